"""A Gaussian over the latents of recent training images: a VAE's density until the ex-post density is fitted.

Sheets during training are sampled from it, and checkpoints contain it.
"""

from typing import Any

import torch

from hfgen.models import GaussianMixture


# Weight of the past at each update: half of it is from the last 350 updates.
DECAY = 0.998


class RecentLatents:
    """Moments of the latents of recent training images.

    Sampling from the prior would show worse images than the finished pipeline generates: the latents do not fill the
    prior (see `density.py`). One Gaussian with full covariance costs next to nothing.

    Args:
        latent_dim: size of a latent.
        device: device of the posteriors; there is a device sync only in `to_latents`.
    """

    def __init__(self, latent_dim: int, device: torch.device):
        shapes = ((), (latent_dim,), (latent_dim, latent_dim), (latent_dim,))
        # Exponential averages of 1, the posteriors' means m, m m^T, and their variances; all start at 0.
        self._averages = tuple(torch.zeros(shape, device=device) for shape in shapes)

    @torch.no_grad()
    def observe(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        """Record the posteriors of one update; those that are not finite, as in a skipped fp16 update, are ignored.

        Args:
            mean: `(batch_size, latent_dim, 1, 1)`.
            logvar: logarithms of the variances, same shape.
        """
        mean, variance = mean.float().flatten(1), logvar.float().flatten(1).exp()
        one = torch.ones_like(self._averages[0])
        moments = (one, mean.mean(dim=0), mean.T @ mean / len(mean), variance.mean(dim=0))
        is_finite = torch.stack([moment.isfinite().all() for moment in moments]).all()
        for average, moment in zip(self._averages, moments, strict=True):
            average.copy_(torch.where(is_finite, average.lerp(moment, 1 - DECAY), average))

    @torch.no_grad()
    def to_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Map standard normal numbers to latents of this Gaussian; the same numbers before anything was observed.

        Args:
            noise: `(batch_size, latent_dim)`, on the CPU.
        """
        moments = self._moments()
        if moments is None:
            return noise
        mean, root = moments
        return (mean + noise.double() @ root).float()

    @torch.no_grad()
    def density(self) -> GaussianMixture | None:
        """Return this Gaussian, on the CPU, as a pipeline's ex-post density; None before anything was observed."""
        moments = self._moments()
        if moments is None:
            return None
        mean, root = moments
        mixture = GaussianMixture(len(mean), num_components=1)
        mixture.means.copy_(mean[None])
        # With S = Q R, the covariance S^T S is R^T R: lower triangular, even where the covariance is singular.
        mixture.scale_trils.copy_(torch.linalg.qr(root).R.T[None])
        return mixture.eval()

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return mean and symmetric square root of the covariance, in float64; None if nothing was observed."""
        weight, *moments = (average.cpu().double() for average in self._averages)
        if not weight:
            return None
        mean, square, variance = (moment / weight for moment in moments)
        covariance = square - torch.outer(mean, mean) + torch.diag(variance)  # law of total covariance
        variances, axes = torch.linalg.eigh(covariance)
        # Symmetric, so that it changes slowly from sheet to sheet; rounding can make a variance negative.
        return mean, axes * variances.clamp(min=0).sqrt() @ axes.T

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to draw the same sheets."""
        return {"averages": tuple(average.clone() for average in self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for average, saved in zip(self._averages, state_dict["averages"], strict=True):
            average.copy_(saved)
