"""The objective of variational autoencoders (Kingma and Welling 2014, arXiv:1312.6114): the negative ELBO in nats.

All terms are summed over pixels or latents and averaged over the batch, so that a KL weight of 1 is the ELBO: a mean
over pixels would multiply the KL by the number of pixels.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy


# Half an 8-bit grey level on the scale of [-1, 1]. A pixel density has no upper bound; a decoder with a smaller sigma
# has learned the rounding of the data.
MIN_SIGMA = 1 / 255


def gaussian_nats(mean_squared_error: torch.Tensor, variance: torch.Tensor, num_dims: int) -> torch.Tensor:
    """Return the negative log-likelihood of images under a Gaussian around each pixel, in nats per image.

    Args:
        mean_squared_error: a scalar, the mean over images `(batch_size, channels, height, width)` and their pixels.
        variance: a scalar, the same for all pixels.
        num_dims: channels times height times width.
    """
    return 0.5 * num_dims * (mean_squared_error / variance + (2 * math.pi * variance).log())


def _calibrated(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    mean_squared_error = (reconstruction - images).square().mean()
    # At the optimal variance the derivative with respect to it is 0, so it needs no gradient.
    variance = mean_squared_error.detach().clamp(min=MIN_SIGMA**2)
    return gaussian_nats(mean_squared_error, variance, images[0].numel())


# Each maps the decoder's output and the images, both float32 `(batch_size, channels, height, width)` in [-1, 1], to
# the negative log-likelihood in nats per image: summed over pixels, averaged over the batch.
RECONSTRUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # A Gaussian with the optimal variance, the mean squared error of the batch (Rybkin et al. 2021,
    # arXiv:2006.13202, equation 5), but at least MIN_SIGMA squared.
    "calibrated": _calibrated,
    # A Gaussian of variance 1: half the squared error plus a constant.
    "mse": lambda reconstruction, images: gaussian_nats(
        (reconstruction - images).square().mean(), torch.ones((), device=images.device), images[0].numel()
    ),
    # A Laplace distribution of scale 1: the absolute error plus a constant.
    "l1": lambda reconstruction, images: images[0].numel() * ((reconstruction - images).abs().mean() + math.log(2)),
    # A Bernoulli distribution over black and white, after mapping [-1, 1] to [0, 1]: for binary images.
    "bce": lambda reconstruction, images: (
        binary_cross_entropy((reconstruction + 1) / 2, (images + 1) / 2, reduction="sum") / len(images)
    ),
}


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor, kind: str = "calibrated") -> torch.Tensor:
    """Return the negative log-likelihood of the images, in nats per image.

    Args:
        reconstruction: the decoder's output, `(batch_size, channels, height, width)`, in [-1, 1].
        images: same shape, in [-1, 1].
        kind: the likelihood, a key of `RECONSTRUCTIONS`.

    Returns:
        A scalar, always in float32.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in RECONSTRUCTIONS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(RECONSTRUCTIONS)}")
    return RECONSTRUCTIONS[kind](reconstruction.float(), images.float())


def kl_per_dimension(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return KL(q || p) of the posteriors from the standard normal prior for each dimension, in nats.

    Kingma and Welling 2014, appendix B: `(mean^2 + variance - 1 - log variance) / 2`.

    Args:
        mean: means of the posteriors, `(batch_size, latent_dim, ...)`; further dimensions have size 1.
        logvar: logarithm of their variances, same shape.

    Returns:
        The mean over the batch, `(latent_dim,)`, float32, non-negative.
    """
    mean, logvar = mean.float().flatten(1), logvar.float().flatten(1)
    return 0.5 * (mean.square() + logvar.expm1() - logvar).mean(dim=0)


def kl_loss(kl_dimensions: torch.Tensor, free_bits: float = 0.0) -> torch.Tensor:
    """Sum the KL over the dimensions, with a free amount for each.

    Kingma et al. 2016 (arXiv:1606.04934), equation 15, with one dimension per group: reducing the KL of a dimension
    below `free_bits` gains nothing, so no dimension is given up.

    Args:
        kl_dimensions: `(latent_dim,)`, means over posteriors `(batch_size, latent_dim)`, in nats.
        free_bits: lambda, the KL that costs nothing in each dimension; in nats, despite the name.

    Returns:
        A scalar, in nats per image.
    """
    return kl_dimensions.clamp(min=free_bits).sum()


def warmed_up(weight: float, step: int, warmup_steps: int) -> float:
    """Return the weight at step 1, 2, ...: a linear ramp that reaches `weight` at step `warmup_steps`.

    Bowman et al. 2016 (arXiv:1511.06349), section 3.1; Sonderby et al. 2016 (arXiv:1602.02282), section 2.3.
    """
    return weight * min(1.0, step / warmup_steps) if warmup_steps else weight


def bits_per_dimension(nats: torch.Tensor | float, num_dims: int) -> torch.Tensor | float:
    """Convert a negative log-density of images in [-1, 1] to bits per 8-bit value.

    The density is taken as constant over a grey level, which is 2/255 wide (Theis et al. 2016, arXiv:1511.01844,
    section 3.1): `(nats / num_dims + log(255 / 2)) / log(2)`. A uniform density on [-1, 1] gives log2(255).

    Args:
        nats: negative log-density per image; with the negative ELBO the result is an upper bound.
        num_dims: channels times height times width.
    """
    return (nats / num_dims + math.log(255 / 2)) / math.log(2)
