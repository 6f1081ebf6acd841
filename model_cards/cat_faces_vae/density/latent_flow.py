"""A normalising flow over latents: a second stage for a VAE whose latents a mixture of Gaussians fits badly.

Couplings as in Dinh et al. 2017 (Real NVP, arXiv:1605.08803), combined with a full-covariance Gaussian. Like a second
VAE on the latents (Dai and Wipf 2019, arXiv:1903.05789), it samples from the region that the encoder actually uses;
unlike that, it also gives the density of a latent.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class AlignedModelMixin(ModelMixin):
    """Loads weights to memory aligned to 64 bytes, as PyTorch itself allocates it.

    safetensors memory-maps the file without alignment, and on some CPUs the last bits of a matrix product depend on
    the alignment of the weights. Each network's file has a copy of this class.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load like diffusers: same arguments, same result."""
        loaded = super().from_pretrained(*args, **kwargs)
        network = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()
        return loaded


class LatentFlow(AlignedModelMixin, ConfigMixin):
    """Maps standard normal numbers to latents, invertibly.

    It is initialised as the standard normal distribution: the couplings start as the identity, and the caller sets the
    Gaussian after them, `location + scale_tril @ x`.

    Args:
        latent_dim: size of a latent, at least 2.
        num_couplings: number of couplings; each scales and shifts one half of the numbers.
        hidden_dim: width of the couplings' networks.

    Raises:
        ValueError: if `latent_dim` is below 2.
    """

    @register_to_config
    def __init__(self, latent_dim: int = 100, num_couplings: int = 8, hidden_dim: int = 256):
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"latent_dim={latent_dim} must be at least 2: a flow couples two parts of a latent")
        self.couplings = nn.ModuleList(
            _Coupling(latent_dim, hidden_dim, second_half=bool(index % 2)) for index in range(num_couplings)
        )
        # Two couplings change all numbers, one half each; then a fixed permutation mixes the halves.
        numbers = torch.Generator().manual_seed(0)
        mixed = [torch.randperm(latent_dim, generator=numbers) for _ in range(num_couplings)]
        orders = torch.stack([torch.arange(latent_dim) if index % 2 else one for index, one in enumerate(mixed)])
        self.register_buffer("orders", orders)
        self.location = nn.Parameter(torch.zeros(latent_dim), requires_grad=False)
        self.scale_tril = nn.Parameter(torch.eye(latent_dim), requires_grad=False)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Map each row of noise to one latent, smoothly.

        Args:
            noise: `(batch_size, 1 + latent_dim)`, standard normal; the first number is ignored, so that the input is
                the same as for a `GaussianMixture`.

        Returns:
            `(batch_size, latent_dim)`.
        """
        # Without autocast, so that the same noise always gives the same latent.
        with torch.autocast(noise.device.type, enabled=False):
            state = noise[:, 1:].to(self.location.dtype)
            for coupling, order in zip(self.couplings, self.orders, strict=True):
                state = coupling(state[:, order])
            return self.location + state @ self.scale_tril.T

    def log_density(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the log-density of latents, in nats.

        Args:
            latents: `(batch_size, latent_dim)`.

        Returns:
            `(batch_size,)`.
        """
        state = torch.linalg.solve_triangular(self.scale_tril, (latents - self.location).T, upper=False).T
        log_determinant = -self.scale_tril.diagonal().log().sum().expand(len(latents))
        for coupling, order in zip(reversed(self.couplings), self.orders.flip(0), strict=True):
            state, log_scale = coupling.inverse(state)  # type: ignore[operator]
            log_determinant = log_determinant - log_scale
            state = state[:, order.argsort()]
        normal = -0.5 * (state.square() + math.log(2 * math.pi)).sum(dim=1)
        return normal + log_determinant


class _Coupling(nn.Module):
    """Scales and shifts one half of the numbers; a network computes scale and shift from the other half."""

    def __init__(self, latent_dim: int, hidden_dim: int, second_half: bool):
        super().__init__()
        self.split = latent_dim // 2
        self.second_half = second_half
        kept = self.split if second_half else latent_dim - self.split
        changed = latent_dim - kept
        self.network = nn.Sequential(
            nn.Linear(kept, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, 2 * changed),
        )  # fmt: skip
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, latent_dim)` to the same shape."""
        first, second = state[:, : self.split], state[:, self.split :]
        kept, changed = (first, second) if self.second_half else (second, first)
        log_scale, shift = self._scale_and_shift(kept)
        return self._join(kept, changed * log_scale.exp() + shift)

    def inverse(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Invert `forward`; also return the log-determinant of its Jacobian, `(batch_size,)`."""
        first, second = state[:, : self.split], state[:, self.split :]
        kept, changed = (first, second) if self.second_half else (second, first)
        log_scale, shift = self._scale_and_shift(kept)
        return self._join(kept, (changed - shift) * (-log_scale).exp()), log_scale.sum(dim=1)

    def _scale_and_shift(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_scale, shift = self.network(kept).chunk(2, dim=1)
        return log_scale.tanh(), shift  # a factor of at most e, so that no sample is far from all data

    def _join(self, kept: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        return torch.cat((kept, changed) if self.second_half else (changed, kept), dim=1)
