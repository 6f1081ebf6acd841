"""Fitting the ex-post density: a mixture of Gaussians over the latents of the training set."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Fit

from hfgen.models import GaussianMixture


# Latents that a mixture is fitted to, drawn from the posteriors: of few images several each, for full covariances.
NUM_LATENTS = 20_000
# One of so many images is held out to choose the number of components.
HELD_OUT_PART = 10
CANDIDATES = (1, 2, 5, 10, 20, 50, 100)


class FittedDensity(NamedTuple):
    """A mixture and how well it fits.

    Attributes:
        mixture: fitted to all images.
        held_out_nats: mean log-density, in nats, of latents of images that a mixture of as many components had not
            been fitted to.
        prior_nats: mean log-density of the same latents under the standard normal prior.
    """

    mixture: GaussianMixture
    held_out_nats: float
    prior_nats: float

    def report(self) -> dict[str, float]:
        """Return what there is to tell, as plain values."""
        return {
            "num_components": self.mixture.config.num_components,
            "held_out_nats": self.held_out_nats,
            "prior_nats": self.prior_nats,
        }


def fit_density(mean: torch.Tensor, logvar: torch.Tensor, max_components: int, seed: int) -> FittedDensity:
    """Fit a mixture of Gaussians with full covariances to draws from the posteriors of the training images.

    Of 1, 2, 5, 10, ... components, those are taken under which the latents of held-out images are likeliest: with few
    images many components would be so many copies of them.

    Args:
        mean: of the posteriors, `(num_images, latent_dim)`, at least 2 images.
        logvar: logarithm of their variances, of the same shape.
        max_components: at most so many.
        seed: of the draws and of the fit's start.

    Returns:
        The mixture, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = max(1, NUM_LATENTS // len(mean))
    noise = torch.randn(draws, *mean.shape, generator=generator)
    latents = (mean + (logvar / 2).exp() * noise).double().numpy()  # (draws, num_images, latent_dim)

    held_out = torch.randperm(len(mean), generator=generator).numpy() < max(1, len(mean) // HELD_OUT_PART)
    seen, unseen = (part.reshape(-1, mean.shape[1]) for part in (latents[:, ~held_out], latents[:, held_out]))
    scores: dict[int, float] = {}
    for components in [count for count in CANDIDATES if count <= min(max_components, (~held_out).sum())]:
        scores[components] = _fit(seen, components, seed).score(unseen)
        if scores[components] < max(scores.values()):  # more will not help either
            break
    best = max(scores, key=lambda components: scores[components])

    fit = _fit(latents.reshape(-1, mean.shape[1]), best, seed)
    mixture = GaussianMixture(mean.shape[1], best)
    mixture.weights.copy_(torch.from_numpy(fit.weights_))
    mixture.means.copy_(torch.from_numpy(fit.means_))
    mixture.scale_trils.copy_(torch.linalg.cholesky(torch.from_numpy(fit.covariances_)))
    prior = -0.5 * (np.square(unseen) + np.log(2 * np.pi)).sum(axis=1).mean()
    return FittedDensity(mixture.eval(), scores[best], float(prior))


def _fit(latents: np.ndarray, components: int, seed: int) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 100 rounds it is good enough to sample from
        return Fit(components, covariance_type="full", random_state=seed % 2**32).fit(latents)
