"""Checkpoints on disk: each is a folder that is either complete or absent.

A checkpoint is written under a temporary name and renamed once it is complete, so a crash never damages earlier
checkpoints:

    checkpoints/step-00001000/
        progress.json       step, seconds of training so far, and what a resumed run is checked against
        state.pt            networks, EMA, optimizers, data position; tensors and plain values only
        digests.json        of these two files, compared when training continues from them
        pipeline/           pipeline with the EMA network, for `from_pretrained`
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hfgen.errors import UserError
from hfgen.files import read_json, write_atomically
from hfgen.integrity import DIGESTS_FILE, find_damage, record_digests, recorded_names, save_with_digests
from hfgen.texts import say


PREFIX = "step-"
PROGRESS_FILE, STATE_FILE, PIPELINE_FOLDER = "progress.json", "state.pt", "pipeline"
PIPELINE_MARKER = "model_index.json"  # in every folder that a diffusers pipeline was saved to


def save_checkpoint(
    folder: Path,
    progress: dict[str, Any],
    state: dict[str, Any],
    save_pipeline: Callable[[Path], object],
    total_limit: int,
) -> Path:
    """Write a checkpoint, then delete the oldest ones beyond the limit, but never the newest good one.

    Args:
        folder: the run's `checkpoints` folder.
        progress: plain values with the key "step", for `progress.json`; "good": False if training went badly.
        state: state dictionaries by name, for `state.pt`.
        save_pipeline: saves the pipeline to the given folder.
        total_limit: number of checkpoints to keep, at least 1.

    Returns:
        The folder of the new checkpoint.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        torch.save(state, temporary / STATE_FILE)
        save_with_digests(save_pipeline, temporary / PIPELINE_FOLDER)
        (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2) + "\n")
        record_digests(temporary, (PROGRESS_FILE, STATE_FILE))

    target = checkpoint_of(folder, progress["step"])
    write_atomically(target, write, marker="*.json")  # a damaged one may lack its `progress.json`
    good = newest_good_checkpoint(folder)
    remove_checkpoints([old for old in list_checkpoints(folder)[:-total_limit] if old != good])
    return target


def set_aside_newer_checkpoints(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step, of a run that goes back to it, and print what they are called now.

    Under their old names, "latest" would be one of them, and they would outlive all new ones.
    """
    newer = [path for path in sorted(folder.glob(f"{PREFIX}*")) if path.name > f"{PREFIX}{step:08d}"]
    if moved := [set_aside(checkpoint) for checkpoint in newer]:
        names = ", ".join(path.name for path in moved)
        say(f"the newer checkpoints in {folder} were renamed to {names}; delete those that you do not need")


def set_aside(path: Path) -> Path:
    """Rename what a run that goes back abandons; return its new path, which no earlier one has."""
    paths = (path.with_name(f"abandoned{count or ''}-{path.name}") for count in itertools.count())
    target = next(path for path in paths if not path.exists())
    os.replace(path, target)
    return target


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step, in the run's `checkpoints` folder."""
    return folder / f"{PREFIX}{step:08d}"


def save_final_pipeline(folder: Path, save: Callable[[Path], object], step: int, rollbacks: int) -> None:
    """Save the pipeline of a finished run in its folder, with digests of the files; other files there are kept.

    Args:
        folder: the run's.
        save: saves the pipeline to the given folder.
        step: of the pipeline, for a `progress.json` beside it: a longer training of the run may fail, and then
            `status.json` is about later steps.
        rollbacks: before it.
    """
    progress = {"step": step, "rollbacks": rollbacks}

    def write(temporary: Path) -> None:
        save(temporary)
        (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2) + "\n")

    target = folder / PIPELINE_FOLDER
    write_atomically(target, partial(save_with_digests, write), PIPELINE_MARKER, recorded_names(target))


def set_aside_newer_pipeline(folder: Path, step: int) -> None:
    """Rename the final pipeline of a run that goes back to a step before it, and print what it is called now."""
    final = folder / PIPELINE_FOLDER
    if final_progress(final).get("step", 0) > step:
        say(f"{final} is of a later step; it was renamed to {set_aside(final).name}")


