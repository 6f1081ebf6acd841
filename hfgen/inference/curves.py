"""Curves of losses and scores of runs, against steps and time, side by side."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hfgen.errors import UserError
from hfgen.files import read_json
from hfgen.inference.fonts import with_fonts
from hfgen.run_files import SETTINGS_FILE
from hfgen.training.charts import is_loss
from hfgen.training.history import SCORES, read_metrics
from hfgen.training.reference_curves import ReferenceCurve, compare_with_reference, minutes_of_updates


TITLES = {"gan": "GAN", "vae": "VAE", "ddpm": "diffusion"}
TITLE_COLUMNS = 80  # of a title's lines, which fit over the axes
FEW_POINTS = 30  # of a curve; so few are marked, since a line of one point is invisible


def plot_curves(runs: Sequence[Path], references: Sequence[ReferenceCurve] = ()) -> Figure:
    """Plot every loss and score of every run: one row each, against steps on the left and minutes on the right.

    With `references`, FID is plotted against training images instead of steps, next to the presets' curves.

    Losses are the entries named "loss", "loss_..." or "..._loss", so that a GAN's two losses and the parts of a VAE's
    loss each get a row. Runs share the row of a loss if they are of the same family, since losses of different ones
    have different scales; scores are comparable and share one row each. A run is labelled by its folder's name, or by
    the full path if two folders have the same name.

    Raises:
        UserError: if a folder has no log, or with `references` none has scores.
    """
    same_names = len({run.resolve().name for run in runs}) < len(runs)
    logs = {_label(str(run) if same_names else run.resolve().name): read_metrics(run) for run in runs}
    if references and not any("fid" in entry for log in logs.values() for entry in log):
        raise UserError(
            "--reference: compares scores, and no run here has any: train with --evaluate_every N, such as 1000; "
            "without --reference the losses are plotted"
        )
    colours = {run: f"C{number % 10}" for number, run in enumerate(logs)}
    rows = _rows(logs)
    figure = Figure(figsize=(12, 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (by_step, by_time), (title, name, labels) in zip(axes, rows, strict=True):
        by_images = bool(references) and name == "fid"
        for run in labels:
            log = logs[run]
            indices = [index for index, entry in enumerate(log) if name in entry]
            of_updates = minutes_of_updates(log) if by_images else [entry["seconds"] / 60 for entry in log]
            values = [log[index][name] for index in indices]
            style = {"color": colours[run], "linewidth": 1, "marker": "." if len(values) < FEW_POINTS else ""}
            by_step.plot(
                [log[index]["images" if by_images else "step"] for index in indices], values, label=run, **style
            )
            by_time.plot([of_updates[index] for index in indices], values, label=run, **style)
        by_step.set(xlabel="steps", ylabel=name, title=title)
        by_time.set(xlabel="training minutes", ylabel=name, title=title)
        if by_images:
            _plot_references(by_step, by_time, references)
        (by_time if by_images else by_step).legend(fontsize="small")  # where there is more room
        by_step.grid(alpha=0.3)
        by_time.grid(alpha=0.3)
    return with_fonts(figure)


def _rows(logs: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, list[str]]]:
    """Return title, entry and runs of each row: losses by family, then scores."""
    found = {run: {name for entry in log for name in entry} for run, log in logs.items()}
    families = {run: _family(names) for run, names in found.items()}
    several = len(set(families.values())) > 1
    losses = sorted({(families[run], name) for run, names in found.items() for name in names if is_loss(name)})
    rows = [
        (
            TITLES[family] if several else "",
            name,
            [run for run in logs if families[run] == family and name in found[run]],
        )
        for family, name in losses
    ]
    scored = {name: [run for run in logs if name in found[run]] for name in SCORES}
    return rows + [("", name, labels) for name, labels in scored.items() if labels]


def _family(names: set[str]) -> str:
    """Return "gan", "vae" or "ddpm", by the names in a run's log."""
    if "kl_loss" in names:  # also if it has a GAN's losses besides
        return "vae"
    return "gan" if "loss_d" in names else "ddpm"


def _label(name: str) -> str:
    """Return a name as matplotlib shows it: valid text, no formulas, and in the legend even if it begins with "_"."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def compared_with_references(run: Path) -> str:
    """Compare a run's latest score with the reference curve of its preset, in a sentence."""
    scored = [entry for entry in read_metrics(run) if "fid" in entry]
    if not scored:
        return "not scored yet: train with --evaluate_every"
    file, newest = run / SETTINGS_FILE, scored[-1]
    settings = read_json(file) if file.is_file() else {}
    count = settings.get("evaluate_num_images", 0)
    _, message = compare_with_reference(settings, count, newest["images"], newest["fid"])
    return message or (
        "no reference curve has these settings, this image size, so few training images and this number of scored "
        f"images (--evaluate_num_images {count})"
    )


def plot_reference_curves(curves: Sequence[ReferenceCurve], coloured: Sequence[str] = ()) -> Figure:
    """Plot the reference curves of presets: FID against training images, on logarithmic axes.

    Args:
        curves: those to plot.
        coloured: presets that are drawn in colour in front of the others, which are grey; all if empty.

    Raises:
        UserError: if a coloured preset has no curve.
    """
    known = [curve.preset for curve in curves]
    if missing := [name for name in coloured if name not in known]:
        raise UserError(f"{missing[0]}: no reference run of this preset; those with one are {', '.join(known)}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for number, curve in enumerate(curves):
        images, _, fids = zip(*curve.points, strict=True)
        in_front = not coloured or curve.preset in coloured
        style = {"color": f"C{number % 10}", "linewidth": 2, "zorder": 3} if in_front else {"color": "lightgrey"}
        ax.plot(images, fids, marker=".", label=curve.preset if in_front else None, **style)
        if not in_front:
            ax.annotate(f" {curve.preset}", (images[-1], fids[-1]), color="grey", fontsize="x-small", va="center")
    ax.set(xlabel="training images seen", ylabel="FID", xscale="log", yscale="log")
    for axis, parts in ((ax.xaxis, (1, 2, 5)), (ax.yaxis, (1, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=parts))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.0f}")
    measured = dict.fromkeys(f"{curve.data}, FID of {curve.num_images:,} images" for curve in curves)
    ax.set_title("\n".join(measured), fontsize="small")
    ax.legend(fontsize="small")
    ax.grid(alpha=0.3)
    return with_fonts(figure)


def _plot_references(by_images: Axes, by_time: Axes, references: Sequence[ReferenceCurve]) -> None:
    for number, curve in enumerate(references):
        images, minutes, fids = zip(*curve.points, strict=True)
        for ax, places in ((by_images, images), (by_time, minutes)):
            style = (0, (1 + number, 2))
            label = f"preset {curve.preset}"
            ax.plot(places, fids, label=label, color="grey", linestyle=style, linewidth=1, marker=".")
    by_images.set(xlabel="training images seen", yscale="log")
    by_time.set(xlabel="minutes of updates, without scoring", yscale="log")
    for ax in (by_images, by_time):
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    parts = [curve.about.partition("; ")[::2] for curve in references]  # data and scoring; hardware, for the minutes
    for ax, texts in zip((by_images, by_time), zip(*parts, strict=True), strict=True):
        lines = [
            line for text in dict.fromkeys(texts) if text for line in textwrap.wrap(f"grey: {text}", TITLE_COLUMNS)
        ]
        ax.set_title("\n".join(lines), fontsize="x-small")
