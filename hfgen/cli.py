"""`hfgen ...`: what one does with a trained pipeline and with a data set.

Heavy imports stand inside the commands, so that `hfgen --help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.errors import UserError, run_reporting_user_errors


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Train, compare and ship small unconditional image generators.")  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at data sets.")
app.add_typer(data_app, name="data")

# What the commands on a pipeline have in common.
PipelineFolder = Annotated[str, typer.Argument(metavar="DIR", help="a run, a checkpoint, a pipeline, or a Hub repo")]
Steps = Annotated[int, typer.Option("--num_inference_steps", min=1, help="denoising steps")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="the same seed draws the same images")]
Sampler = Annotated[str | None, typer.Option("--sampler", help="ddim, dpm, unipc or ddpm; as saved if not given")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]


def main() -> None:
    """Run the command line; a user's mistake ends in one message, not in a traceback."""
    run_reporting_user_errors(app)


@app.command()
def sample(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for sheet.png and the single images")],
    num_images: Annotated[int, typer.Option("--num_images", min=1, help="how many")] = 64,
    seed: Seed = 0,
    num_inference_steps: Steps = 50,
    sampler: Sampler = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="drawn at once; bounds the memory")] = 32,
    device: Device = "auto",
) -> None:
    """Draw images from a pipeline: a sheet and single files."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty; choose another folder")
    from hfgen.figures import image_sheet
    from hfgen.inference import draw_images, open_pipeline

    loaded = open_pipeline(pipeline, device, sampler)
    output.mkdir(parents=True, exist_ok=True)
    images = []
    for index, image in enumerate(draw_images(loaded, num_images, seed, num_inference_steps, batch_size)):
        image.save(output / f"{index:06d}.png")
        images.append(image)
    image_sheet(images).save(output / "sheet.png")
    typer.echo(f"{num_images} images and sheet.png in {output}")


@app.command()
def denoise(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for denoising.png and forward.png")],
    timesteps: Annotated[
        str | None, typer.Option("--timesteps", help="shown, such as 999,750,500,250,0; eight if not given")
    ] = None,
    num_images: Annotated[int, typer.Option("--num_images", min=1, help="rows of the strip")] = 4,
    seed: Seed = 0,
    num_inference_steps: Steps = 50,
    sampler: Sampler = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="noised in the forward strip; a drawn one if not given")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show how a diffusion pipeline draws, and how a linear and a cosine schedule turn an image into noise."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty; choose another folder")
    from hfgen.figures import denoising_strip, forward_strip
    from hfgen.inference import open_image, open_pipeline

    loaded = open_pipeline(pipeline, device, sampler)
    trained_steps = loaded.scheduler.config.num_train_timesteps
    chosen = parse_timesteps(timesteps, trained_steps)
    size = loaded.unet.config.sample_size
    clean_image = open_image(image, size) if image is not None else None
    try:
        strip, last = denoising_strip(loaded, chosen, num_images, seed, num_inference_steps)
    except ValueError as error:  # the pipeline does not take so many steps
        raise UserError(str(error)) from error
    output.mkdir(parents=True, exist_ok=True)
    strip.save(output / "denoising.png")
    forward_strip(clean_image or last, chosen[::-1], trained_steps, seed).save(output / "forward.png")
    typer.echo(
        f"denoising.png (timesteps {', '.join(map(str, chosen))}) and forward.png (linear above cosine) in {output}"
    )


@data_app.command("inspect")
def inspect_data(
    path: Annotated[str, typer.Argument(metavar="PATH", help="what --dataset takes")],
    sample_size: Annotated[int, typer.Option("--sample_size", help="training size in pixels")] = 64,
    dataset_split: Annotated[str, typer.Option("--dataset_split", help="split of a Hub data set")] = "train",
    dataset_column: Annotated[
        str | None, typer.Option("--dataset_column", help="column or feature that holds the images")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the whole report here")] = None,
) -> None:
    """Report what a data set holds: counts, sizes, modes, unreadable files, duplicates."""
    import json

    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    settings = DataSettings(
        dataset=path, sample_size=sample_size, dataset_split=dataset_split, dataset_column=dataset_column
    )
    report = load_images(settings).report
    typer.echo(str(report))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def parse_timesteps(text: str | None, trained_steps: int) -> list[int]:
    """Read timesteps such as "999,500,0", noisiest first; eight from the noisiest to 0 if there is no text.

    Raises:
        UserError: if one is no number from 0 to `trained_steps - 1`.
    """
    if text is None:
        return [round((trained_steps - 1) * part / 7) for part in range(7, -1, -1)]
    try:
        chosen = sorted({int(part) for part in text.split(",")}, reverse=True)
    except ValueError as error:
        raise UserError(f"--timesteps {text}: write numbers with commas between them") from error
    if not 0 <= chosen[-1] <= chosen[0] < trained_steps:
        raise UserError(f"--timesteps {text}: each must be from 0 to {trained_steps - 1}")
    return chosen
