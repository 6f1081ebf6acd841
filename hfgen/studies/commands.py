"""The commands that train the cells of a study again, outside of it."""

import shlex

from hfgen.studies.cells import Cell, Study, default_settings


def commands(study: Study) -> str:
    """Return a text with a command per cell; see `command_of`."""
    lines = ["# A command per cell, which trains it again with the settings of the study."]
    for name, cell in study.cells.items():
        lines += ["", f"# {' '.join(name.split())}", command_of(study, cell)]
    return "\n".join(lines) + "\n"


def command_of(study: Study, cell: Cell, preset: str | None = None) -> str:
    """Return the command that trains a cell again.

    Args:
        study: the study.
        cell: one of its cells.
        preset: JSON file with the cell's settings; if None, each setting that is not the default becomes a flag.
    """
    words = ["hfgen", "train", cell.method, "--dataset", study.dataset]
    words += _flags(cell) if preset is None else ["--preset", preset]
    words += ["--output_dir", f"runs/{cell.folder_name}"]
    if study.budget.minutes is not None:
        words += ["--max_train_time", f"{60 * study.budget.minutes:.0f}s"]
    return shlex.join(words)


def _flags(cell: Cell) -> list[str]:
    defaults, flags = default_settings(cell.method), []
    for key, value in cell.settings.items():
        if value is not None and value != defaults.get(key):
            # With "=", because argparse takes a bare -1e-05 for a flag.
            flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags
