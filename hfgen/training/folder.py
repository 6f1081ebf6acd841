"""The run's folder: created or reopened, never mixed with another run's files; and the files in it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from hfgen.config import LENGTHS, changed_settings, settings_to_dict
from hfgen.errors import UserError
from hfgen.files import (
    LEFTOVER,
    append_json_line,
    read_json,
    read_json_lines,
    remove_leftovers,
    require_place_for,
    require_replaceable,
    require_utf8,
    write_text_atomically,
)
from hfgen.hardware import describe_environment
from hfgen.hub.upload import check_access
from hfgen.run_files import (
    ABANDONED_FILE,
    EVENTS_FILE,
    INTAKE_FILE,
    LAUNCHES_FILE,
    METRICS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    STATUS_FILE,
)
from hfgen.texts import say
from hfgen.training.checkpoints import (
    PIPELINE_FOLDER,
    PIPELINE_MARKER,
    find_checkpoint,
    list_checkpoints,
    load_progress,
    remove_half_deleted,
    remove_newer,
    set_aside_newer_checkpoints,
    set_aside_newer_pipeline,
)
from hfgen.training.duration import WITHOUT_END
from hfgen.training.lock import HOLDER_FILE, LOCK_FILE, lock_folder
from hfgen.training.page import PAGE_FILE
from hfgen.training.settings import RunSettings, rates_follow_length


# What a launch may leave before there is anything to lose, its first log entry or checkpoint; and of it what tells of
# that launch. The folder then counts as empty.
OF_A_LAUNCH = (INTAKE_FILE, METRICS_FILE, ABANDONED_FILE, LAUNCHES_FILE, EVENTS_FILE, STATUS_FILE, PAGE_FILE)
LEFT_BY_A_FAILED_START = frozenset((SETTINGS_FILE, *OF_A_LAUNCH, "logs", "checkpoints"))
SHEETS = ("samples", "reconstructions", "training_images", "ex_post")
FIRST_SHEETS, FIRST_SHEET = ("samples", "reconstructions"), "step-00000000.png"
NEW_FOLDER = "continue in another folder with --resume CHECKPOINT --output_dir NEW"
BEST_FOLDER = "best"
STATUS_KEYS = ("status", "reason", "step", "seconds")  # of status.json


def open_folder(
    accelerator: Accelerator, run_settings: RunSettings, settings: Sequence[Any]
) -> tuple[FileLock | None, Path | None, list[str]]:
    """Create or reopen the folder of a run; all processes must call this, and errors occur on all.

    Args:
        accelerator: knows the main process, which opens the folder.
        run_settings: they name the folder, what to resume, and the repo on the Hub.
        settings: all settings of this launch.

    Returns:
        The lock (None on other processes), the checkpoint to resume from, and the settings that differ from those of
        its run.

    Raises:
        UserError: see `claim_folder`; or if the repo on the Hub cannot be written.
    """
    folder, lock = Path(run_settings.output_dir), None
    problem, checkpoint, changes = None, None, []
    if accelerator.is_main_process:
        try:
            if run_settings.push_to_hub:  # fail before the training rather than after it
                check_access(run_settings.hub_repo_id, run_settings.hub_private_repo)
            lock, checkpoint = claim_folder(folder, run_settings.resume, settings)
            if checkpoint is not None:
                changes = changes_since(checkpoint, folder, settings)
        except UserError as error:
            problem = str(error)
    problem, checkpoint, changes = broadcast_object_list([problem, checkpoint, changes])
    if problem is not None:
        if lock is not None:
            lock.release()
        raise UserError(problem)
    return lock, checkpoint, changes


def claim_folder(folder: Path, resume: str | None, settings: Sequence[Any]) -> tuple[FileLock, Path | None]:
    """Lock the folder of a new run and keep its settings there, or check that it holds the run to resume.

    Args:
        folder: the run's folder.
        resume: "latest", the path of a checkpoint, or None for a new run.
        settings: all settings of this launch.

    Returns:
        The lock; and the checkpoint to resume from, or None if the run starts from scratch.

    Raises:
        UserError: if the folder holds something else, a run with other settings, or a run that another process is
            training; it is not changed.
    """
    if not (folder / LOCK_FILE).exists():  # in a folder of somebody else's not even a lock is left
        check_folder(folder, resume, settings)
    lock = lock_folder(folder)
    try:
        check_folder(folder, resume, settings)
        checkpoint = find_start(folder, resume)
        remove_leftovers(folder)
        remove_half_deleted(folder / "checkpoints")
        if not has_started(folder):
            for name in OF_A_LAUNCH if checkpoint is None else ():  # of a start that failed
                (folder / name).unlink(missing_ok=True)
            write_settings(folder, settings, checkpoint)
    except BaseException:
        lock.release()
        raise
    return lock, checkpoint


def check_folder(folder: Path, resume: str | None, settings: Sequence[Any]) -> None:
    """Raise the `UserError` of `claim_folder`, but do not look at the checkpoints, and change nothing."""
    require_place_for(folder, "--output_dir")
    require_utf8(folder, "--output_dir")
    _refuse_used(folder, resume)
    _refuse_changes(folder, resume, settings)


def _refuse_used(folder: Path, resume: str | None) -> None:
    """Raise a `UserError` if a folder holds something that this launch does not continue."""
    if not has_started(folder):
        return
    if resume is None:
        raise UserError(
            f"--output_dir {folder} is not empty: continue its run with --resume latest (if it is complete, with a "
            "larger --max_train_steps), or choose another folder"
        )
    if not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"--output_dir {folder} is not the folder of a run: it has no {SETTINGS_FILE}")
    read_json(folder / SETTINGS_FILE, ("output_dir",), NEW_FOLDER)  # is it one of hfgen's?


def _refuse_changes(folder: Path, resume: str | None, settings: Sequence[Any]) -> None:
    """Raise a `UserError` if a folder holds a run with other settings, or what the training would have to replace."""
    if not has_started(folder):
        return
    config_file = folder / SETTINGS_FILE
    saved = read_json(config_file, remedy=NEW_FOLDER)
    require_replaceable(folder / PIPELINE_FOLDER, PIPELINE_MARKER)
    require_replaceable(folder / BEST_FOLDER, SCORES_FILE)
    best_scores(folder)  # refuses damaged ones now rather than after the training
    if changes := changed_settings(saved, *settings):
        raise UserError(
            f"--resume {resume}: settings differ from those in {config_file} (saved -> now):\n  "
            + "\n  ".join(changes)
            + f"\nUse the saved settings, or {_in_another_folder(folder)}"
        )
    _refuse_other_length(folder, resume, saved, settings_to_dict(*settings))


def find_start(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to resume from, or raise a `UserError`; see `claim_folder`."""
    config_file = folder / SETTINGS_FILE
    saved = read_json(config_file, remedy=NEW_FOLDER) if config_file.is_file() else {}
    checkpoint = find_checkpoint(folder / "checkpoints", resume) if resume else None
    if resume == "latest" and checkpoint is None and (origin := saved.get("resume")):
        # It continued another run and was killed before its first checkpoint: never start from scratch instead.
        is_elsewhere = Path(origin).name != origin and _run_of(Path(origin)) != folder.resolve()
        checkpoint = find_checkpoint(folder / "checkpoints", origin) if is_elsewhere else None
    if resume == "latest" and checkpoint is None and (folder / PIPELINE_FOLDER).exists():
        raise UserError(
            f"--resume latest: {folder} has a trained pipeline, but no checkpoint to continue from; to start from the "
            f"weights of its pipeline: --init_from {folder} --output_dir NEW"
        )
    return checkpoint


