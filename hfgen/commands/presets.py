"""`hfgen presets`: the tested combinations of settings, and their scores."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import refuse_to_replace
from hfgen.config import shipped_presets
from hfgen.files import writing
from hfgen.texts import say, say_lines


def presets(
    coloured: Annotated[
        list[str] | None, typer.Argument(metavar="PRESET", help="presets that --curves plots in colour")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option("--curves", help="plot of FID against images seen: .png, .pdf or .svg")
    ] = None,
) -> None:
    """List the presets of `hfgen train`, with the best FID of their reference runs."""
    if curves is not None:
        refuse_to_replace(curves, endings=(".png", ".pdf", ".svg"))
        _plot(curves, coloured or [])
    elif coloured:
        raise typer.BadParameter("presets are named only with --curves, which plots them in colour")
    else:
        _list()


def _plot(output: Path, coloured: list[str]) -> None:
    from hfgen.inference.curves import plot_reference_curves
    from hfgen.training.reference_curves import read_reference_curves

    figure = plot_reference_curves(read_reference_curves(), coloured)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    say(f"{output}: FID of the presets' reference runs")


def _list() -> None:
    from hfgen.training.reference_curves import read_reference_curves  # imports numpy

    reached = {}
    for curve in read_reference_curves():
        images, _, fid = min(curve.points, key=lambda point: point[2])
        reached[curve.preset] = f"FID {fid:.1f} after {images:,} images, for {curve.data}"
    folder = shipped_presets()
    rows = [("method", "preset", "size", "best FID of a reference run, and after how many images seen")]
    rows += [
        (file.parent.name, file.stem, f"{_size(file)} px", reached.get(file.stem, "no reference run"))
        for file in sorted(folder.glob("*/*.json"))
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    say_lines(
        "\nto train one: hfgen train DATA --preset NAME; to see its settings: hfgen train gan --preset NAME --help"
    )


def _size(file: Path) -> int:
    return json.loads(file.read_text(encoding="utf-8")).get("sample_size", 64)
