"""`hfgen evaluate`: draw from a pipeline, score it against real images, write what was found."""

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen.cli_options import BatchSize, Device, PipelineFolder, SampleFrom, Sampler, Seed, Steps, require_new_folder
from hfgen.errors import UserError


if TYPE_CHECKING:  # heavy, as everything that stands inside the functions
    from collections.abc import Iterable

    import numpy as np
    from PIL import Image

    from hfgen.metrics.reference import Extractor, Reference


# Images drawn if nobody says how many: as many as there are real ones, up to this.
MAX_DEFAULT_IMAGES = 5000
CLOSEST_PAIRS = 16
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
    reference: Annotated[str, typer.Option("--reference", help="the real images; what --dataset takes")],
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
    inception_weights: Annotated[
        str | None, typer.Option("--inception_weights", help="TorchScript file; found by itself if installed")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a pipeline against real images: FID, KID, precision to coverage, copies; with the data's own floor."""
    require_new_folder(output)
    if mode not in ("clean", "legacy"):
        raise UserError(f"--mode {mode}: must be clean or legacy")
    from hfgen.data.settings import DataSettings
    from hfgen.inference import draw_images, image_size, open_pipeline
    from hfgen.metrics.inception import InceptionFeatures, find_weights
    from hfgen.metrics.reference import load_reference

    loaded = open_pipeline(pipeline, device, sampler)
    extractor = InceptionFeatures(find_weights(inception_weights), loaded.device, mode)
    size = image_size(loaded)
    settings = DataSettings(reference, sample_size=size, dataset_split=dataset_split, dataset_column=dataset_column)
    real = load_reference(settings, extractor)
    count = num_images or min(len(real.features), MAX_DEFAULT_IMAGES)
    images = draw_images(loaded, count, seed, num_inference_steps, batch_size, sample_from=sample_from)
    scores, sheet = score_images(images, count, size, real, extractor, seed)
    report: dict[str, Any] = {
        "pipeline": type(loaded).__name__,
        "reference": reference,
        "sample_size": size,
        "seed": seed,
        "features": extractor.identity,
        **scores,
    }
    output.mkdir(parents=True, exist_ok=True)
    sheet.save(output / "closest.png")
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "evaluation.md").write_text(markdown(report))
    typer.echo(markdown(report))
    typer.echo(f"evaluation.json, evaluation.md and closest.png (samples above the nearest real images) in {output}")


def score_images(
    images: "Iterable[Image.Image]", count: int, size: int, real: "Reference", extractor: "Extractor", seed: int
) -> "tuple[dict[str, Any], Image.Image]":
    """Score images as they are drawn, in bounded memory.

    Args:
        images: generated ones.
        count: how many there are.
        size: their height and width, in pixels.
        real: the real images.
        extractor: made the features of the real images.
        seed: of the resamplings.

    Returns:
        The scores and how many images were drawn in a second; and the sheet of the closest pairs.
    """
    import numpy as np

    from hfgen.metrics.evaluation import memorisation_report, score_features

    with tempfile.TemporaryDirectory() as folder:
        drawn = np.memmap(Path(folder) / "drawn", np.uint8, "w+", shape=(count, size, size, 3))
        started = time.perf_counter()
        for index, image in enumerate(images):
            drawn[index] = np.asarray(image)
        speed = round(count / (time.perf_counter() - started), 2)
        features = extractor(drawn, count)
        sheet = closest_sheet(real, drawn, features)
    scores = {
        "drawing_images_per_second": speed,
        "scores": score_features(real.features, features, seed),
        "floor": real.floor(count, seed),
        "memorisation": memorisation_report(real.features, features),
    }
    return scores, sheet


def closest_sheet(real: "Reference", drawn: "np.ndarray", features: "np.ndarray") -> "Image.Image":
    """Draw the generated images that are nearest to a real one, above those real ones."""
    from PIL import Image

    from hfgen.figures import reconstruction_sheet
    from hfgen.metrics.memorisation import nearest_images

    nearest = nearest_images(features, real.features)
    order = nearest.distances.argsort()[:CLOSEST_PAIRS]
    fake = [Image.fromarray(drawn[index]) for index in order]
    originals = [Image.fromarray(real.images[int(nearest.indices[index])]) for index in order]
    return reconstruction_sheet(fake, originals)


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
    lines += [
        "",
        f"FID of {scores['num_fake']:,} real images, drawn with replacement, against all: {floor['fid_at_n']:.4g}. "
        "± is the standard error, which does not contain the bias of FID: compare at equal numbers of images.",
        "",
        f"Memorisation: {report['memorisation']['statement']}.",
        "",
    ]
    return "\n".join(lines)
