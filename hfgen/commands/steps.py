"""`hfgen steps`: measure how many denoising steps a diffusion pipeline needs, and save that as its default."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen.commands.compare import parse_steps, table
from hfgen.commands.options import (
    FLAG,
    MAX_DEFAULT_IMAGES,
    BatchSize,
    DatasetColumn,
    DatasetConfig,
    DatasetSplit,
    Device,
    FeatureMode,
    Features,
    FeatureWeights,
    PipelineFolder,
    Reference,
    Sampler,
    ScoredImages,
    Seed,
    absolute_if_path,
    dataset_of,
    loading,
    require_new_folder,
    start_new_folder,
    trained_on_reference,
)
from hfgen.errors import UserError
from hfgen.files import writing
from hfgen.texts import counted, say, say_lines


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    from diffusers import DiffusionPipeline
    from PIL import Image


DEFAULT_STEPS = "5,10,18,25,50"


def steps(
    pipeline: PipelineFolder,
    reference: Reference,
    output: Annotated[Path, typer.Option("--output", help="new folder for steps.json, steps.md and sheet.png")],
    numbers: Annotated[str, typer.Option("--steps", help="numbers of denoising steps to try")] = DEFAULT_STEPS,
    save: Annotated[
        bool,
        typer.Option(
            "--save", metavar=FLAG, help="save the smallest sufficient number as the default of the pipeline in DIR"
        ),
    ] = False,
    num_images: ScoredImages = None,
    seed: Seed = 0,
    sampler: Sampler = None,
    batch_size: BatchSize = 32,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score a diffusion pipeline at several numbers of denoising steps, and report how many are enough."""
    require_new_folder(output, reference, [pipeline])
    if save:
        check_saves(pipeline, sampler)
    all_steps = sorted(set(parse_steps(numbers)))
    with loading():
        from hfgen.evaluation.reference import open_reference
        from hfgen.evaluation.scoring import score_pipeline
        from hfgen.inference.figures import labelled_rows, labelled_sheet
        from hfgen.inference.opening import find_pipeline, open_pipeline
        from hfgen.inference.sampling import SamplingOptions, image_size
        from hfgen.metrics.report import score_names

    folder = find_pipeline(Path(pipeline).expanduser()) if save else None  # a run may write a newer one meanwhile
    loaded = open_pipeline(pipeline if folder is None else str(folder), device, sampler)
    check_takes_steps(loaded, pipeline, all_steps, save)
    data = dataset_of("--reference", reference, image_size(loaded), dataset_config, dataset_split, dataset_column)
    real = open_reference(data, loaded.device, features, mode, feature_weights)
    options = SamplingOptions(num_images or min(len(real.features), MAX_DEFAULT_IMAGES), seed, None, batch_size)
    trained_on = trained_on_reference([pipeline], data, real)[pipeline]
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Image.Image]] = []
    fid, enough = score_names(real.extractor.identity)["fid"], 0
    try:
        for number in all_steps:
            scored = score_pipeline(loaded, real, replace(options, num_inference_steps=number), trained_on=trained_on)
            rows.append({"name": counted(number, "step"), "steps": number, **scored.report})
            shown.append((rows[-1]["name"], labelled_sheet(scored.shown, columns=len(scored.shown))))
            say(f"{rows[-1]['name']}: {fid} {scored.report['scores']['fid']:.4g}")
        enough = fewest_that_suffice(rows)
    finally:  # what has been scored outlives a failure and an interruption
        if rows:
            report = {"reference": absolute_if_path(reference), "enough": enough or None, "rows": rows}
            write_steps(output, report, labelled_rows(shown))
    say(f"steps needed: {enough}, the smallest number whose {fid} is within one standard error of the lowest")
    if folder is not None:
        save_number_of_steps(folder, enough)


def check_saves(pipeline: str, sampler: str | None) -> None:
    """Raise a `UserError` if a number of steps cannot be saved in a pipeline, whatever it is."""
    if sampler is not None:
        raise UserError("--save --sampler: the number is saved for the pipeline's own sampler; use only one of them")
    if not Path(pipeline).expanduser().is_dir():
        raise UserError(f"--save: {pipeline} is not a local folder; download it, or leave out --save")


def check_takes_steps(loaded: "DiffusionPipeline", pipeline: str, all_steps: list[int], save: bool) -> None:
    """Raise a `UserError` if a pipeline does not support these numbers of steps, or cannot save one."""
    from hfgen.families import family

    if family(loaded) != "ddpm":
        raise UserError(f"{pipeline} is not a diffusion pipeline: it generates in one step")
    trained = loaded.scheduler.config.num_train_timesteps
    if all_steps[-1] > trained:
        raise UserError(f"--steps {all_steps[-1]}: this pipeline takes at most {trained}")
    if save and type(loaded.unet).__module__.startswith("diffusers."):
        raise UserError(
            f"--save: {pipeline} consists of diffusers' own classes, which cannot store a number of steps; leave out "
            "--save, and pass num_inference_steps to each call"
        )


def write_steps(output: Path, report: dict[str, Any], sheet: "Image.Image") -> None:
    """Write the scores to a new folder, as JSON and as a table, and the images; print the table."""
    from hfgen.metrics.report import to_json

    say_lines(table(report["rows"]))  # before anything that may fail
    start_new_folder(output)
    with writing(output):
        (output / "steps.json").write_text(to_json(report))
        (output / "steps.md").write_text(table(report["rows"]), encoding="utf-8")
        sheet.save(output / "sheet.png")
    say(f"steps.json, .md and sheet.png in {output}")


def fewest_that_suffice(rows: list[dict[str, Any]]) -> int:
    """Return the fewest steps whose FID is within one standard error of the lowest.

    Args:
        rows: one per number of `steps`, with its `scores`: `fid` and `fid_standard_error`.

    Raises:
        UserError: if no FID is finite.
    """
    finite_rows = [row for row in rows if math.isfinite(row["scores"]["fid"])]
    if not finite_rows:
        raise UserError("no number of steps has a finite FID: this pipeline does not generate valid images")
    best = min(finite_rows, key=lambda row: row["scores"]["fid"])["scores"]
    limit = best["fid"] + best["fid_standard_error"]
    return min(row["steps"] for row in finite_rows if row["scores"]["fid"] <= limit)


def save_number_of_steps(folder: Path, number: int) -> None:
    """Make a number of denoising steps the default of the pipeline in a folder."""
    import hfgen.pipelines.pipeline_ddpm as code
    from hfgen.files import write_text_atomically
    from hfgen.integrity import DIGESTS_FILE, record_digests, recorded_names
    from hfgen.training.folder import run_of

    if not (folder / "model_index.json").is_file():
        why = "its run deleted this checkpoint while you measured; continue the run with --num_inference_steps"
        if run_of(folder) is None:
            why = "it was moved or deleted while you measured; the number to save was"
        raise UserError(f"--save: {folder} is gone: {why} {number}")
    # The code beside the weights may be from a version without this default.
    write_text_atomically(folder / "pipeline_ddpm.py", Path(code.__file__).read_text(encoding="utf-8"))
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"num_inference_steps": number}
    write_text_atomically(file, json.dumps(index, indent=2) + "\n")
    if (folder / DIGESTS_FILE).is_file():  # of hfgen's own files: a user's beside them must not become one
        own = {*recorded_names(folder), "pipeline_ddpm.py", file.name} - {DIGESTS_FILE, "*"}
        record_digests(folder, sorted(name for name in own if (folder / name).is_file()))
    say(
        f"saved in {file}; if you continue the training, add --num_inference_steps {number}, or the old number returns"
    )
