"""The curves on the page of a run, as plain values for its script."""

from typing import Any

import numpy as np

from hfgen.training.history import SCORES, images_at, loss_range
from hfgen.training.reference_curves import reference_of


POINTS = 300  # of a curve; more are averaged
# Both sides of a GAN in one panel: title, and its curves.
TOGETHER = (
    ("losses of both networks", {"loss_d": "discriminator", "loss_g": "generator"}),
    ("mean logits of the discriminator", {"d_real": "real images", "d_fake": "generated images"}),
)
TITLES = {"fid": "FID", "kid": "KID", "copies": "fraction of copies"}
NO_CURVES = {"step", "images", "seconds", *SCORES}
OF_EVALUATIONS = ("copies", "nearest")  # first words of what an evaluation logs besides


def charts_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the panels of a log against steps: losses first, then what else changes in it."""
    names = list(dict.fromkeys(name for entry in log for name in entry if name not in NO_CURVES))
    names = [name for name in names if not name.startswith(OF_EVALUATIONS)]
    together = [(title, sides) for title, sides in TOGETHER if sides.keys() <= {*names}]
    alone = [name for name in names if not any(name in sides for _, sides in together)]
    charts = [_chart(name.replace("_", " "), {"": _points(log, name)}, True) for name in alone if is_loss(name)]
    for title, sides in together:
        charts.append(_chart(title, {side: _points(log, name) for name, side in sides.items()}, "losses" in title))
    for name in alone:
        points = _points(log, name)
        if not is_loss(name) and len({value for _, value in points}) > 1:
            charts.append(_chart(name.replace("_", " "), {"": points}, False))
    return charts


def is_loss(name: str) -> bool:
    """Whether a log entry is a loss: "loss", "loss_..." or "..._loss"."""
    return name == "loss" or name.startswith("loss_") or name.endswith("_loss")


def score_charts(
    log: list[dict[str, Any]], evaluations: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the panels of the scores against training images, FID beside the preset's reference curve."""
    charts = []
    for name in SCORES:
        points = [[images_at(log, line["step"]) or 0, line[name]] for line in evaluations if name in line]
        if not points:
            continue
        lines = {"this run": points}
        curve = reference_of(settings, settings.get("evaluate_num_images", 0)) if name == "fid" else None
        if curve is not None:
            lines[f"preset {curve.preset}"] = [[images, fid] for images, _, fid in curve.points]
        charts.append(_chart(f"{TITLES[name]} by training images", lines, is_main=True, reference=curve is not None))
    return charts


def _points(log: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Return (step, value) of a curve, averaged over neighbours if there are too many."""
    found = [[entry["step"], entry[name]] for entry in log if isinstance(entry.get(name), int | float)]
    if len(found) <= POINTS:
        return found
    return [part.mean(axis=0).tolist() for part in np.array_split(np.array(found, dtype=np.float64), POINTS)]


def _chart(title: str, lines: dict[str, list[list[float]]], is_main: bool, reference: bool = False) -> dict[str, Any]:
    """Return a panel; if it has a reference, that is its last line."""
    scale, low, high = loss_range([[value for _, value in points] for points in lines.values()])
    if scale == "linear" and low < 0 <= min((value for points in lines.values() for _, value in points), default=-1):
        low = 0.0
    named = [{"name": name, "points": points, "is_reference": False} for name, points in lines.items()]
    named[-1]["is_reference"] = reference
    axis = {"low": low, "high": high, "log": scale == "log"} if low < high else None
    return {"title": title, "is_main": is_main, "scale": axis, "lines": named}
