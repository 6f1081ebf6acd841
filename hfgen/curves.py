"""Curves of losses and scores of runs, against steps and against time, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hfgen.errors import UserError


METRICS_FILE = "metrics.jsonl"
# What `--evaluate_every` adds to the losses.
SCORES = ("fid", "kid", "copies")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the log of a run, one entry every `log_every` steps.

    Raises:
        UserError: if the folder holds no log, or an empty one.
    """
    file = run / METRICS_FILE
    lines = file.read_text().splitlines() if file.is_file() else []
    # The run may be going on, and its last line half written.
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    if not entries:
        raise UserError(f"{run}: no log of a run there: {METRICS_FILE} is missing or empty")
    return entries


def draw_curves(runs: Sequence[Path]) -> Figure:
    """Draw every loss and score of every run: a row each, against steps on the left, against minutes on the right.

    Losses are those whose name is "loss", begins with "loss_" or ends with "_loss", so that a GAN's two and a VAE's
    parts stand above each other and runs of different families share what they have in common. A run is called by its
    folder's name, or by the whole path if two folders have the same name.

    Raises:
        UserError: if a folder holds no log.
    """
    same_names = len({run.resolve().name for run in runs}) < len(runs)
    logs = {str(run) if same_names else run.resolve().name: read_metrics(run) for run in runs}
    found = {name for log in logs.values() for entry in log for name in entry}
    names = [*sorted(filter(_is_loss, found)), *(name for name in SCORES if name in found)]
    figure = Figure(figsize=(12, 3.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for (by_step, by_time), name in zip(axes, names, strict=True):
        for run, log in logs.items():
            entries = [entry for entry in log if name in entry]
            values = [entry[name] for entry in entries]
            marker = "." if name in SCORES else ""  # there are few of them
            by_step.plot([entry["step"] for entry in entries], values, label=run, linewidth=1, marker=marker)
            by_time.plot([entry["seconds"] / 60 for entry in entries], values, label=run, linewidth=1, marker=marker)
        by_step.set(xlabel="steps", ylabel=name)
        by_time.set(xlabel="minutes of training", ylabel=name)
        by_step.grid(alpha=0.3)
        by_time.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    return figure


def _is_loss(name: str) -> bool:
    return name == "loss" or name.startswith("loss_") or name.endswith("_loss")
