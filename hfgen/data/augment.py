"""Batched augmentations: each processes all images of a batch at once, on the batch's device.

The random numbers come from a CPU generator, so that augmentations are the same on every device.
"""

import torch
import torch.nn.functional as F

from hfgen.data.settings import DataSettings


# Random erasing (Zhong et al. 2017, arXiv:1708.04896, section 4.1): area of the rectangle as a fraction of the
# image's, and its aspect ratio.
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 1 / 0.3)


def prepare_batch(pixels: torch.Tensor, settings: DataSettings, generator: torch.Generator) -> torch.Tensor:
    """Convert pixels to a training batch: normalise to [-1, 1], then apply the enabled augmentations.

    Args:
        pixels: uint8 `(batch_size, height, width, 3)`, on any device.
        settings: `horizontal_flip`, `random_rotation` and `random_erasing` are used.
        generator: a CPU generator.

    Returns:
        float32 `(batch_size, 3, height, width)` in [-1, 1], in channels_last memory format.
    """
    images = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)  # NHWC viewed as NCHW is already channels_last
    if settings.horizontal_flip:
        images = horizontal_flip(images, generator)
    if settings.random_rotation:
        images = random_rotation(images, settings.random_rotation, generator)
    if settings.random_erasing:
        images = random_erasing(images, settings.random_erasing, generator)
    return images.contiguous(memory_format=torch.channels_last)


def horizontal_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image with probability 1/2.

    Args:
        images: `(batch_size, channels, height, width)`.
        generator: a CPU generator.
    """
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)


def random_rotation(images: torch.Tensor, max_degrees: float, generator: torch.Generator) -> torch.Tensor:
    """Rotate each image about its centre by an angle sampled uniformly from [-max_degrees, max_degrees].

    Bilinear interpolation with reflection padding.

    Args:
        images: `(batch_size, channels, height, width)`, of equal height and width.
        max_degrees: at least 0.
        generator: a CPU generator.
    """
    angles = (torch.rand(len(images), generator=generator) * 2 - 1) * torch.pi * max_degrees / 180  # (B,)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).to(images)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def random_erasing(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Fill a random rectangle of each image with grey, with the given probability.

    Zhong et al. 2017, algorithm 1, filling with the mean of the range; a rectangle that does not fit is clipped at the
    border instead of resampled.

    Args:
        images: `(batch_size, channels, height, width)`, in [-1, 1].
        probability: probability of erasing per image, from 0 to 1.
        generator: a CPU generator.
    """
    batch_size, _, height, width = images.shape
    chance, area, aspect, top, left = torch.rand(5, batch_size, generator=generator).unbind()
    area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
    low, high = torch.tensor(ERASED_ASPECT).log()
    aspect = (low + aspect * (high - low)).exp()
    erased_height = (area * aspect).sqrt().round().clamp(1, height)
    erased_width = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (top * (height - erased_height + 1)).floor(), (left * (width - erased_width + 1)).floor()
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    in_rows = (rows >= top[:, None]) & (rows < (top + erased_height)[:, None])  # (B, H)
    in_columns = (columns >= left[:, None]) & (columns < (left + erased_width)[:, None])  # (B, W)
    erased = in_rows[:, :, None] & in_columns[:, None, :] & (chance < probability)[:, None, None]
    return images.masked_fill(erased[:, None].to(images.device), 0.0)
