"""Curves of losses and scores of runs, against steps and time, side by side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hfgen.files import read_json
from hfgen.training.history import SCORES, read_metrics
from hfgen.training.reference_curves import ReferenceCurve, compare_with_reference, minutes_of_updates


def plot_curves(runs: Sequence[Path], references: Sequence[ReferenceCurve] = ()) -> Figure:
    """Plot every loss and score of every run: one row each, against steps on the left and minutes on the right.

    With `references`, FID is plotted against training images instead of steps, next to the presets' curves.

    Losses are the entries named "loss", "loss_..." or "..._loss", so that a GAN's two losses and the parts of a VAE's
    loss each get a row, and runs of different families share common rows. A run is labelled by its folder's name, or
    by the full path if two folders have the same name.

    Raises:
        UserError: if a folder has no log.
    """
    same_names = len({run.resolve().name for run in runs}) < len(runs)
    logs = {_label(str(run) if same_names else run.resolve().name): read_metrics(run) for run in runs}
    found = {name for log in logs.values() for entry in log for name in entry}
    losses = [name for name in found if name == "loss" or name.startswith("loss_") or name.endswith("_loss")]
    names = [*sorted(losses), *(name for name in SCORES if name in found)]
    if references and "fid" not in names:  # no run was scored; still show the references
        names.append("fid")
    figure = Figure(figsize=(12, 3.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for (by_step, by_time), name in zip(axes, names, strict=True):
        for run, log in logs.items():
            entries = [entry for entry in log if name in entry]
            values = [entry[name] for entry in entries]
            minutes = [entry["seconds"] / 60 for entry in entries]
            marker = "." if name in SCORES else ""  # few points
            unit = "step"
            if references and name == "fid":
                unit, of_updates = "images", minutes_of_updates(log)
                minutes = [of_updates[index] for index, entry in enumerate(log) if name in entry]
            by_step.plot([entry[unit] for entry in entries], values, label=run, linewidth=1, marker=marker)
            by_time.plot(minutes, values, label=run, linewidth=1, marker=marker)
        by_step.set(xlabel="steps", ylabel=name)
        by_time.set(xlabel="training minutes", ylabel=name)
        if references and name == "fid":
            _plot_references(by_step, by_time, references)
        by_step.grid(alpha=0.3)
        by_time.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    return figure


def _label(name: str) -> str:
    """Return a name as matplotlib shows it: valid text, no formulas, and in the legend even if it begins with "_"."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def compared_with_references(run: Path) -> str:
    """Compare a run's latest score with the reference curve of its preset, in a sentence."""
    scored = [entry for entry in read_metrics(run) if "fid" in entry]
    if not scored:
        return "not scored yet: train with --evaluate_every"
    file, newest = run / "training_config.json", scored[-1]
    settings = read_json(file) if file.is_file() else {}
    count = settings.get("evaluate_num_images", 0)
    _, message = compare_with_reference(settings, count, newest["images"], newest["fid"])
    return message or (
        "no reference curve has these settings, this image size, so few training images and this number of scored "
        f"images (--evaluate_num_images {count})"
    )


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
    about = dict.fromkeys(curve.about for curve in references)
    by_images.set_title("\n".join(f"grey: {one}" for one in about), fontsize="x-small")
    by_images.legend(fontsize="small")