def _in_another_folder(folder: Path) -> str:
    """Say how to continue a run in another folder, or to begin there if it has no checkpoint."""
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        return "start in another folder with --output_dir NEW"
    return f"continue with these in another folder: --resume {found[-1]} --output_dir NEW"


def has_started(folder: Path) -> bool:
    """Whether a folder holds a run that has begun, or anything else that must not be overwritten."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, accepts names that are too long
        return False
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE, HOLDER_FILE}
    left = {name for name in names if not _is_partial(name) and not _has_only_the_first_sheet(folder / name)}
    if not left:
        return False
    log = folder / METRICS_FILE
    has_content = (log.is_file() and log.stat().st_size > 0) or any((folder / "checkpoints").glob("[!.]*"))
    return has_content or not left <= LEFT_BY_A_FAILED_START or not is_of_a_run(folder / SETTINGS_FILE)


def _has_only_the_first_sheet(path: Path) -> bool:
    """Whether a folder holds no more than the sheet of an untrained network."""
    return path.name in FIRST_SHEETS and path.is_dir() and {file.name for file in path.iterdir()} <= {FIRST_SHEET}


def _is_partial(name: str) -> bool:
    """Whether a process was killed while it wrote the file."""
    match = LEFTOVER.fullmatch(name)
    return match is not None and match["name"] in LEFT_BY_A_FAILED_START


def is_of_a_run(file: Path) -> bool:
    """Whether hfgen wrote a `training_config.json`."""
    try:
        return "output_dir" in read_json(file)
    except UserError:
        return False


def _refuse_other_length(folder: Path, resume: str | None, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a `UserError` if a run gets another length and its learning rates were planned for the old one."""
    changed = [f"{key}: {saved.get(key)} -> {now[key]}" for key in LENGTHS if saved.get(key) != now[key]]
    if changed and rates_follow_length(now):
        raise UserError(
            f"--resume {resume}: the {now['lr_scheduler']} schedule of the learning rate in {folder} was planned for "
            f"the old length ({', '.join(changed)}); for a schedule of the new length, {_in_another_folder(folder)}"
        )


