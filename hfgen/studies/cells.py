"""A study expanded for running: every cell with all its settings, and the table entries that the cells fill."""

import contextlib
import io
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hfgen
from hfgen.config import default_values, parse_settings, settings_as_flags, settings_to_dict
from hfgen.errors import UserError
from hfgen.settings.vae import check_length
from hfgen.studies.scripts import find_scripts, import_script, presets_of, script_differences, script_digests
from hfgen.studies.study_file import SET_BY_THE_STUDY, Budget, Evaluation, StudyFile
from hfgen.training.settings import rates_follow_length


# Defaults for all cells: no output that is only useful when watching a single run.
QUIET = {"report_to": "none", "sample_every": 0}
# Checkpoint limit if checkpoints are scored: none is deleted before it is scored.
ALL_CHECKPOINTS = 10**6
# With a budget in minutes, time ends a run, not the number of steps.
ENDLESS_STEPS = 10**9
MANY_DIFFERENCES = 20
# Maximum folder name length; leaves room for the suffixes of sibling and temporary files.
MAX_FOLDER_NAME = 200


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: unique within the study.
        method: "ddpm", "gan" or "vae".
        settings: all settings by name, except the locations of data and results.
        device: "cpu", "cuda" or None; see `Family`.
    """

    name: str
    method: str
    settings: dict[str, Any]
    device: str | None = None

    @property
    def folder_name(self) -> str:
        """The name in a form that is valid on every file system."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.name).strip("-.")


@dataclass(frozen=True)
class Place:
    """A table entry: a family at one grid point, with one cell per seed.

    Attributes:
        family: name of the family, the table's row.
        point: grid values as text, by setting; empty if there is no grid.
        cells: names of the cells; two places with the same settings share cells.
        published: published figure for this place, or None.
    """

    family: str
    point: dict[str, str]
    cells: tuple[str, ...]
    published: Any = None


