"""The objective of denoising diffusion (Ho et al. 2020, arXiv:2006.11239): what is predicted, and how it is scored."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from scipy.optimize import linear_sum_assignment


# Each maps (model_output, target), both (batch_size, channels, height, width), to the loss of every pixel.
PIXEL_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda model_output, target: F.l1_loss(model_output, target, reduction="none"),
    "l2": lambda model_output, target: F.mse_loss(model_output, target, reduction="none"),
    "huber": lambda model_output, target: F.huber_loss(model_output, target, reduction="none", delta=1.0),
}


def diffusion_loss(
    model_output: torch.Tensor, target: torch.Tensor, kind: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Score a prediction: the mean over pixels and batch of the pixel losses, each image by its weight.

    With kind "l2", a noise target and no weights this is L_simple, Ho et al. 2020, equation 14.

    Args:
        model_output: `(batch_size, channels, height, width)`.
        target: same shape, from `prediction_target`.
        kind: a key of `PIXEL_LOSSES`: "l1", "l2" or "huber" (quadratic up to an error of 1, linear beyond).
        weights: `(batch_size,)`, not negative; 1 for every image if None.

    Returns:
        A scalar, in float32 whatever the precision of the prediction.
    """
    per_image = PIXEL_LOSSES[kind](model_output.float(), target.float()).flatten(1).mean(dim=1)  # (B,)
    return per_image.mean() if weights is None else (weights * per_image).mean()


def prediction_target(
    scheduler: DDPMScheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return what the network should predict, by `scheduler.config.prediction_type`.

    Args:
        scheduler: the schedule of the training; its prediction type is "epsilon" (the noise), "sample" (the clean
            images) or "v_prediction" (Salimans and Ho 2022, arXiv:2202.00512, appendix D:
            `sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * clean_images`).
        clean_images: `(batch_size, channels, height, width)`, in [-1, 1].
        noise: same shape, standard normal.
        timesteps: `(batch_size,)`, int64, in [0, num_train_timesteps).

    Returns:
        The target, of the same shape as `clean_images`.

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
    raise ValueError(f"prediction_type={prediction_type!r} is none of 'epsilon', 'sample', 'v_prediction'")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight each image by its timestep so that easy, nearly clean ones do not dominate the gradient.

    Hang et al. 2023 (arXiv:2303.09556), section 3.4, with `SNR = alphas_cumprod / (1 - alphas_cumprod)`:
    `min(SNR, gamma)` for the clean image as target, that divided by `SNR` for the noise, and divided by `SNR + 1` for
    the velocity: the same weight on the error of the clean image in all three.

    Args:
        scheduler: the schedule of the training.
        timesteps: `(batch_size,)`, int64, in [0, num_train_timesteps).
        gamma: the largest weight of an error of the clean image; 5 in the paper.

    Returns:
        `(batch_size,)`, float32, positive.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clipped = snr.clamp(max=gamma)
    return {
        "sample": lambda: clipped,
        # clipped / snr, without dividing by an SNR that underflows to zero where a schedule ends in pure noise
        "epsilon": lambda: (gamma * (1 - alphas_cumprod) / alphas_cumprod.clamp(min=1e-20)).clamp(max=1.0),
        "v_prediction": lambda: clipped / (snr + 1),
    }[scheduler.config.prediction_type]()


def match_noise(clean_images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Give each image of a batch the noise near it: a permutation with the least sum of distances.

    Immiscible diffusion (Li et al. 2024, arXiv:2406.12303, algorithm 1): an image then sees noise from a part of the
    whole only, and what the network must tell apart is less mixed. The noise of a batch stays the same as a whole.

    Args:
        clean_images: `(batch_size, channels, height, width)`.
        noise: same shape, standard normal.

    Returns:
        The same noise in another order.
    """
    distances = torch.cdist(clean_images.flatten(1).float(), noise.flatten(1).float())  # (B, B)
    _, chosen = linear_sum_assignment(distances.cpu().numpy())
    return noise[torch.from_numpy(chosen).to(noise.device)]
