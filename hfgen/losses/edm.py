"""The objective of EDM (Karras et al. 2022, arXiv:2206.00364): how noise is added, and what is predicted."""

import math

import torch


# Mean and standard deviation of the log noise level in training: table 1 of the paper.
LOG_MEAN, LOG_STD = -1.2, 1.2


def sample_noise_levels(batch_size: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Sample noise levels from the lognormal distribution of table 1.

    Args:
        batch_size: number of noise levels.
        generator: source of the random numbers.
        scale: factor of the noise levels. An image at twice the size hides its composition only in twice the noise
            (Hoogeboom et al. 2023, arXiv:2301.11093, section 2.1).

    Returns:
        `(batch_size,)`, positive, on the generator's device.
    """
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return (LOG_MEAN + math.log(scale) + LOG_STD * normal).exp()


def edm_batch(
    clean_images: torch.Tensor, noise: torch.Tensor, noise_levels: torch.Tensor, sigma_data: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add noise to images, and scale the network's input and target to similar magnitude at every noise level.

    With noise level sigma, denoiser D and network F, equation 7 is `D(x) = c_skip x + c_out F(c_in x, c_noise)`.
    Table 1 gives the factors. In the loss, equation 8, the weight of each level cancels `c_out ** 2`, which leaves
    the plain squared error of F against the target returned here.

    Args:
        clean_images: `(batch_size, channels, height, width)`, in [-1, 1].
        noise: same shape, standard normal.
        noise_levels: `(batch_size,)`, positive.
        sigma_data: standard deviation of the images' pixels.

    Returns:
        The network's input, `(batch_size, channels, height, width)`; its timesteps, `(batch_size,)`: the log of the
        noise level divided by 4; and its target, same shape as the input.
    """
    noisy_images = clean_images + noise_levels.view(-1, 1, 1, 1) * noise
    c_skip, c_out, c_in = _factors(noise_levels, sigma_data)
    target = (clean_images - c_skip * noisy_images) / c_out
    return c_in * noisy_images, noise_levels.log() / 4, target


def edm_denoised(
    noisy_images: torch.Tensor, output: torch.Tensor, noise_levels: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """Return the denoised images: D of equation 7.

    Args:
        noisy_images: `(batch_size, channels, height, width)`, before scaling by `c_in`.
        output: output of the network F, same shape.
        noise_levels: `(batch_size,)`, positive.
        sigma_data: standard deviation of the images' pixels.
    """
    c_skip, c_out, _ = _factors(noise_levels, sigma_data)
    return c_skip * noisy_images + c_out * output


def _factors(noise_levels: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `c_skip`, `c_out` and `c_in` of table 1, each `(batch_size, 1, 1, 1)`."""
    sigma = noise_levels.view(-1, 1, 1, 1)
    total = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total
