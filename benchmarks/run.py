#!/usr/bin/env python
"""All comparisons in one go, on the CPU: speed and memory of hfgen's steps, samplers, scores and data beside others'.

    python benchmarks/run.py [--quick] [--only PART ...] [--pipeline RUN --reference DATA]

Sides are timed in turn, and medians and ratios are compared. Writes benchmarks/results/NAME.json and NAME.md after
each part, so that an interruption loses only one; `--only` replaces its parts in these files. `--quick` takes ten
minutes on two cores: fewer rounds, and smaller batches of the largest networks.
"""

import argparse
import datetime
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from script_steps import describe
from tables import Goal, Table, table_of
from training_steps import Size

from hfgen.hardware import cpu_multiplies_bf16, version_of


PEERS = ("denoising-diffusion-pytorch", "pythae")
PACKAGES = ("diffusers", "accelerate", *PEERS, "clean-fid", "numpy", "scipy")
Part = Callable[[Path, argparse.Namespace], tuple[list[Table], list[Goal]]]


def steps(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """Training steps beside those of others, with peak memory."""
    from training_steps import compare_steps

    return compare_steps(folder, options.size, cpu_multiplies_bf16())


def costs(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """Share of the matrix rate, bound, and top operations of each family's step."""
    from step_costs import measure_costs

    return measure_costs(folder, options.size)


def compiled(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """torch.compile of each family's step; left out by --quick, as compiling takes minutes."""
    from training_steps import compare_compiled

    return compare_compiled(folder, options.size), []


def levers(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """What each of hfgen's levers for CPUs brings; left out by --quick."""
    from training_steps import compare_levers

    return compare_levers(folder, options.size), []


def sampling(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """Images generated per second; with --pipeline and --reference, FID beside the time of diffusion's samplers."""
    from sampling import compare_gan_sampling, compare_quality

    count, rounds = (options.smoke and (32, 2)) or (options.quick and (1000, 3)) or (10_000, 3)
    tables, goals = compare_gan_sampling(folder, count, rounds, options.threads)
    if options.pipeline:
        num_images, divisor = (options.smoke and (20, 50)) or (options.quick and (50, 10)) or (1000, 1)
        quality = (options.pipeline, options.reference, options.num_images or num_images, divisor, options.device)
        tables += compare_quality(*quality)
    return tables, goals


def metrics(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """FID's arithmetic and features beside clean-fid's."""
    from metrics import compare_metrics

    counts, images = ((20, 30), 8) if options.smoke else ((300, 5000), 64 if options.quick else 128)
    return compare_metrics(1 if options.quick else 3, options.threads, counts, images)


def data(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """Images per second from the cache beside those that a training step consumes."""
    from data_path import compare_data_path

    size = (2, options.threads, 16, 2, 0.02) if options.smoke else (3, options.threads, 256, 32, 0.2)
    return compare_data_path(folder, *(size if options.quick else (7, options.threads, 512, 32, 0.3)))


def startup(folder: Path, options: argparse.Namespace) -> tuple[list[Table], list[Goal]]:
    """Seconds until commands begin."""
    from startup import compare_startup

    return compare_startup(folder, 2 if options.smoke else 5 if options.quick else 15)


PARTS: dict[str, Part] = {
    "steps": steps,
    "costs": costs,
    "compiled": compiled,
    "levers": levers,
    "sampling": sampling,
    "metrics": metrics,
    "data": data,
    "startup": startup,
}
QUICK = [name for name in PARTS if name not in ("compiled", "levers")]


def main() -> None:
    """Run the parts, and write the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="in ten minutes on two cores, without compiled and levers"
    )
    parser.add_argument("--smoke", action="store_true", help="only test that it runs: tiny sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument("--pipeline", help="a trained diffusion run, to compare samplers by FID")
    parser.add_argument("--reference", help="its images")
    parser.add_argument("--num_images", type=int, help="for that FID; default: 1,000, with --quick 50")
    parser.add_argument("--device", default="cpu", help="for that FID")
    parser.add_argument("--output", type=Path, help="file, without ending; default: benchmarks/results/CPU-quick")
    options = parser.parse_args()
    if (options.pipeline is None) != (options.reference is None):
        parser.error("--pipeline and --reference go together")
    options.quick = options.quick or options.smoke

    parts = options.only or (QUICK if options.quick else list(PARTS))
    missing = [package for package in PEERS if "steps" in parts and not version_of(package)]
    if missing:
        parser.error(f"steps: {' and '.join(missing)} not installed: pip install -e '.[bench]'")
    rounds, *divisors = (2, 8, 8) if options.smoke else (5, 1, 4) if options.quick else (9, 1, 1)
    options.size = Size(rounds, options.threads, *divisors)
    about = describe(options.threads, *PACKAGES)
    today = datetime.date.today().isoformat()
    kind = "smoke" if options.smoke else "quick" if options.quick else "full"
    name = re.sub(r"\W+", "-", f"{about.split(',')[0]} {kind}".lower())
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    figures: dict[str, Any] = {"about": about, "kind": kind, "parts": {}}
    if file.is_file() and (before := json.loads(file.read_text())).items() >= {"about": about, "kind": kind}.items():
        figures = before  # only the parts of this run are replaced
    for part in parts:
        print(f"{part}: {PARTS[part].__doc__}", flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tables, goals = PARTS[part](Path(folder), options)
        figures["parts"][part] = {
            "date": today,
            "seconds": round(time.perf_counter() - started, 1),
            "tables": [table.as_dict() for table in tables],
            "goals": [goal._asdict() | {"verdict": goal.verdict} for goal in goals],
        }
        file.write_text(json.dumps(figures, indent=1) + "\n")
        output.with_suffix(".md").write_text(page_of(figures))
        print("\n".join(table.as_markdown() for table in tables), flush=True)
    print(output.with_suffix(".md"))


def page_of(figures: dict[str, Any]) -> str:
    """Return all figures of one machine as Markdown: the goals, then the parts in their order."""
    parts = [figures["parts"][name] for name in PARTS if name in figures["parts"]]
    goals = [Goal(goal["name"], goal["value"], goal["at_least"]) for part in parts for goal in part["goals"]]
    tables = [table_of(goals)] if goals else []
    tables += [Table.from_dict(table) for part in parts for table in part["tables"]]
    dates = " to ".join(sorted({part["date"] for part in parts}))
    head = [f"# Benchmarks, {figures['kind']}, {dates}", "", f"{figures['about']}.", ""]
    return "\n".join([*head, *(table.as_markdown() for table in tables)])


if __name__ == "__main__":
    main()
