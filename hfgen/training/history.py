"""The log of a run as its readers see it; imports nothing slow."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfgen.errors import UserError
from hfgen.files import read_json_lines
from hfgen.run_files import METRICS_FILE


# What every line of `metrics.jsonl` has.
NEEDED = ("step", "seconds")
# Logged by `--evaluate_every`, in addition to the losses.
SCORES = ("fid", "kid", "copies")
# Panels whose losses span a larger ratio get a logarithmic axis, if all losses are positive.
MAX_LINEAR_SPAN = 20
# The axis extends at most this many interquartile ranges beyond the quartiles, so that exploding curves leave it.
REACH = 20


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the log of a run, one entry every `log_every` steps.

    Raises:
        UserError: if the log is missing or empty.
    """
    entries = read_json_lines(run / METRICS_FILE, NEEDED)
    if not entries:
        raise UserError(f"{run}: not the folder of a run: {METRICS_FILE} is missing, empty or damaged")
    return entries


def images_at(log: Sequence[dict[str, Any]], step: int) -> int | None:
    """Return how many training images a run had seen after a step; None without a log.

    Not in proportion to the step: a run that continues another one may have other batches than that one had.

    Args:
        log: entries of `metrics.jsonl`, with "step" and "images".
        step: need not have an entry.
    """
    if not log:
        return None
    first, last = log[0], log[-1]
    if first["step"] < last["step"]:
        per_step = (last["images"] - first["images"]) / (last["step"] - first["step"])
    else:
        per_step = last["images"] / max(last["step"], 1)
    return round(last["images"] - (last["step"] - step) * per_step)


def loss_range(curves: list[list[float]]) -> tuple[str, float, float]:
    """Choose an axis that shows most of the curves, even if some explode.

    Returns:
        "log" or "linear", and the limits of the axis; 0 and 0 if no loss is finite.
    """
    found = np.array([value for values in curves for value in values if math.isfinite(value)], dtype=np.float64)
    if not len(found):
        return "linear", 0.0, 0.0
    is_log = found.min() > 0 and found.max() > MAX_LINEAR_SPAN * found.min()
    found = np.log10(found) if is_log else found
    lower, upper = np.quantile(found, [0.25, 0.75])
    reach = REACH * (upper - lower) or math.inf
    low, high = max(found.min(), lower - reach), min(found.max(), upper + reach)
    margin = 0.05 * (high - low) or 0.5
    ends = low - margin, high + margin
    low, high = (10.0 ** float(end) if is_log else float(end) for end in ends)
    return "log" if is_log else "linear", low, high
