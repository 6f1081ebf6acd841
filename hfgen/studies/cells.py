"""A study as it is run: every cell with all its settings, and the places in the table that the cells fill."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import hfgen
from hfgen.config import parse_settings, settings_as_flags, settings_to_dict
from hfgen.errors import UserError
from hfgen.studies.study_file import DECIDED, METHODS, Budget, Evaluation, StudyFile


# Of all cells unless the study says otherwise: what is kept on the disk only for those who watch a single run.
QUIET = {"report_to": "none", "sample_every": 0}
# With a budget in minutes the time ends a run, not the steps.
ENDLESS_STEPS = 10**9
MANY_DIFFERENCES = 20


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: unique within the study.
        method: "ddpm", "gan" or "vae".
        settings: all of them, by name, except where data and results lie.
        device: "cpu", "cuda" or None; see `Family`.
    """

    name: str
    method: str
    settings: dict[str, Any]
    device: str | None = None

    @property
    def folder_name(self) -> str:
        """The name in a form that every file system takes."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.name).strip("-.")


@dataclass(frozen=True)
class Place:
    """A place in the table: a family at a point of the grid, filled by a cell for each seed.

    Attributes:
        family: the row.
        point: text of each value of the grid, by setting; empty if there is no grid.
        cells: their names; two places may share a cell, if their settings are the same.
        published: what others reported there, or None.
    """

    family: str
    point: dict[str, str]
    cells: tuple[str, ...]
    published: Any = None


@dataclass(frozen=True)
class Study:
    """A study with all its cells. It is kept in the database, so that a worker needs nothing else.

    Attributes:
        name: of the study.
        version: of hfgen, whose defaults are part of the cells.
        dataset: where the images are, on the machine that the study was made on.
        data_settings: of all cells, for the reference of the scores.
        budget: of each cell.
        full_budget: what the file asked for, if `--budget` has reduced it.
        evaluation: how cells are scored.
        full_evaluation: likewise.
        cells: by name.
        places: in the order of the table.
        title, question, source, metric, seeds: see `StudyFile`.
        asked: the `--budget` that it was scaled down to, or None.
    """

    name: str
    version: str
    title: str
    question: str
    source: str
    metric: str
    dataset: str
    budget: Budget
    evaluation: Evaluation
    seeds: tuple[int, ...]
    cells: dict[str, Cell]
    places: tuple[Place, ...]
    asked: str | None = None
    full_budget: Budget | None = None
    full_evaluation: Evaluation | None = None
    full_seeds: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Study":
        """Build the study that `to_dict` has written."""
        full = values["full_budget"], values["full_evaluation"], values["full_seeds"]
        return cls(
            **{
                **values,
                "budget": Budget(**values["budget"]),
                "evaluation": Evaluation(**values["evaluation"]),
                "seeds": tuple(values["seeds"]),
                "cells": {name: Cell(**cell) for name, cell in values["cells"].items()},
                "places": tuple(Place(**{**one, "cells": tuple(one["cells"])}) for one in values["places"]),
                "full_budget": None if full[0] is None else Budget(**full[0]),
                "full_evaluation": None if full[1] is None else Evaluation(**full[1]),
                "full_seeds": None if full[2] is None else tuple(full[2]),
            }
        )


def load_method(scripts: Path, method: str) -> ModuleType:
    """Import a training script, for its settings and presets; nothing is trained."""
    name = f"hfgen_training_script_{method}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, scripts / METHODS[method])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their own module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def expand(file: StudyFile, scripts: Path, dataset: str) -> Study:
    """Work out all cells of a study, their settings checked as the training scripts check them.

    Args:
        file: the study as it is written.
        scripts: the folder of the training scripts.
        dataset: as `--dataset` takes it.

    Raises:
        UserError: if a family has no such preset or setting, or if settings contradict each other.
    """
    cells: dict[str, Cell] = {}
    known: dict[str, str] = {}  # what a cell does -> its name
    places = []
    for family, points in _points(file).items():
        published = file.published.get(family, [None] * len(points))
        if len(published) != len(points):
            raise UserError(f"published: {family}: {len(published)} figures for {len(points)} points of the grid")
        for point, figure in zip(points, published, strict=True):
            names = []
            for seed in file.seeds:
                cell = _cell(file, scripts, family, point, seed)
                same = known.setdefault(
                    json.dumps([cell.method, cell.device, cell.settings], sort_keys=True), cell.name
                )
                cells.setdefault(same, cell)
                names.append(same)
            places.append(Place(family, {key: str(value) for key, value in point.items()}, tuple(names), figure))
    folders = {cell.folder_name.lower() for cell in cells.values()}
    if len(folders) < len(cells):
        raise UserError("families: two names differ only in letters that a folder's name cannot have")
    return Study(
        file.name, hfgen.__version__, file.title, file.question, file.source, file.metric, dataset, file.budget,
        file.evaluation, file.seeds, cells, tuple(places),
    )  # fmt: skip


def _points(file: StudyFile) -> dict[str, list[dict[str, Any]]]:
    """Return the points of the grid of each family."""
    points = {}
    for name, family in file.families.items():
        grid = file.grid if family.grid is None else family.grid
        points[name] = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return points


def _cell(file: StudyFile, scripts: Path, family_name: str, point: dict[str, Any], seed: int) -> Cell:
    family = file.families[family_name]
    name = " ".join([family_name, *(f"{key}={value}" for key, value in point.items()), f"seed={seed}"])
    own = {key: value for key, value in file.data.items() if key != "dataset"}
    own |= {**file.settings, **family.settings, **point, "seed": seed}
    if family.device == "cpu":
        own["cpu"] = True
    settings = _resolve(load_method(scripts, family.method), family.preset, {**QUIET, **own}, name)
    return Cell(name, family.method, with_budget(settings, file.budget), family.device)


def _resolve(script: ModuleType, preset: str | None, own: dict[str, Any], where: str) -> dict[str, Any]:
    """Return all settings of a cell, without those of which the study decides."""
    flags = settings_as_flags(own, script.SETTINGS, where)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = parse_settings(
                script.SETTINGS, script.PRESETS, [*(["--preset", preset] if preset else []), *flags]
            )
    except SystemExit:  # of argparse, which has told why
        raise UserError(f"{where}: {complaint.getvalue().strip().splitlines()[-1]}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    settings = settings_to_dict(*parsed)
    return {key: value for key, value in settings.items() if key == "seed" or key not in DECIDED}


def with_budget(settings: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Return the settings of a cell with the number of updates that the budget allows.

    Raises:
        UserError: if a learning rate is to fall over a number of steps that nobody knows.
    """
    if budget.minutes is not None:
        if settings.get("lr_scheduler") in ("cosine", "linear"):
            raise UserError(
                f"budget: minutes: lr_scheduler {settings['lr_scheduler']} needs to know the last step; give steps or "
                "images"
            )
        return {**settings, "max_train_steps": ENDLESS_STEPS}
    steps = budget.steps or math.ceil((budget.images or 0) / images_per_step(settings))
    return {**settings, "max_train_steps": steps}


def images_per_step(settings: dict[str, Any]) -> int:
    """Return the training images of one update; of a GAN: of the generator, with its `n_critic` batches."""
    return settings["batch_size"] * settings.get("n_critic", 1)


def differences(stored: Study, now: Study) -> list[str]:
    """List, a line each, in what two studies differ, as far as it alters a figure; at most some twenty lines."""
    lines = [
        f"{name}: {getattr(stored, name)} -> {getattr(now, name)}"
        for name in ("version", "metric", "budget", "evaluation", "seeds")
        if getattr(stored, name) != getattr(now, name)
    ]
    for name in [*stored.cells, *(name for name in now.cells if name not in stored.cells)]:
        before, after = stored.cells.get(name), now.cells.get(name)
        if before is None or after is None:
            lines.append(f"cell {name}: {'new' if before is None else 'gone'}")
            continue
        old, new = asdict(before)["settings"], json.loads(json.dumps(after.settings))
        if (before.method, before.device) != (after.method, after.device):
            lines.append(f"cell {name}: another script or device")
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        lines += [f"cell {name}: {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
    if len(lines) > MANY_DIFFERENCES:
        lines = [*lines[:MANY_DIFFERENCES], f"and {len(lines) - MANY_DIFFERENCES} more"]
    return lines
