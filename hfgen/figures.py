"""Pictures of pictures: sheets of samples, strips of the diffusion process."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.schedules import noise_schedule


def image_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images of one size out on a white sheet, row by row.

    Args:
        images: at least one; all as large as the first.
        columns: images a row; as square as possible if None.
        gap: white pixels between two images.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def denoising_strip(
    pipeline: DiffusionPipeline, timesteps: Sequence[int], num_images: int, seed: int, num_inference_steps: int
) -> tuple[Image.Image, Image.Image]:
    """Draw images and show them on the way: a row an image, a column a timestep.

    Args:
        pipeline: of diffusion.
        timesteps: shown, noisiest first; of the sampler's steps the nearest is shown.
        num_images: rows.
        seed: of the noise.
        num_inference_steps: denoising steps.

    Returns:
        The strip, and the last of the finished images.
    """
    generator = torch.Generator().manual_seed(seed)
    states: dict[int, torch.Tensor] = {}

    def keep(index: int, timestep: int, sample: torch.Tensor) -> None:
        states[timestep] = sample.float().cpu()

    finished = pipeline(
        num_images, generator=generator, num_inference_steps=num_inference_steps, callback_on_step_end=keep
    ).images
    # The state kept with a timestep is what that step left; the first column shows the noise nearest to it.
    columns = [states[min(states, key=lambda step: abs(step - timestep))] for timestep in timesteps]
    cells = [_to_image(column[row]) for row in range(num_images) for column in columns]
    return image_sheet(cells, columns=len(timesteps)), finished[-1]


def forward_strip(image: Image.Image, timesteps: Sequence[int], trained_steps: int, seed: int) -> Image.Image:
    """Show an image turning into noise: linear schedule above, cosine below, a column a timestep.

    Args:
        image: the clean image.
        timesteps: shown, cleanest first.
        trained_steps: diffusion steps of both schedules.
        seed: of the noise, which is the same in all cells.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    cells = []
    for kind in ("linear", "cosine"):
        schedule = noise_schedule(kind, trained_steps)
        cells += [_to_image(schedule.add_noise(pixels, noise, torch.tensor([step]))[0]) for step in timesteps]
    return image_sheet(cells, columns=len(timesteps))


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """Turn `(3, height, width)` in [-1, 1], clipped to it, into an image."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
