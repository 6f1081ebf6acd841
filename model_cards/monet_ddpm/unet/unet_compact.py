"""A U-Net for small budgets: residual blocks, GroupNorm, attention where it is cheap, optional pixel patches.

It uses the blocks of diffusers' `UNet2DModel`, and adds patches of pixels as channels, so that most computation is at
a half or a quarter of the resolution, and zero-initialised branches.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
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


class UNetCompact(AlignedModelMixin, ConfigMixin):
    """Predicts the noise, the velocity or EDM's target; same interface as diffusers' `UNet2DModel`.

    Every level has residual blocks (GroupNorm, SiLU, dropout), scaled and shifted by a two-layer timestep embedding;
    levels with few pixels also have self-attention. The last layer of each branch, and of the network, is initialised
    to zero, so that each block starts as the identity (Dhariwal and Nichol 2021, arXiv:2105.05233, appendix).

    Args:
        sample_size: height and width of the images, in pixels: a multiple of
            `patch_size * 2 ** (len(block_out_channels) - 1)`.
        in_channels: channels of the noisy images.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level, from the finest; the resolution halves from level to level.
        layers_per_block: residual blocks per level in the down path; the up path has one more.
        patch_size: side of the patches whose pixels become channels: with 2, a 3 x 64 x 64 image is processed as
            12 x 32 x 32.
        attention_size: levels with a side of at most this many patches have self-attention.
        dropout: dropout probability.
        time_scale: factor of the timesteps before the embedding: 1 for timesteps from 0 to 1,000; 1,000 for EDM's,
            which are the log of the noise level divided by 4.

    Raises:
        ValueError: if the architecture does not allow `sample_size` or the widths.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256),
        layers_per_block: int = 2,
        patch_size: int = 1,
        attention_size: int = 16,
        dropout: float = 0.1,
        time_scale: float = 1.0,
    ):
        super().__init__()
        if min(patch_size, layers_per_block, *block_out_channels) < 1:
            raise ValueError(
                f"patch_size={patch_size}, layers_per_block={layers_per_block} and "
                f"block_out_channels={tuple(block_out_channels)} must be positive"
            )
        factor = patch_size * 2 ** (len(block_out_channels) - 1)
        if sample_size < factor or sample_size % factor:
            raise ValueError(
                f"sample_size={sample_size} does not fit block_out_channels={tuple(block_out_channels)} and "
                f"patch_size={patch_size}: it must be a multiple of {factor} "
                f"(for example {factor * max(1, round(sample_size / factor))})"
            )
        sides = [sample_size // patch_size // 2**level for level in range(len(block_out_channels))]
        attends = [side <= attention_size for side in sides]
        groups = math.gcd(32, *block_out_channels)
        if groups > 1 and groups == min(
            block_out_channels
        ):  # a group of one channel cannot be normalised meaningfully
            groups //= 2
        self.unet = UNet2DModel(
            sample_size=sides[0],
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]),
            attention_head_dim=math.gcd(64, *block_out_channels),
            norm_num_groups=groups,
            dropout=dropout,
            resnet_time_scale_shift="scale_shift",
            add_attention=any(attends),
        )
        for module in self.unet.modules():
            if isinstance(module, ResnetBlock2D):
                _start_at_zero(module.conv2)
            elif isinstance(module, Attention):
                _start_at_zero(module.to_out[0])
        _start_at_zero(self.unet.conv_out)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict one target per noisy image.

        Args:
            sample: `(batch_size, in_channels, sample_size, sample_size)`.
            timestep: a number, a scalar tensor, or one per image, `(batch_size,)`.
            return_dict: whether to return a `UNet2DOutput` instead of a plain tuple.

        Returns:
            `(batch_size, out_channels, sample_size, sample_size)`, as `.sample` or in a tuple.
        """
        patch_size = self.config.patch_size
        patches = nn.functional.pixel_unshuffle(sample, patch_size)  # (B, C p^2, H / p, W / p)
        timesteps = torch.as_tensor(timestep, device=sample.device) * self.config.time_scale
        predicted = self.unet(patches, timesteps, return_dict=False)[0]
        predicted = nn.functional.pixel_shuffle(predicted, patch_size)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)


def _start_at_zero(layer: nn.Module) -> None:
    for weight in layer.parameters():
        nn.init.zeros_(weight)
