"""A plain convolutional U-Net: two convolutions per level, BatchNorm, sinusoidal time embedding, no attention.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
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


class UNetBase(AlignedModelMixin, ConfigMixin):
    """Predicts, from noisy images and their timesteps, the noise (or whatever target it is trained on).

    The shape of Ronneberger et al. 2015 (arXiv:1505.04597): one block per level. Strided convolutions halve the
    resolution between the levels of the down path, transposed convolutions double it in the up path, and skip
    connections concatenate the features of each level. The interface is the same as for diffusers' `UNet2DModel`.

    Args:
        sample_size: height and width of the images, in pixels: a multiple of `2 ** (len(block_out_channels) - 1)`.
        in_channels: channels of the noisy images.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level, from the finest; the resolution halves from level to level.
        time_embedding_dim: size of the sinusoidal embedding of the timestep, an even number, at least 4.

    Raises:
        ValueError: if the architecture does not allow `sample_size` or `time_embedding_dim`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 1024),
        time_embedding_dim: int = 32,
    ):
        super().__init__()
        if time_embedding_dim < 4 or time_embedding_dim % 2:
            raise ValueError(f"time_embedding_dim={time_embedding_dim} must be an even number, at least 4")
        factor = 2 ** (len(block_out_channels) - 1)
        if sample_size < factor or sample_size % factor:
            raise ValueError(
                f"sample_size={sample_size} does not fit block_out_channels={tuple(block_out_channels)}: "
                f"it must be a multiple of {factor} (for example {factor * max(1, round(sample_size / factor))})"
            )
        self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = nn.Sequential(nn.Linear(time_embedding_dim, time_embedding_dim), nn.ReLU())

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        self.upsamplers, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(block_out_channels[:-1], block_out_channels[1:], strict=True):
            self.down_blocks.append(ConvBlock(fine, fine, time_embedding_dim))
            self.downsamplers.append(nn.Conv2d(fine, coarse, 4, stride=2, padding=1))
            self.upsamplers.insert(0, nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1))
            self.up_blocks.insert(0, ConvBlock(2 * fine, fine, time_embedding_dim))
        self.mid_block = ConvBlock(block_out_channels[-1], block_out_channels[-1], time_embedding_dim)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict one target per noisy image.

        Args:
            sample: noisy images, `(batch_size, in_channels, height, width)`.
            timestep: `(batch_size,)`, or one number for the whole batch.
            return_dict: whether to return a `UNet2DOutput` instead of a plain tuple.

        Returns:
            An output whose `sample` is `(batch_size, out_channels, height, width)`.
        """
        # 1. time
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))  # (B,)
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (B, time_embedding_dim)

        # 2. down: keep each level's features before its resolution is halved
        hidden_states = self.conv_in(sample)
        skips = []
        for block, downsample in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden_states = block(hidden_states, temb)
            skips.append(hidden_states)
            hidden_states = downsample(hidden_states)  # (B, C, H, W) -> (B, 2C, H/2, W/2)

        # 3. mid
        hidden_states = self.mid_block(hidden_states, temb)

        # 4. up
        for upsample, block in zip(self.upsamplers, self.up_blocks, strict=True):
            hidden_states = upsample(hidden_states)  # (B, 2C, H, W) -> (B, C, 2H, 2W)
            hidden_states = block(torch.cat([hidden_states, skips.pop()], dim=1), temb)

        # 5. out
        prediction = self.conv_out(hidden_states)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


class ConvBlock(nn.Module):
    """Convolution, ReLU, BatchNorm; adds the time embedding to every pixel; convolution, ReLU, BatchNorm again."""

    def __init__(self, in_channels: int, out_channels: int, time_embedding_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.time_emb_proj = nn.Linear(time_embedding_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height, width)`."""
        hidden_states = self.norm1(self.conv1(hidden_states).relu())
        hidden_states = hidden_states + self.time_emb_proj(temb).relu()[:, :, None, None]
        return self.norm2(self.conv2(hidden_states).relu())
