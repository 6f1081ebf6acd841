"""The file of a study: which families, which settings, what budget, which seeds, how it is scored."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hfgen.errors import UserError


SCRIPTS_FOLDER = "training_scripts"
METHODS = {"ddpm": "train_ddpm.py", "gan": "train_gan.py", "vae": "train_vae.py"}
# What a study compares, and how it is written above a column of figures.
METRICS = {
    "fid": "FID",
    "kid": "KID",
    "minutes": "minutes of training",
    "images_per_second": "images/s in training",
}
# Settings that the study itself decides, of every cell alike.
DECIDED = {
    "dataset": "give data: dataset, or --dataset",
    "output_dir": "give --output",
    "seed": "give seeds",
    "max_train_steps": "give budget: steps",
    "num_epochs": "give budget: images",
    "max_train_time": "give budget: minutes",
    "resume": "a study resumes by itself",
    "push_to_hub": "a study publishes nothing",
    "hub_model_id": "a study publishes nothing",
    "hub_private_repo": "a study publishes nothing",
}
Part = TypeVar("Part")


@dataclass(frozen=True)
class Budget:
    """How long each cell trains: the same for all, in one of three units.

    Attributes:
        steps: updates of the weights.
        images: training images that the network (of a GAN: the discriminator) has seen.
        minutes: of training.
    """

    steps: int | None = None
    images: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        given = [one for one in fields(self) if getattr(self, one.name) is not None]
        if len(given) != 1:
            raise UserError("budget: give one of steps, images and minutes")
        value = getattr(self, given[0].name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"budget: {given[0].name} {value!r}: must be a number above 0")

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} minutes of training"
        return f"{self.images:,} images" if self.images is not None else f"{self.steps:,} steps"


@dataclass(frozen=True)
class Evaluation:
    """How each trained cell is scored; as `hfgen evaluate` does it.

    Attributes:
        num_images: drawn from each.
        seed: of the drawing, for all cells alike.
        num_inference_steps: of diffusion.
        sampler: of diffusion; as saved if None.
        sample_from: of a VAE: "prior" or "ex_post"; the latter if None.
        features: where images are compared.
        mode: how Inception's images are resized.
    """

    num_images: int = 5000
    seed: int = 0
    num_inference_steps: int = 50
    sampler: str | None = None
    sample_from: str | None = None
    features: str = "inception"
    mode: str = "clean"

    def __post_init__(self):
        for name, least in (("num_images", 10), ("num_inference_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"evaluation: {name} {value!r}: must be a whole number from {least}")


@dataclass(frozen=True)
class Family:
    """A row of the table: a training script, a preset, and settings of its own.

    Attributes:
        method: "ddpm", "gan" or "vae".
        preset: of that script; its defaults if None.
        settings: on top of the preset.
        grid: values by setting; that of the study if None.
        device: "cpu", or "cuda": then a machine without CUDA leaves its cells out and says so.
    """

    method: str
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    device: str | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method: {self.method!r} is none of {', '.join(METHODS)}")
        if self.device not in (None, "cpu", "cuda"):
            raise UserError(f"device: {self.device!r} must be cpu or cuda, or left out")


@dataclass(frozen=True)
class StudyFile:
    """A study as it is written down.

    Attributes:
        name: of the file, without its ending.
        title: heading of the report.
        families: rows of the table, by name.
        budget: of each cell.
        question: that the study answers, for the report.
        source: of the published figures.
        published: by family one figure (or remark) for each point of its grid.
        data: settings of the data, of all cells.
        settings: of all cells.
        grid: values by setting; the cells are all their combinations.
        seeds: each cell is trained with each.
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
        if self.metric not in METRICS:
            raise UserError(f"metric: {self.metric!r} is none of {', '.join(METRICS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds: give at least one, each once")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise UserError(f"seeds: {seed!r}: must be a whole number from 0")
        if not self.families:
            raise UserError("families: give at least one")
        for name, family in self.families.items():
            _check_grid(f"families: {name}: grid", self.grid if family.grid is None else family.grid)
            for where, settings in (("data", self.data), ("settings", {**self.settings, **family.settings})):
                _check_free_to_choose(where, settings)
        for name in self.published:
            if name not in self.families:
                raise UserError(f"published: {name!r} is none of the families ({', '.join(self.families)})")


def find_study_file(name: str) -> Path:
    """Find a study by its path, or one of the shipped ones by its name, such as `studies/gan_loss.yaml` or `gan_loss`.

    Raises:
        UserError: if there is none.
    """
    shipped = find_scripts() / "studies"
    short = name.removeprefix("studies/").removesuffix(".yaml")
    for path in (Path(name).expanduser(), shipped / f"{short}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise UserError(f"{name}: neither a study file nor one of the shipped studies ({known})")


def find_scripts() -> Path:
    """Find the training scripts: in the working folder, or where hfgen was installed from with `pip install -e`.

    Raises:
        UserError: if they are in neither place.
    """
    places = [Path(SCRIPTS_FOLDER), Path(__file__).resolve().parents[2] / SCRIPTS_FOLDER]
    for folder in places:
        if (folder / METHODS["gan"]).is_file():
            return folder.resolve()
    raise UserError(f"there is no {SCRIPTS_FOLDER}/ here: run hfgen study in a checkout of hfgen")


def read_study_file(path: Path) -> StudyFile:
    """Read a study file.

    Raises:
        UserError: if it is no YAML, or a part of it is missing, unknown or of no use; the message names both.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    try:
        return _parse(path.stem, _mapping(content, "the file"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parse(name: str, content: dict[str, Any]) -> StudyFile:
    parts = dict(content)
    for key in ("data", "settings", "grid", "published"):
        parts[key] = _mapping(parts.get(key, {}), key)
    for key, cls in (("budget", Budget), ("evaluation", Evaluation)):
        if key in parts:
            parts[key] = _build(cls, _mapping(parts[key], key), key)
    families = _mapping(parts.get("families", {}), "families")
    parts["families"] = {
        str(row): _build(Family, _mapping(family, f"families: {row}"), f"families: {row}")
        for row, family in families.items()
    }
    if "seeds" in parts:
        if not isinstance(parts["seeds"], list):
            raise UserError("seeds: write a list, such as [0, 1, 2]")
        parts["seeds"] = tuple(parts["seeds"])
    parts["published"] = {
        str(row): figures if isinstance(figures, list) else [figures] for row, figures in parts["published"].items()
    }
    return _build(StudyFile, {"name": name, **parts}, "the file")


def _build(cls: type[Part], values: dict[str, Any], where: str) -> Part:
    """Make a part of the study; a missing or an unknown key is an error that names it."""
    known = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" * bool(near)))
    try:
        return cls(**values)
    except TypeError as error:  # of a dataclass: which arguments are missing
        raise UserError(f"{where}: {str(error).split('__init__() ')[-1]}") from error
    except UserError as error:
        prefix = "" if cls is StudyFile or str(error).startswith(where) else f"{where}: "
        raise UserError(f"{prefix}{error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: names with values are needed, not {type(value).__name__}")
    return value


def _check_grid(where: str, grid: dict[str, list[Any]]) -> None:
    _check_free_to_choose(where, grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {key}: write a list of values, such as [64, 128]")
        if len({str(value) for value in values}) < len(values):
            raise UserError(f"{where}: {key}: a value stands there twice")


def _check_free_to_choose(where: str, settings: dict[str, Any]) -> None:
    for key in settings:
        if key in DECIDED and not (where == "data" and key == "dataset"):
            raise UserError(f"{where}: {key} is not to be set there: {DECIDED[key]}")
