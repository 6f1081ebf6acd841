"""The commands that train the cells of a study again, outside of it."""

import shlex
from pathlib import PureWindowsPath
from typing import Any

from hfgen.config import as_flags
from hfgen.data.location import is_path
from hfgen.studies.cells import ALL_CHECKPOINTS, Cell, Study, default_settings
from hfgen.studies.scripts import METHODS, OWN_SCRIPTS


def script_of(commands: dict[str, str]) -> str:
    """Return a shell script of the commands of the cells, by name."""
    lines = ["# A command per cell, which trains it again with the settings of the study."]
    for name, command in commands.items():
        lines += ["", f"# {' '.join(name.split())}", command]
    return "\n".join(lines) + "\n"


def command_of(cell: Cell, study: Study, dataset: str, preset: str | None = None) -> str:
    """Return the command that trains a cell again.

    Args:
        cell: a cell.
        study: its study.
        dataset: what to give as `--dataset`; see `dataset_to_give`.
        preset: JSON file with the cell's settings; if None, each setting that is not the default becomes a flag.
    """
    if study.scripts.get(cell.method) is None:
        words = ["hfgen", "train", cell.method]
    else:  # the user's own
        words = ["accelerate", "launch", f"{OWN_SCRIPTS}/{METHODS[cell.method]}.py"]
    words += ["--dataset", dataset]
    words += _flags(cell) if preset is None else ["--preset", preset]
    words += ["--output_dir", f"runs/{cell.folder_name}"]
    if study.budget.minutes is not None:
        words += ["--max_train_time", f"{60 * study.budget.minutes:.0f}s"]
    return shlex.join(words)


def dataset_to_give(study: Study) -> str:
    """Return what a reader of the report gives as `--dataset`: not the path on this machine."""
    return f"path/to/{PureWindowsPath(study.dataset).name}" if is_path(study.dataset) else study.dataset


def settings_outside(cell: Cell) -> dict[str, Any]:
    """Return a cell's settings without the checkpoints that a study with scores on the way keeps until it has them."""
    if cell.settings.get("checkpoints_total_limit") != ALL_CHECKPOINTS:
        return cell.settings
    of_the_study = ("checkpoint_every", "checkpoints_total_limit")
    return {key: value for key, value in cell.settings.items() if key not in of_the_study}


def _flags(cell: Cell) -> list[str]:
    defaults, flags = default_settings(cell.method), []
    for key, value in settings_outside(cell).items():
        if value is not None and value != defaults.get(key):
            flags += as_flags(key, value)
    return flags