def write_settings(folder: Path, settings: Sequence[Any], checkpoint: Path | None) -> None:
    """Write `training_config.json`: all settings of this launch.

    Args:
        folder: the run's folder.
        settings: all settings of this launch.
        checkpoint: what the run was resumed from; recorded as `resume` if it belongs to another run.
    """
    values = settings_to_dict(*settings)
    if checkpoint is not None and _run_of(checkpoint) != folder.resolve():
        values["resume"] = str(checkpoint.resolve())  # it may be resumed from another directory
    write_text_atomically(folder / SETTINGS_FILE, json.dumps(values, indent=2) + "\n")


def changes_since(checkpoint: Path, folder: Path, settings: Sequence[Any]) -> list[str]:
    """List the settings that differ from those of the run that a checkpoint belongs to; see `changed_settings`.

    Args:
        checkpoint: where the run continues from.
        folder: the run's folder; empty for a checkpoint in it, whose settings `claim_folder` compares.
        settings: all settings of this launch.
    """
    config_file = _run_of(checkpoint) / SETTINGS_FILE
    if config_file.parent == folder.resolve() or not config_file.is_file():
        return []
    saved, now = read_json(config_file), settings_to_dict(*settings)
    return changed_settings({key: value for key, value in saved.items() if key in now}, *settings)


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    return checkpoint.resolve().parent.parent


def differing(changes: Sequence[str]) -> str:
    """Say which settings differ from those of the run that a checkpoint belongs to; see `changes_since`."""
    return f"settings that differ from its run (before -> now): {', '.join(changes)}"


def print_resumption(checkpoint: Path, step: int, is_complete: bool, changes: Sequence[str], rollbacks: int) -> None:
    """Print where a run continues, and what is not as it was."""
    say(f"resumed from {checkpoint} at step {step}")
    if is_complete:
        say("the run is complete; to extend it, give a larger --max_train_steps (or --num_epochs)")
    if changes:
        say(differing(changes))
    if rollbacks:
        say(f"learning rates halved {rollbacks} times by rollbacks so far")


def write_status(folder: Path, status: str, reason: str, step: int, seconds: float) -> None:
    """Write `status.json`: whether the run is running, and if not, why it ended."""
    content = {"status": status, "reason": reason, "step": step, "seconds": round(seconds, 2)}
    write_text_atomically(folder / STATUS_FILE, json.dumps(content, indent=2) + "\n")


def note_launch(
    folder: Path,
    launch: dict[str, Any],
    changes: list[str],
    choices: dict[str, Callable[[], str]],
    accelerator: Accelerator,
) -> None:
    """Append a launch to `launches.jsonl`: where it begins, settings changed since, choices, and its environment."""
    launch |= {"changed_settings": changes} if changes else {}
    is_first = not launch["from_step"] or not (folder / LAUNCHES_FILE).is_file()  # of this folder
    chosen = {name: describe() for name, describe in choices.items()}
    launch |= {"choices": chosen} if chosen and is_first else {}  # later ones keep them
    append_json_line(folder / LAUNCHES_FILE, launch | describe_environment(accelerator))


