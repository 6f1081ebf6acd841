"""A Gaussian over the latents of recent training images, from which a VAE's sheets are sampled during training."""

from typing import Any

import torch


# Weight of the past at each update: half of it is from the last 350 updates.
DECAY = 0.998


class RecentLatents:
    """Moments of the latents of recent training images.

    Sampling from the prior would show worse images than the finished pipeline generates: the latents do not fill the
    prior (see `density.py`). One Gaussian with full covariance costs next to nothing.

    Args:
        latent_dim: size of a latent.
        device: device of the posteriors; there is a device sync only in `place`.
    """

    def __init__(self, latent_dim: int, device: torch.device):
        self._weight = 0.0
        self._mean = torch.zeros(latent_dim, device=device)
        # Of the posteriors' means, E[m m^T], and of their variances.
        self._square = torch.zeros(latent_dim, latent_dim, device=device)
        self._variance = torch.zeros(latent_dim, device=device)

    @torch.no_grad()
    def observe(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        """Record the posteriors of one update: means and logarithms of variances, `(batch_size, latent_dim, 1, 1)`."""
        mean, variance = mean.float().flatten(1), logvar.float().flatten(1).exp()
        self._weight = DECAY * self._weight + 1 - DECAY
        self._mean.lerp_(mean.mean(dim=0), 1 - DECAY)
        self._square.lerp_(mean.T @ mean / len(mean), 1 - DECAY)
        self._variance.lerp_(variance.mean(dim=0), 1 - DECAY)

    @torch.no_grad()
    def place(self, noise: torch.Tensor) -> torch.Tensor:
        """Map standard normal numbers to latents of this Gaussian; the same numbers before anything was observed.

        Args:
            noise: `(batch_size, latent_dim)`, on the CPU.
        """
        if not self._weight:
            return noise
        mean, square, variance = (
            moment.cpu().double() / self._weight for moment in (self._mean, self._square, self._variance)
        )
        covariance = square - torch.outer(mean, mean) + torch.diag(variance)  # law of total covariance
        if not covariance.isfinite().all():
            return torch.full_like(noise, torch.nan)  # the run ends for the images that these give
        variances, axes = torch.linalg.eigh(covariance)
        # Symmetric, so that it changes slowly from sheet to sheet; rounding can make a variance negative.
        scale = axes * variances.clamp(min=0).sqrt() @ axes.T
        return (mean + noise.double() @ scale).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to draw the same sheets."""
        moments = (self._mean, self._square, self._variance)
        return {"weight": self._weight, "moments": tuple(moment.clone() for moment in moments)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._weight = state_dict["weight"]
        own = (self._mean, self._square, self._variance)
        for moment, saved in zip(own, state_dict["moments"], strict=True):
            moment.copy_(saved)
