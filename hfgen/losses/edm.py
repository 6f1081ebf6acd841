"""The objective of EDM (Karras et al. 2022, arXiv:2206.00364): how images are noised, and what is predicted."""

import torch


# Of the logarithm of the noise level in training: table 1 of the paper.
LOG_MEAN, LOG_STD = -1.2, 1.2


def draw_noise_levels(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels from the lognormal distribution of table 1.

    Returns:
        `(batch_size,)`, positive, on the generator's device.
    """
    return (LOG_MEAN + LOG_STD * torch.randn(batch_size, generator=generator, device=generator.device)).exp()


def edm_batch(
    clean_images: torch.Tensor, noise: torch.Tensor, noise_levels: torch.Tensor, sigma_data: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise images, and scale what the network sees and is to say to about the same size at every noise level.

    With sigma the noise level and D the denoiser that the network F stands for, equation 7 is
    `D(x) = c_skip x + c_out F(c_in x, c_noise)`, table 1 gives the factors, and equation 8 the loss, in which the
    weight of each level cancels `c_out ** 2`: what is left is the plain squared error of F against the target here.

    Args:
        clean_images: `(batch_size, channels, height, width)`, in [-1, 1].
        noise: same shape, standard normal.
        noise_levels: `(batch_size,)`, positive.
        sigma_data: standard deviation of the images' pixels.

    Returns:
        The network's input, `(batch_size, channels, height, width)`; its timesteps, `(batch_size,)`: a quarter of the
        logarithm of the noise level; and its target, of the input's shape.
    """
    noisy_images = clean_images + noise_levels.view(-1, 1, 1, 1) * noise
    c_skip, c_out, c_in = _factors(noise_levels, sigma_data)
    target = (clean_images - c_skip * noisy_images) / c_out
    return c_in * noisy_images, noise_levels.log() / 4, target


def edm_denoised(
    noisy_images: torch.Tensor, output: torch.Tensor, noise_levels: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """Return the clean images that the network takes noisy ones for: D of equation 7.

    Args:
        noisy_images: `(batch_size, channels, height, width)`, before they were scaled for the network.
        output: of the network, F; same shape.
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
