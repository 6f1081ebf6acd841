"""Train with one, two and three processes, and check that the losses agree and that a lost process ends the others.

    python tests/endurance/processes.py
    python tests/endurance/processes.py vae

Not part of `make test`: it takes about ten minutes on one CPU core. Each family trains on the same images with the
same images per update, shared among the processes by `accelerate launch`. Their random numbers differ, so that losses
are not equal; the mean over the last half of the updates must be, within 5 standard errors of the difference of two
such means. Then one process is killed with -9 in the middle: the launcher must end with an error, no process may be
left, and status.json must say that the run ended.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from toy_runs import METHODS, TINY  # noqa: E402


STEPS, EFFECTIVE_BATCH = 120, 12
# BatchNorm's statistics are those of a process, so that a VAE with few images on each learns more slowly with it.
SETTINGS = METHODS | {"vae": [*METHODS["vae"], "--normalization", "group"]}
LOSSES = {"gan": "loss_d", "vae": "reconstruction_loss", "ddpm": "loss"}
STANDARD_ERRORS = 5
# Not heard of for so long, the others wait for the lost process for good.
SECONDS = 300


def start(family: str, count: int, output: Path) -> subprocess.Popen:
    """Start a training with so many processes."""
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_processes", str(count), "--main_process_port", "0"]
    launcher += ["--multi_gpu"] if count > 1 else []  # also on a CPU: else it starts only one
    settings = [*TINY, *SETTINGS[family], "--max_train_steps", str(STEPS)]
    settings += ["--batch_size", str(EFFECTIVE_BATCH // count), "--checkpoint_every", "1000"]
    settings += ["--output_dir", str(output)]
    script = str(ROOT / "training_scripts" / f"train_{family}.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HFGEN_CACHE": str(output.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, *launcher, script, *settings],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=(output.parent / f"{output.name}.errors").open("w"),
        text=True,
    )


def logged(output: Path, name: str) -> list[float]:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)[name] for line in lines]


def compare_losses(family: str, folder: Path) -> list[str]:
    """Train with 1, 2 and 3 processes; return what was wrong."""
    means = {}
    for count in (1, 2, 3):
        output = folder / f"{family}-{count}"
        if start(family, count, output).wait(1200):
            return [f"{family} with {count} processes: {Path(f'{output}.errors').read_text()[:500]}"]
        losses = logged(output, LOSSES[family])
        half = losses[len(losses) // 2 :]
        means[count] = statistics.fmean(half), statistics.stdev(half) / len(half) ** 0.5
    print(
        f"{family}, {LOSSES[family]}: {', '.join(f'{n}: {m:.4g} ± {e:.2g}' for n, (m, e) in means.items())}",
        flush=True,
    )
    mean, error = means[1]
    return [
        f"{family}: {LOSSES[family]} of {count} processes is {other:.4g} instead of {mean:.4g}"
        for count, (other, other_error) in means.items()
        if abs(other - mean) > STANDARD_ERRORS * (error**2 + other_error**2) ** 0.5
    ]


def processes_of(output: Path) -> list[int]:
    """The process ids of the workers that train in a folder."""
    found = subprocess.run(["pgrep", "-f", f"train_.*--output_dir {output}$"], capture_output=True, text=True)
    return [
        pid
        for pid in map(int, found.stdout.split())
        if b"accelerate.commands.launch" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def kill_one(family: str, folder: Path) -> list[str]:
    """Kill one of three processes; return what was wrong."""
    output = folder / f"{family}-killed"
    launcher = start(family, 3, output)
    deadline = time.monotonic() + SECONDS
    while len(logged(output, "step")) < 20:
        if launcher.poll() is not None or time.monotonic() > deadline:
            return [f"{family} with 3 processes does not train: {Path(f'{output}.errors').read_text()[:500]}"]
        time.sleep(0.05)
    workers = processes_of(output)
    if len(workers) != 3:
        return [f"{family}: {len(workers)} workers were found instead of 3"]
    began = time.monotonic()
    os.kill(workers[-1], signal.SIGKILL)
    try:
        status = launcher.wait(SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()
        return [f"{family}: the launcher goes on without a worker"]
    print(f"{family}: one of three killed; the launcher ended after {time.monotonic() - began:.0f} s, status {status}")
    left = processes_of(output)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    state = json.loads((output / "status.json").read_text())["status"]
    faults = [f"{len(left)} workers are left"] if left else []
    faults += ["the launcher says that all is well"] if status == 0 else []
    faults += [f"status.json says {state}"] if state in ("running", "complete") else []
    return [f"{family}, one of three killed: {fault}" for fault in faults]


def main() -> None:
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for family in sys.argv[1:] or LOSSES:
            faults += compare_losses(family, Path(folder))
            faults += kill_one(family, Path(folder))
    print(f"{len(faults)} faults")
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
