"""Pictures of a study: the curves of its cells, and their samples side by side."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hfgen.inference.figures import GAP, image_sheet, labelled_rows, labelled_sheet
from hfgen.inference.fonts import with_fonts
from hfgen.studies.cells import Study
from hfgen.studies.results import SHEET_COLUMNS, STRIP_COLUMNS, decode_picture, losses_of, strip_timesteps
from hfgen.studies.table import Row
from hfgen.training.history import loss_range


FIGURE_COLUMNS = 3
TITLE_LENGTH, LEGEND_LENGTH = 44, 32
SHOWN_PER_ROW = 12
MIN_REPORT_PIXELS, MAX_REPORT_PIXELS = 64, 128
Curve = tuple[str, str, list[float], list[float]]


def plot_loss_curves(rows: list[Row]) -> Figure | None:
    """Plot the losses of all cells: a panel per family and loss, a line per grid point and seed.

    Returns:
        None if nothing has been trained.
    """
    panels: dict[tuple[str, str], list[Curve]] = {}
    places: dict[str, int] = {}  # rows per family so far, for the colours
    for row in rows:
        colour = f"C{places.setdefault(row.place.family, 0) % 10}"
        places[row.place.family] += 1
        results = [one.result for one in row.outcomes if one is not None and one.result is not None]
        for index, result in enumerate(results):
            label = (row.label or row.place.family) if index == 0 else ""
            for name in losses_of(result.curve):
                entries = [entry for entry in result.curve if name in entry]
                line = [entry["step"] for entry in entries], [entry[name] for entry in entries]
                panels.setdefault((row.place.family, name), []).append((label, colour, *line))
    if not panels:
        return None
    columns = min(len(panels), FIGURE_COLUMNS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns, 3.4 * lines), layout="constrained")
    axes: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, ((family, name), curves) in zip(axes, panels.items(), strict=False):
        _plot_panel(ax, _plain(f"{family}: {name}", TITLE_LENGTH), curves)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return with_fonts(figure)


def plot_score_curves(rows: list[Row]) -> Figure | None:
    """Plot FID against training images: a line per place through the means over its seeds, which are points.

    Returns:
        None if no cell was scored during training.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    ax = figure.subplots()
    lowest = math.inf
    for index, row in enumerate(rows):
        points = row.course()
        if not points:
            continue
        name = _plain(" ".join(filter(None, (row.place.family, row.label))), TITLE_LENGTH)
        style = ("-", "--", ":")[index // 10 % 3]
        most = max(map(len, points.values()))
        means = {images: np.mean(found) for images, found in points.items() if len(found) == most}
        ax.plot(list(means), list(means.values()), style, color=f"C{index % 10}", label=f" {name}")
        for images, found in points.items():
            ax.plot([images] * len(found), found, ".", color=f"C{index % 10}")
            lowest = min(lowest, *found)
    if not math.isfinite(lowest):
        return None
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("training images seen")
    ax.set_ylabel("FID")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return with_fonts(figure)


def _plot_panel(ax: Axes, title: str, curves: list[Curve]) -> None:
    for label, colour, steps, values in curves:
        # Labels that begin with an underscore are left out of the legend.
        legend = f" {_plain(label, LEGEND_LENGTH)}" if label else "_nolegend_"
        ax.plot(steps, values, label=legend, color=colour, linewidth=1)
    scale, low, high = loss_range([values for *_, values in curves])
    if low < high:
        ax.set_yscale(scale)
        ax.set_ylim(low, high)
    leaving = sum(any(not low <= value <= high for value in values) for *_, values in curves)
    if leaving:
        title += f"\n{leaving} of {len(curves)} curves leave{'s' if leaving == 1 else ''} the plot"
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("steps")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    if len({label for label, *_ in curves if label}) > 1:
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # beside the curves


def _plain(text: str, length: int) -> str:
    """Shorten a text, and escape it so that it is not read as a formula."""
    text = " ".join(text.split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def sample_rows(rows: list[Row]) -> Image.Image | None:
    """Show the first images of each place, one column per latent or noise; None if there are none."""
    shown = []
    for row in rows:
        if picture := first_picture(row, "sheet"):
            images = [_resized(image) for image in cut(decode_picture(picture), SHEET_COLUMNS)[:SHOWN_PER_ROW]]
            shown.append((_name_of(row), image_sheet(images, SHOWN_PER_ROW)))
    return labelled_rows(shown) if shown else None


def strip_rows(study: Study, rows: list[Row]) -> Image.Image | None:
    """Show the denoising of the diffusion cells under their timesteps, noise on the left; None if there are none."""
    shown = []
    for row in rows:
        if picture := first_picture(row, "strip"):
            trained_steps = study.cells[row.place.cells[0]].settings["num_train_timesteps"]
            heads = [f"t ≈ {timestep}" for timestep in strip_timesteps(trained_steps)]
            images = [_resized(image) for image in cut(decode_picture(picture), STRIP_COLUMNS)]
            shown.append((_name_of(row), labelled_sheet(images, STRIP_COLUMNS, heads=heads)))
    return labelled_rows(shown) if shown else None


def _name_of(row: Row) -> str:
    return f"{row.place.family}\n{row.label}" if row.label else row.place.family


def first_picture(row: Row, kind: str) -> str:
    """Return the "sheet" or "strip" of the first seed that has one, or ""."""
    found = [getattr(one.result, kind) for one in row.outcomes if one is not None and one.result is not None]
    return next(iter(filter(None, found)), "")


def cut(sheet: Image.Image, columns: int) -> list[Image.Image]:
    """Cut a sheet, which may have been downscaled, into its images, row by row."""
    pitch = (sheet.width + GAP) / columns
    size, rows = int(pitch) - GAP, round((sheet.height + GAP) / pitch)
    corners = [(round(column * pitch), round(row * pitch)) for row in range(rows) for column in range(columns)]
    return [sheet.crop((left, top, left + size, top + size)) for left, top in corners]


def _resized(image: Image.Image) -> Image.Image:
    """Enlarge a small image by repeating pixels, or downscale a large one, to a visible size."""
    if image.width > MAX_REPORT_PIXELS:
        return image.resize((MAX_REPORT_PIXELS, MAX_REPORT_PIXELS), Image.Resampling.LANCZOS)
    factor = max(1, MIN_REPORT_PIXELS // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
