"""The report of a study as one page of HTML, complete in itself: nothing is fetched from anywhere."""

import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from hfgen.studies.cells import Study
from hfgen.studies.launch import TRAINED
from hfgen.studies.pictures import losses_of
from hfgen.studies.storage import Outcome
from hfgen.studies.study_file import METRICS
from hfgen.studies.table import HIGHER_IS_BETTER, Row, as_matrix, cells_of, heads


def page(study: Study, rows: list[Row], statements: list[str]) -> str:
    """Write the page.

    Args:
        study: as it is stored.
        rows: of its table.
        statements: what was done and how it compares, a paragraph each.
    """
    matrix = as_matrix(rows)
    numbers = {id(row): index for index, row in enumerate(rows)}
    table: dict[str, Any] = {"head": [METRICS[study.metric]], "lines": []}
    if matrix is not None:
        name, values, families = matrix
        table["head"] = [f"{METRICS[study.metric]} by {name}", *values]
    else:
        families = {" ".join(filter(None, (row.place.family, row.label))): [row] for row in rows}
        table["head"] = ["", METRICS[study.metric]]
    best = best_rows(study, rows)
    for family, line in families.items():
        cells = [{"text": row.shown(), "place": numbers[id(row)], "best": id(row) in best} for row in line]
        published = [row.published for row in line]
        table["lines"].append({"name": family, "cells": cells, "published": published if any(published) else None})
    return _template().render(
        title=study.title,
        statements=statements,
        table=table,
        heads=heads(study, rows),
        lines=[{"place": numbers[id(row)], "cells": cells_of(study, row, rows)} for row in rows],
        places=[_place(study, row) for row in rows],
    )


def best_rows(study: Study, rows: list[Row]) -> set[int]:
    """Return the `id` of the row with the best figure of each family, or of all if each has one figure only."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if math.isfinite(row.mean):
            families.setdefault(row.place.family if row.place.point else "", []).append(row)
    choose = max if study.metric in HIGHER_IS_BETTER else min
    return {id(choose(line, key=lambda row: row.mean)) for line in families.values()}


def _place(study: Study, row: Row) -> dict[str, Any]:
    """Return what the page shows of a place when it is chosen."""
    seeds = []
    for seed, name, outcome in zip(study.seeds, row.place.cells, row.outcomes, strict=True):
        result = outcome.result if outcome is not None else None
        seeds.append(
            {
                "seed": seed,
                "told": _told(study, outcome),
                "sheet": result.sheet if result is not None else "",
                "strip": result.strip if result is not None else "",
                "curves": _curves(result.curve) if result is not None else {},
                "settings": study.cells[name].settings,
            }
        )
    return {"name": row.place.family, "point": row.label, "seeds": seeds}


def _told(study: Study, outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run yet"
    if outcome.kind == TRAINED and outcome.result is not None:
        scores, training = outcome.result.summary["scores"], outcome.result.summary["training"]
        return (
            f"FID {scores['fid']:.4g}, KID {scores['kid']:.3g}, recall {scores['recall']:.2f}; {training['steps']:,} "
            f"steps in {training['minutes']:.1f} minutes"
        )
    at = f" at step {outcome.step:,}" if outcome.step is not None else ""
    return f"{outcome.kind}{at}: {outcome.reason}"


def _curves(curve: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Return the points (step, loss) of each loss."""
    return {name: [[entry["step"], entry[name]] for entry in curve if name in entry] for name in losses_of(curve)}


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("hfgen.studies").joinpath("page.html").read_text(encoding="utf-8"))
