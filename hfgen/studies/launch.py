"""Training a cell: launches the training script as a user would, and resumes where it stopped."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hfgen.data.location import is_missing
from hfgen.errors import UserError
from hfgen.files import read_json, read_json_lines, write_text_atomically
from hfgen.run_files import LAUNCHES_FILE, SETTINGS_FILE, STATUS_FILE
from hfgen.studies.cells import Cell
from hfgen.studies.outcomes import BROKEN, DIVERGED, IN_USE, LOST, TRAINED, Ending
from hfgen.studies.scripts import launch_arguments, script_differences, script_digests
from hfgen.studies.study_file import Budget
from hfgen.studies.supervised import GRACE_SECONDS
from hfgen.training.checkpoints import find_checkpoint, load_progress
from hfgen.training.folder import STATUS_KEYS
from hfgen.training.launcher import HEED_LAUNCHER
from hfgen.training.lock import holder_of


LAUNCHER = [
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
# Errors of hfgen and Python; the launcher's own error after them contains no information.
ERROR = re.compile(r"error: |(?!subprocess\.CalledProcessError)[\w.]*(Error|Exception|Interrupt)\b")
ERROR_LINES = 12
MIN_SECONDS = 1
# A training for a time ends a step before it or after it, and a resumed one has the time of its start-up on top.
LONGER, MARGIN_SECONDS = 1.1, 60.0
POLL_SECONDS = 5.0
# The training of a worker that was killed has stopped after this time, or goes on.
WAIT_SECONDS = GRACE_SECONDS + 10.0
LOST_CELL = Ending(LOST, "another worker has taken it, because this one did not respond for too long")


@dataclass(frozen=True)
class Workspace:
    """A worker's folders and data.

    Attributes:
        output: folder of the study on this machine.
        scripts: from `find_scripts`.
        dataset: the `--dataset` value.
        feature_weights: file with Inception's weights; found automatically if None.
    """

    output: Path
    scripts: Path
    dataset: str
    feature_weights: str | None = None

    def run_folder(self, cell: Cell) -> Path:
        """Return the training script's output folder."""
        return self.output / "cells" / cell.folder_name

    def script_file(self, cell: Cell) -> Path:
        """Return the file that notes which training script trains the cell."""
        folder = self.run_folder(cell)
        return folder.with_name(f"{folder.name}.script.json")

    def log_file(self, cell: Cell) -> Path:
        """Return the file with what the training script prints."""
        folder = self.run_folder(cell)
        return folder.with_name(f"{folder.name}.log")


