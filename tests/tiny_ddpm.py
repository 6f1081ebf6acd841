"""Untrained diffusion pipelines of 8 x 8 pixels."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.models import UNetAttention, UNetBase, UNetCompact
from hfgen.pipelines import DDPMPipeline


NETWORKS = {
    "compact": lambda **options: UNetCompact(
        8, block_out_channels=(4, 8), layers_per_block=1, patch_size=2, **options
    ),
    "base": lambda **options: UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6, **options),
    "attention": lambda **options: UNetAttention(
        8, block_out_channels=(4, 8), time_embedding_dim=6, num_attention_heads=2, max_attention_size=4, **options
    ),
    "library": lambda **options: UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    ),
}


class ZeroUNet(ModelMixin, ConfigMixin):
    """Predicts no noise at all, and remembers what it was shown."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 3):
        super().__init__()
        self.shown = []
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        self.shown.append(sample)
        return UNet2DOutput(torch.zeros_like(sample))


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """An untrained pipeline of 8 x 8 pixels and 20 training steps."""
    torch.manual_seed(seed)
    unet = UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 20), "ddim")).save_pretrained(folder)
    return folder


def build(network: str = "base", sampler: str = "ddim", **options) -> DDPMPipeline:
    """An untrained pipeline of 8 x 8 pixels and 40 training steps; BatchNorm's statistics are not the initial ones."""
    torch.manual_seed(0)
    unet = NETWORKS[network](**options).train()
    for timestep in 3, 30:
        unet(torch.randn(4, unet.config.in_channels, 8, 8), timestep)
    return quiet(DDPMPipeline(unet.eval(), sampling_scheduler(noise_schedule("linear", 40), sampler)))


def quiet(pipeline: DDPMPipeline) -> DDPMPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, batch_size: int = 2, seed: int = 3, **arguments) -> np.ndarray:
    """Images as float arrays `(batch_size, 8, 8, channels)` in [0, 1]."""
    arguments = {"generator": seeded(seed), "num_inference_steps": 4, "output_type": "np", **arguments}
    return pipeline(batch_size, **arguments).images
