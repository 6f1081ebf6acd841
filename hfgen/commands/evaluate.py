"""`hfgen evaluate`: draw from a pipeline, score it against real images, write what was found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen.commands.options import (
    BatchSize,
    DatasetColumn,
    DatasetSplit,
    Device,
    FeatureMode,
    Features,
    FeatureWeights,
    PipelineFolder,
    Reference,
    SampleFrom,
    Sampler,
    Seed,
    Steps,
    require_new_folder,
)


if TYPE_CHECKING:  # heavy, as everything that stands inside the functions
    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.reference import Reference as RealImages
    from hfgen.evaluation.scoring import Scored
    from hfgen.metrics.extraction import Extractor


# Images drawn if nobody says how many: as many as there are real ones, up to this.
MAX_DEFAULT_IMAGES = 5000


HeldOut = Annotated[
    str | None, typer.Option("--held_out", help="real images that it was not trained on; what --dataset takes")
]
HeldOutSplit = Annotated[str, typer.Option("--held_out_split", help="of a Hub data set")]
Output = Annotated[
    Path, typer.Option("--output", help="new folder for evaluation.json, .md, model-index.yml and two sheets")
]
Extrapolate = Annotated[
    bool, typer.Option("--extrapolate", help="also FID for infinitely many images; ten times the arithmetic")
]
Repeats = Annotated[
    int, typer.Option("--repeats", min=1, help="draw so many sets, with seeds that count up; also their spread")
]


def evaluate(
    pipeline: PipelineFolder,
    reference: Reference,
    output: Output,
    num_images: Annotated[
        int | None, typer.Option("--num_images", min=10, help="drawn; as many as real ones if not given, up to 5000")
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    sampler: Sampler = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    held_out: HeldOut = None,
    held_out_split: HeldOutSplit = "test",
    repeats: Repeats = 1,
    extrapolate: Extrapolate = False,
    bits_per_dimension: Annotated[
        bool, typer.Option("--bits_per_dimension", help="also the bound on the likelihood of real images: VAE, DDPM")
    ] = False,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score a pipeline against real images: FID, KID, precision to coverage, copies; with the data's own floor."""
    require_new_folder(output)
    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.bits_per_dimension import check_has_likelihood, likelihood_report
    from hfgen.evaluation.scoring import Drawing, score_pipeline
    from hfgen.inference.draw import image_size, open_pipeline
    from hfgen.metrics.feature_spaces import build_extractor

    loaded = open_pipeline(pipeline, device, sampler)
    if bits_per_dimension:
        check_has_likelihood(loaded)
    extractor = build_extractor(features, mode, feature_weights, loaded.device)
    settings = DataSettings(
        reference, sample_size=image_size(loaded), dataset_split=dataset_split, dataset_column=dataset_column
    )
    real, other = load_both(settings, extractor, held_out, held_out_split)
    count = num_images or min(len(real.features), MAX_DEFAULT_IMAGES)
    drawing = Drawing(count, seed, num_inference_steps, batch_size, sample_from)
    scored = score_pipeline(loaded, real, extractor, drawing, repeats, extrapolate, other)
    report = {"reference": where_it_is(reference), **scored.report}
    if bits_per_dimension:
        report["likelihood"] = likelihood_report(loaded, other or real, seed, other is not None)
    write_evaluation(output, report, scored, Path(pipeline).resolve().name)


def evaluate_images(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="generated images; what --dataset takes")],
    reference: Reference,
    output: Output,
    sample_size: Annotated[int, typer.Option("--sample_size", help="pixels that both are reduced to")],
    seed: Seed = 0,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    held_out: HeldOut = None,
    held_out_split: HeldOutSplit = "test",
    extrapolate: Extrapolate = False,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score images that something else has drawn, on the same terms as `evaluate` does those of a pipeline."""
    require_new_folder(output)
    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.reference import load_reference
    from hfgen.evaluation.scoring import score_images
    from hfgen.inference.draw import choose_device
    from hfgen.metrics.feature_spaces import build_extractor

    extractor = build_extractor(features, mode, feature_weights, choose_device(device))
    settings = DataSettings(
        reference, sample_size=sample_size, dataset_split=dataset_split, dataset_column=dataset_column
    )
    fake = load_reference(DataSettings(images, sample_size=sample_size), extractor, "IMAGES")
    real, other = load_both(settings, extractor, held_out, held_out_split)
    scored = score_images(fake.images, fake.features, real, extractor.identity, seed, extrapolate, other)
    report = {"reference": where_it_is(reference), "images": images, "num_inference_steps": None, **scored.report}
    write_evaluation(output, report, scored, Path(images).resolve().name)


def where_it_is(reference: str) -> str:
    """Return a path as it is seen from everywhere, so that nobody takes it for a data set of the Hub later."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference


def load_both(
    settings: "DataSettings", extractor: "Extractor", held_out: str | None, held_out_split: str
) -> "tuple[RealImages, RealImages | None]":
    """Load the reference that the settings name, and the held-out images, if there are some, in the same way."""
    from hfgen.evaluation.reference import load_reference

    real = load_reference(settings, extractor, "--reference")
    if held_out is None:
        return real, None
    others = replace(settings, dataset=held_out, dataset_split=held_out_split)
    return real, load_reference(others, extractor, "--held_out")


def write_evaluation(output: Path, report: dict[str, Any], scored: "Scored", name: str) -> None:
    """Fill the new folder of an evaluation and print its table; `name` is that of the model."""
    from hfgen.hub.model_index import model_index
    from hfgen.metrics.report import finite, markdown

    output.mkdir(parents=True, exist_ok=True)
    scored.closest.save(output / "closest.png")
    scored.closest_pixels.save(output / "closest_pixels.png")
    (output / "evaluation.json").write_text(json.dumps(finite(report), indent=2, allow_nan=False) + "\n")
    (output / "evaluation.md").write_text(markdown(report))
    (output / "model-index.yml").write_text(model_index(report, name))
    typer.echo(markdown(report))
    typer.echo(f"evaluation.json, .md, model-index.yml and sheets of the closest pairs in {output}")
