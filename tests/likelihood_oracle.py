"""Networks that predict by a formula, and the terms of the variational bound by the paper's equations."""

import math
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.special import erf, log_ndtr

from hfgen.models import ConvVAE


TYPES = ("epsilon", "sample", "v_prediction")
FEW_BETAS = (0.003, 0.004, 0.02, 0.1, 0.3, 0.5)


class Network:
    """Predicts the clean images by a function of noisy images and timesteps, and notes what it was asked for.

    Args:
        predict: maps float64 noisy images and timesteps `(batch_size,)` to the predicted clean images.
        schedule: by which the prediction is expressed.
    """

    def __init__(self, predict, schedule: DDPMScheduler):
        self.predict, self.prediction_type, self.asked = predict, schedule.config.prediction_type, []
        self.alphas_cumprod = alphas_cumprod_of(schedule)

    def __call__(self, noisy_images, timesteps):
        assert (noisy_images.dtype, timesteps.dtype) == (torch.float32, torch.int64)
        assert not torch.is_grad_enabled()
        self.asked.append(timesteps)
        noisy_images = noisy_images.double()
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        clean_images = self.predict(noisy_images, timesteps).expand_as(noisy_images)
        noise = (noisy_images - alphas_cumprod.sqrt() * clean_images) / (1 - alphas_cumprod).sqrt()
        velocity = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean_images
        outputs = {"epsilon": noise, "sample": clean_images, "v_prediction": velocity}
        return SimpleNamespace(sample=outputs[self.prediction_type].float())


def alphas_cumprod_of(schedule: DDPMScheduler) -> torch.Tensor:
    return (1 - schedule.betas.double()).cumprod(dim=0)


def few_steps(prediction_type: str = "sample", clip_sample: bool = False, betas=FEW_BETAS) -> DDPMScheduler:
    return DDPMScheduler(
        len(betas), trained_betas=list(betas), prediction_type=prediction_type, clip_sample=clip_sample
    )


def images_of(levels) -> torch.Tensor:
    return 2 * torch.as_tensor(levels).float() / 255 - 1


def random_images(count: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return images_of(torch.randint(0, 256, (count, 3, size, size), generator=generator))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kl_of_gaussians(mean_q, variance_q, mean_p, variance_p):
    return 0.5 * (math.log(variance_p / variance_q) + (variance_q + (mean_q - mean_p) ** 2) / variance_p - 1)


def decoder_nats(level: int, mean: float, sigma: float) -> float:
    """Equation 13 for one value, by the logarithms of the tails where the bin is far from the mean."""
    clean = 2 * level / 255 - 1
    above, below = (clean + 1 / 255 - mean) / sigma, (clean - 1 / 255 - mean) / sigma
    if level == 0:
        return -log_ndtr(above)
    if level == 255:
        return -log_ndtr(-below)
    if min(abs(above), abs(below)) < 5:
        return -math.log((erf(above / math.sqrt(2)) - erf(below / math.sqrt(2))) / 2)
    near, far = sorted((abs(above), abs(below)))
    return -(log_ndtr(-near) + math.log1p(-math.exp(log_ndtr(-far) - log_ndtr(-near))))


def terms_by_the_equations(schedule: DDPMScheduler, level: int, predicted) -> list[float]:
    """L_0, L_1, ..., L_T in nats for one value if the network says `predicted[t - 1]` at Ho et al.'s timestep t."""
    beta = [None, *(float(beta) for beta in schedule.betas.double())]
    bar = np.cumprod([1, *(1 - beta for beta in beta[1:])])
    clean, last = 2 * level / 255 - 1, len(beta) - 1
    variance = [None, *(beta[t] * (1 - bar[t - 1]) / (1 - bar[t]) for t in range(1, last + 1))]
    terms = [decoder_nats(level, predicted[0], math.sqrt(variance[2]))]
    for t in range(2, last + 1):
        noisy = 0.3  # drops out
        means = [
            (math.sqrt(bar[t - 1]) * beta[t] * start + math.sqrt(1 - beta[t]) * (1 - bar[t - 1]) * noisy)
            / (1 - bar[t])
            for start in (clean, predicted[t - 1])
        ]
        terms.append(kl_of_gaussians(means[0], variance[t], means[1], variance[t]))
    return [*terms, kl_of_gaussians(math.sqrt(bar[last]) * clean, 1 - bar[last], 0, 1)]


def tiny_vae() -> ConvVAE:
    torch.manual_seed(0)
    vae = ConvVAE(8, latent_dim=5, block_out_channels=(4, 8), layers_per_block=0).eval()
    with torch.no_grad():
        vae.to_posterior.weight *= 30
        vae.conv_out.weight *= 10
    return vae
