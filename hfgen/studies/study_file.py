"""The study file: families, settings, budget, seeds and evaluation."""

import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hfgen.errors import UserError
from hfgen.files import read_written_text
from hfgen.ranges import COUNT, SCORED_IMAGES, SEED, Range
from hfgen.studies.scripts import METHODS, study_folders
from hfgen.texts import one_line


# The most that a study file may hold, with the parts that it repeats by name written out, and the levels of nesting.
MAX_PARTS, MAX_DEPTH = 100_000, 20
# Metrics that a study can compare, and their column headings.
METRICS = {
    "fid": "FID",
    "kid": "KID",
    "minutes": "minutes of training",
    "images_per_second": "images/s in training",
}
# Settings controlled by the study, the same for all cells.
SET_BY_THE_STUDY = {
    "dataset": "give data: dataset, or --dataset",
    "output_dir": "give --output",
    "seed": "give seeds",
    "max_train_steps": "give budget: steps",
    "num_epochs": "give budget: images",
    "max_train_time": "give budget: minutes",
    "resume": "a study resumes automatically",
    "push_to_hub": "a study does not publish",
    "hub_model_id": "a study does not publish",
    "hub_private_repo": "a study does not publish",
}
Part = TypeVar("Part")


@dataclass(frozen=True)
class Budget:
    """How long each cell trains: the same for all, in one of three units.

    Attributes:
        steps: updates of the weights.
        images: training images seen by the network (for a GAN, by the discriminator).
        minutes: minutes of training.
    """

    steps: int | None = None
    images: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        given = [one for one in fields(self) if getattr(self, one.name) is not None]
        if len(given) != 1:
            raise UserError("budget: give exactly one of steps, images and minutes")
        name, value = given[0].name, getattr(self, given[0].name)
        kind, whole = (int | float, "") if name == "minutes" else (int, "whole ")
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise UserError(f"budget: {name} {value!r}: must be a {whole}number above 0, in digits such as 90000")
        Range(0, 10**12, above=True).check(f"budget: {name}", value)

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} minutes"
        return f"{self.images:,} images" if self.images is not None else f"{self.steps:,} steps"


@dataclass(frozen=True)
class Evaluation:
    """How each trained cell is scored, as in `hfgen evaluate`.

    Attributes:
        num_images: images generated per cell.
        seed: seed of the generated images, the same for all cells.
        num_inference_steps: denoising steps, for diffusion.
        sampler: for diffusion; the saved one if None.
        sample_from: for a VAE: "prior" or "ex_post"; the latter if None.
        features: feature network.
        mode: resizing for Inception.
        every_images: training images between two scores during training, for a curve; None: score only at the end.
    """

    num_images: int = 5000
    seed: int = 0
    num_inference_steps: int = 50
    sampler: str | None = None
    sample_from: str | None = None
    features: str = "inception"
    mode: str = "clean"
    every_images: int | None = None

    def __post_init__(self):
        ranges = {"num_images": SCORED_IMAGES, "num_inference_steps": COUNT, "seed": SEED}
        if self.every_images is not None:
            ranges["every_images"] = COUNT
        for name, allowed in ranges.items():
            _check_whole(f"evaluation: {name} {getattr(self, name)!r}", getattr(self, name), allowed)
        # The other lists are in modules that take seconds to import.
        if self.sampler is not None:
            from hfgen.methods.schedules import SAMPLERS

            _check_choice("evaluation: sampler", self.sampler, SAMPLERS)
        _check_choice("evaluation: sample_from", self.sample_from, (None, "prior", "ex_post"))
        _check_choice("evaluation: mode", self.mode, ("clean", "legacy"))
        if self.features != "inception":
            from hfgen.metrics.vision_transformers import TRANSFORMERS

            _check_choice("evaluation: features", self.features, ("inception", *TRANSFORMERS))
            _check_choice(f"evaluation: mode with features {self.features}", self.mode, ("clean",))


@dataclass(frozen=True)
class Family:
    """A row of the table: a training script, a preset, and its own settings.

    Attributes:
        method: "ddpm", "gan" or "vae".
        preset: preset of the script; the script's defaults if None.
        settings: settings that override the preset.
        grid: values by setting; the study's grid if None.
        device: "cpu", "cuda" (machines without CUDA skip its cells with a message) or None.
    """

    method: str
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    device: str | None = None

    def __post_init__(self):
        _check_choice("method", self.method, METHODS)
        if self.preset is not None and (not isinstance(self.preset, str) or not self.preset):
            raise UserError(f"preset: {self.preset!r}: must be the name of a preset, or the path of its file")
        _refuse_what_the_study_sets("settings", _mapping(self.settings, "settings"))
        if self.grid is not None:
            _check_grid("grid", self.grid, self.settings)
        _check_choice("device", self.device, (None, "cpu", "cuda"))