def note_event(folder: Path, step: int, event: str, what: str) -> None:
    """Append an event to `events.jsonl`, which rollbacks do not rewind."""
    append_json_line(folder / EVENTS_FILE, {"step": step, "event": event, "what": what})


def run_of(pipeline_folder: Path) -> Path | None:
    """Return RUN for RUN/pipeline, RUN/best/pipeline or RUN/checkpoints/*/pipeline; None if there is no run."""
    parents = pipeline_folder.resolve().parents
    return next((folder for folder in parents[:3] if (folder / LAUNCHES_FILE).is_file()), None)


def read_launches(folder: Path) -> list[dict[str, Any]]:
    """Return the launches of a run, oldest first: the step that each began at, and its environment.

    Raises:
        UserError: if none is readable.
    """
    launches = read_json_lines(folder / LAUNCHES_FILE, ("from_step",))
    if not launches:
        raise UserError(f"{folder / LAUNCHES_FILE} is missing or damaged; restore it from a copy")
    return launches


def best_scores(folder: Path) -> dict[str, Any] | None:
    """Return the scores and step of the run's best pipeline; None if none was scored."""
    file = folder / BEST_FOLDER / SCORES_FILE
    needed, remedy = ("step", "num_images", "fid", "kid", "copying"), f"move {file.parent} away"
    return read_json(file, needed, remedy) if file.is_file() else None


def print_end(folder: Path, reason: str, step: int, max_train_steps: int, seconds: float) -> None:
    """Print how a launch ended, what it left, and how to go on."""
    of_all = f" of {max_train_steps}" if max_train_steps < WITHOUT_END else ""
    say(f"{reason}: step {step}{of_all}, {seconds:.0f} s of training in total")
    for line in list_results(folder):
        say(line)
    if step < max_train_steps:
        say("to continue, run the same command with --resume latest")


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the checkpoints, the pipeline and the sheets after a step, of a run that goes back to it."""
    set_aside_newer_checkpoints(folder / "checkpoints", step)
    set_aside_newer_pipeline(folder, step)
    set_aside_newer_sheets(folder, step)


def roll_back(folder: Path, checkpoint: Path) -> None:
    """Delete the checkpoints of later steps than this one, to which a run rolls back; rename sheets and pipeline."""
    remove_newer(checkpoint)
    step = load_progress(checkpoint)["step"]
    set_aside_newer_pipeline(folder, step)
    set_aside_newer_sheets(folder, step)


def set_aside_newer_sheets(folder: Path, step: int) -> None:
    """Rename the sheets after a step, of a run that goes back to it; an earlier one of that name is replaced."""
    for kind in SHEETS:
        for sheet in (folder / kind).glob("step-*.png"):
            if sheet.name > f"step-{step:08d}.png":
                os.replace(sheet, sheet.with_name(f"abandoned-{sheet.name}"))


def print_break(step: int) -> None:
    """Print in which update a launch failed, and how to continue."""
    say(f"failed during step {step}; to continue, run the same command with --resume latest")


def list_results(folder: Path) -> list[str]:
    """List the run's results for the user, one per line."""
    lines = [f"pipeline: {folder / 'pipeline'}"]
    if best := best_scores(folder):
        scores = f"FID {best['fid']:.4g}, KID {best['kid']:.4g} at step {best['step']}"
        lines.append(f"best pipeline: {folder / BEST_FOLDER} ({scores})")
    if (sheet := _best_sheet(folder, best)) is not None:
        lines.append(f"sample sheet: {sheet}")
    return lines


def _best_sheet(folder: Path, best: dict[str, Any] | None) -> Path | None:
    """Return the sheet that shows the run best: from a VAE's density, of its best score, or the newest."""
    fitted, sheets = (sorted((folder / kind).glob("step-*.png")) for kind in ("ex_post", "samples"))
    if fitted and (not sheets or fitted[-1].name >= sheets[-1].name):  # else it is of before the run was prolonged
        sheets = fitted
    of_best = [sheet for sheet in sheets if best and sheet.name == f"step-{best['step']:08d}.png"]
    return next(iter(of_best or sheets[-1:]), None)