@dataclass(frozen=True)
class Study:
    """A study with all its cells, as stored in the database: a worker needs nothing else.

    Attributes:
        name: name of the study.
        version: hfgen version, whose defaults are part of the cells.
        dataset: location of the images, on the machine that created the study.
        budget: training budget per cell.
        full_budget: the study file's budget, if `--budget` has reduced it.
        evaluation: how cells are scored.
        full_evaluation, full_seeds: the study file's evaluation and seeds, likewise.
        cells: all cells by name.
        places: table entries, in order.
        title, question, source, metric, seeds: see `StudyFile`.
        asked: the `--budget` that the study was scaled down to, or None.
        scripts: from `script_digests`; empty in a study that was stored without.
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
    scripts: dict[str, str | None] = field(default_factory=dict)

    @property
    def methods(self) -> set[str]:
        """The methods of its cells."""
        return {cell.method for cell in self.cells.values()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Study":
        """Build a study from the output of `to_dict`.

        Raises:
            UserError: if it was written by another hfgen version and this one cannot read it.
        """
        try:
            return cls._from_dict(values)
        except (KeyError, TypeError) as error:
            version = values.get("version", "unknown")
            raise UserError(
                f"the study was made with hfgen {version}, which hfgen {hfgen.__version__} cannot read: install that "
                "version, or start the study again"
            ) from error

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> "Study":
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


def expand(file: StudyFile, scripts: Path, dataset: str) -> Study:
    """Expand a study file into all its cells, with settings validated by the training scripts.

    Args:
        file: the study file.
        scripts: from `find_scripts`.
        dataset: the `--dataset` value.

    Raises:
        UserError: if a preset or setting does not exist, or settings contradict each other.
    """
    cells: dict[str, Cell] = {}
    known: dict[str, str] = {}  # method, device and settings -> cell name
    places: list[Place] = []
    for family in file.families:
        points = file.points(family)
        for point, figure in zip(points, file.published.get(family, [None] * len(points)), strict=True):
            names = []
            for seed in file.seeds:
                cell = _cell(file, scripts, family, point, seed)
                same = known.setdefault(
                    json.dumps([cell.method, cell.device, cell.settings], sort_keys=True), cell.name
                )
                if same == cell.name and cells.setdefault(same, cell) != cell:
                    raise UserError(
                        f"study {file.name}: families: {family}: another family also has a cell named {same!r}"
                    )
                names.append(same)
            if any((one.family, one.cells) == (family, tuple(names)) for one in places):
                raise UserError(
                    f"study {file.name}: {_name(family, point)}: has the same settings as another point of its grid; "
                    "leave one out"
                )
            places.append(Place(family, {key: str(value) for key, value in point.items()}, tuple(names), figure))
    _check_folder_names(file, cells)
    # All cells with the first seed come before any with the second: a study that ends early still compares all.
    cells = dict(sorted(cells.items(), key=lambda item: file.seeds.index(item[1].settings["seed"])))
    digests = script_digests(scripts, {cell.method for cell in cells.values()})
    return Study(
        file.name, hfgen.__version__, file.title, file.question, file.source, file.metric, dataset, file.budget,
        file.evaluation, file.seeds, cells, tuple(places), scripts=digests,
    )  # fmt: skip


def _check_folder_names(file: StudyFile, cells: dict[str, Cell]) -> None:
    taken: dict[str, str] = {}
    for cell in cells.values():
        if len(cell.folder_name) > MAX_FOLDER_NAME:
            raise UserError(
                f"study {file.name}: {cell.name}: is too long for the name of a folder; shorten the name of the "
                f"family by {len(cell.folder_name) - MAX_FOLDER_NAME} letters"
            )
        # Many file systems ignore case.
        if (other := taken.setdefault(cell.folder_name.lower(), cell.name)) != cell.name:
            raise UserError(
                f"study {file.name}: {other!r} and {cell.name!r} would share a folder: their family names must "
                "differ in letters a to z or digits"
            )


def _name(family: str, point: dict[str, Any]) -> str:
    return " ".join([family, *(f"{key}={value}" for key, value in point.items())])


def _cell(file: StudyFile, scripts: Path, family_name: str, point: dict[str, Any], seed: int) -> Cell:
    """Build a cell; errors name the study, the family and the grid point."""
    family, name = file.families[family_name], f"{_name(family_name, point)} seed={seed}"
    where = f"study {file.name}: {_name(family_name, point)}"
    own = {key: value for key, value in file.data.items() if key != "dataset"}
    own |= {**file.settings, **family.settings, **point, "seed": seed}
    if family.device == "cpu":
        own["cpu"] = True
    try:
        script = import_script(scripts, family.method)
        presets = presets_of(scripts, family.method)
        settings = with_max_train_steps(_resolve(script, presets, family.preset, {**QUIET, **own}), file.budget)
        settings = with_scored_checkpoints(settings, own, file.evaluation)
    except UserError as error:
        raise UserError(f"{where}: {error}{_about_its_grid(file, scripts, family_name)}") from error
    if settings.get("formulation") == "edm" and (sampler := file.evaluation.sampler) is not None:
        from hfgen.methods.schedules import EDM_SAMPLERS

        if sampler not in EDM_SAMPLERS:
            raise UserError(f"{where}: evaluation: sampler: {sampler}: EDM has only {' and '.join(EDM_SAMPLERS)}")
    if file.evaluation.sample_from == "ex_post" and settings.get("density_components") == 0:
        raise UserError(
            f"{where}: evaluation: sample_from ex_post: density_components 0 fits no density; give 1 or more, or "
            "leave sample_from out"
        )
    if family.device == "cuda" and settings["cpu"]:
        raise UserError(f"{where}: device cuda and the setting cpu contradict each other; leave one out")
    return Cell(name, family.method, settings, family.device)


def _about_its_grid(file: StudyFile, scripts: Path, family_name: str) -> str:
    """Return what helps if the study's grid has settings that only other families have; "" if it has none."""
    known = {
        name: default_values(import_script(scripts, family.method).SETTINGS).keys()
        for name, family in file.families.items()
    }
    lacking = [key for key in file.grid if key not in known[family_name] and any(key in one for one in known.values())]
    if not lacking or file.families[family_name].grid is not None:
        return ""
    shared = json.dumps({key: values for key, values in file.grid.items() if key not in lacking}).replace('"', "")
    return f"; give {family_name} a grid of its own, without {' and '.join(lacking)}: grid: {shared}"


