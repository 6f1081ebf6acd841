"""`hfgen kaggle-zip`: the submission of Kaggle's competitions for image generators, one zip of many JPEGs."""

import io
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from hfgen.cli_options import BatchSize, Device, PipelineFolder, SampleFrom, Sampler, Seed, Steps
from hfgen.errors import UserError


# Of "I'm Something of a Painter Myself" (gan-getting-started).
FEWEST, MOST = 7000, 10_000
SIDE = 256
JPEG_QUALITY = 95


def kaggle_zip(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="the zip; Kaggle wants this name")] = Path("images.zip"),
    num_images: Annotated[int, typer.Option("--num_images", help="from 7,000 to 10,000")] = FEWEST,
    size: Annotated[int, typer.Option("--size", help="height and width in pixels; the competition wants 256")] = SIDE,
    seed: Seed = 0,
    num_inference_steps: Steps = 50,
    sampler: Sampler = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Write the zip that gan-getting-started asks for: JPEGs of 256 pixels, RGB, drawn one batch after the other."""
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name")
    if output.suffix != ".zip":
        raise UserError(f"--output {output}: must end in .zip; Kaggle looks for images.zip")
    if not FEWEST <= num_images <= MOST:
        raise UserError(f"--num_images {num_images}: the competition takes {FEWEST:,} to {MOST:,} images")
    if size != SIDE:
        raise UserError(f"--size {size}: the competition takes images of {SIDE} pixels only")
    from PIL import Image

    from hfgen.checkpoints import write_atomically
    from hfgen.inference import draw_images, image_size, open_pipeline

    loaded = open_pipeline(pipeline, device, sampler)
    own_size = image_size(loaded)
    if own_size != size:
        typer.echo(
            f"note: this pipeline draws {own_size} pixels; its images are resized to {size}, which adds no detail"
        )
    drawn = draw_images(loaded, num_images, seed, num_inference_steps, batch_size, sample_from=sample_from)

    def write(temporary: Path) -> None:
        # JPEG is compressed already.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for index, image in enumerate(drawn):
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BICUBIC)
                encoded = io.BytesIO()
                image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
                archive.writestr(f"{index:05d}.jpg", encoded.getvalue())

    write_atomically(output, write)
    typer.echo(f"{output}: {num_images:,} JPEGs of {size} pixels (quality {JPEG_QUALITY}), seed {seed}")
    typer.echo(
        "hfgen evaluate --reference says the MiFID against your own images; Kaggle's are others, which it hides"
    )