def train_cell(
    cell: Cell, budget: Budget, workspace: Workspace, has_lost: Callable[[], bool] = lambda: False
) -> Ending:
    """Train a cell to its end, from its newest checkpoint if there is one.

    Args:
        cell: the cell.
        budget: training budget of the study.
        workspace: this worker's folders.
        has_lost: whether the cell was given to another worker, which may be training in the same folder.

    Raises:
        KeyboardInterrupt: if this process was asked to stop; the training has then been stopped, too.
    """
    folder = workspace.run_folder(cell)
    if (ending := _wait_for_folder(folder, has_lost)) is not None:
        return ending
    script = script_digests(workspace.scripts, [cell.method])
    if (ending := _by_another_script(cell, script, workspace)) is not None:
        return ending
    if (ending := _earlier_ending(folder, cell, budget, workspace)) is not None:
        return ending
    write_text_atomically(workspace.script_file(cell), json.dumps(script) + "\n")
    command = launch_command(cell, budget, workspace)
    log = workspace.log_file(cell)
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        supervised = [sys.executable, "-m", "hfgen.studies.supervised", str(os.getpid()), *command]
        # The launcher's precision only overrides a configuration of accelerate; "auto" means the hardware's.
        environment = {**os.environ, HEED_LAUNCHER: "no"}
        process = subprocess.Popen(
            supervised, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while (status := _wait(process)) is None:
                if has_lost():
                    process.terminate()
                    process.wait()
                    return LOST_CELL
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return _ending(folder, budget, status, log)


def _wait_for_folder(folder: Path, has_lost: Callable[[], bool]) -> Ending | None:
    """Wait until the training of an earlier worker has stopped; return an ending if it goes on."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (holder := holder_of(folder)) is not None:
        if has_lost():
            return LOST_CELL
        if time.monotonic() > deadline:
            return Ending(IN_USE, f"{folder} is in use by {holder}")
        time.sleep(min(POLL_SECONDS, 1.0))
    return None


def _wait(process: subprocess.Popen) -> int | None:
    """Wait briefly; return the exit status if the process has ended."""
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def launch_command(cell: Cell, budget: Budget, workspace: Workspace) -> list[str]:
    """Write the cell's settings as a preset next to its folder, and return the training command."""
    folder = workspace.run_folder(cell)
    preset = folder.with_name(f"{folder.name}.json")
    write_text_atomically(preset, json.dumps(cell.settings, indent=2) + "\n")
    command = [sys.executable, *LAUNCHER, *launch_arguments(workspace.scripts, cell.method), "--preset", str(preset)]
    command += ["--dataset", workspace.dataset, "--output_dir", str(folder), "--resume", "latest"]
    if budget.minutes is not None:
        left = 60 * budget.minutes - _trained_seconds(folder)
        command += ["--max_train_time", f"{max(left, MIN_SECONDS):.3f}s"]
    return command


def read_status(folder: Path) -> dict[str, Any]:
    """Return a run's `status.json`; an empty dictionary if it has not started, or the file is damaged."""
    try:
        return read_json(folder / STATUS_FILE, STATUS_KEYS)
    except UserError:
        return {}


def _by_another_script(cell: Cell, script: dict[str, str | None], workspace: Workspace) -> Ending | None:
    """Return an ending if the training in the cell's folder, of another study, is by another training script."""
    folder, note = workspace.run_folder(cell), workspace.script_file(cell)
    if not (folder / SETTINGS_FILE).is_file() or not note.is_file():
        return None
    changes = script_differences(read_json(note), script)
    remedy = f"move {folder} elsewhere, or use another --output"
    return Ending(BROKEN, f"its folder holds a run of another script: {changes[0]}; {remedy}") if changes else None


def _earlier_ending(folder: Path, cell: Cell, budget: Budget, workspace: Workspace) -> Ending | None:
    """Return how an earlier training of the cell ended; None if it is to be trained, or trained for longer."""
    file = folder / SETTINGS_FILE
    if not file.is_file() or (ending := _ending(folder, budget, 0, None)).kind != TRAINED:
        return None
    saved = read_json(file)
    if any(saved.get(key) != value for key, value in json.loads(json.dumps(cell.settings)).items()):
        return None  # the script names the differences
    remedy = f"move {folder} elsewhere, or use another --output"
    digest = training_digest(cell, workspace)
    if read_json_lines(folder / LAUNCHES_FILE)[-1].get("data_digest", digest) != digest:
        return Ending(BROKEN, f"its folder has a training on other images than {workspace.dataset}: {remedy}")
    # Of a cell that has been scored, the checkpoints are gone; then the time is not known.
    if budget.minutes is not None and (trained := _trained_seconds(folder)):
        asked = 60 * budget.minutes
        if trained > LONGER * asked + MARGIN_SECONDS:
            return Ending(BROKEN, f"its folder has a training of {trained:.0f} s instead of {asked:.0f} s: {remedy}")
        if trained < asked / LONGER - MARGIN_SECONDS:
            return None
    return ending


def training_digest(cell: Cell, workspace: Workspace) -> str:
    """Return the digest of a cell's training images, as its runs note it."""
    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    names = {field.name for field in fields(DataSettings)} - {"dataset"}
    return load_images(
        DataSettings(workspace.dataset, **{name: cell.settings[name] for name in names & cell.settings.keys()})
    ).digest


def _trained_seconds(folder: Path) -> float:
    """Return the seconds of training in a run's folder, up to its newest checkpoint."""
    found = find_checkpoint(folder / "checkpoints", "latest")
    return load_progress(found)["seconds"] if found else 0.0


def _ending(folder: Path, budget: Budget, exit_status: int, log: Path | None) -> Ending:
    """Determine from the run's folder how it ended."""
    said = read_status(folder)
    kind, step = said.get("status"), said.get("step")
    in_time = budget.minutes is not None and said.get("reason") == "time is up"
    if exit_status == 0 and (kind == "complete" or in_time) and (folder / "pipeline" / "model_index.json").is_file():
        return Ending(TRAINED, step=step)
    if kind in ("diverged", "collapsed"):
        return Ending(DIVERGED, f"{kind}: {said['reason']}", step)
    error = last_error(log.read_text(encoding="utf-8", errors="replace")) if log is not None else ""
    return Ending(BROKEN, f"training ended with status {exit_status}: {error}", step)


def last_error(log: str) -> str:
    """Return the end of the last launch in a log: an error with its indented lines, or the last lines."""
    lines = log[log.rfind("\n$ ") + 1 :].splitlines()[1:]
    found = [index for index, line in enumerate(lines) if ERROR.match(line)]
    if not found:
        return " / ".join(line.strip() for line in lines[-2:])
    more = itertools.takewhile(lambda line: line.startswith("  "), lines[found[-1] + 1 :])
    return " ".join([lines[found[-1]], *(line.strip() for line in list(more)[:ERROR_LINES])])


def missing_device(cell: Cell) -> str | None:
    """Return why this machine cannot train the cell, or None if it can."""
    import torch

    if cell.device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device, which this machine does not have"
    return None


def check_data(workspace: Workspace) -> None:
    """Raise a `UserError` if a worker's dataset is a path that does not exist."""
    if is_missing(workspace.dataset):
        raise UserError(
            f"--dataset {workspace.dataset}: not on this machine; give the path of its images as --dataset"
        )