@dataclass(frozen=True)
class StudyFile:
    """The content of a study file.

    Attributes:
        name: file name without its suffix.
        title: heading of the report.
        families: rows of the table, by name.
        budget: training budget per cell.
        question: the question that the study answers, for the report.
        source: source of the published figures.
        published: by family, one figure (or remark) per grid point.
        data: data settings of all cells.
        settings: settings of all cells.
        grid: values by setting; cells are all combinations.
        seeds: every grid point is trained with each seed.
        evaluation: how cells are scored.
        metric: a key of `METRICS`: what the table compares.
    """

    name: str
    title: str
    families: dict[str, Family]
    budget: Budget
    question: str = ""
    source: str = ""
    published: dict[str, list[Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    evaluation: Evaluation = field(default_factory=Evaluation)
    metric: str = "fid"

    def __post_init__(self):
        for name in ("title", "question", "source"):
            text = getattr(self, name)
            if not isinstance(text, str) or (name == "title" and not text.strip()):
                raise UserError(f"{name}: {text!r}: must be text; write it in quotes")
        _check_choice("metric", self.metric, METRICS)
        if self.evaluation.every_images is not None and self.budget.minutes is not None:
            raise UserError("evaluation: every_images needs a budget in images or steps, not in minutes")
        for seed in self.seeds:
            _check_whole(f"seeds: {seed!r}", seed, SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds: give at least one, without repeats")
        if not isinstance(self.data.get("dataset", ""), str):
            raise UserError(f"data: dataset: {self.data['dataset']!r}: must be text; write it in quotes")
        _refuse_what_the_study_sets("data", {key: value for key, value in self.data.items() if key != "dataset"})
        _refuse_what_the_study_sets("settings", self.settings)
        _check_grid("grid", self.grid, self.settings)
        if not self.families:
            raise UserError("families: give at least one")
        for name, family in self.families.items():
            if family.grid is None:
                _check_grid(f"families: {name}: grid", self.grid, family.settings)
        for name, figures in self.published.items():
            self._check_published(name, figures)

    def points(self, family: str) -> list[dict[str, Any]]:
        """Return a family's grid points: all combinations of its values, or one empty point if there is no grid."""
        own = self.families[family].grid
        grid = self.grid if own is None else own
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def _check_published(self, family: str, figures: list[Any]) -> None:
        _check_choice("published", family, self.families)
        for figure in figures:
            if isinstance(figure, bool) or not isinstance(figure, int | float | str | None):
                raise UserError(f"published: {family}: {figure!r}: must be a number, or a remark in quotes")
        if len(figures) != (points := len(self.points(family))):
            raise UserError(f"published: {family}: {len(figures)} figures for {points} points; write null for none")


def find_study_file(name: str) -> Path:
    """Find a study by its path, or a shipped one by its name, such as `studies/gan_loss.yaml` or `gan_loss`.

    Raises:
        UserError: if there is none.
    """
    folders = study_folders()
    short = name.removeprefix("studies/").removesuffix(".yaml")
    for path in (Path(name).expanduser(), *(folder / f"{short}.yaml" for folder in folders)):
        if path.is_file():
            return path
    known = ", ".join(sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))
    raise UserError(f"{name}: neither a study file nor one of the shipped studies ({known})")


def read_study_file(path: Path) -> StudyFile:
    """Read a study file.

    Raises:
        UserError: if it is not YAML, or a part is missing, unknown or invalid; the message names file and part.
    """
    try:
        text = read_written_text(path)
        _check_bounded(text)
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise UserError(f"{path}: not valid YAML ({one_line(error)})") from error
    try:
        _refuse_duplicate_keys(yaml.compose(text, yaml.SafeLoader))
        return _parse(path.stem, _mapping(content, "the file"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parse(name: str, content: dict[str, Any]) -> StudyFile:
    if "name" in content:
        raise UserError("the file: name: leave it out, the study is named after its file")
    parts = dict(content)
    for key in ("data", "settings", "grid", "published", "families"):
        parts[key] = _mapping(parts.get(key, {}), key)
    for key, cls in (("budget", Budget), ("evaluation", Evaluation)):
        if key in parts:
            parts[key] = _build(cls, _mapping(parts[key], key), key)
    parts["families"] = {
        row: _build(Family, _mapping(family, f"families: {row}"), f"families: {row}")
        for row, family in parts["families"].items()
    }
    if not isinstance(seeds := parts.get("seeds", [0]), list):
        raise UserError("seeds: write a list, such as [0, 1, 2]")
    parts["seeds"] = tuple(seeds)
    parts["published"] = {
        row: [_figure(one) for one in (figures if isinstance(figures, list) else [figures])]
        for row, figures in parts["published"].items()
    }
    return _build(StudyFile, {"name": name, **parts}, "the file")


def _figure(value: Any) -> Any:
    """Return a published figure as a number, even if YAML parses it as text (1e-4, NaN); remarks stay text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _build(cls: type[Part], values: dict[str, Any], where: str) -> Part:
    """Build a part of the study; errors name missing and unknown keys."""
    parts = fields(cls)  # type: ignore[arg-type]
    for key in values:
        _check_choice(f"{where}: unknown key", key, [one.name for one in parts])
    needed = [one.name for one in parts if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where}: {' and '.join(missing)} must be given")
    try:
        return cls(**values)
    except UserError as error:
        prefix = "" if cls is StudyFile or str(error).startswith(f"{where}: ") else f"{where}: "
        raise UserError(f"{prefix}{error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}: must be names with values, such as {{batch_size: 64}}, not {found}")
    for key in value:
        if not isinstance(key, str) or not key.strip():
            raise UserError(f"{where}: {key!r}: a name must be text; write it in quotes")
    return value


def _check_bounded(text: str) -> None:
    """Refuse what is nested too deeply, or would grow too large where it names parts of itself."""
    open_parts: list[list[Any]] = [[None, 0]]  # anchor and size of each collection that is open
    sizes: dict[str, int] = {}  # of each part with an anchor, written out
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append([anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_parts.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(anchor), MAX_PARTS)  # an unknown one is a part of itself
        if size and anchor is not None:
            sizes[anchor] = size
        open_parts[-1][1] += size
        if len(open_parts) > MAX_DEPTH or open_parts[-1][1] > MAX_PARTS:
            place = f"line {event.start_mark.line + 1}"
            raise ValueError(f"{place}: more than {MAX_PARTS} parts, written out, or {MAX_DEPTH} levels")


def _refuse_duplicate_keys(node: yaml.Node | None, above: frozenset[yaml.Node] = frozenset()) -> None:
    """Refuse duplicate keys, of which YAML would silently keep only the last."""
    if not isinstance(node, yaml.CollectionNode) or node in above:  # aliases can be circular
        return
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, one) for one in node.value]
    names = [key.value for key, _ in pairs if key is not None]
    for index, (key, value) in enumerate(pairs):
        if key is not None and key.value in names[:index]:
            raise UserError(f"line {key.start_mark.line + 1}: {key.value!r} appears twice; leave one out")
        _refuse_duplicate_keys(value, above | {node})


def _check_choice(where: str, value: Any, choices: Iterable[str | None]) -> None:
    choices = list(choices)
    if value not in choices:
        known = [one for one in choices if one is not None]
        near = difflib.get_close_matches(str(value), known, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: {value!r} is not one of {', '.join(known)}{suggestion}")


def _check_whole(where: str, value: Any, allowed: Range) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < allowed.minimum:
        raise UserError(f"{where}: must be a whole number, at least {allowed.minimum:g}")
    allowed.check(where.rpartition(" ")[0], value)


def _check_grid(where: str, grid: dict[str, list[Any]], settings: dict[str, Any]) -> None:
    _refuse_what_the_study_sets(where, _mapping(grid, where))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {key}: write a list of values, such as [64, 128]")
        if len({str(value) for value in values}) < len(values):
            raise UserError(f"{where}: {key}: a value appears twice; leave one out")
        if key in settings:
            raise UserError(f"{where}: {key}: is also among the settings, where it has no effect; leave one out")


def _refuse_what_the_study_sets(where: str, settings: dict[str, Any]) -> None:
    for key in settings:
        if key in SET_BY_THE_STUDY:
            raise UserError(f"{where}: {key} cannot be set there: {SET_BY_THE_STUDY[key]}")
