"""Checkpoints on disk: each is a folder that is either whole or not there.

A checkpoint is written under a temporary name and renamed when all of it is on the disk, so a crash at any moment
leaves the earlier ones as they were:

    checkpoints/step-00001000/
        progress.json       the step, the seconds of training so far, and what a resumed run must agree with
        state.pt            networks, averages, optimizers, data positions; tensors and plain values only
        pipeline/           the averaged network as a pipeline, ready for `from_pretrained`
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hfgen.errors import UserError
from hfgen.files import write_atomically


PREFIX = "step-"
PROGRESS_FILE, STATE_FILE, PIPELINE_FOLDER = "progress.json", "state.pt", "pipeline"


def save_checkpoint(
    folder: Path,
    progress: dict[str, Any],
    state: dict[str, Any],
    save_pipeline: Callable[[Path], object],
    total_limit: int,
) -> Path:
    """Write the checkpoint of a step, then remove the oldest beyond the limit; the newest good one stays.

    Args:
        folder: the run's `checkpoints` folder.
        progress: plain values with the key "step", for `progress.json`; "good": False if training went badly.
        state: state dictionaries by name, for `state.pt`.
        save_pipeline: writes the pipeline into the folder that it is given.
        total_limit: how many checkpoints to keep, at least 1.

    Returns:
        The folder of the new checkpoint.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        torch.save(state, temporary / STATE_FILE)
        save_pipeline(temporary / PIPELINE_FOLDER)
        (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2) + "\n")

    target = folder / f"{PREFIX}{progress['step']:08d}"
    write_atomically(target, write)
    good = newest_good_checkpoint(folder)
    remove_checkpoints([old for old in list_checkpoints(folder)[:-total_limit] if old != good])
    return target


def remove_checkpoints(doomed: Iterable[Path]) -> None:
    """Delete checkpoints; one that is half deleted does not pass for a checkpoint."""
    for checkpoint in doomed:
        moved = checkpoint.with_name(f".{checkpoint.name}.removed")
        os.replace(checkpoint, moved)
        shutil.rmtree(moved, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / PROGRESS_FILE).is_file())


def newest_good_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was made while training went well; None if there is none."""
    return next((path for path in reversed(list_checkpoints(folder)) if load_progress(path).get("good", True)), None)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` names, or None if "latest" finds none.

    Args:
        folder: the run's `checkpoints` folder.
        resume: "latest", or the path of one checkpoint.

    Raises:
        UserError: if the path is no checkpoint.
    """
    if resume == "latest":
        checkpoints = list_checkpoints(folder)
        return checkpoints[-1] if checkpoints else None
    if not (Path(resume) / PROGRESS_FILE).is_file():
        known = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise UserError(f"--resume {resume}: no checkpoint there (checkpoints of this run: {known})")
    return Path(resume)


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint."""
    return json.loads((checkpoint / PROGRESS_FILE).read_text())


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state dictionaries of a checkpoint onto the CPU; never runs code from the file.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and OS errors alike: whatever it is, the file cannot be read
        raise UserError(f"{checkpoint / STATE_FILE} cannot be read: {error}; resume an earlier checkpoint") from error


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written or half removed."""
    for pattern in (f".{PREFIX}*.partial-*", f".{PREFIX}*.removed", f".{PREFIX}*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
