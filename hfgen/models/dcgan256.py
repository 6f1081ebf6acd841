"""A DCGAN (Radford et al. 2016, arXiv:1511.06434) for 256-pixel paintings: large kernels and a dense 16 x 16 stem.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import leaky_relu


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


class DCGAN256Generator(AlignedModelMixin, ConfigMixin):
    """Maps latents to images: a dense layer, four 6 x 6 transposed convolutions, a 6 x 6 convolution; no BatchNorm.

    Args:
        sample_size: height and width of the images, in pixels: a multiple of 16.
        latent_dim: size of a latent.
        out_channels: channels of the images.
        stem_channels: channels of the dense layer's output; each transposed convolution halves them.

    Raises:
        ValueError: if `sample_size` or `stem_channels` is not a multiple of 16.
    """

    @register_to_config
    def __init__(self, sample_size: int = 256, latent_dim: int = 100, out_channels: int = 3, stem_channels: int = 512):
        super().__init__()
        for name, value in (("sample_size", sample_size), ("stem_channels", stem_channels)):
            if value < 16 or value % 16:
                raise ValueError(f"{name}={value} must be a multiple of 16: four layers double or halve it")
        self.stem = nn.Linear(latent_dim, stem_channels * (sample_size // 16) ** 2)
        widths = [stem_channels // 2**level for level in range(5)]
        self.blocks = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 6, stride=2, padding=2)
            for wide, narrow in zip(widths[:-1], widths[1:], strict=True)
        )
        self.pad = nn.ZeroPad2d((2, 3, 2, 3))  # "same" padding for an even kernel size, as in TensorFlow
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 6)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Generate one image for each latent.

        Args:
            latents: `(batch_size, latent_dim)`, standard normal.

        Returns:
            `(batch_size, out_channels, sample_size, sample_size)`, in [-1, 1].
        """
        side = self.config.sample_size // 16
        hidden_states = self.stem(latents).unflatten(1, (self.config.stem_channels, side, side))  # (B, C, H/16, W/16)
        for block in self.blocks:
            hidden_states = leaky_relu(block(hidden_states), 0.2)
        return self.conv_out(self.pad(hidden_states)).tanh()


class DCGAN256Discriminator(AlignedModelMixin, ConfigMixin):
    """Maps images to logits: four 6 x 6 convolutions of stride 2, BatchNorm from the second on, dropout.

    Args:
        sample_size: height and width of the images, in pixels: a multiple of 16.
        in_channels: channels of the images.
        base_channels: channels after the first convolution; each further convolution doubles them.
        dropout: probability of dropping a feature before the last layer.

    Raises:
        ValueError: if `sample_size` is not a multiple of 16.
    """

    @register_to_config
    def __init__(self, sample_size: int = 256, in_channels: int = 3, base_channels: int = 32, dropout: float = 0.3):
        super().__init__()
        if sample_size < 16 or sample_size % 16:
            raise ValueError(f"sample_size={sample_size} must be a multiple of 16: four convolutions halve it")
        widths = [in_channels, *(base_channels * 2**level for level in range(4))]
        self.convs = nn.ModuleList(
            nn.Conv2d(fine, coarse, 6, stride=2, padding=2)
            for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList([nn.Identity(), *(nn.BatchNorm2d(width) for width in widths[2:])])
        self.drop = nn.Dropout(dropout)
        self.linear_out = nn.Linear(widths[-1] * (sample_size // 16) ** 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits: larger means more real.

        Args:
            images: `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].

        Returns:
            Logits, `(batch_size,)`.
        """
        hidden_states = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden_states = leaky_relu(norm(conv(hidden_states)), 0.2)
        return self.linear_out(self.drop(hidden_states.flatten(1))).flatten()
