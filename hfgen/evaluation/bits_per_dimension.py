"""Likelihood of real images under a pipeline's model: VAEs and DDPMs bound it, GANs do not."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from hfgen.errors import UserError
from hfgen.evaluation.reference import ReferenceImages
from hfgen.families import family, image_network
from hfgen.methods.schedules import is_edm, sampling_scheduler
from hfgen.metrics.kernel import random_subset
from hfgen.metrics.likelihood import diffusion_bits, edm_bits, vae_bits
from hfgen.texts import counted


MAX_IMAGES = 256
BATCH_SIZE = 32
# Timesteps per image for a DDPM: they estimate the sum over all timesteps.
TIMESTEPS_PER_IMAGE = 50


def check_has_likelihood(pipeline: DiffusionPipeline) -> None:
    """Raise a `UserError` if the pipeline's model has no likelihood bound, or none for colour images."""
    kind = family(pipeline)
    if kind == "gan":
        raise UserError(f"--bits_per_dimension: a {type(pipeline).__name__} has no likelihood; use a VAE or DDPM")
    channels = image_network(pipeline).config.in_channels
    if channels != 3:
        raise UserError(f"--bits_per_dimension: this pipeline's images have {counted(channels, 'channel')}, not 3")
    if kind == "ddpm":
        _training_schedule(pipeline)


def likelihood_report(
    pipeline: DiffusionPipeline,
    real: ReferenceImages,
    seed: int,
    images: str = "reference",
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """Measure the bits per dimension of at most `MAX_IMAGES` real images.

    Args:
        pipeline: of a VAE or a DDPM.
        real: the images.
        seed: seed for choosing the images and for latents, timesteps and noise.
        images: "held_out" if they were not used in training, "training" if they were, "reference" if that is unknown
            or true of some only. The statement says which.
        batch_size: images per evaluation of the network. A DDPM's random numbers depend on it, a VAE's do not.

    Returns:
        Plain values: `bits_per_dimension` (an upper bound), `num_images`, `held_out`, and `statement` (a clause).
    """
    chosen = random_subset(np.arange(len(real.images)), MAX_IMAGES, seed)
    pixels = torch.from_numpy(np.stack([real.images[int(index)] for index in chosen])).permute(0, 3, 1, 2)
    scaled = (pixels.float() / 127.5 - 1).clamp(-1, 1)
    numbers = torch.Generator().manual_seed(seed)
    if family(pipeline) == "vae":
        bits = vae_bits(pipeline.vae, scaled, numbers, batch_size)
    else:
        schedule = _training_schedule(pipeline)
        bound = edm_bits if is_edm(schedule) else diffusion_bits
        parts = (part.to(pipeline.device) for part in scaled.split(batch_size))
        each = [bound(pipeline.unet, schedule, part, TIMESTEPS_PER_IMAGE, numbers) for part in parts]
        bits = float(torch.cat(each).mean())
    kind = {
        "held_out": "held-out images",
        "training": "images of its training data",
        "reference": "images that may have been in its training data",
    }[images]
    return {
        "bits_per_dimension": bits,
        "num_images": len(scaled),
        "held_out": images == "held_out",
        "statement": f"at most {bits:.3f} bits per dimension for {len(scaled)} {kind}",
    }


def _training_schedule(pipeline: DiffusionPipeline) -> SchedulerMixin:
    """Return the schedule whose bound is measured, whichever sampler the pipeline was saved with.

    Raises:
        UserError: if its scheduler is of another kind.
    """
    if is_edm(pipeline.scheduler):
        return pipeline.scheduler
    try:
        return sampling_scheduler(pipeline.scheduler, "ddpm")
    except ValueError as error:
        raise UserError(f"--bits_per_dimension: {error}") from error
