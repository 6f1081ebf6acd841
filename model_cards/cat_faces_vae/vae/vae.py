"""A convolutional variational autoencoder with vector latents (Kingma and Welling 2014, arXiv:1312.6114).

Encoder and decoder are mirrored DCGAN stacks of strided convolutions (Radford et al. 2016, arXiv:1511.06434), with
optional residual blocks at each level (He et al. 2016, arXiv:1603.05027: normalise, activate, convolve). The methods
are the same as for diffusers' `AutoencoderKL`.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn.functional import silu


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


@dataclass
class ConvVAEOutput(BaseOutput):
    """Output of one pass through encoder and decoder.

    Attributes:
        sample: the reconstruction, `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].
        latent_dist: the posterior that the latents came from.
    """

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution


class ConvVAE(AlignedModelMixin, ConfigMixin):
    """Encodes images to Gaussians over latent vectors, and decodes latents to images.

    Args:
        sample_size: height and width of the images, in pixels: a multiple of `2 ** len(block_out_channels)`.
        in_channels: channels of the images.
        latent_dim: size of a latent.
        block_out_channels: channels of each level, from half the resolution of the images; each level halves it.
        layers_per_block: residual blocks per level in encoder and decoder; 0: only strided convolutions.
        normalization: "batch", or "group" for small batches: groups of 8 channels or more (Wu and He 2018,
            arXiv:1803.08494).
        upsampling: of the decoder: "transposed" convolutions, as in DCGAN, or "nearest": repeated pixels and a
            convolution, which avoids checkerboard artifacts (Odena et al. 2016, doi:10.23915/distill.00003).
        refine_channels: channels of two further convolutions at the end of the decoder, at the resolution of the
            images; 0: none. Without them 2 x 2 pixels are a linear function of the features at half the resolution:
            enough for a pixel loss, but not for fine texture.

    Raises:
        ValueError: if the levels do not divide `sample_size`, or for an unknown normalisation or upsampling.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        latent_dim: int = 100,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int = 1,
        normalization: str = "batch",
        upsampling: str = "transposed",
        refine_channels: int = 0,
    ):
        super().__init__()
        widths = list(block_out_channels)
        if not widths or sample_size < 1 or sample_size % 2 ** len(widths):
            raise ValueError(
                f"sample_size={sample_size} must be a multiple of {2 ** len(widths)}: each of the {len(widths)} "
                f"levels of block_out_channels={tuple(widths)} halves the resolution"
            )
        if normalization not in ("batch", "group"):
            raise ValueError(f"normalization={normalization!r} must be batch or group")
        if upsampling not in ("transposed", "nearest"):
            raise ValueError(f"upsampling={upsampling!r} must be transposed or nearest")
        self.coarse_size = sample_size // 2 ** len(widths)
        coarse_features = widths[-1] * self.coarse_size**2

        self.down_blocks = nn.ModuleList()
        for fine, coarse in zip([in_channels, *widths[:-1]], widths, strict=True):
            blocks = [_ResidualBlock(coarse, normalization) for _ in range(layers_per_block)]
            self.down_blocks.append(nn.Sequential(nn.Conv2d(fine, coarse, 4, stride=2, padding=1), *blocks))
            self.down_blocks.append(nn.Sequential(_norm(coarse, normalization), nn.SiLU(inplace=True)))
        self.to_posterior = nn.Linear(coarse_features, 2 * latent_dim)

        self.from_latents = nn.Linear(latent_dim, coarse_features)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = [_ResidualBlock(widths[level], normalization) for _ in range(layers_per_block)]
            self.up_blocks.append(nn.Sequential(*blocks, _norm(widths[level], normalization), nn.SiLU(inplace=True)))
            if level > 0:
                repeat, convolution = _upsample(widths[level], widths[level - 1], upsampling)
                self.up_blocks.extend([*repeat, convolution])
        repeat, self.conv_out = _upsample(widths[0], in_channels, upsampling)
        self.up_blocks.extend(repeat)
        self.refine = None
        if refine_channels:
            own_repeat = [] if repeat else _upsample(widths[0], in_channels, "nearest")[0]
            self.refine = nn.Sequential(
                *own_repeat, *_refinement(widths[0], in_channels, refine_channels, normalization)
            )
        # The posterior starts near the prior (mean about 0, variance about 1), and the images start grey.
        for layer in (self.to_posterior, self.conv_out):
            nn.init.normal_(layer.weight, 0.0, 0.1 * layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.get_parameter("bias"))

    @apply_forward_hook
    def encode(self, images: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode images.

        Args:
            images: `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].
            return_dict: whether to return an `AutoencoderKLOutput` instead of a plain tuple.

        Returns:
            An output whose `latent_dist` is the posterior, a Gaussian over latents `(batch_size, latent_dim, 1, 1)`.
        """
        hidden_states = images
        for block in self.down_blocks:
            hidden_states = block(hidden_states)  # (B, C, H/2, W/2)
        # In the precision of the weights: bf16 rounding of a mean can exceed the width of the posterior.
        with torch.autocast(images.device.type, enabled=False):
            features = hidden_states.flatten(1).to(self.to_posterior.weight.dtype)
            posterior = DiagonalGaussianDistribution(self.to_posterior(features)[:, :, None, None])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Decode latents.

        Args:
            latents: `(batch_size, latent_dim)` or `(batch_size, latent_dim, 1, 1)`.
            return_dict: whether to return a `DecoderOutput` instead of a plain tuple.

        Returns:
            An output whose `sample` are images, `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].
        """
        hidden_states = self.from_latents(latents.flatten(1))
        hidden_states = hidden_states.unflatten(1, (-1, self.coarse_size, self.coarse_size))  # (B, C, H, W)
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        for block in self.up_blocks:
            hidden_states = block(hidden_states)  # (B, C, 2H, 2W)
        images = self.conv_out(hidden_states)
        if self.refine is not None:
            images = images + self.refine(hidden_states)
        images = images.float().tanh().to(latents.dtype)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        images: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> ConvVAEOutput | tuple:
        """Encode images and decode them again.

        Args:
            images: `(batch_size, in_channels, sample_size, sample_size)`, in [-1, 1].
            sample_posterior: sample the latents from the posterior, as in training, instead of using its mean.
            return_dict: whether to return a `ConvVAEOutput` instead of a plain tuple.
            generator: random number generator for sampling the posterior.

        Returns:
            The reconstruction as `sample`, and the posterior as `latent_dist`.
        """
        (posterior,) = self.encode(images, return_dict=False)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        (reconstruction,) = self.decode(latents, return_dict=False)
        if not return_dict:
            return reconstruction, posterior
        return ConvVAEOutput(sample=reconstruction, latent_dist=posterior)


