"""Image generation for the demo: with a pipeline of any family, loaded with or without hfgen.

A copy of this file and the few that it imports is part of each Space. An image is a function of its seed and its
index among the images of that seed, as in `hfgen sample`.
"""

import copy
import inspect
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from hfgen.data.metadata import read_despite_metadata
from hfgen.data.rgb import to_rgb, upright
from hfgen.families import family, image_network
from hfgen.inference.interpolation import interpolate_latents
from hfgen.methods.schedules import drop_extra_timesteps, is_edm, sampling_scheduler, scaled_for_display
from hfgen.randomness import keyed_seed


SAVED = "saved"
# Not those for which Pillow runs other programs.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
MAX_PIXELS = 64 * 1024 * 1024
MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class Settings:
    """How to generate images; each family uses its own settings.

    Attributes:
        steps: denoising steps, for diffusion.
        sampler: for diffusion: one of the `SAMPLERS` of schedules.py, or "saved".
        truncation: for a GAN's latents.
        sample_from: for a VAE's latents: "prior" or "ex_post"; if None, the ex-post density if there is one.
    """

    steps: int = 50
    sampler: str = SAVED
    truncation: float | None = None
    sample_from: str | None = None


def height_and_width(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Return height and width of the images, in pixels."""
    size = image_network(pipeline).config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def describe(pipeline: DiffusionPipeline) -> str:
    """Describe a pipeline in one line: family, size, parameters, network."""
    network, (height, width) = image_network(pipeline), height_and_width(pipeline)
    name = {"gan": "GAN", "vae": "VAE", "ddpm": "Diffusion (DDPM)"}[family(pipeline)]
    parameters = sum(weight.numel() for weight in network.parameters())
    count = f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    return f"{name} · {width} × {height} pixels · {count} parameters · {type(network).__name__}"


def image_generator(seed: int, index: int = 0) -> torch.Generator:
    """Return the random number generator of one image, as in `hfgen sample`."""
    return torch.Generator().manual_seed(keyed_seed(seed, index))


def generate(
    pipeline: DiffusionPipeline,
    generators: list[torch.Generator],
    settings: Settings,
    after_each_step: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Image.Image]:
    """Generate one image per random number generator.

    Args:
        pipeline: of any family.
        generators: from `image_generator`.
        settings: how to generate.
        after_each_step: for diffusion: called with the number of steps done and the total.

    Raises:
        ValueError: if the pipeline does not support the settings.
    """
    kind, count = family(pipeline), len(generators)
    # One at a time: larger batches round differently, and an image must not depend on its batch.
    if kind == "gan":
        return pipeline(count, generator=generators, truncation=settings.truncation, chunk_size=1).images
    if kind == "vae":
        return pipeline(count, generator=generators, sample_from=settings.sample_from, chunk_size=1).images
    return _denoised(pipeline, starting_noise(pipeline, generators), generators, settings, after_each_step)


def starting_noise(pipeline: DiffusionPipeline, generators: list[torch.Generator]) -> torch.Tensor:
    """Sample the initial noise, `(batch_size, channels, height, width)`, standard normal, on the CPU."""
    shape = (1, pipeline.unet.config.in_channels, *height_and_width(pipeline))
    return torch.cat([torch.randn(shape, generator=own) for own in generators])


@torch.no_grad()
def denoise(
    pipeline: DiffusionPipeline, noise: torch.Tensor, generators: list[torch.Generator], settings: Settings
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Denoise step by step; the pipeline's own scheduler is not changed.

    Args:
        pipeline: of diffusion, hfgen's or diffusers' own.
        noise: from `starting_noise`.
        generators: for samplers that add noise at each step.
        settings: `steps` and `sampler` are used.

    Yields:
        Steps done, total steps, the timestep, and the current image, `(batch_size, channels, height, width)`.
    """
    scheduler = own_scheduler(pipeline.scheduler, settings.sampler)
    scheduler.set_timesteps(settings.steps, device=pipeline.device)
    if not is_edm(scheduler):
        drop_extra_timesteps(scheduler)
    timesteps = scheduler.timesteps
    last = scheduler.config.num_train_timesteps - 1
    sample = noise.to(pipeline.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    random_numbers = {"generator": generators} if takes_generator else {}
    for index, timestep in enumerate(timesteps):
        model_input = scheduler.scale_model_input(sample, timestep).to(pipeline.unet.dtype)
        model_output = pipeline.unet(model_input, timestep).sample.to(sample.dtype)
        sample = scheduler.step(model_output, timestep, sample, **random_numbers).prev_sample
        counted = round(last * (1 - index / max(len(timesteps) - 1, 1))) if is_edm(scheduler) else int(timestep)
        yield index + 1, len(timesteps), counted, scaled_for_display(scheduler, index, sample)


def _denoised(
    pipeline: DiffusionPipeline,
    noise: torch.Tensor,
    generators: list[torch.Generator],
    settings: Settings,
    after_each_step: Callable[[int, int], None],
) -> list[Image.Image]:
    sample = noise
    for done, steps, _, left in denoise(pipeline, noise, generators, settings):
        sample = left
        after_each_step(done, steps)
    return to_images(sample)


def own_scheduler(saved: SchedulerMixin, sampler: str) -> SchedulerMixin:
    """Build a scheduler for one call, with the settings of `hfgen sample --sampler`.

    Args:
        saved: the pipeline's scheduler.
        sampler: one of the `SAMPLERS` of schedules.py, or "saved" for a copy of the pipeline's.
    """
    if sampler == SAVED:
        return copy.deepcopy(saved)  # from_config loses settings passed by position
    return sampling_scheduler(saved, sampler)


@torch.no_grad()
def interpolate(
    pipeline: DiffusionPipeline,
    ends: tuple[int, int],
    parts: Sequence[float],
    settings: Settings,
    after_each_step: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Image.Image]:
    """Generate images between those of two seeds.

    Args:
        pipeline: of any family.
        ends: two seeds.
        parts: fractions of the way, from 0 at the first to 1 at the second.
        settings: how to generate; for diffusion, the sampler must not add noise at each step.
        after_each_step: see `generate`.
    """
    generators, kind = [image_generator(seed) for seed in ends], family(pipeline)
    if kind == "ddpm":
        noise = spherical(starting_noise(pipeline, generators), parts)
        return _denoised(pipeline, noise, generators[:1] * len(parts), settings, after_each_step)
    if kind == "vae":
        latents = pipeline.draw_latents(2, generators, settings.sample_from).cpu()
    else:
        latent_dim = pipeline.generator.config.latent_dim
        latents = torch.stack([torch.randn(latent_dim, generator=own) for own in generators])
    return pipeline(latents=spherical(latents, parts), chunk_size=1).images


def spherical(ends: torch.Tensor, parts: Sequence[float]) -> torch.Tensor:
    """Interpolate spherically between two tensors, `(2, ...)`; `parts` are from 0 to 1. Returns `(count, ...)`."""
    start, end = ends.flatten(1)
    return interpolate_latents(start, end, torch.tensor(parts), spherical=True).reshape(-1, *ends.shape[1:])


def to_images(sample: torch.Tensor) -> list[Image.Image]:
    """Convert `(batch_size, channels, height, width)`, clipped to [-1, 1], to images."""
    pixels = (sample.float().cpu().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    levels = (pixels * 255).round().astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[2] == 1 else one) for one in levels]


def _decode(content: bytes, size: tuple[int, int]) -> Image.Image:
    """Return the RGB of an uploaded file, at least twice `size` (height, width) unless the file is smaller."""
    height, width = size
    Image.init()  # fills OPEN: an old Pillow does not read AVIF
    with Image.open(io.BytesIO(content), formats=sorted(FORMATS & Image.OPEN.keys())) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if min(image.size) >= 4 * max(size):  # decode large JPEGs at reduced size
            image.draft(image.mode, (2 * width, 2 * height))
        return to_rgb(upright(image))


def open_upload(path: str, size: tuple[int, int]) -> Image.Image:
    """Read an image as in training: RGB, largest centre crop of this aspect ratio, resized.

    Args:
        path: image file.
        size: height and width, in pixels.

    Raises:
        ValueError: if it cannot be read; the message is meant for the user who uploaded it.
    """
    height, width = size
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise Image.DecompressionBombError
        rgb = read_despite_metadata(Path(path).read_bytes(), lambda content: _decode(content, size))
    except Image.DecompressionBombError:
        raise ValueError(
            f"This image has more than {MAX_PIXELS // 2**20} million pixels or {MAX_FILE_BYTES // 2**20} MiB: upload "
            "a smaller one."
        ) from None
    except Image.UnidentifiedImageError:
        raise ValueError("This file is not a readable image: upload a JPEG, PNG, WebP, BMP, TIFF or GIF.") from None
    except Exception:  # damaged files make Pillow's decoders raise almost anything
        raise ValueError("This image is damaged or of an unsupported kind: save it as PNG or JPEG.") from None
    scale = min(rgb.width / width, rgb.height / height)
    crop_width, crop_height = round(scale * width), round(scale * height)
    left, top = (rgb.width - crop_width) // 2, (rgb.height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
    return rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
