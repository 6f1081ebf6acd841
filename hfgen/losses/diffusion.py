"""The objective of denoising diffusion (Ho et al. 2020, arXiv:2006.11239): prediction targets and losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from scipy.optimize import linear_sum_assignment


# Each maps (model_output, target), both (batch_size, channels, height, width), to a loss for each pixel.
PIXEL_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda model_output, target: F.l1_loss(model_output, target, reduction="none"),
    "l2": lambda model_output, target: F.mse_loss(model_output, target, reduction="none"),
    "huber": lambda model_output, target: F.huber_loss(model_output, target, reduction="none", delta=1.0),
}


def diffusion_loss(
    model_output: torch.Tensor, target: torch.Tensor, kind: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean over pixels and batch of the pixel losses, with one weight per image.

    With kind "l2", a noise target and no weights, this is L_simple of Ho et al. 2020, equation 14.

    Args:
        model_output: `(batch_size, channels, height, width)`.
        target: same shape; see `prediction_target`.
        kind: a key of `PIXEL_LOSSES`: "l1", "l2" or "huber" (quadratic up to an error of 1, linear beyond).
        weights: `(batch_size,)`, non-negative; 1 for every image if None.

    Returns:
        A scalar, always in float32.
    """
    per_image = PIXEL_LOSSES[kind](model_output.float(), target.float()).flatten(1).mean(dim=1)  # (B,)
    return per_image.mean() if weights is None else (weights * per_image).mean()


def prediction_target(
    scheduler: DDPMScheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return the target of the network's prediction, according to `scheduler.config.prediction_type`.

    Args:
        scheduler: the training schedule; its prediction type is "epsilon" (the noise), "sample" (the clean
            images) or "v_prediction" (the velocity; Salimans and Ho 2022, arXiv:2202.00512, appendix D:
            `sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * clean_images`).
        clean_images: `(batch_size, channels, height, width)`, in [-1, 1].
        noise: same shape, standard normal.
        timesteps: `(batch_size,)`, int64, in [0, num_train_timesteps).

    Returns:
        The target, same shape as `clean_images`.

    Raises:
        ValueError: if the scheduler has another prediction type.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean_images
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean_images, noise, timesteps)
    raise ValueError(f"prediction_type={prediction_type!r} must be 'epsilon', 'sample' or 'v_prediction'")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return a loss weight per image, by timestep, so that easy, nearly clean images do not dominate the gradient.

    Hang et al. 2023 (arXiv:2303.09556), section 3.4, with `SNR = alphas_cumprod / (1 - alphas_cumprod)`:
    `min(SNR, gamma)` if the target is the clean image, divided by `SNR` for the noise and by `SNR + 1` for the
    velocity. All three put the same weight on the error of the clean image.

    Args:
        scheduler: the training schedule.
        timesteps: `(batch_size,)`, int64, in [0, num_train_timesteps).
        gamma: maximum weight of the clean image's error; 5 in the paper.

    Returns:
        `(batch_size,)`, float32, positive.

    Raises:
        ValueError: if the scheduler has another prediction type.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        # min(snr, gamma) / snr, rewritten because the SNR underflows to zero if the schedule ends in pure noise
        return (gamma * (1 - alphas_cumprod) / alphas_cumprod.clamp(min=1e-20)).clamp(max=1.0)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise ValueError(f"prediction_type={prediction_type!r} must be 'epsilon', 'sample' or 'v_prediction'")


def match_noise(clean_images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Assign the noise of a batch to nearby images: the permutation with the smallest total distance.

    Immiscible diffusion (Li et al. 2024, arXiv:2406.12303, algorithm 1): each image is paired with noise from only a
    part of the noise space, so the network's targets are less mixed. The batch as a whole keeps the same noise.

    Args:
        clean_images: `(batch_size, channels, height, width)`.
        noise: same shape, standard normal.

    Returns:
        The same noise in another order.
    """
    distances = torch.cdist(clean_images.flatten(1).float(), noise.flatten(1).float())  # (B, B)
    _, chosen = linear_sum_assignment(distances.cpu().numpy())
    return noise[torch.from_numpy(chosen).to(noise.device)]
