"""`hfgen evaluate`: generate images with a pipeline, score them against real images, write a report."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen.arguments import errors_name_dataset_as, require_beside
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
    SampleFrom,
    Sampler,
    ScoredImages,
    Seed,
    Steps,
    absolute_if_path,
    dataset_of,
    in_range,
    loading,
    printed_if_not_written,
    require_new_folder,
    start_new_folder,
    trained_on_reference,
)
from hfgen.files import writing
from hfgen.ranges import PIXELS, SCORED_IMAGES, Range
from hfgen.texts import say, say_lines


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    from diffusers import DiffusionPipeline

    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.reference import ReferenceImages
    from hfgen.evaluation.scoring import Scored
    from hfgen.inference.sampling import SamplingOptions


MIN_HELD_OUT = 2  # FID has a covariance


HeldOut = Annotated[
    str | None,
    typer.Option("--held_out", help="real images not used in training, as for --dataset; tests for copying"),
]
HeldOutSplit = Annotated[
    str | None, typer.Option("--held_out_split", help="split of --held_out; unset: test, or everything without splits")
]
Output = Annotated[
    Path, typer.Option("--output", help="new folder for evaluation.json, .md, model-index.yml and two sheets")
]
Extrapolate = Annotated[
    bool,
    typer.Option(
        "--extrapolate",
        metavar=FLAG,
        help="also extrapolate FID to infinitely many images; computes FID ten more times",
    ),
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        callback=in_range(Range(1, 1000)),
        help="number of image sets, with consecutive seeds; above 1 also reports the spread",
    ),
]


def evaluate(
    pipeline: PipelineFolder,
    reference: Reference,
    output: Output,
    num_images: ScoredImages = None,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    sampler: Sampler = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    held_out: HeldOut = None,
    held_out_split: HeldOutSplit = None,
    repeats: Repeats = 1,
    extrapolate: Extrapolate = False,
    bits_per_dimension: Annotated[
        bool,
        typer.Option(
            "--bits_per_dimension", metavar=FLAG, help="also bound the likelihood of real images; VAE and DDPM only"
        ),
    ] = False,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score a pipeline against real images: FID, KID, precision, recall, copies, and the data's own floor."""
    require_new_folder(output, reference, [pipeline])
    require_beside("--held_out_split", held_out_split, "--held_out", held_out)
    with loading():
        from hfgen.evaluation.bits_per_dimension import likelihood_report
        from hfgen.evaluation.reference import open_reference
        from hfgen.evaluation.scoring import repeat_scores, score_pipeline
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import SamplingOptions, image_size
        from hfgen.metrics.report import markdown

    loaded = open_pipeline(pipeline, device, sampler)
    options = SamplingOptions(num_images or 0, seed, num_inference_steps, batch_size, sample_from=sample_from)
    refuse_the_impossible(loaded, options, extrapolate, bits_per_dimension)
    data = dataset_of("--reference", reference, image_size(loaded), dataset_config, dataset_split, dataset_column)
    other_data = held_out_of(held_out, held_out_split, data)
    real = open_reference(data, loaded.device, features, mode, feature_weights)
    other = load_held_out(other_data, real)
    options = replace(options, num_images=num_images or min(len(real.features), MAX_DEFAULT_IMAGES))
    trained_on = trained_on_reference([pipeline], data, real)[pipeline]
    scored = score_pipeline(loaded, real, options, extrapolate, other, trained_on)
    report = {"reference": absolute_if_path(reference), **scored.report}
    name = Path(pipeline).resolve().name
    with printed_if_not_written(markdown(report)):
        start_new_folder(output)
        write_evaluation(output, report, scored, name)  # outlives an interruption of what follows
    if bits_per_dimension:
        images = "held_out" if other else "training" if trained_on else "reference"
        report["likelihood"] = likelihood_report(loaded, other or real, seed, images, batch_size)
    if repeats > 1:
        report["repeats"] = repeat_scores(loaded, real, options, repeats, report["scores"])
    print_and_write(output, report, scored, name)


def refuse_the_impossible(
    pipeline: "DiffusionPipeline", options: "SamplingOptions", extrapolate: bool, bits_per_dimension: bool
) -> None:
    """Raise a `UserError` for what a pipeline cannot do, before the features of the real images, which take long.

    Args:
        pipeline: the one to score.
        options: how to generate; no images, if as many as there are real ones.
        extrapolate: whether FID is to be extrapolated.
        bits_per_dimension: whether the likelihood is to be bounded.
    """
    from hfgen.evaluation.bits_per_dimension import check_has_likelihood
    from hfgen.evaluation.scoring import check_enough_to_extrapolate
    from hfgen.inference.sampling import check_sampling

    if bits_per_dimension:
        check_has_likelihood(pipeline)
    check_sampling(pipeline, options)
    if extrapolate and options.num_images:
        check_enough_to_extrapolate(options.num_images)


