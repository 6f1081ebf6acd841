"""SNGAN (Miyato et al. 2018, arXiv:1802.05957): the residual generator and discriminator of appendix B.4.

The paper's convolutional pair is in `sngan_conv.py`; `dcgan.py` with spectral norm is similar.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrizations import spectral_norm


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


def _level_channels(sample_size: int, base_channels: int) -> list[int]:
    """Return the channels from full resolution down to 4 x 4 pixels: they double at each level, up to 16 times."""
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(
            f"sample_size={sample_size} must be a power of two, at least 8, such as 64: each level halves the size"
        )
    return [base_channels * min(2**level, 16) for level in range(sample_size.bit_length() - 2)]


class SNGANGenerator(AlignedModelMixin, ConfigMixin):
    """Maps latents to images: a dense layer, then residual blocks that each double the resolution.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        latent_dim: size of a latent.
        out_channels: channels of the images.
        base_channels: channels at full resolution; they double at each coarser level, up to a factor of 16.

    Raises:
        ValueError: if `sample_size` is not a power of two.
    """

    @register_to_config
    def __init__(self, sample_size: int = 64, latent_dim: int = 128, out_channels: int = 3, base_channels: int = 64):
        super().__init__()
        channels = _level_channels(sample_size, base_channels)[::-1]  # starting at 4 x 4 pixels
        self.stem = nn.Linear(latent_dim, channels[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            UpBlock(coarse, fine) for coarse, fine in zip(channels[:-1], channels[1:], strict=True)
        )
        self.norm_out = nn.BatchNorm2d(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        for module in (self.stem, self.conv_out):
            _initialise(module)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Generate one image for each latent.

        Args:
            latents: `(batch_size, latent_dim)`, standard normal.

        Returns:
            `(batch_size, out_channels, sample_size, sample_size)`, in [-1, 1].
        """
        hidden_states = self.stem(latents).unflatten(1, (-1, 4, 4))  # (B, C, 4, 4)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(relu(self.norm_out(hidden_states))).tanh()


class SNGANDiscriminator(AlignedModelMixin, ConfigMixin):
    """Maps images to logits: residual blocks that halve the resolution, a sum over pixels, a dense layer.

    Every weight has spectral norm, so gradient penalties are possible but not needed.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        in_channels: channels of the images.
        base_channels: channels after the first block; they double with each further block, up to a factor of 16.

    Raises:
        ValueError: if `sample_size` is not a power of two.
    """

    @register_to_config
    def __init__(self, sample_size: int = 64, in_channels: int = 3, base_channels: int = 64):
        super().__init__()
        channels = [in_channels, *_level_channels(sample_size, base_channels)[:-1]]
        self.blocks = nn.ModuleList(
            DownBlock(fine, coarse, first=index == 0)
            for index, (fine, coarse) in enumerate(zip(channels[:-1], channels[1:], strict=True))
        )
        self.last_block = DownBlock(channels[-1], channels[-1], first=False, halve=False)
        self.linear_out = spectral_norm(_initialise(nn.Linear(channels[-1], 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits: larger means more real.

        Args:
            images: `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].

        Returns:
            Logits, `(batch_size,)`.
        """
        hidden_states = images
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.last_block(hidden_states)  # (B, C, 4, 4)
        return self.linear_out(relu(hidden_states).sum(dim=(2, 3))).flatten()


class UpBlock(nn.Module):
    """Figure 8 of the paper: BatchNorm, ReLU, upsampling, convolution, BatchNorm, ReLU, convolution; 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = _initialise(nn.Conv2d(in_channels, out_channels, 3, padding=1), gain=math.sqrt(2))
        self.conv2 = _initialise(nn.Conv2d(out_channels, out_channels, 3, padding=1), gain=math.sqrt(2))
        self.shortcut = _initialise(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, 2 height, 2 width)`."""
        residual = self.conv1(interpolate(relu(self.norm1(hidden_states)), scale_factor=2))
        residual = self.conv2(relu(self.norm2(residual)))
        # A 1 x 1 convolution commutes with repeating pixels; before that there are only a quarter of them.
        return residual + interpolate(self.shortcut(hidden_states), scale_factor=2)


class DownBlock(nn.Module):
    """Two convolutions with spectral norm, then 2 x 2 average pooling; 1 x 1 shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        first: whether the input is an image, which gets no ReLU.
        halve: whether the resolution is halved.
    """

    def __init__(self, in_channels: int, out_channels: int, first: bool, halve: bool = True):
        super().__init__()
        self.first, self.halve = first, halve
        self.conv1 = spectral_norm(_initialise(nn.Conv2d(in_channels, out_channels, 3, padding=1), math.sqrt(2)))
        self.conv2 = spectral_norm(_initialise(nn.Conv2d(out_channels, out_channels, 3, padding=1), math.sqrt(2)))
        widens = in_channels != out_channels or halve
        self.shortcut = spectral_norm(_initialise(nn.Conv2d(in_channels, out_channels, 1))) if widens else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height / 2, width / 2)`."""
        residual = self.conv1(hidden_states if self.first else relu(hidden_states))
        residual = self.conv2(relu(residual))
        if self.halve:
            # Pooling commutes with the 1 x 1 convolution; after it there are only a quarter of the pixels.
            residual, hidden_states = avg_pool2d(residual, 2), avg_pool2d(hidden_states, 2)
        return residual + (hidden_states if self.shortcut is None else self.shortcut(hidden_states))


def _initialise(module: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Module:
    """Glorot uniform weights (Glorot and Bengio 2010), as in the authors' code; zero biases."""
    nn.init.xavier_uniform_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
