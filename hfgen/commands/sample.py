"""`hfgen sample`, `denoise`, `interpolate` and `reconstruct`: pictures from a trained pipeline."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfgen.commands.options import (
    BatchSize,
    Device,
    PipelineFolder,
    SampleFrom,
    Sampler,
    Seed,
    Steps,
    in_range,
    loading,
    parse_numbers,
    refuse_to_replace,
    require_new_folder,
    start_new_folder,
)
from hfgen.errors import UserError
from hfgen.files import writing
from hfgen.ranges import COUNT, POSITIVE, SEED, Range
from hfgen.texts import counted, say


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image


MAX_ON_SHEET = 400  # images on the sheet of `hfgen sample`
MAX_STEM = 200  # bytes of the original's name in that of its reconstruction; a name has at most 255
FEW = Range(1, 1000)  # images that are in memory together


def sample(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for the images; a sheet is written next to it")],
    num_images: Annotated[int, typer.Option("--num_images", callback=in_range(COUNT), help="images to generate")] = 64,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    sampler: Sampler = None,
    truncation: Annotated[
        float | None,
        typer.Option(
            "--truncation",
            callback=in_range(POSITIVE),
            help="truncate a GAN's latents at this value; lower: less diversity; 3: almost no truncation",
        ),
    ] = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Generate images with a pipeline: one file per image, and a sheet next to the folder."""
    require_new_folder(output, sources=[pipeline])
    refuse_to_replace(sheet := sheet_beside(output))
    with loading():
        from hfgen.inference.figures import labelled_sheet
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import SamplingOptions, generate_images

    loaded = open_pipeline(pipeline, device, sampler)
    options = SamplingOptions(num_images, seed, num_inference_steps, batch_size, truncation, sample_from)
    shown: list[Image.Image] = []
    for index, image in enumerate(generate_images(loaded, options)):
        if index == 0:
            start_new_folder(output)
        with writing(output):
            image.save(output / f"{index:06d}.png")
        if len(shown) < MAX_ON_SHEET:  # bounds the memory
            shown.append(image)
    with writing(output):
        title = f"seed {seed}; image numbers below"
        labelled_sheet(shown, title=title, captions=[str(index) for index in range(len(shown))]).save(sheet)
    of_all = f" (the first {len(shown)})" if len(shown) < num_images else ""
    on_sheet = f"all on one sheet{of_all}" if num_images > 1 else "and on a sheet"
    say(f"{counted(num_images, 'image')} in {output}, {on_sheet}: {sheet}")


