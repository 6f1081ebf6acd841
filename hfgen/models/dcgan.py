"""DCGAN (Radford et al. 2016, arXiv:1511.06434): the generator and the discriminator of section 3.

The discriminator's normalisation is an option, so that later methods can use the same pair: BatchNorm for DCGAN and
LSGAN, spectral norm for a convolutional SNGAN (Miyato et al. 2018, table 3), InstanceNorm for a WGAN-GP critic
(Gulrajani et al. 2017, arXiv:1704.00028), whose gradient penalty rules out BatchNorm.

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
    """Return the channels from half the resolution down to 4 x 4 pixels: they double at each level, up to 8 times."""
    levels = sample_size.bit_length() - 3
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(
            f"sample_size={sample_size} must be a power of two, at least 8, such as 64: each level halves the size"
        )
    return [base_channels * min(2**level, 8) for level in range(levels)]


class DCGANGenerator(AlignedModelMixin, ConfigMixin):
    """Maps latents to images with transposed convolutions that each double the resolution.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        latent_dim: size of a latent.
        out_channels: channels of the images.
        base_channels: channels at half the resolution of the images (often called ngf); they double at each coarser
            level, up to a factor of 8.

    Raises:
        ValueError: if `sample_size` is not a power of two.
    """

    @register_to_config
    def __init__(self, sample_size: int = 64, latent_dim: int = 100, out_channels: int = 3, base_channels: int = 64):
        super().__init__()
        channels = _level_channels(sample_size, base_channels)[::-1]  # starting at 4 x 4 pixels
        self.stem = _Stem(latent_dim, channels[0], 4, bias=False)
        self.blocks = nn.ModuleList()
        for coarse, fine in zip(channels[:-1], channels[1:], strict=True):
            self.blocks.append(nn.Sequential(nn.BatchNorm2d(coarse), nn.ReLU(inplace=True)))
            self.blocks.append(nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1, bias=False))
        self.norm_out = nn.BatchNorm2d(channels[-1])
        self.conv_out = nn.ConvTranspose2d(channels[-1], out_channels, 4, stride=2, padding=1)
        self.apply(_initialise)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Generate one image for each latent.

        Args:
            latents: `(batch_size, latent_dim)`, standard normal.

        Returns:
            `(batch_size, out_channels, sample_size, sample_size)`, in [-1, 1].
        """
        hidden_states = self.stem(latents)  # (B, C, 4, 4)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = torch.relu_(self.norm_out(hidden_states))  # (B, C, H/2, W/2)
        return self.conv_out(hidden_states).tanh()


class _Stem(nn.ConvTranspose2d):
    """The transposed convolution of one pixel as a matrix product, which is faster and gives channels_last."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Map latents `(batch_size, in_channels)` to `(batch_size, out_channels, 4, 4)`."""
        product = nn.functional.linear(input, self.weight.permute(2, 3, 1, 0).flatten(0, 2))
        return product.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)


class DCGANDiscriminator(AlignedModelMixin, ConfigMixin):
    """Maps images to logits with convolutions that each halve the resolution.

    Args:
        sample_size: height and width of the images, in pixels: a power of two from 8.
        in_channels: channels of the images.
        base_channels: channels at half the resolution of the images (often called ndf); they double at each coarser
            level, up to a factor of 8.
        normalization: "batch", after each convolution except the first and the last, as in DCGAN; "instance", with
            scale and shift, in the same places, for WGAN-GP; "spectral", for every convolution's weight; or
            "none". A per-image gradient penalty needs one of the last three.
        spectral_scale: factor of each spectrally normalised weight, roughly the Lipschitz constant of a layer: 1 in
            SNGAN's paper (Lee et al. 2020, arXiv:2009.02773, vary it).

    Raises:
        ValueError: if `sample_size` is not a power of two, or for an unknown normalisation.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        base_channels: int = 64,
        normalization: str = "batch",
        spectral_scale: float = 1.0,
    ):
        super().__init__()
        if normalization not in ("batch", "instance", "spectral", "none"):
            raise ValueError(f"normalization={normalization!r} must be batch, instance, spectral or none")
        channels = _level_channels(sample_size, base_channels)
        normalised = normalization in ("batch", "instance")
        self.conv_in = nn.Conv2d(in_channels, channels[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for fine, coarse in zip(channels[:-1], channels[1:], strict=True):
            self.blocks.append(nn.Conv2d(fine, coarse, 4, stride=2, padding=1, bias=not normalised))
            if normalization == "batch":
                self.blocks.append(nn.BatchNorm2d(coarse))
            elif normalization == "instance":
                self.blocks.append(nn.InstanceNorm2d(coarse, affine=True))
            self.blocks.append(nn.LeakyReLU(0.2, inplace=True))
        self.conv_out = nn.Conv2d(channels[-1], 1, 4)
        self.apply(_initialise)
        if normalization == "spectral":
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d):
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
        hidden_states = nn.functional.leaky_relu(self.conv_in(images), 0.2, inplace=True)  # (B, C, H/2, W/2)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states).flatten()


class Scale(nn.Module):
    """Multiplies a weight by a constant: a parametrization applied after spectral norm."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `factor * weight`; both `(out_channels, ...)`."""
        return self.factor * weight


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), as in section 4 of the paper; normalisation scales from N(1, 0.02), as in its code."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
