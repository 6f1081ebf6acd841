"""The report of a study as one self-contained HTML page: nothing is fetched from anywhere."""

import math
import statistics
from typing import Any

from hfgen.metrics.report import finite
from hfgen.pages import page_template
from hfgen.studies.cells import Cell, Study
from hfgen.studies.outcomes import TRAINED, Outcome
from hfgen.studies.results import losses_of, strip_timesteps
from hfgen.studies.study_file import METRICS
from hfgen.studies.table import COLUMNS, Row, as_matrix, cells_of, heads, ranked


def render_page(
    study: Study, rows: list[Row], statements: list[str], remarks: list[str], commands: dict[str, str]
) -> str:
    """Build the page.

    Args:
        study: the stored study.
        rows: rows of its table.
        statements: what was done and how it compares, one paragraph each.
        remarks: remarks on single cells.
        commands: what trains a cell again, by its name.
    """
    matrix = as_matrix(rows)
    numbers = {id(row): index for index, row in enumerate(rows)}
    table: dict[str, Any] = {"head": [METRICS[study.metric]], "lines": []}
    if matrix is not None:
        name, values, families = matrix
        table["head"] = [f"{METRICS[study.metric]} by {name}", *values]
        named = list(families.items())
    else:
        table["head"] = ["", METRICS[study.metric]]
        named = [(" ".join(filter(None, (row.place.family, row.label))), [row]) for row in rows]
    best = best_rows(study, rows)
    for title, line in named:
        cells = [{"text": row.shown(), "place": numbers[id(row)], "best": id(row) in best} for row in line]
        published = [row.published for row in line]
        table["lines"].append({"name": title, "cells": cells, "published": published if any(published) else None})
    places = [_place(study, row, commands) for row in rows]
    gallery = take_for_gallery(places)
    return page_template("studies/page.html").render(
        title=study.title,
        statements=statements,
        remarks=remarks,
        table=table,
        best="the best of its family" if any(row.place.point for row in rows) else "the best of all",
        heads=heads(study, rows),
        lines=[
            [{"text": text, "key": key} for text, key in zip(cells_of(study, row, rows), keys, strict=True)]
            for row, keys in zip(rows, sort_keys(study, rows), strict=True)
        ],
        places=finite(places),
        gallery=gallery,
    )


def sort_keys(study: Study, rows: list[Row]) -> list[list[float | None]]:
    """Return the sort key of each cell of the long table; None if it has no figure."""
    families = list(dict.fromkeys(row.place.family for row in rows))
    points = list(dict.fromkeys(row.label for row in rows))
    found = []
    for row in rows:
        keys: list[float | None] = []
        for name in heads(study, rows):
            if name in COLUMNS and name != METRICS[study.metric]:
                values = row.numbers(COLUMNS[name][0])
                keys.append(statistics.fmean(values) if values else None)
            elif name in ("family", "setting"):  # in the order of the study file
                keys.append(families.index(row.place.family) if name == "family" else points.index(row.label))
            else:
                figure = row.place.published if name == "published" else row.mean
                keys.append(figure if isinstance(figure, int | float) and math.isfinite(figure) else None)
        found.append(keys)
    return found


def take_for_gallery(places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gallery: for each place, the first seed with samples.

    The sheet is removed from the place, which stores its gallery index instead, so that it is on the page only once.
    """
    gallery: list[dict[str, Any]] = []
    for place in places:
        for seed in [seed for seed in place["seeds"] if seed["sheet"]][:1]:
            name = f"{place['name']} {place['point']}".strip()
            gallery.append({"name": name, "seed": seed["seed"], "sheet": seed["sheet"]})
            seed |= {"sheet": "", "in_gallery": len(gallery) - 1}
    return gallery


def best_rows(study: Study, rows: list[Row]) -> set[int]:
    """Return the `id` of each family's best complete row, or of the best of all if each family has only one figure."""
    best: dict[str, int] = {}
    for row in ranked(study, rows):
        best.setdefault(row.place.family if row.place.point else "", id(row))
    return set(best.values())


def _place(study: Study, row: Row, commands: dict[str, str]) -> dict[str, Any]:
    """Return what the page shows when a place is selected."""
    seeds = []
    for seed, name, outcome in zip(study.seeds, row.place.cells, row.outcomes, strict=True):
        result = outcome.result if outcome is not None else None
        seeds.append(
            {
                "seed": seed,
                "summary": _summary(study, outcome),
                "sheet": result.sheet if result is not None else "",
                "in_gallery": None,
                "strip": result.strip if result is not None else "",
                "strip_label": _strip_label(study.cells[name]),
                "curves": _curves(result.curve) if result is not None else {},
                "settings": study.cells[name].settings,
                "command": commands[name],
            }
        )
    return {"name": row.place.family, "point": row.label, "seeds": seeds}


def _strip_label(cell: Cell) -> str:
    if cell.method != "ddpm":
        return ""
    shown = ", ".join(map(str, strip_timesteps(cell.settings["num_train_timesteps"])))
    return f"denoising, after the steps nearest to t = {shown}"


def _summary(study: Study, outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run yet"
    if outcome.kind == TRAINED and outcome.result is not None:
        alone, training = Row(study.places[0], (outcome,)), outcome.result.summary["training"]
        figures = ", ".join(f"{name} {alone.column(name)}" for name in ("FID", "KID", "precision", "recall"))
        minutes = training["minutes"]
        took = f"{60 * minutes:.2g} seconds" if minutes < 1 else f"{alone.column('minutes')} minutes"
        return f"{figures}; {training['steps']:,} steps in {took}"
    at = f" at step {outcome.step:,}" if outcome.step is not None else ""
    return f"{outcome.kind}{at}: {outcome.reason}"


def _curves(curve: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Return the points (step, loss) of each loss."""
    return {name: [[entry["step"], entry[name]] for entry in curve if name in entry] for name in losses_of(curve)}
