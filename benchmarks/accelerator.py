#!/usr/bin/env python
"""One prepared run on a GPU: speed, memory and images of every family, and the resume test.

    python benchmarks/accelerator.py --output DIR [--minutes 8] [--dataset FOLDER]

For each preset, in a process of its own: its training for a part of the time, with images/s, the share of the matrix
rate of the machine and the peak memory; then FID, and a sheet. At last, where pytest is installed, the tests that need
a GPU. Needs no network, the `eval` extra, and no data: toy paintings are generated if none are given. Without a GPU it
runs on the CPU, to test it: with a few images.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from script_steps import describe
from step_costs import counted_step


PRESETS = {"dcgan_nearest": "gan", "dcgan": "gan", "wgan_gp": "gan", "vae": "vae", "ddpm": "ddpm"}
# Of the time: training; the rest is for starting, scoring and sampling.
SHARE_OF_TRAINING = 0.6
STEPS_TO_RESUME = 40
# Losses of an interrupted run may differ from those of an uninterrupted one by this fraction: the GPU's fastest
# convolutions are chosen anew by each launch, and round differently.
TOLERANCE = 0.02
MATRIX_SIZE, CPU_MATRIX_SIZE = 8192, 2048
HFGEN = [sys.executable, "-c", "from hfgen.cli import main; main()"]


def train_measured(method: str, arguments: list[str], report: Path) -> None:
    """Run a training script, and write what it took: FLOPs of an update, peak memory; in a process of its own."""
    import torch

    script: Any = importlib.import_module(f"hfgen.training_scripts.train_{method}")
    found: dict[str, Any] = {}

    class MeasuredRun(script.Run):
        def restore(self, stateful: dict, *others: Any, **named: Any) -> None:
            super().restore(stateful, *others, **named)
            networks = [part for name, part in stateful.items() if isinstance(part, torch.nn.Module) and name != "ema"]
            found["parameters"] = sum(weight.numel() for network in networks for weight in network.parameters())

        def steps(self) -> Iterator[int]:
            steps = super().steps()
            operations = yield from counted_step(steps, rate=float("inf"), bandwidth=float("inf"))
            found["flops_per_image"] = sum(one.flops for one in operations.values()) / self.images_per_step
            found["precision"] = self.accelerator.mixed_precision
            yield from steps

    script.Run = MeasuredRun
    script.main(arguments)
    if torch.cuda.is_available():
        found["peak_memory"] = torch.cuda.max_memory_allocated()
    report.write_text(json.dumps(found))


def matrix_rates() -> dict[str, float]:
    """Return the operations per second of a product of square matrices, by the name of the mixed precision."""
    import torch

    from hfgen.hardware import cpu_multiplies_bf16

    on_gpu = torch.cuda.is_available()
    size, device = (MATRIX_SIZE, "cuda") if on_gpu else (CPU_MATRIX_SIZE, "cpu")
    torch.set_float32_matmul_precision("high")
    rates = {}
    for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if not on_gpu and (name == "fp16" or (name == "bf16" and not cpu_multiplies_bf16())):
            continue  # emulated, which takes minutes
        left = torch.randn(size, size, device=device).to(dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            left @ left
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates[name] = 2 * size**3 / statistics.median(times[1:])
    return rates


def measure(preset: str, method: str, options: argparse.Namespace, seconds: float, num_images: int) -> dict[str, Any]:
    """Train a preset for some seconds, score it and save a sheet; return the figures."""
    folder = options.output / preset
    shared = ["--dataset", options.dataset, "--sample_size", "64", "--report_to", "none"]
    arguments = ["--preset", preset, "--output_dir", str(folder), *shared, "--max_train_time", f"{seconds:.0f}s"]
    arguments += ["--max_train_steps", "10000000", "--log_every", "10", "--sample_every", "0"]
    arguments += ["--checkpoint_every", "0", "--lr_scheduler", "constant_with_warmup"] if method != "gan" else []
    report = options.output / f"{preset}.json"
    call([sys.executable, __file__, "--worker", method, str(report), *arguments], options.output / f"{preset}.log")
    found = json.loads(report.read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found |= {
        "images": log[-1]["images"],
        "seconds": log[-1]["seconds"],
        # The first entry has the first calls, which choose kernels.
        "images_per_second": statistics.median(entry["images_per_second"] for entry in log[1:] or log),
    }
    of_score = ["--reference", options.dataset, "--num_images", str(num_images)]
    of_score += ["--feature_weights", options.feature_weights] if options.feature_weights else []
    score = options.output / f"{preset}_score"
    call([*HFGEN, "evaluate", str(folder), *of_score, "--output", str(score)], options.output / f"{preset}.log")
    found["scores"] = json.loads((score / "evaluation.json").read_text())["scores"]
    sheet = ["--num_images", "40", "--output", str(options.output / f"{preset}_samples")]
    call([*HFGEN, "sample", str(folder), *sheet], options.output / f"{preset}.log")
    return found


def resumed_like_uninterrupted(options: argparse.Namespace) -> float:
    """Return the largest relative difference between the losses of an uninterrupted and of a resumed run."""
    common = ["--preset", "dcgan", "--dataset", options.dataset, "--sample_size", "64", "--batch_size", "16"]
    common += ["--report_to", "none", "--sample_every", "0", "--log_every", "1", "--max_train_steps"]
    half, whole = str(STEPS_TO_RESUME // 2), str(STEPS_TO_RESUME)
    runs = [options.output / "uninterrupted", options.output / "resumed"]
    log = options.output / "resume.log"
    for folder, steps, more in ((runs[0], whole, []), (runs[1], half, []), (runs[1], whole, ["--resume", "latest"])):
        call([*HFGEN, "train", "gan", *common, steps, "--output_dir", str(folder), *more], log)
    pairs = zip(*((folder / "metrics.jsonl").read_text().splitlines() for folder in runs), strict=True)
    differences = [0.0]
    for one, other in (map(json.loads, pair) for pair in pairs):
        differences += [abs(one[name] - other[name]) / max(abs(one[name]), 0.1) for name in ("loss_d", "loss_g")]
    return max(differences)


def tests_that_need_a_gpu(log: Path) -> str:
    """Run them, with their output in a log, and return its last line."""
    tests = Path(__file__).parents[1] / "tests"
    with log.open("w") as output:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    return f"Tests that need a GPU: {log.read_text().strip().splitlines()[-1]}"


def call(command: list[str], log: Path) -> None:
    """Run a command, with its output in a log.

    Raises:
        SystemExit: with the end of the log if it fails; training that its time limit ends does not.
    """
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{log.read_text()[-2000:]}")


def as_markdown(about: str, rates: dict[str, float], families: dict[str, Any], num_images: int) -> str:
    """Return a page of all figures."""
    rate = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in rates.items())
    lines = [f"{about}. Matrix products: {rate}. FID of {num_images} images.", ""]
    lines += ["| preset | precision | images/s | share of the matrix rate | peak memory | trained on | FID |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for preset, one in families.items():
        speed = one["images_per_second"]
        share = f"{speed * one['flops_per_image'] / rates[one['precision']]:.3f}"
        memory = f"{one['peak_memory'] / 2**30:.2f} GiB" if "peak_memory" in one else ""
        lines.append(
            f"| {preset} | {one['precision']} | {speed:.0f} | {share} | {memory} | {one['images']:,} images, "
            f"{one['seconds']:.0f} s | {one['scores']['fid']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all presets, and write results.json, results.md, pipelines and sheets."""
    if sys.argv[1:2] == ["--worker"]:
        train_measured(sys.argv[2], sys.argv[4:], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="in total, about")
    parser.add_argument("--dataset", help="real images; unset: 2,000 toy paintings (50 on a CPU)")
    parser.add_argument("--feature_weights", help="Inception's TorchScript file; unset: found if installed")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    import torch

    on_gpu = torch.cuda.is_available()
    num_images = 1000 if on_gpu else 20
    options.dataset = options.dataset or f"toy_paintings:{2000 if on_gpu else 50}"
    about = describe(torch.get_num_threads(), "diffusers", "accelerate")
    if on_gpu:
        about = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {about}"
    print(about, flush=True)
    seconds = max(2.0, SHARE_OF_TRAINING * 60 * options.minutes / len(options.presets))
    rates, families = matrix_rates(), {}
    for preset in options.presets:
        families[preset] = measure(preset, PRESETS[preset], options, seconds, num_images)
        results = {"about": about, "dataset": options.dataset, "num_images": num_images, "matrix_rates": rates}
        results["presets"] = families
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        page = as_markdown(about, rates, families, num_images)
        (options.output / "results.md").write_text(page)
        print(page.splitlines()[-1], flush=True)
    difference = resumed_like_uninterrupted(options)
    results["resumed_losses_differ_by"] = difference
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    verdict = "pass" if difference <= TOLERANCE else "MISS"
    resumed = (
        f"resumed after {STEPS_TO_RESUME // 2} of {STEPS_TO_RESUME} steps: losses within {difference:.2g} of the "
    )
    resumed += f"uninterrupted run's (at most {TOLERANCE}: {verdict})"
    with (options.output / "results.md").open("a") as file:
        file.write(f"\n{resumed}\n")
    print(resumed)
    tested = (
        tests_that_need_a_gpu(options.output / "tests.log") if on_gpu else "The tests that need a GPU were not run."
    )
    with (options.output / "results.md").open("a") as file:
        file.write(f"\n{tested}\n")
    print(tested)


if __name__ == "__main__":
    main()
