"""`hfgen evaluate`: draw from a pipeline, score it against real images, write what was found."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgen.cli_options import (
    BatchSize,
    Device,
    InceptionWeights,
    PipelineFolder,
    Reference,
    SampleFrom,
    Sampler,
    Seed,
    Steps,
    require_new_folder,
)
from hfgen.errors import UserError


# Images drawn if nobody says how many: as many as there are real ones, up to this.
MAX_DEFAULT_IMAGES = 5000
# name in the table -> key of the scores, key of its standard error
TABLE = {
    "FID": ("fid", "fid_standard_error"),
    "KID": ("kid", "kid_standard_error"),
    "precision": ("precision", None),
    "recall": ("recall", None),
    "density": ("density", None),
    "coverage": ("coverage", None),
    "MiFID": ("mifid", None),
}


def evaluate(
    pipeline: PipelineFolder,
    reference: Reference,
    output: Annotated[Path, typer.Option("--output", help="new folder for evaluation.json, .md and closest.png")],
    num_images: Annotated[
        int | None, typer.Option("--num_images", min=10, help="drawn; as many as real ones if not given, up to 5000")
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Steps = 50,
    sampler: Sampler = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    dataset_split: Annotated[str, typer.Option("--dataset_split", help="split of a Hub data set")] = "train",
    dataset_column: Annotated[str | None, typer.Option("--dataset_column", help="that holds the images")] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="how images are resized: clean (clean-fid's) or legacy")
    ] = "clean",
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="also FID for infinitely many images; ten times the arithmetic")
    ] = False,
    inception_weights: InceptionWeights = None,
    device: Device = "auto",
) -> None:
    """Score a pipeline against real images: FID, KID, precision to coverage, copies; with the data's own floor."""
    require_new_folder(output)
    if mode not in ("clean", "legacy"):
        raise UserError(f"--mode {mode}: must be clean or legacy")
    from hfgen.data.settings import DataSettings
    from hfgen.inference import image_size, open_pipeline
    from hfgen.metrics.inception import InceptionFeatures, find_weights
    from hfgen.metrics.reference import load_reference
    from hfgen.scoring import score_pipeline

    loaded = open_pipeline(pipeline, device, sampler)
    extractor = InceptionFeatures(find_weights(inception_weights), loaded.device, mode)
    settings = DataSettings(
        reference, sample_size=image_size(loaded), dataset_split=dataset_split, dataset_column=dataset_column
    )
    real = load_reference(settings, extractor)
    count = num_images or min(len(real.features), MAX_DEFAULT_IMAGES)
    scored = score_pipeline(
        loaded, real, extractor, count, seed, num_inference_steps, batch_size, sample_from, extrapolate
    )
    report = {"reference": reference, **scored.report}
    output.mkdir(parents=True, exist_ok=True)
    scored.closest.save(output / "closest.png")
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "evaluation.md").write_text(markdown(report))
    typer.echo(markdown(report))
    typer.echo(f"evaluation.json, evaluation.md and closest.png (samples above the nearest real images) in {output}")


def markdown(report: dict[str, Any]) -> str:
    """Write a report as a table, with the floor in a column beside the scores, and the statement on copies."""
    scores, floor = report["scores"], report["floor"]
    halves = floor["halves"]
    lines = [
        f"{scores['num_fake']:,} images of {report['sample_size']} pixels against {scores['num_real']:,} real ones, "
        f"seed {report['seed']}; features: {report['features']}.",
        "",
        f"| score | generated | floor: half of the real images against the other ({halves['num_fake']:,} each) |",
        "| --- | --- | --- |",
    ]
    for name, (key, error) in TABLE.items():
        cells = [f"{part[key]:.4g}" + (f" ± {part[error]:.2g}" if error else "") for part in (scores, halves)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    at_infinity = []
    if "fid_at_infinity" in report:
        at_infinity = [f"FID extrapolated to infinitely many generated images: {report['fid_at_infinity']:.4g}.", ""]
    lines += [
        "",
        f"FID of {scores['num_fake']:,} real images, drawn with replacement, against all: {floor['fid_at_n']:.4g}. "
        "± is the standard error, which does not contain the bias of FID: compare at equal numbers of images.",
        "",
        *at_infinity,
        f"Memorisation: {report['memorisation']['statement']}.",
        "",
    ]
    return "\n".join(lines)
