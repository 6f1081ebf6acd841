"""`hfgen kaggle-zip`: a submission to Kaggle's image generation competitions, one zip of many JPEGs."""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfgen.arguments import require_beside
from hfgen.commands.options import (
    BatchSize,
    Device,
    FeatureWeights,
    PipelineFolder,
    SampleFrom,
    Sampler,
    Seed,
    Steps,
    dataset_of,
    in_range,
    loading,
    refuse_to_replace,
    trained_on_reference,
)
from hfgen.errors import UserError
from hfgen.ranges import COUNT
from hfgen.texts import say


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    import numpy as np
    import torch
    from PIL import Image


# Limits of the competition "I'm Something of a Painter Myself" (gan-getting-started).
MIN_IMAGES, MAX_IMAGES = 7000, 10_000
SIDE = 256
JPEG_QUALITY = 95


def kaggle_zip(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="the zip file; Kaggle requires the default name")] = Path(
        "images.zip"
    ),
    num_images: Annotated[
        int, typer.Option("--num_images", callback=in_range(COUNT), help="images to generate, 7,000 to 10,000")
    ] = MIN_IMAGES,
    size: Annotated[
        int, typer.Option("--size", callback=in_range(COUNT), help="height and width in pixels; must be 256")
    ] = SIDE,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    sampler: Sampler = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    reference: Annotated[
        str | None, typer.Option("--reference", help="also score the zip against these images, as for --dataset")
    ] = None,
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Write a submission to Kaggle's gan-getting-started: a zip of 256-pixel RGB JPEGs, generated batch by batch."""
    refuse_to_replace(output, endings=(".zip",))
    if not MIN_IMAGES <= num_images <= MAX_IMAGES:
        raise UserError(f"--num_images {num_images}: the competition accepts {MIN_IMAGES:,} to {MAX_IMAGES:,} images")
    require_beside("--feature_weights", feature_weights, "--reference", reference)
    if size != SIDE:
        raise UserError(f"--size {size}: the competition accepts only images of {SIDE} pixels")
    with loading():
        from hfgen.files import write_atomically
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import SamplingOptions, check_sampling, generate_images, image_size

    loaded = open_pipeline(pipeline, device, sampler)
    if (own_size := image_size(loaded)) != size:
        say(f"note: this pipeline generates {own_size}-pixel images; they are resized to {size}, which adds no detail")
    options = SamplingOptions(num_images, seed, num_inference_steps, batch_size, sample_from=sample_from)
    check_sampling(loaded, options)
    score = None
    if reference is not None:  # before generating images, as it may be misspelt
        score = local_score(pipeline, reference, feature_weights, loaded.device)
    jpegs = (encode_jpeg(image, size) for image in generate_images(loaded, options))
    score_message = "give --reference to compute the MiFID against images of your own"

    def write(temporary: Path) -> None:
        nonlocal score_message
        # JPEG is compressed already.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            packed = pack(archive, jpegs)
            if score is None:
                for _ in packed:
                    pass
            else:
                score_message = score((decode_jpeg(jpeg) for jpeg in packed), num_images)

    write_atomically(output, write)
    say(f"{output}: {num_images:,} JPEGs of {size} pixels (quality {JPEG_QUALITY}), seed {seed}")
    say(f"{score_message}; Kaggle's own score will differ, because its real images are hidden")


def local_score(
    pipeline: str, reference: str, feature_weights: str | None, device: "torch.device"
) -> Callable[[Iterable["np.ndarray"], int], str]:
    """Open the real images at the competition's size; return a function that scores images and says so in a clause."""
    from hfgen.evaluation.reference import open_reference
    from hfgen.metrics.frechet import frechet_distance
    from hfgen.metrics.memorisation import memorisation_informed_fid

    data = dataset_of("--reference", reference, SIDE)
    real = open_reference(data, device, feature_weights=feature_weights)
    trained_on_reference([pipeline], data, real)  # warns if it was not

    def score(images: Iterable["np.ndarray"], count: int) -> str:
        fake = real.extractor(images, count)
        mifid, fid = memorisation_informed_fid(real.features, fake), frechet_distance(real.features, fake)
        return f"local MiFID {mifid:.4g} (FID {fid:.4g}) against the {len(real.features):,} images of {reference}"

    return score


def pack(archive: zipfile.ZipFile, jpegs: Iterable[bytes]) -> Iterator[bytes]:
    """Write JPEGs to the archive one by one, yielding each."""
    for index, jpeg in enumerate(jpegs):
        archive.writestr(f"{index:05d}.jpg", jpeg)
        yield jpeg


def encode_jpeg(image: "Image.Image", size: int) -> bytes:
    """Resize an image if its size differs, and encode it."""
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def decode_jpeg(jpeg: bytes) -> "np.ndarray":
    """Decode an image as Kaggle will see it, uint8 `(height, width, 3)`."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)))
