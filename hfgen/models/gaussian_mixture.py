"""A mixture of Gaussians over latents, for sampling latents from the region that the encoder actually uses.

Ex-post density estimation (Ghosh et al. 2020, arXiv:1903.12436, section 4): the latents of the training set do not
fill the prior, so a sample from the prior may fall where the decoder was never trained.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

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


class GaussianMixture(AlignedModelMixin, ConfigMixin):
    """Maps standard normal numbers to samples from a mixture of Gaussians.

    The caller sets the tensors after fitting; initially the mixture is the standard normal distribution.

    Args:
        latent_dim: size of a latent.
        num_components: number of Gaussians in the mixture.
    """

    @register_to_config
    def __init__(self, latent_dim: int = 100, num_components: int = 10):
        super().__init__()
        # Parameters without gradient, because diffusers takes a model's device and dtype from its parameters.
        self.weights = nn.Parameter(torch.full((num_components,), 1 / num_components), requires_grad=False)
        self.means = nn.Parameter(torch.zeros(num_components, latent_dim), requires_grad=False)
        # L of each covariance L L^T, lower triangular.
        scales = torch.eye(latent_dim).repeat(num_components, 1, 1)
        self.scale_trils = nn.Parameter(scales, requires_grad=False)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Map each row of noise to one latent, smoothly within a component.

        Args:
            noise: `(batch_size, 1 + latent_dim)`, standard normal: the first number selects the component, the others
                the position in it.

        Returns:
            `(batch_size, latent_dim)`.
        """
        bounds = self.weights.float().cumsum(0)
        quantiles = torch.special.ndtr(noise[:, 0].float()) * bounds[-1]
        chosen = torch.searchsorted(bounds, quantiles).clamp(max=len(bounds) - 1)  # (B,)
        # Without autocast, so that the same noise always gives the same latent.
        with torch.autocast(noise.device.type, enabled=False):
            offsets = torch.einsum("bij,bj->bi", self.scale_trils[chosen], noise[:, 1:].to(self.means.dtype))
        return self.means[chosen] + offsets
