"""The plain U-Net with self-attention after levels of the down and up paths.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
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


class UNetAttention(AlignedModelMixin, ConfigMixin):
    """`UNetBase` with a self-attention block after each level of few pixels, so that distant pixels are consistent.

    Args:
        sample_size: height and width of the images, in pixels: a multiple of `2 ** (len(block_out_channels) - 1)`.
        in_channels: channels of the noisy images.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level, from the finest; the resolution halves from level to level.
            Each must be a multiple of `num_attention_heads`.
        time_embedding_dim: size of the sinusoidal embedding of the timestep, an even number, at least 4.
        num_attention_heads: heads of each self-attention.
        max_attention_size: levels with a side of more pixels than this have no attention: its cost grows with the
            fourth power of the side.

    Raises:
        ValueError: if the architecture does not allow `sample_size` or `time_embedding_dim`, or the heads do not
            divide the channels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 1024),
        time_embedding_dim: int = 32,
        num_attention_heads: int = 4,
        max_attention_size: int = 32,
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
        if any(channels % num_attention_heads for channels in block_out_channels):
            raise ValueError(
                f"block_out_channels={tuple(block_out_channels)} must all be multiples of "
                f"num_attention_heads={num_attention_heads}"
            )
        self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = nn.Sequential(nn.Linear(time_embedding_dim, time_embedding_dim), nn.ReLU())

        def attention(channels: int, size: int) -> nn.Module:
            return AttentionBlock(channels, num_attention_heads) if size <= max_attention_size else nn.Identity()

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks, self.down_attentions, self.downsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.upsamplers, self.up_blocks, self.up_attentions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (fine, coarse) in enumerate(zip(block_out_channels[:-1], block_out_channels[1:], strict=True)):
            size = sample_size // 2**level
            self.down_blocks.append(ConvBlock(fine, fine, time_embedding_dim))
            self.down_attentions.append(attention(fine, size))
            self.downsamplers.append(nn.Conv2d(fine, coarse, 4, stride=2, padding=1))
            self.upsamplers.insert(0, nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1))
            self.up_blocks.insert(0, ConvBlock(2 * fine, fine, time_embedding_dim))
            self.up_attentions.insert(0, attention(fine, size))
        self.mid_block = ConvBlock(block_out_channels[-1], block_out_channels[-1], time_embedding_dim)
        self.mid_attention = attention(block_out_channels[-1], sample_size // factor)
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
        for block, attend, downsample in zip(self.down_blocks, self.down_attentions, self.downsamplers, strict=True):
            hidden_states = attend(block(hidden_states, temb))
            skips.append(hidden_states)
            hidden_states = downsample(hidden_states)  # (B, C, H, W) -> (B, 2C, H/2, W/2)

        # 3. mid
        hidden_states = self.mid_attention(self.mid_block(hidden_states, temb))

        # 4. up
        for upsample, block, attend in zip(self.upsamplers, self.up_blocks, self.up_attentions, strict=True):
            hidden_states = upsample(hidden_states)  # (B, 2C, H, W) -> (B, C, 2H, 2W)
            hidden_states = attend(block(torch.cat([hidden_states, skips.pop()], dim=1), temb))

        # 5. out
        prediction = self.conv_out(hidden_states)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


# Identical copy of unet_base.ConvBlock: a published model file must be self-contained.
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


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the pixels, then a feed-forward with GELU; LayerNorm before each, residual after.

    The encoder layer of Vaswani et al. 2017 (arXiv:1706.03762) in its pre-norm form.
    """

    def __init__(self, channels: int, num_attention_heads: int):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.norm1 = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Let every pixel attend to every other: `(batch_size, channels, height, width)` to the same shape."""
        batch_size, channels, height, width = hidden_states.shape
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        qkv = self.to_qkv(self.norm1(tokens)).unflatten(2, (3, self.num_attention_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H*W, C/heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.to_out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.feed_forward(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(batch_size, channels, height, width)