class _ResidualBlock(nn.Module):
    """Two convolutions with an identity shortcut; initialised as the identity."""

    def __init__(self, channels: int, normalization: str):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels, normalization), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(channels, normalization), nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, channels, height, width)` to the same shape."""
        change = self.conv1(silu(self.norm1(hidden_states), inplace=True))
        return hidden_states + self.conv2(silu(self.norm2(change), inplace=True))


def _upsample(coarse: int, fine: int, kind: str) -> tuple[list[nn.Module], nn.Conv2d | nn.ConvTranspose2d]:
    """Return layers that double height and width: those before a convolution, and the convolution."""
    if kind == "nearest":
        return [nn.Upsample(scale_factor=2, mode="nearest")], nn.Conv2d(coarse, fine, 3, padding=1)
    return [], nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1)


def _refinement(coarse: int, image_channels: int, channels: int, normalization: str) -> list[nn.Module]:
    """Return layers from features at the resolution of the images to a correction of those; it starts at zero."""
    last = nn.Conv2d(channels, image_channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.get_parameter("bias"))
    layers: list[nn.Module] = []
    for width in (coarse, channels):
        layers += [nn.Conv2d(width, channels, 3, padding=1), _norm(channels, normalization), nn.SiLU(inplace=True)]
    return [*layers, last]


def _norm(channels: int, normalization: str) -> nn.Module:
    if normalization == "batch":
        return nn.BatchNorm2d(channels)
    groups = max(count for count in range(1, 33) if channels % count == 0 and channels // count >= min(8, channels))
    return nn.GroupNorm(groups, channels)
