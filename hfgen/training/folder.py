"""The run's folder: created or reopened, never mixed with another run's files; and the files in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfgen.config import changed_settings, settings_to_dict
from hfgen.errors import UserError
from hfgen.files import append_json_line, write_text_atomically
from hfgen.training.checkpoints import find_checkpoint, remove_leftovers


BEST_FOLDER, SCORES_FILE = "best", "scores.json"
EVALUATIONS_FILE = "evaluations.jsonl"


def claim_folder(folder: Path, resume: str | None, settings: Sequence[Any]) -> Path | None:
    """Create the folder of a new run, with its settings, or check that it holds the run to resume.

    Args:
        folder: the run's folder.
        resume: "latest", the path of a checkpoint, or None for a new run.
        settings: all settings of this launch.

    Returns:
        The checkpoint to resume from; None if the run starts from scratch.

    Raises:
        UserError: if the folder holds something else or a run with other settings; it is not changed.
    """
    config_file = folder / "training_config.json"
    used = folder.is_dir() and any(folder.iterdir())
    if used and resume is None:
        raise UserError(
            f"--output_dir {folder} is not empty: continue its run with --resume latest, or choose another folder"
        )
    if used and not config_file.is_file():
        raise UserError(f"--output_dir {folder} is not the folder of a run: it has no {config_file.name}")
    if used:
        changes = changed_settings(json.loads(config_file.read_text()), *settings)
        if changes:
            raise UserError(
                f"--resume {resume}: settings differ from those in {config_file} (saved -> now):\n  "
                + "\n  ".join(changes)
                + "\nUse the saved settings, or continue with these in another folder: --resume "
                f"{find_checkpoint(folder / 'checkpoints', 'latest') or 'CHECKPOINT'} --output_dir NEW"
            )
    checkpoint = find_checkpoint(folder / "checkpoints", resume) if resume else None
    if used and checkpoint is None and (origin := json.loads(config_file.read_text()).get("resume")):
        # It continued another run and was killed before its first checkpoint: never start from scratch instead.
        if origin != "latest" and _run_of(Path(origin)) != folder.resolve():
            checkpoint = find_checkpoint(folder / "checkpoints", origin)
    remove_leftovers(folder / "checkpoints")
    if not used:
        keep_settings(folder, settings)
    return checkpoint


def keep_settings(folder: Path, settings: Sequence[Any], checkpoint: Path | None = None) -> None:
    """Write `training_config.json`: all settings of this launch.

    Args:
        folder: the run's folder.
        settings: all settings of this launch.
        checkpoint: what the run was resumed from; recorded as `resume` if it belongs to another run.
    """
    values = settings_to_dict(*settings)
    if checkpoint is not None and _run_of(checkpoint) != folder.resolve():
        values["resume"] = str(checkpoint)
    write_text_atomically(folder / "training_config.json", json.dumps(values, indent=2) + "\n")


def changes_since(checkpoint: Path, folder: Path, settings: Sequence[Any]) -> list[str]:
    """List the settings that differ from those of the run that a checkpoint belongs to; see `changed_settings`.

    Args:
        checkpoint: where the run continues from.
        folder: the run's folder; empty for a checkpoint in it, whose settings `claim_folder` compares.
        settings: all settings of this launch.
    """
    config_file = _run_of(checkpoint) / "training_config.json"
    if config_file.parent == folder.resolve() or not config_file.is_file():
        return []
    saved, now = json.loads(config_file.read_text()), settings_to_dict(*settings)
    return changed_settings({key: value for key, value in saved.items() if key in now}, *settings)


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    return checkpoint.resolve().parent.parent


def write_status(folder: Path, status: str, reason: str, step: int, seconds: float) -> None:
    """Write `status.json`: whether the run is running, and if not, why it ended."""
    content = {"status": status, "reason": reason, "step": step, "seconds": round(seconds, 2)}
    write_text_atomically(folder / "status.json", json.dumps(content, indent=2) + "\n")


def note_event(folder: Path, step: int, event: str, what: str) -> None:
    """Append an event to `events.jsonl`, which rollbacks do not rewind."""
    append_json_line(folder / "events.jsonl", {"step": step, "event": event, "what": what})


def best_scores(folder: Path) -> dict[str, Any] | None:
    """Return the scores and step of the run's best pipeline; None if none was scored."""
    file = folder / BEST_FOLDER / SCORES_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def list_results(folder: Path) -> list[str]:
    """List the run's results for the user, one per line."""
    lines = [f"pipeline: {folder / 'pipeline'}"]
    if best := best_scores(folder):
        scores = f"FID {best['fid']:.4g}, KID {best['kid']:.4g} at step {best['step']}"
        lines.append(f"best pipeline: {folder / BEST_FOLDER} ({scores})")
    sheets = sorted((folder / "samples").glob("step-*.png"))
    return [*lines, f"sample sheet: {sheets[-1]}"] if sheets else lines
