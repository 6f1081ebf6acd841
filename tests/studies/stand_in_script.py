"""Stands in for a training script: does what its preset says, at once, and leaves what a run leaves.

Copied by the tests to where a training script is looked for; it imports nothing that takes time.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    """Act as the preset says; return the exit status."""
    parser = argparse.ArgumentParser()
    for flag in ("--preset", "--dataset", "--output_dir", "--resume", "--max_train_time"):
        parser.add_argument(flag)
    given = parser.parse_args()
    settings = json.loads(Path(given.preset).read_text())
    act, last = settings["act"], settings["max_train_steps"]
    if act == "refuse":
        print("error: --resume latest: settings differ (saved -> now):\n  batch_size: 4 -> 8", file=sys.stderr)
        return 2
    if act == "raise":
        raise RuntimeError("no space left")
    if act == "mutter":
        print("one\ntwo\nthree")
        return 5
    folder = Path(given.output_dir)
    folder.mkdir(exist_ok=True)
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    step = json.loads((checkpoints[-1] / "progress.json").read_text())["step"] if checkpoints else 0
    with (folder / "launches.jsonl").open("a") as file:
        file.write(json.dumps({"from_step": step, "time": given.max_train_time, "dataset": given.dataset}) + "\n")
    (folder / "training_config.json").write_text(json.dumps({**settings, "output_dir": given.output_dir}))
    if act in ("diverged", "collapsed"):
        tell(folder, act, "a loss is not finite", 3)
        print("error: stopped at step 3: a loss is not finite")
        return 2
    if act == "linger":  # until it is told to stop
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(True))
        tell(folder, "running", "", step)
        (folder / "begun").write_text(str(os.getpid()))
        while not told:
            time.sleep(0.02)
        checkpoint(folder, step + 7)
        tell(folder, "stopped", "stopped by SIGTERM", step + 7)
        return 143
    checkpoint(folder, last)
    (folder / "pipeline").mkdir(exist_ok=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    tell(folder, "stopped" if act == "time is up" else "complete", act, last)
    return 0


def checkpoint(folder: Path, step: int) -> None:
    """Leave a checkpoint that has 40 seconds of training behind it."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "progress.json").write_text(json.dumps({"step": step, "seconds": 40.0}))


def tell(folder: Path, status: str, reason: str, step: int) -> None:
    """Say how the run stands."""
    content = {"status": status, "reason": reason, "step": step, "seconds": 40.0}
    (folder / "status.json").write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
