"""The objective of variational autoencoders (Kingma and Welling 2014, arXiv:1312.6114): the negative ELBO in nats.

Everything is a sum over pixels and latents and a mean over the batch, so that a KL weight of 1 means 1: a mean over
pixels would weight the KL by the number of pixels.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy


# Half a grey level of 8 bits, on the scale of [-1, 1]. A density of pixels has no upper bound; a decoder that is surer
# than this has learnt the rounding of the data.
MIN_SIGMA = 1 / 255


def gaussian_nats(mean_squared_error: torch.Tensor, variance: torch.Tensor, num_dims: int) -> torch.Tensor:
    """Return the negative log-likelihood of images under a Gaussian around each pixel, in nats an image.

    Args:
        mean_squared_error: a scalar: the mean over images `(batch_size, channels, height, width)` and their pixels.
        variance: a scalar: of all pixels.
        num_dims: channels times height times width.
    """
    return 0.5 * num_dims * (mean_squared_error / variance + (2 * math.pi * variance).log())


def _calibrated(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    mean_squared_error = (reconstruction - images).square().mean()
    # The optimal variance needs no gradient: there the derivative by it is 0.
    variance = mean_squared_error.detach().clamp(min=MIN_SIGMA**2)
    return gaussian_nats(mean_squared_error, variance, images[0].numel())


# Each maps the decoder's output and the images, both float32 `(batch_size, channels, height, width)` in [-1, 1], to
# the negative log-likelihood in nats an image: summed over pixels, averaged over the batch.
RECONSTRUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # A Gaussian of the variance that fits best, the mean squared error of the batch: Rybkin et al. 2021
    # (arXiv:2006.13202), equation 5; but at least MIN_SIGMA squared.
    "calibrated": _calibrated,
    # A Gaussian of variance 1: half the squared error and a constant.
    "mse": lambda reconstruction, images: gaussian_nats(
        (reconstruction - images).square().mean(), torch.ones((), device=images.device), images[0].numel()
    ),
    # A Laplace distribution of scale 1: the absolute error and a constant.
    "l1": lambda reconstruction, images: images[0].numel() * ((reconstruction - images).abs().mean() + math.log(2)),
    # A Bernoulli distribution over black and white, both taken from [-1, 1] to [0, 1]: for pixels that are either.
    "bce": lambda reconstruction, images: (
        binary_cross_entropy((reconstruction + 1) / 2, (images + 1) / 2, reduction="sum") / len(images)
    ),
}


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor, kind: str = "calibrated") -> torch.Tensor:
    """Return the negative log-likelihood of the images in nats an image.

    Args:
        reconstruction: the decoder's output, `(batch_size, channels, height, width)`, in [-1, 1].
        images: of the same shape, in [-1, 1].
        kind: the likelihood, a key of `RECONSTRUCTIONS`.

    Returns:
        A scalar, in float32 whatever the precision of the reconstruction.

    Raises:
        ValueError: for another kind.
    """
    if kind not in RECONSTRUCTIONS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(RECONSTRUCTIONS)}")
    return RECONSTRUCTIONS[kind](reconstruction.float(), images.float())


def kl_per_dimension(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return how far the posteriors are from the standard normal prior: KL(q || p) of each dimension, in nats.

    Kingma and Welling 2014, appendix B: `(mean^2 + variance - 1 - log variance) / 2`.

    Args:
        mean: of the posteriors, `(batch_size, latent_dim, ...)`, further dimensions being of size 1.
        logvar: logarithm of their variances, of the same shape.

    Returns:
        The mean over the batch, `(latent_dim,)`, float32, not negative.
    """
    mean, logvar = mean.float().flatten(1), logvar.float().flatten(1)
    return 0.5 * (mean.square() + logvar.expm1() - logvar).mean(dim=0)


def kl_loss(kl_dimensions: torch.Tensor, free_bits: float = 0.0) -> torch.Tensor:
    """Sum the KL over the dimensions, each of which has some for free.

    Kingma et al. 2016 (arXiv:1606.04934), equation 15, a group being a dimension: below `free_bits` a dimension has no
    reason to be given up.

    Args:
        kl_dimensions: `(latent_dim,)`, means over posteriors `(batch_size, latent_dim)`, in nats.
        free_bits: lambda, what each dimension may spend at no cost; in nats, in spite of the name.

    Returns:
        A scalar, in nats an image.
    """
    return kl_dimensions.clamp(min=free_bits).sum()


def warmed_up(weight: float, step: int, warmup_steps: int) -> float:
    """Return the weight of step 1, 2, ...: it rises linearly and is full from step `warmup_steps` on.

    Bowman et al. 2016 (arXiv:1511.06349), section 3.1; Sonderby et al. 2016 (arXiv:1602.02282), section 2.3.
    """
    return weight * min(1.0, step / warmup_steps) if warmup_steps else weight


def bits_per_dimension(nats: torch.Tensor | float, num_dims: int) -> torch.Tensor | float:
    """Turn a negative log-density of images in [-1, 1] into bits for each of their 8-bit values.

    A grey level is 2/255 wide, over which the density is taken as constant (Theis et al. 2016, arXiv:1511.01844,
    section 3.1): `(nats / num_dims + log(255 / 2)) / log(2)`. A uniform density on [-1, 1] gives log2(255).

    Args:
        nats: of an image, such as the negative ELBO: the result is then an upper bound.
        num_dims: channels times height times width.
    """
    return (nats / num_dims + math.log(255 / 2)) / math.log(2)
