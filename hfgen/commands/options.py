"""Arguments, options and checks shared by several commands."""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfgen.arguments import errors_name_dataset_as
from hfgen.errors import UserError
from hfgen.files import is_empty_folder, read_json, require_place_for, writing
from hfgen.ranges import COUNT, SCORED_IMAGES, SEED, Range
from hfgen.run_files import SETTINGS_FILE, TRAINING_FILE
from hfgen.texts import say, say_lines


if TYPE_CHECKING:
    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.reference import ReferenceImages


# The `metavar` of an option that takes no value: without it, `--help` names a type as if it did.
FLAG = ""


def in_range(allowed: Range) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """Return a `callback` for an option that is a number: it raises a `UserError` for one outside the range."""

    def check(option: typer.CallbackParam, value: float | None) -> float | None:
        allowed.check(option.opts[0], value)
        return value

    return check


PipelineFolder = Annotated[str, typer.Argument(metavar="DIR", help="a run, a checkpoint, a pipeline, or a Hub repo")]
Steps = Annotated[
    int | None,
    typer.Option(
        "--num_inference_steps",
        callback=in_range(COUNT),
        help="denoising steps; fewer is faster; unset: the saved number",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", callback=in_range(SEED), help="random seed; the same seed gives the same images")
]
Sampler = Annotated[
    str | None, typer.Option("--sampler", help="diffusion sampler: ddim, dpm, unipc or ddpm; unset: the saved one")
]
SampleFrom = Annotated[
    str | None,
    typer.Option(
        "--sample_from", help="where a VAE's latents come from: prior or ex_post; unset: ex_post if it was fitted"
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps; auto: the fastest available")]
Reference = Annotated[
    str, typer.Option("--reference", help="real images: a folder, Hub dataset or other --dataset value")
]
DatasetConfig = Annotated[
    str | None, typer.Option("--dataset_config", help="configuration of a Hub dataset, if it has several")
]
DatasetSplit = Annotated[str, typer.Option("--dataset_split", help="split of the dataset")]
DatasetColumn = Annotated[str | None, typer.Option("--dataset_column", help="column or feature with the images")]
Features = Annotated[str, typer.Option("--features", help="feature network for the scores: inception, dinov2 or clip")]
FeatureMode = Annotated[
    str, typer.Option("--mode", help="resizing for Inception: clean (as clean-fid) or legacy (for old scores)")
]
FeatureWeights = Annotated[
    str | None,
    typer.Option(
        "--feature_weights",
        help="TorchScript file of Inception (unset: found if installed); for dinov2 and clip, a folder or Hub repo",
    ),
]
ScoredImages = Annotated[
    int | None,
    typer.Option(
        "--num_images",
        callback=in_range(SCORED_IMAGES),
        help="images to generate for each score; unset: as many as in the reference, up to 5000",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch_size", callback=in_range(Range(1, 10_000)), help="images per batch; lower it to save memory"
    ),
]


# Default number of generated images: that of the real ones, up to this.
MAX_DEFAULT_IMAGES = 5000
LOADING = "loading PyTorch and diffusers ..."


@contextmanager
def loading() -> Iterator[None]:
    """Show what takes seconds while the body imports slow packages, on a terminal; erase it afterwards."""
    if "diffusers" in sys.modules or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(LOADING)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write(f"\r{' ' * len(LOADING)}\r")
        sys.stderr.flush()


def dataset_of(
    argument: str,
    dataset: str,
    sample_size: int,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> "DataSettings":
    """Return the settings of a dataset that is not given by `--dataset`; a `UserError` names its argument."""
    from hfgen.data.settings import DataSettings

    with errors_name_dataset_as(argument):
        return DataSettings(dataset, config, split, column, sample_size=sample_size)


def trained_on_reference(
    pipelines: list[str], data: "DataSettings", real: "ReferenceImages"
) -> dict[str, bool | None]:
    """Return which pipelines were trained on the reference, None if unknown; warn of the others, before the work."""
    from hfgen.evaluation.trained_on import was_trained_on
    from hfgen.metrics.report import OTHER_DATA

    trained_on = {pipeline: was_trained_on(pipeline, data, real.images) for pipeline in pipelines}
    if others := [pipeline for pipeline, known in trained_on.items() if known is False]:
        say(f"warning: --reference {data.dataset}: {', '.join(others)}: {OTHER_DATA}", err=True)
    return trained_on


def absolute_if_path(reference: str) -> str:
    """Return an existing path as an absolute one, so that it cannot be mistaken for a Hub dataset later."""
    from hfgen.data.location import is_missing, is_path

    exists = is_path(reference) and not is_missing(reference)
    return str(Path(reference).expanduser().resolve()) if exists else reference


def require_new_folder(output: Path, data: str = "", sources: Iterable[str | Path] = ()) -> None:
    """Raise a `UserError` if a command's output folder is not empty, or lies among images; see `require_apart`."""
    require_apart(output, data, sources)
    if os.path.exists(output) and not is_empty_folder(output):
        raise UserError(f"--output {output} exists and is not empty; choose another folder")
    require_place_for(output, "--output")


def start_new_folder(output: Path) -> None:
    """Create the output folder of a command, once there is something to write.

    Raises:
        UserError: if it cannot be created, or another command has written there since `require_new_folder` looked.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if not is_empty_folder(output):
            raise UserError(f"--output {output}: another command has written there meanwhile; choose another folder")


@contextmanager
def printed_if_not_written(results: str) -> Iterator[None]:
    """Print results if the body, which writes them, raises a `UserError`: they took long."""
    try:
        yield
    except UserError:
        say_lines(results)
        raise


def require_apart(output: Path, data: str = "", sources: Iterable[str | Path] = ()) -> None:
    """Raise a `UserError` if pictures would be written into a folder of images, and later be taken for some of them.

    Args:
        output: file or folder to write.
        data: a dataset that the command reads.
        sources: runs or their pipelines: the folders are those that they were trained on.
    """
    place = Path(os.path.realpath(os.path.expanduser(output)))
    above = [place, *place.parents]
    if any((folder / SETTINGS_FILE).is_file() for folder in above):  # runs and pipelines are not read as data
        return
    for dataset in (data, *map(_data_of, sources)):
        folder = Path(os.path.realpath(os.path.expanduser(dataset)))
        if dataset and folder.is_dir() and folder in above:
            raise UserError(
                f"--output {output} is inside the dataset folder {folder} and would later be read as data; choose a "
                "place outside it"
            )


def _data_of(source: str | Path) -> str:
    """Return the dataset of the run that a folder is, or is a part of; "" if there is none or its place is unknown."""
    folder = Path(os.path.abspath(os.path.expanduser(source)))
    for place in (folder, *folder.parents[:3]) if folder.exists() else ():  # RUN/checkpoints/step-.../pipeline
        try:
            settings = read_json(place / SETTINGS_FILE, ("dataset", "output_dir"))
        except (UserError, OSError):
            continue
        dataset, parts = Path(str(settings["dataset"])), Path(str(settings["output_dir"])).parts
        if dataset.is_absolute():
            return str(dataset)
        # Both are as they were typed: what remains of the run's folder is where that was.
        is_there = place.parts[-len(parts) :] == parts and not (place / TRAINING_FILE).is_file()
        return str(Path(*place.parts[: -len(parts)]) / dataset) if is_there else ""
    return ""


def refuse_to_replace(file: Path, option: str = "--output", endings: Collection[str] = ()) -> None:
    """Raise a `UserError` if a command's output file exists, cannot be created, or has not one of the endings."""
    if endings and file.suffix.lower() not in endings:
        raise UserError(f"{option} {file}: must end in {' or '.join(endings)}")
    if os.path.exists(file):  # unlike Path.exists, accepts names that are too long
        raise UserError(f"{option} {file} exists; choose another name")
    require_place_for(file, option)


def parse_numbers(option: str, text: str) -> list[int]:
    """Parse whole numbers such as "10,25,50".

    Raises:
        UserError: if one is not a whole number; the message names the option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: must be numbers separated by commas") from error
