"""The folder of a run: new, or one that is resumed, never somebody else's; and what a run leaves in it."""

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
    """Make the folder of a new run, with its settings, or check that the run in it is the one to resume.

    Args:
        folder: of the run.
        resume: "latest", the path of a checkpoint, or None for a new run.
        settings: all settings of this launch.

    Returns:
        The checkpoint to resume from; None if the run starts at its beginning.

    Raises:
        UserError: if the folder holds something else, or a run with other settings; it is left as it is.
    """
    config_file = folder / "training_config.json"
    used = folder.is_dir() and any(folder.iterdir())
    if used and resume is None:
        raise UserError(
            f"--output_dir {folder} is not empty: continue that run with --resume latest, or choose another folder"
        )
    if used and not config_file.is_file():
        raise UserError(f"--output_dir {folder} holds no run: there is no {config_file.name} in it")
    if used:
        changes = changed_settings(json.loads(config_file.read_text()), *settings)
        if changes:
            raise UserError(
                f"--resume {resume}: settings differ from those in {config_file} (saved -> now):\n  "
                + "\n  ".join(changes)
                + "\nGive the saved ones again, or start another run in another --output_dir"
            )
    checkpoint = find_checkpoint(folder / "checkpoints", resume) if resume else None
    remove_leftovers(folder / "checkpoints")
    if not used:
        keep_settings(folder, settings)
    return checkpoint


def keep_settings(folder: Path, settings: Sequence[Any]) -> None:
    """Write `training_config.json`: all settings of this launch."""
    write_text_atomically(folder / "training_config.json", json.dumps(settings_to_dict(*settings), indent=2) + "\n")


def write_status(folder: Path, status: str, reason: str, step: int, seconds: float) -> None:
    """Write `status.json`: whether the run goes on, and if not, why."""
    content = {"status": status, "reason": reason, "step": step, "seconds": round(seconds, 2)}
    write_text_atomically(folder / "status.json", json.dumps(content, indent=2) + "\n")


def note_event(folder: Path, step: int, event: str, what: str) -> None:
    """Keep what happened to the run in `events.jsonl`, which no rollback takes back."""
    append_json_line(folder / "events.jsonl", {"step": step, "event": event, "what": what})


def best_scores(folder: Path) -> dict[str, Any] | None:
    """Return the scores of the best pipeline of a run, with their step; None if none was scored."""
    file = folder / BEST_FOLDER / SCORES_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def list_results(folder: Path) -> list[str]:
    """Say, a line each, what a run has left for the user to look at."""
    lines = [f"pipeline: {folder / 'pipeline'}"]
    if best := best_scores(folder):
        told = f"FID {best['fid']:.4g}, KID {best['kid']:.4g} at step {best['step']}"
        lines.append(f"best pipeline: {folder / BEST_FOLDER} ({told})")
    sheets = sorted((folder / "samples").glob("step-*.png"))
    return [*lines, f"sheet of samples: {sheets[-1]}"] if sheets else lines
