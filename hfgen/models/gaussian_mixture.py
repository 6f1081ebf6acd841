"""A mixture of Gaussians over latents, for sampling from where an encoder really puts the data.

Ex-post density estimation (Ghosh et al. 2020, arXiv:1903.12436, section 4): the latents of the training set do not
fill the prior that they were drawn to, so that a draw from the prior may fall where the decoder never was.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class AlignedModelMixin(ModelMixin):
    """Loads weights to addresses that are multiples of 64, where PyTorch itself puts them.

    safetensors maps a file into memory as it lies on the disk, and on some CPUs a matrix product of weights at another
    address ends in other last bits. The same class stands in each network's file.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as diffusers does; same arguments, same result."""
        loaded = super().from_pretrained(*args, **kwargs)
        network = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()
        return loaded


class GaussianMixture(AlignedModelMixin, ConfigMixin):
    """Turns standard normal numbers into draws from a mixture of Gaussians.

    Its tensors are set by whoever fitted it; a new one is a single standard normal distribution, if it has one
    component.

    Args:
        latent_dim: size of a latent.
        num_components: Gaussians in the mixture.
    """

    @register_to_config
    def __init__(self, latent_dim: int = 100, num_components: int = 10):
        super().__init__()
        # Parameters without gradient, as diffusers looks for a model's device and precision there.
        self.weights = nn.Parameter(torch.full((num_components,), 1 / num_components), requires_grad=False)
        self.means = nn.Parameter(torch.zeros(num_components, latent_dim), requires_grad=False)
        # L of each covariance L L^T, lower triangular.
        scales = torch.eye(latent_dim).repeat(num_components, 1, 1)
        self.scale_trils = nn.Parameter(scales, requires_grad=False)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Draw one latent for each row of noise: a smooth function of it within a component.

        Args:
            noise: `(batch_size, 1 + latent_dim)`, standard normal: the first number chooses the component, the others
                the place in it.

        Returns:
            `(batch_size, latent_dim)`.
        """
        bounds = self.weights.float().cumsum(0)
        quantiles = torch.special.ndtr(noise[:, 0].float()) * bounds[-1]
        chosen = torch.searchsorted(bounds, quantiles).clamp(max=len(bounds) - 1)  # (B,)
        # In its own precision wherever it is called, so that the same noise is the same latent.
        with torch.autocast(noise.device.type, enabled=False):
            offsets = torch.einsum("bij,bj->bi", self.scale_trils[chosen], noise[:, 1:].to(self.means.dtype))
        return self.means[chosen] + offsets
