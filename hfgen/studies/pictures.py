"""Pictures of a study: the curves of its cells, and what they draw, side by side."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from hfgen.figures import image_sheet
from hfgen.studies.results import SHEET_COLUMNS, decode_picture
from hfgen.studies.table import Row


LABEL_WIDTH = 170
FIGURE_COLUMNS = 3
SHOWN_PER_ROW = 12
LEAST_SHOWN_PIXELS = 64


def draw_loss_curves(rows: list[Row]) -> Figure | None:
    """Draw the losses of all cells: a panel for each family and loss, a line for each point of the grid and seed.

    Returns:
        None if nothing has been trained.
    """
    panels: dict[tuple[str, str], list[tuple[str, str, list[float], list[float]]]] = {}
    colours = {label: f"C{index % 10}" for index, label in enumerate(dict.fromkeys(row.label for row in rows))}
    for row in rows:
        for index, outcome in enumerate(row.outcomes):
            if outcome is None or outcome.result is None:
                continue
            for name in losses_of(outcome.result.curve):
                entries = [entry for entry in outcome.result.curve if name in entry]
                line = [entry["step"] for entry in entries], [entry[name] for entry in entries]
                label = (row.label or row.place.family) if index == 0 else "_nolegend_"
                panels.setdefault((row.place.family, name), []).append((label, colours[row.label], *line))
    if not panels:
        return None
    lines = math.ceil(len(panels) / FIGURE_COLUMNS)
    figure = Figure(figsize=(5 * min(len(panels), FIGURE_COLUMNS), 3.4 * lines), layout="constrained")
    axes: list[Axes] = list(figure.subplots(lines, min(len(panels), FIGURE_COLUMNS), squeeze=False).flat)
    for ax, ((family, name), curves) in zip(axes, panels.items(), strict=False):
        for label, colour, steps, values in curves:
            ax.plot(steps, values, label=label, color=colour, linewidth=1)
        ax.set(title=f"{family}: {name}", xlabel="steps")
        ax.grid(alpha=0.3)
        if len({label for label, *_ in curves} - {"_nolegend_"}) > 1:
            ax.legend(fontsize="small")
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return figure


def losses_of(curve: list[dict[str, float]]) -> list[str]:
    """Return the losses that a log holds: those of a GAN's two networks, or the whole loss."""
    names = list(curve[-1]) if curve else []
    return [name for name in names if name == "loss" or name.startswith("loss_")]


def labelled_rows(rows: list[tuple[str, Image.Image]]) -> Image.Image:
    """Lay pictures out below each other, each with its name on the left."""
    width = max(picture.width for _, picture in rows)
    sheet = Image.new("RGB", (LABEL_WIDTH + width, sum(picture.height + 6 for _, picture in rows)), "white")
    top = 0
    for name, picture in rows:
        sheet.paste(picture, (LABEL_WIDTH, top))
        for index, part in enumerate(name.split("\n")):
            ImageDraw.Draw(sheet).text((4, top + 4 + 12 * index), part, fill="black")
        top += picture.height + 6
    return sheet


def sample_rows(rows: list[Row]) -> Image.Image | None:
    """Show the first images of the first seed of each place, of the same latents or noise a column; None if none."""
    shown = []
    for row in rows:
        if sheet := first_picture(row, "sheet"):
            images = [_enlarged(image) for image in cut(decode_picture(sheet))[:SHOWN_PER_ROW]]
            shown.append((_name(row), image_sheet(images, SHOWN_PER_ROW)))
    return labelled_rows(shown) if shown else None


def strip_rows(rows: list[Row]) -> Image.Image | None:
    """Show how the diffusion cells draw, noise on the left; None if there are none."""
    shown = [(_name(row), decode_picture(strip)) for row in rows if (strip := first_picture(row, "strip"))]
    return labelled_rows(shown) if shown else None


def first_picture(row: Row, kind: str) -> str:
    """Return the "sheet" or "strip" of the first seed that has one, else ""."""
    found = [getattr(one.result, kind) for one in row.outcomes if one is not None and one.result is not None]
    return next(iter(filter(None, found)), "")


def cut(sheet: Image.Image, gap: int = 2) -> list[Image.Image]:
    """Cut a sheet of `SHEET_COLUMNS` columns into its images."""
    size = (sheet.width + gap) // SHEET_COLUMNS - gap
    rows = (sheet.height + gap) // (size + gap)
    corners = [(column * (size + gap), row * (size + gap)) for row in range(rows) for column in range(SHEET_COLUMNS)]
    return [sheet.crop((left, top, left + size, top + size)) for left, top in corners]


def _enlarged(image: Image.Image) -> Image.Image:
    """Repeat the pixels of a small image until one can see what it shows."""
    factor = max(1, LEAST_SHOWN_PIXELS // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _name(row: Row) -> str:
    return f"{row.place.family}\n{row.label}" if row.label else row.place.family
