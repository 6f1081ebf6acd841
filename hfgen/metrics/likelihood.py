"""Bits per dimension: bounds on the negative log-likelihood of images under DDPMs, EDM and VAEs.

They are not comparable: the diffusion bounds are on the probability of the 8-bit values, the VAE bound is on a density
assumed constant within a grey level.
"""

import math
from functools import partial
from itertools import pairwise

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, ModelMixin

from hfgen.losses.edm import edm_batch, edm_denoised
from hfgen.losses.vae import MIN_SIGMA, bits_per_dimension, gaussian_nats, kl_per_dimension
from hfgen.methods.schedules import PREDICTION_TYPES


# Half an 8-bit grey level, on the scale of [-1, 1].
HALF_LEVEL = 1 / 255
# Tolerance for 8-bit values, in grey levels: far above the rounding error of float32.
ROUNDING = 0.01


@torch.no_grad()
def diffusion_bits(
    unet: ModelMixin,
    schedule: DDPMScheduler,
    images: torch.Tensor,
    timesteps_per_image: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Estimate the variational bound of a DDPM on the negative log-likelihood of images, in bits per dimension.

    Ho et al. 2020 (arXiv:2006.11239), equation 5: L_T exactly, L_0 and the L_{t-1} between from one noise sample each.
    The variances are the lower choice of section 3.2; that of the first timestep, which is 0, is replaced by that of
    the second, as in the code of Nichol and Dhariwal 2021 (arXiv:2102.09672). The bound is on the probability of the
    8-bit values, while that of `vae_bits` is on a density assumed constant within a grey level.

    The sum over the L_{t-1} is estimated without bias by stratified sampling: the T - 1 timesteps are split into
    strata of equal decrease in log signal-to-noise ratio, so that the terms have similar size; each image gets one
    timestep from each stratum, sampled uniformly and weighted by the stratum's size.

    Args:
        unet: the network, in eval mode, on the images' device; predicts `schedule.config.prediction_type`.
        schedule: the training schedule, T at least 2; if it clips samples, predicted images are clipped likewise.
        images: float32 `(batch_size, 3, height, width)`, 8-bit values v as `2 v / 255 - 1`.
        timesteps_per_image: number of strata; from T - 1 on every timestep is used once. The network is evaluated
            once per stratum and once for L_0, on the whole batch.
        generator: random numbers for timesteps and noise.

    Returns:
        `(batch_size,)`, float64, on the CPU.

    Raises:
        ValueError: if `timesteps_per_image` is below 1, `images` are not of this form, or for another prediction type.
    """
    if timesteps_per_image < 1:
        raise ValueError(f"timesteps_per_image={timesteps_per_image} must be at least 1")
    if schedule.config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={schedule.config.prediction_type!r} must be one of {PREDICTION_TYPES}")
    clean_images = _exact_values(images)
    # In float64 from the betas on: float32 has only three digits for the first 1 - alphas_cumprod.
    betas = schedule.betas.cpu().double()
    alphas_cumprod = (1 - betas).cumprod(dim=0)  # (T,)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    predict = partial(_predicted_images, unet, schedule, clean_images, alphas_cumprod, images.device, generator)

    # 1. L_T: how far the end of the diffusion is from the standard normal prior
    last = alphas_cumprod[-1]
    nats = _sum_of_pixels(last * clean_images.square() - last - (-last).log1p()) / 2

    # 2. L_{t-1}, equation 8. Both Gaussians have the variance of equation 7, so the weight of the squared error,
    # in terms of the predicted clean images, is half the decrease of the signal-to-noise ratio.
    for first, end in pairwise(_strata(snr, timesteps_per_image)):
        timesteps = torch.randint(first, end, (len(images),), generator=generator, device=generator.device).cpu()
        predicted = predict(timesteps)
        weights = (end - first) * (snr[timesteps - 1] - snr[timesteps]) / 2
        nats += weights * _sum_of_pixels((predicted - clean_images).square())

    # 3. L_0: the mean of equation 7 is the predicted clean image itself
    mean = predict(torch.zeros(len(images), dtype=torch.int64))
    variance = betas[1] * (1 - alphas_cumprod[0]) / (1 - alphas_cumprod[1])
    nats += _sum_of_pixels(_decoder_nats(clean_images, mean, variance.sqrt()))
    return nats / (images[0].numel() * math.log(2))


@torch.no_grad()
def edm_bits(
    unet: ModelMixin,
    schedule: EDMEulerScheduler,
    images: torch.Tensor,
    levels_per_image: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Estimate the variational bound of a network trained with EDM, in bits per dimension.

    Kingma et al. 2021 (arXiv:2107.00630), equation 17: for infinitely many steps the bound is an integral over the
    signal-to-noise ratio, here `1 / sigma^2` from `sigma_max` to `sigma_min`. Over log sigma it is the integral of the
    squared error divided by `sigma^2`. The other terms are as in `diffusion_bits`: the prior, Gaussian noise of
    `sigma_max`, and the 8-bit values given the image noised by `sigma_min`, under a Gaussian of that width around the
    network's prediction. The bound is on the probability of the 8-bit values.

    The integral is estimated without bias: the range is split into strata of equal width, and each image gets one
    noise level from each, sampled uniformly.

    Args:
        unet: the network, in eval mode, on the images' device.
        schedule: has EDM's `sigma_min`, `sigma_max` and `sigma_data`.
        images: as in `diffusion_bits`.
        levels_per_image: number of strata; the network is evaluated once per stratum and once more, on the whole
            batch.
        generator: random numbers for noise levels and noise.

    Returns:
        `(batch_size,)`, float64, on the CPU.

    Raises:
        ValueError: if `levels_per_image` is below 1, or `images` do not have this form.
    """
    if levels_per_image < 1:
        raise ValueError(f"levels_per_image={levels_per_image} must be at least 1")
    clean_images, config = _exact_values(images), schedule.config
    lowest, highest = math.log(config.sigma_min), math.log(config.sigma_max)
    width = (highest - lowest) / levels_per_image

    def denoised(log_levels: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(clean_images.shape, generator=generator, device=generator.device).cpu()
        levels = log_levels.float().exp()
        network_input, timesteps, _ = edm_batch(clean_images.float(), noise, levels, config.sigma_data)
        output = unet(network_input.to(images.device), timesteps.to(images.device)).sample.cpu()
        noisy_images = clean_images.float() + levels.view(-1, 1, 1, 1) * noise
        return edm_denoised(noisy_images.double(), output.double(), levels.double(), config.sigma_data)

    nats = _sum_of_pixels(clean_images.square()) / (2 * config.sigma_max**2)
    for stratum in range(levels_per_image):
        places = torch.rand(len(images), generator=generator, device=generator.device).cpu().double()
        log_levels = lowest + width * (stratum + places)
        errors = _sum_of_pixels((denoised(log_levels) - clean_images).square())
        nats += width * errors / (2 * log_levels).exp()
    mean = denoised(torch.full((len(images),), lowest, dtype=torch.float64))
    nats += _sum_of_pixels(_decoder_nats(clean_images, mean, torch.tensor(config.sigma_min, dtype=torch.float64)))
    return nats / (images[0].numel() * math.log(2))


@torch.no_grad()
def vae_bits(vae: ModelMixin, images: torch.Tensor, generator: torch.Generator, batch_size: int = 64) -> float:
    """Estimate the negative ELBO of a VAE on images, in bits per dimension, from one sample of each posterior.

    The decoder is a Gaussian with the best-fitting variance over all images, the mean squared error, but at least
    `MIN_SIGMA` squared: Rybkin et al. 2021 (arXiv:2006.13202), equation 5. The bound is on a density assumed constant
    within a grey level, while that of `diffusion_bits` is on the probability of the 8-bit values.

    Args:
        vae: the network, in eval mode: `encode` and `decode` as in diffusers' `AutoencoderKL`.
        images: float32 `(num_images, 3, height, width)`, 8-bit values v as `2 v / 255 - 1`, on any device.
        generator: random numbers for the latents, sampled image by image, so that batching does not matter.
        batch_size: images encoded at a time.

    Raises:
        ValueError: if `batch_size` is below 1, or `images` do not have this form.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    squared_error, kl = torch.zeros(2, dtype=torch.float64)
    for batch in images.split(batch_size):
        clean_images = _exact_values(batch)
        posterior = vae.encode(batch.to(vae.device)).latent_dist
        reconstruction = vae.decode(posterior.sample([generator] * len(batch))).sample
        squared_error += (reconstruction.cpu().double() - clean_images).square().sum()
        kl += len(batch) * kl_per_dimension(posterior.mean, posterior.logvar).cpu().double().sum()
    mean_squared_error = squared_error / images.numel()
    num_dims = images[0].numel()
    nats = gaussian_nats(mean_squared_error, mean_squared_error.clamp(min=MIN_SIGMA**2), num_dims) + kl / len(images)
    return float(bits_per_dimension(nats, num_dims))


def _exact_values(images: torch.Tensor) -> torch.Tensor:
    """Check the images and return them in float64, on the CPU, without the rounding of float32."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images must have shape (batch_size, 3, height, width), not {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise ValueError(f"images must be torch.float32, not {images.dtype}")
    if not bool((images.abs() <= 1).all()):  # also catches NaN
        raise ValueError("images must be in [-1, 1]")
    values = (images.cpu().double() + 1) * 127.5
    levels = values.round()
    if bool(((values - levels).abs() > ROUNDING).any()):
        raise ValueError("images must be 8-bit values: 2 v / 255 - 1 with an integer v")
    return levels / 127.5 - 1


def _strata(snr: torch.Tensor, parts: int) -> list[int]:
    """Return the edges of the strata of timesteps 1 to T - 1; each has at least one timestep."""
    last = len(snr)
    parts = min(parts, last - 1)
    log_snr = snr.clamp(min=float(snr[snr > 0].min())).log()  # zero at the end of some schedules
    targets = torch.linspace(float(log_snr[0]), float(log_snr[-1]), parts + 1, dtype=torch.float64)
    # The term of timestep t covers the decrease from t - 1 to t; it belongs to the stratum in which that ends.
    edges = [1 + int((log_snr[1:] > target).sum()) for target in targets]
    edges[0], edges[-1] = 1, last
    for part in range(1, parts):
        edges[part] = min(max(edges[part], edges[part - 1] + 1), last - (parts - part))
    return edges


def _predicted_images(
    unet: ModelMixin,
    schedule: DDPMScheduler,
    clean_images: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    device: torch.device,
    generator: torch.Generator,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Add noise to the clean images and return the network's prediction of them, in float64 on the CPU."""
    signal = alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    spread = (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    noise = torch.randn(clean_images.shape, generator=generator, device=generator.device)
    noisy_images = (signal * clean_images + spread * noise.cpu()).float()
    model_output = unet(noisy_images.to(device), timesteps.to(device)).sample.cpu().double()
    if schedule.config.prediction_type == "epsilon":
        predicted = (noisy_images - spread * model_output) / signal
    elif schedule.config.prediction_type == "sample":
        predicted = model_output
    else:  # Salimans and Ho 2022 (arXiv:2202.00512), appendix D
        predicted = signal * noisy_images - spread * model_output
    limit = schedule.config.clip_sample_range
    return predicted.clamp(-limit, limit) if schedule.config.clip_sample else predicted


def _decoder_nats(clean_images: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return the negative log-probability of each 8-bit value under a discretised Gaussian (Ho et al., equation 13).

    Args:
        clean_images: float64 `(batch_size, channels, height, width)`, 8-bit values scaled to [-1, 1].
        mean: same shape.
        sigma: a scalar.
    """
    distance = clean_images - mean
    # Mirroring bins above the mean keeps their probability and avoids subtracting two numbers near 1.
    upper = torch.special.log_ndtr((HALF_LEVEL - distance.abs()) / sigma)
    lower = torch.special.log_ndtr((-HALF_LEVEL - distance.abs()) / sigma)
    log_probability = upper + (-(lower - upper).expm1()).log()
    darkest = torch.special.log_ndtr((HALF_LEVEL + distance) / sigma)  # 0 includes everything below
    brightest = torch.special.log_ndtr((HALF_LEVEL - distance) / sigma)  # 255 includes everything above
    log_probability = torch.where(clean_images < HALF_LEVEL - 1, darkest, log_probability)
    return -torch.where(clean_images > 1 - HALF_LEVEL, brightest, log_probability)


def _sum_of_pixels(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(dim=1)