def final_progress(pipeline_folder: Path) -> dict[str, Any]:
    """Return the progress that `save_final_pipeline` saved: "step", "rollbacks"; empty if an earlier version did."""
    file = pipeline_folder / PROGRESS_FILE
    return read_json(file, ("step", "rollbacks")) if file.is_file() else {}


def remove_checkpoints(doomed: Iterable[Path]) -> None:
    """Delete checkpoints; each is renamed first, so that a half-deleted one is not taken for a checkpoint."""
    for checkpoint in doomed:
        moved = checkpoint.with_name(f".{checkpoint.name}.removed")
        os.replace(checkpoint, moved)
        shutil.rmtree(moved, ignore_errors=True)


def remove_newer(checkpoint: Path) -> None:
    """Delete a run's checkpoints of later steps than this one."""
    remove_checkpoints([path for path in list_checkpoints(checkpoint.parent) if path.name > checkpoint.name])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / PROGRESS_FILE).is_file())


def newest_good_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint saved while training was healthy; None if there is none."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if damage_of(checkpoint, trust_times=True) is None and load_progress(checkpoint).get("good", True):
            return checkpoint
    return None


def damage_of(checkpoint: Path, trust_times: bool = False) -> str | None:
    """Return what is damaged in a checkpoint, or None; see `find_damage`."""
    if (checkpoint / DIGESTS_FILE).is_file():
        return find_damage(checkpoint, trust_times)
    try:  # of an earlier version
        load_progress(checkpoint)
    except UserError as error:
        return str(error)
    return None


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` names, or None if "latest" finds none.

    A damaged one is not "latest": a warning names it, and the one before it is taken.

    Args:
        folder: the run's `checkpoints` folder.
        resume: "latest", or the path of a checkpoint, or the name of one in the folder.

    Raises:
        UserError: if the path is not a checkpoint, or it is damaged, or all are.
    """
    if resume == "latest":
        found = sorted(folder.glob(f"{PREFIX}*"), reverse=True)
        for checkpoint in found:
            damage = damage_of(checkpoint)
            if damage is None:
                return checkpoint
            say(f"warning: {checkpoint} is damaged and was skipped: {damage}")
        if found:
            raise UserError(
                f"--resume latest: all checkpoints in {folder} are damaged; start again with another --output_dir"
            )
        return None
    checkpoint = Path(resume)
    if not checkpoint.is_dir() and checkpoint.name == resume:
        checkpoint = folder / resume
    if not (checkpoint / PROGRESS_FILE).is_file():
        known = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise UserError(f"--resume {resume}: not a checkpoint (checkpoints of this run: {known})")
    if damage := damage_of(checkpoint):
        others = ", ".join(path.name for path in list_checkpoints(checkpoint.parent) if path != checkpoint) or "none"
        raise UserError(
            f"--resume {resume}: damaged: {damage}; choose another checkpoint (in the same folder: {others})"
        )
    return checkpoint


def check_not_beyond(last_step: int, step: int, checkpoint: Path) -> None:
    """Raise a `UserError` if a run of `last_step` updates would resume from a checkpoint of a later `step`."""
    if step > last_step:
        raise UserError(
            f"--max_train_steps, --num_epochs: the run would end at step {last_step}, but {checkpoint} is already at "
            f"step {step}; give a larger value"
        )


def commit_of(checkpoint: Path | None) -> str | None:
    """Return the commit of the dataset that a run streamed up to a checkpoint; None if there is none."""
    return None if checkpoint is None else load_progress(checkpoint).get("commit")


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint; raise a `UserError` if they are damaged."""
    return read_json(checkpoint / PROGRESS_FILE, ("step",), "resume from another checkpoint")


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Load the state dictionaries of a checkpoint to the CPU, without running code from the file.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    file, remedy = checkpoint / STATE_FILE, "resume from an earlier checkpoint"
    if damage := damage_of(checkpoint):
        raise UserError(f"{file} cannot be read: {damage}; {remedy}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and OS errors alike: the file cannot be read
        raise UserError(f"{file} cannot be read: {error}; {remedy}") from error


def remove_half_deleted(folder: Path) -> None:
    """Delete checkpoints that a killed process was deleting; see `remove_checkpoints`."""
    for path in folder.glob(f".{PREFIX}*.removed"):
        shutil.rmtree(path, ignore_errors=True)