def evaluate_images(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="generated images, as for --dataset")],
    reference: Reference,
    output: Output,
    sample_size: Annotated[
        int, typer.Option("--sample_size", callback=in_range(PIXELS), help="both are resized to this, in pixels")
    ],
    seed: Seed = 0,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    held_out: HeldOut = None,
    held_out_split: HeldOutSplit = None,
    extrapolate: Extrapolate = False,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score images generated by something else, in the same way as `evaluate` scores a pipeline."""
    require_new_folder(output, reference)
    require_new_folder(output, images)
    require_beside("--held_out_split", held_out_split, "--held_out", held_out)
    with loading():
        from hfgen.evaluation.reference import load_reference, open_images, open_reference
        from hfgen.evaluation.scoring import score_images
        from hfgen.inference.opening import choose_device
        from hfgen.metrics.report import markdown

    generated = dataset_of("IMAGES", images, sample_size)
    data = dataset_of("--reference", reference, sample_size, dataset_config, dataset_split, dataset_column)
    other_data = held_out_of(held_out, held_out_split, data)
    open_images(data, "--reference")  # to refuse it before the features of the others
    fewest = int(SCORED_IMAGES.minimum)
    fake = open_reference(generated, choose_device(device), features, mode, feature_weights, "IMAGES", fewest)
    real = load_reference(data, fake.extractor, "--reference")
    warn_of_other_white("IMAGES", fake, real)
    other = load_held_out(other_data, real)
    scored = score_images(fake.images, fake.features, real, seed, extrapolate, other)
    report = {"reference": absolute_if_path(reference), "images": images, "num_inference_steps": None, **scored.report}
    with printed_if_not_written(markdown(report)):
        start_new_folder(output)
    print_and_write(output, report, scored, Path(images).resolve().name)


def held_out_of(held_out: str | None, split: str | None, data: "DataSettings") -> "DataSettings | None":
    """Return how to read the held-out images, if any are given: like those of the reference, `data`, where it can be.

    They are opened, so that what cannot be used is refused before anything is computed.
    """
    from hfgen.data.selection import ALL, NoSplitsError
    from hfgen.data.source import UnusedColumnError
    from hfgen.evaluation.reference import open_images

    if held_out is None:
        return None
    config = data.dataset_config if held_out == data.dataset else None
    with errors_name_dataset_as("--held_out"):
        other = replace(data, dataset=held_out, dataset_config=config, dataset_split=split or "test")
    attempts = [other, replace(other, dataset_column=None)]  # it may lack the columns of the reference
    attempts += [replace(one, dataset_split=ALL) for one in attempts if split is None]  # and splits
    for attempt in attempts:
        try:
            open_images(attempt, "--held_out", MIN_HELD_OUT)
        except (NoSplitsError, UnusedColumnError):
            if attempt is attempts[-1]:
                raise
        else:
            return attempt
    raise AssertionError("the last attempt returns or raises")


def load_held_out(data: "DataSettings | None", real: "ReferenceImages") -> "ReferenceImages | None":
    """Load the held-out images that `held_out_of` found, if there are any, and their features."""
    from hfgen.evaluation.reference import load_reference

    if data is None:
        return None
    other = load_reference(data, real.extractor, "--held_out", MIN_HELD_OUT)
    warn_of_other_white("--held_out", other, real)
    return other


def warn_of_other_white(argument: str, images: "ReferenceImages", real: "ReferenceImages") -> None:
    """Warn if 16-bit grey images, whose largest value gives their white, are brighter or darker than the reference's.

    Args:
        argument: names the images.
        images: to compare with the reference.
        real: the reference.
    """
    bits = [one.images.report.grey_bits for one in (images, real) if one.images.report.grey_bits is not None]
    if len({*bits}) == 2:
        whites = [2**one - 1 for one in bits]
        say(
            f"warning: {argument}: white is {whites[0]} in these 16-bit grey images and {whites[1]} in the reference's"
            " (by their largest values), so the scores also measure a difference in brightness; convert both to 8 "
            "bits in the same way",
            err=True,
        )


def write_evaluation(output: Path, report: dict[str, Any], scored: "Scored", name: str) -> None:
    """Write an evaluation's files into its folder, the scores before the pictures; `name` is the model's."""
    from hfgen.hub.model_index import model_index
    from hfgen.metrics.report import markdown, to_json

    with writing(output):
        (output / "evaluation.json").write_text(to_json(report))
        (output / "evaluation.md").write_text(markdown(report), encoding="utf-8")
        (output / "model-index.yml").write_text(model_index(report, name), encoding="utf-8")
        scored.closest.save(output / "closest.png")
        scored.closest_pixels.save(output / "closest_pixels.png")


def print_and_write(output: Path, report: dict[str, Any], scored: "Scored", name: str) -> None:
    """Print the table of an evaluation, which then outlives a full disk, and write its files."""
    from hfgen.metrics.report import markdown

    say_lines(markdown(report))
    write_evaluation(output, report, scored, name)
    say(f"evaluation.json, .md, model-index.yml and sheets of the closest pairs in {output}")
