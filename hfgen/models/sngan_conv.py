"""SNGAN's convolutional pair (Miyato et al. 2018, arXiv:1802.05957): the "standard CNN" of table 3.

Unlike DCGAN's networks, both have a 3 x 3 convolution at full resolution. In the generator it maps features to
pixels; in the discriminator a 3 x 3 convolution follows each 4 x 4 convolution that halves the resolution. The paper
uses 32-pixel images; other sizes have more or fewer levels.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization


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
    """Return the channels from full resolution down to 4 x 4 pixels: they double at each level, up to 8 times."""
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(
            f"sample_size={sample_size} must be a power of two, at least 8, such as 64: each level halves the size"
        )
    return [base_channels * min(2**level, 8) for level in range(sample_size.bit_length() - 2)]


class SNGANConvGenerator(AlignedModelMixin, ConfigMixin):
    """Maps latents to images: a dense layer, levels that double the resolution, a 3 x 3 convolution to pixels.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        latent_dim: size of a latent.
        out_channels: channels of the images.
        base_channels: channels at full resolution; they double at each coarser level, up to a factor of 8.
        upsampling: how a level doubles the resolution: "transposed", a 4 x 4 transposed convolution, as in the paper;
            "nearest", repeated pixels and a 3 x 3 convolution, which avoids checkerboard artifacts (Odena et al. 2016,
            doi:10.23915/distill.00003).

    Raises:
        ValueError: if `sample_size` is not a power of two, or for an unknown upsampling.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        latent_dim: int = 128,
        out_channels: int = 3,
        base_channels: int = 64,
        upsampling: str = "transposed",
    ):
        super().__init__()
        if upsampling not in ("transposed", "nearest"):
            raise ValueError(f"upsampling={upsampling!r} must be transposed or nearest")
        channels = _level_channels(sample_size, base_channels)[::-1]  # starting at 4 x 4 pixels
        self.stem = nn.Linear(latent_dim, channels[0] * 4 * 4)
        self.blocks = nn.ModuleList()
        for coarse, fine in zip(channels[:-1], channels[1:], strict=True):
            if upsampling == "transposed":
                self.blocks.append(nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1, bias=False))
            else:
                self.blocks.append(nn.Upsample(scale_factor=2, mode="nearest"))
                self.blocks.append(nn.Conv2d(coarse, fine, 3, padding=1, bias=False))
            self.blocks.append(nn.Sequential(nn.BatchNorm2d(fine), nn.ReLU(inplace=True)))
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        self.apply(_initialise)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Generate one image for each latent.

        Args:
            latents: `(batch_size, latent_dim)`, standard normal.

        Returns:
            `(batch_size, out_channels, sample_size, sample_size)`, in [-1, 1].
        """
        hidden_states = self.stem(latents).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # (B, C, 4, 4), channels_last
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states).tanh()


class SNGANConvDiscriminator(AlignedModelMixin, ConfigMixin):
    """Maps images to logits: alternating 3 x 3 and (resolution-halving) 4 x 4 convolutions, then a dense layer.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        in_channels: channels of the images.
        base_channels: channels at full resolution; they double at each coarser level, up to a factor of 8.
        normalization: "spectral", for every weight, as in the paper; "batch" or "instance", with scale and shift,
            after each convolution except the first; or "none". A per-image gradient penalty does not work with
            "batch".
        spectral_scale: factor of each normalised weight, roughly the Lipschitz constant of a layer; 1 in the paper
            (Lee et al. 2020, arXiv:2009.02773, vary it).

    Raises:
        ValueError: if `sample_size` is not a power of two, or for an unknown normalisation.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        base_channels: int = 64,
        normalization: str = "spectral",
        spectral_scale: float = 1.0,
    ):
        super().__init__()
        if normalization not in ("batch", "instance", "spectral", "none"):
            raise ValueError(f"normalization={normalization!r} must be batch, instance, spectral or none")
        channels = _level_channels(sample_size, base_channels)
        has_norm = normalization in ("batch", "instance")
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for fine, coarse in zip(channels[:-1], channels[1:], strict=True):
            for convolution in (
                nn.Conv2d(fine, fine, 4, stride=2, padding=1, bias=not has_norm),
                nn.Conv2d(fine, coarse, 3, padding=1, bias=not has_norm),
            ):
                self.blocks.append(convolution)
                if normalization == "batch":
                    self.blocks.append(nn.BatchNorm2d(convolution.out_channels))
                elif normalization == "instance":
                    self.blocks.append(nn.InstanceNorm2d(convolution.out_channels, affine=True))
                self.blocks.append(nn.LeakyReLU(0.1, inplace=True))
        self.linear_out = nn.Linear(channels[-1] * 4 * 4, 1)
        self.apply(_initialise)
        if normalization == "spectral":
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    spectral_norm(module)
                    if spectral_scale != 1:
                        register_parametrization(module, "weight", Scale(spectral_scale))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits: larger means more real.

        Args:
            images: `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].

        Returns:
            Logits, `(batch_size,)`.
        """
        hidden_states = nn.functional.leaky_relu(self.conv_in(images), 0.1, inplace=True)  # (B, C, H, W)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.linear_out(hidden_states.flatten(1)).flatten()


class Scale(nn.Module):
    """Multiplies a weight by a constant: a parametrization applied after spectral norm."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `factor * weight`; both `(out_channels, ...)`."""
        return self.factor * weight


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02) and zero biases, as in DCGAN; normalisations start with scale 1 and shift 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