def denoise(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for denoising.png and forward.png")],
    timesteps: Annotated[
        str | None,
        typer.Option("--timesteps", help="timesteps to show, such as 999,500,0; unset: ten of the sampler's steps"),
    ] = None,
    num_images: Annotated[int, typer.Option("--num_images", callback=in_range(FEW), help="rows of the strip")] = 4,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    sampler: Sampler = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="image to noise in forward.png; unset: a generated one")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show a diffusion pipeline denoising, and how a linear and a cosine schedule turn an image into noise."""
    require_new_folder(output, sources=[pipeline])
    with loading():
        from hfgen.families import family
        from hfgen.inference.figures import (
            denoising_states,
            denoising_steps,
            labelled_denoising,
            labelled_sheet,
            noised_states,
        )
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import SamplingOptions, check_sampling, image_size, open_image

    loaded = open_pipeline(pipeline, device, sampler)
    if family(loaded) != "ddpm":
        raise UserError(f"{pipeline} is not a diffusion pipeline: there is nothing to denoise")
    check_sampling(loaded, SamplingOptions(num_images, seed, num_inference_steps))
    trained_steps = loaded.scheduler.config.num_train_timesteps
    chosen = parse_timesteps(timesteps, trained_steps)
    clean_image = open_image(image, image_size(loaded)) if image is not None else None
    try:
        if timesteps is None:
            states, shown, last = denoising_steps(loaded, num_images, seed, num_inference_steps)
            denoising = labelled_sheet(states, len(shown), f"seed {seed}: after each step", heads=shown)
            what = f"{len(shown)} of the sampler's steps"
        else:
            states, reached, last = denoising_states(loaded, chosen, num_images, seed, num_inference_steps)
            what = f"timesteps {', '.join(map(str, dict.fromkeys(reached)))}"  # each once
            denoising = labelled_denoising(states, reached, f"seed {seed}: after the denoising step at timestep t")
    except ValueError as error:  # more steps than the pipeline supports
        raise UserError(str(error)) from error
    noised = noised_states(clean_image or last, chosen[::-1], trained_steps, seed)
    heads = [f"t = {timestep}" for timestep in chosen[::-1]]
    forward = labelled_sheet(noised, len(chosen), heads=heads, names=("linear", "cosine"))
    start_new_folder(output)
    with writing(output):
        denoising.save(output / "denoising.png")
        forward.save(output / "forward.png")
    say(f"denoising.png ({what}) and forward.png (linear above cosine) in {output}")


def interpolate(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for sheet.png and walk.gif")],
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="seeds to interpolate between, in this order, such as 1,2,3; unset: 0,1"),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="VAE only: interpolate between these images instead; repeat the option"),
    ] = None,
    num_steps: Annotated[
        int, typer.Option("--num_steps", callback=in_range(FEW), help="images between two ends, on the sheet")
    ] = 8,
    num_frames: Annotated[
        int, typer.Option("--num_frames", callback=in_range(FEW), help="frames between two ends, in the GIF")
    ] = 24,
    sample_from: SampleFrom = None,
    device: Device = "auto",
) -> None:
    """Interpolate between images of a GAN or a VAE: a sheet (linear above spherical for each pair) and a GIF."""
    require_new_folder(output, sources=[pipeline])
    if image and (seeds is not None or sample_from is not None):
        raise UserError("--image: interpolates between your images; leave out --seeds and --sample_from")
    if image and len(image) < 2:
        raise UserError(f"--image {image[0]}: interpolation needs at least two images; use --image twice or more")
    chosen = parse_seeds("0,1" if seeds is None else seeds)
    with loading():
        from hfgen.inference.figures import enlarged
        from hfgen.inference.gifs import write_gif
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import interpolated_images, latents_of_images, latents_of_seeds

    loaded = open_pipeline(pipeline, device)
    originals: list[Image.Image] = []
    if image:
        ends, originals = latents_of_images(loaded, image, "--image")
    else:
        ends = latents_of_seeds(loaded, chosen, sample_from)
    names = [path.name for path in image] if image else [f"seed {seed}" for seed in chosen]
    sheet = walk_sheet(loaded, ends, num_steps, names, originals)
    circle = ends[[*range(len(ends)), 0]]  # back to the start, so that the GIF loops smoothly
    frames = interpolated_images(loaded, circle, [part / num_frames for part in range(num_frames)], spherical=True)
    start_new_folder(output)
    with writing(output):
        sheet.save(output / "sheet.png")
        write_gif([enlarged(frame) for frame in frames], output / "walk.gif", frame_seconds=0.08)
    of_which = ", ".join(names) if image else f"seeds {', '.join(map(str, chosen))}"
    say(f"sheet.png (linear above spherical, {of_which}) and walk.gif in {output}")


def walk_sheet(
    pipeline: "DiffusionPipeline",
    ends: "torch.Tensor",
    num_steps: int,
    names: list[str],
    originals: "list[Image.Image]",
) -> "Image.Image":
    """Make a sheet of the interpolations between consecutive latents: linear above spherical for each pair.

    Args:
        pipeline: of a GAN or a VAE.
        ends: at least two latents, `(count, latent_dim)`.
        num_steps: images between two ends.
        names: what each latent is of.
        originals: the images that were encoded, which are shown outside the ends; none if the latents were sampled.
    """
    from hfgen.inference.figures import labelled_sheet
    from hfgen.inference.sampling import interpolated_images

    parts = [step / (num_steps + 1) for step in range(num_steps + 2)]  # both ends, and 1/9 to 8/9 for 8 steps
    heads = ["a = 0", *(f"{step}/{num_steps + 1}" for step in range(1, num_steps + 1)), "1"]
    cells, rows = [], []
    for first in range(len(ends) - 1):
        for way, spherical in (("linear", False), ("spherical", True)):
            between = interpolated_images(pipeline, ends[first : first + 2], parts, spherical)
            cells += [*originals[first : first + 1], *between, *originals[first + 1 : first + 2]]
            rows.append(f"{way}\n{names[first]} to {names[first + 1]}")
    heads = ["original", *heads, "original"] if originals else heads
    return labelled_sheet(cells, len(heads), heads=heads, names=rows)


def reconstruct(
    pipeline: PipelineFolder,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="image files of any size; they are centre-cropped")
    ],
    output: Annotated[Path, typer.Option("--output", help="new folder for the images; a sheet is written next to it")],
    columns: Annotated[int, typer.Option("--columns", callback=in_range(FEW), help="images per row of the sheet")] = 8,
    device: Device = "auto",
) -> None:
    """Encode and decode images with a VAE: one file per image, and a sheet with the originals next to the folder."""
    require_new_folder(output, sources=[pipeline])
    refuse_to_replace(sheet := sheet_beside(output))
    with loading():
        from hfgen.inference.figures import labelled_pairs
        from hfgen.inference.opening import open_pipeline
        from hfgen.inference.sampling import decode_latents, latents_of_images

    loaded = open_pipeline(pipeline, device)
    latents, originals = latents_of_images(loaded, images, "IMAGES")
    reconstructions = decode_latents(loaded, latents)
    start_new_folder(output)
    with writing(output):
        for index, (path, reconstruction) in enumerate(zip(images, reconstructions, strict=True)):
            stem = path.stem.encode(errors="ignore")[:MAX_STEM].decode(errors="ignore")  # a name need not be UTF-8
            reconstruction.save(output / f"{index:06d}-{stem}.png")
        labelled_pairs(originals, reconstructions, ("original", "reconstruction"), columns).save(sheet)
    say(f"{len(images)} reconstructions in {output}, below their originals on one sheet: {sheet}")


def sheet_beside(folder: Path) -> Path:
    """Return the file for the sheet of a folder of images, in which it would be taken for one of them."""
    place = Path(os.path.abspath(folder))  # "." has no name
    return folder.parent / f"{place.name}_sheet.png" if folder.name else place.with_name(f"{place.name}_sheet.png")


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as "1,2,3".

    Raises:
        UserError: if there are fewer than two, or one is not a whole number from 0.
    """
    seeds = parse_numbers("--seeds", text)
    if len(seeds) < 2 or min(seeds) < 0:
        raise UserError(f"--seeds {text}: must be at least two numbers, none below 0")
    SEED.check("--seeds", max(seeds))
    return seeds


def parse_timesteps(text: str | None, trained_steps: int) -> list[int]:
    """Parse timesteps such as "999,500,0"; return them noisiest first; eight evenly spaced ones if `text` is None.

    Raises:
        UserError: if one is not a whole number from 0 to `trained_steps - 1`.
    """
    if text is None:
        return [round((trained_steps - 1) * part / 7) for part in range(7, -1, -1)]
    chosen = sorted(set(parse_numbers("--timesteps", text)), reverse=True)
    if not 0 <= chosen[-1] <= chosen[0] < trained_steps:
        raise UserError(f"--timesteps {text}: each must be from 0 to {trained_steps - 1}")
    return chosen
