"""Train for a long time with sheets, evaluations and checkpoints, and check that memory and throughput stay level.

    python tests/endurance/soak.py
    python tests/endurance/soak.py --minutes 10 --families gan vae

Not part of `make test`: it takes an hour per family. Memory and processor time of the training are read from outside,
every two seconds. The first third of a run is for warming up. In the last third the process may take 3 % more memory
than in the second, on average, and make 10 % fewer steps per second of processor time, which, unlike a second of the
clock, is the same on a core that is busy with other work.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from stand_in_features import save_mean_colours  # noqa: E402
from toy_runs import METHODS, TINY  # noqa: E402

from hfgen.files import read_json_lines  # noqa: E402


MORE_MEMORY, FEWER_STEPS = 0.03, 0.10
RECIPE = [
    *("--max_train_steps", "100000000", "--log_every", "20", "--sample_every", "200", "--checkpoint_every", "150"),
    *("--checkpoints_total_limit", "2", "--evaluate_every", "300"),
]


@dataclass
class Moment:
    """What a training has used and done until a moment.

    Attributes:
        bytes: resident memory of the process.
        seconds: processor time.
        step: the last one in its log.
    """

    bytes: int
    seconds: float
    step: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="per family")
    parser.add_argument("--families", nargs="+", default=list(METHODS), choices=list(METHODS))
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_mean_colours(Path(folder) / "weights.pt")
        faults = [fault for family in settings.families for fault in soak(family, settings.minutes, Path(folder))]
    print(f"{len(faults)} faults")
    sys.exit("\n".join(faults) if faults else 0)


def soak(family: str, minutes: float, folder: Path) -> list[str]:
    """Train a family for so long; return what was wrong."""
    moments, errors = watch(family, minutes, folder)
    if errors:
        return [f"{family}: {errors}"]
    # What comes after the last step, such as saving the pipeline, is not the work of a step.
    moments = [moment for moment in moments if moment.step < moments[-1].step]
    third = len(moments) // 3
    thirds = [moments[:third], moments[third : 2 * third], moments[2 * third :]]
    memory = [statistics.fmean(moment.bytes for moment in part) / 1e6 for part in thirds]
    speed = [(part[-1].step - part[0].step) / (part[-1].seconds - part[0].seconds) for part in thirds]
    print(
        f"{family}, {moments[-1].step} steps: memory {', '.join(f'{value:.1f}' for value in memory)} MB; "
        f"{', '.join(f'{value:.1f}' for value in speed)} steps per second of processor time",
        flush=True,
    )
    faults = [f"memory grows by {memory[2] / memory[1] - 1:.1%}"] if memory[2] > memory[1] * (1 + MORE_MEMORY) else []
    faults += [f"{1 - speed[2] / speed[1]:.0%} fewer steps"] if speed[2] < speed[1] * (1 - FEWER_STEPS) else []
    return [f"{family}: {fault}" for fault in faults]


def watch(family: str, minutes: float, folder: Path) -> tuple[list[Moment], str]:
    """Train a family for so long; return what was seen of it every two seconds, and what it says if it fails."""
    run, log = folder / family, folder / f"{family}.log"
    command = [sys.executable, ROOT / "training_scripts" / f"train_{family}.py", *TINY, *METHODS[family], *RECIPE]
    command += ["--output_dir", run, "--max_train_time", f"{60 * minutes:.0f}s"]
    command += ["--feature_weights", folder / "weights.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HFGEN_CACHE": str(folder / "cache")}
    moments: list[Moment] = []
    with log.open("w") as output:
        process = psutil.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            steps = read_json_lines(run / "metrics.jsonl", ("step",))
            with suppress(psutil.Error):  # it has just ended
                used = process.cpu_times()
                if steps:
                    moments.append(Moment(process.memory_info().rss, used.user + used.system, steps[-1]["step"]))
            time.sleep(2)
    return moments, log.read_text()[-1000:] if process.returncode else ""


if __name__ == "__main__":
    main()