def _resolve(script: ModuleType, presets: Path, preset: str | None, own: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a cell, without those that the study controls."""
    flags = settings_as_flags(own, script.SETTINGS, "settings")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = parse_settings(script.SETTINGS, presets, [*([f"--preset={preset}"] if preset else []), *flags])
    except SystemExit:  # from argparse, which has printed the reason
        message = complaint.getvalue().strip().splitlines()[-1]
        raise UserError(message.split("error: ", 1)[-1]) from None
    settings = settings_to_dict(*parsed)
    for key, value in own.items():
        if value is None and settings[key] is not None:
            raise UserError(f"settings: {key} null: does not change {settings[key]!r}; give a value")
    return {key: value for key, value in settings.items() if key == "seed" or key not in SET_BY_THE_STUDY}


def with_max_train_steps(settings: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Return a cell's settings with the number of updates given by the budget.

    Raises:
        UserError: if a schedule needs the number of steps, but the budget is in minutes; if the budget ends before a
            VAE's learned term begins.
    """
    if budget.minutes is not None:
        needing = [f"lr_scheduler {settings['lr_scheduler']}"] if rates_follow_length(settings) else []
        needing += ["learned_term_start"] if settings.get("learned_term_start") else []
        if needing:
            raise UserError(f"budget: minutes: {needing[0]} needs to know the last step; give steps or images")
        return {**settings, "max_train_steps": ENDLESS_STEPS}
    steps = budget.steps or math.ceil((budget.images or 0) / images_per_step(settings))
    check_length(settings.get("learned_term_start", 0), steps)
    return {**settings, "max_train_steps": steps}


def with_scored_checkpoints(settings: dict[str, Any], own: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Return a cell's settings with a checkpoint wherever the evaluation needs a score.

    Raises:
        UserError: if the study's own settings, `own`, also set the checkpoint options.
    """
    if evaluation.every_images is None:
        return settings
    for name in ("checkpoint_every", "checkpoints_total_limit"):
        if name in own:
            raise UserError(f"settings: {name}: is set by evaluation: every_images; leave one out")
    every = math.ceil(evaluation.every_images / images_per_step(settings))
    return {**settings, "checkpoint_every": every, "checkpoints_total_limit": ALL_CHECKPOINTS}


def num_scored_checkpoints(cell: Cell) -> int:
    """Return the number of checkpoints scored before the last step."""
    every = cell.settings["checkpoint_every"]
    if cell.settings["checkpoints_total_limit"] != ALL_CHECKPOINTS or not every:
        return 0
    return max(0, math.ceil(cell.settings["max_train_steps"] / every) - 1)


def images_per_step(settings: dict[str, Any]) -> int:
    """Return the number of training images per update; for a GAN, the `n_critic` batches of a generator update."""
    return settings["batch_size"] * settings.get("n_critic", 1)


def differences(stored: Study, now: Study) -> list[str]:
    """List differences between two studies that affect results, one line each, at most about twenty lines."""
    lines = script_differences(stored.scripts, now.scripts)
    for name in ("version", "metric", "budget", "full_budget", "seeds", "full_seeds"):
        old, new = getattr(stored, name), getattr(now, name)
        if old != new and None not in (old, new):  # only scaled-down studies have full_ values
            lines.append(f"{name}: {old} -> {new}")
    for name in ("evaluation", "full_evaluation"):
        old, new = getattr(stored, name), getattr(now, name)
        if None not in (old, new):
            lines += _changes(name, asdict(old), asdict(new))
    for name in [*stored.cells, *(name for name in now.cells if name not in stored.cells)]:
        before, after = stored.cells.get(name), now.cells.get(name)
        if before is None or after is None:
            lines.append(f"cell {name}: {'new' if before is None else 'gone'}")
            continue
        for key in ("method", "device"):
            lines += _changes(f"cell {name}", {key: getattr(before, key)}, {key: getattr(after, key)})
        old, new = before.settings, json.loads(json.dumps(after.settings))
        if old.keys() != new.keys():  # a setting newer than the study: its default is the old behaviour
            old, new = ({**default_settings(cell.method), **own} for cell, own in ((before, old), (after, new)))
        lines += _changes(f"cell {name}", old, new)
    if not lines:  # rows can change without a change of cells
        rows = [{(_name(one.family, one.point), one.cells) for one in study.places} for study in (stored, now)]
        lines = [
            f"row {name}: new, gone or with other cells" for name in sorted({name for name, _ in rows[0] ^ rows[1]})
        ]
    if len(lines) > MANY_DIFFERENCES:
        lines = [*lines[:MANY_DIFFERENCES], f"and {len(lines) - MANY_DIFFERENCES} more"]
    return lines


def default_settings(method: str) -> dict[str, Any]:
    """Return the defaults of a training script's settings."""
    return default_values(import_script(find_scripts(), method).SETTINGS)


def _changes(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{where}: {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
