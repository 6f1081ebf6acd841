from pathlib import Path

import torch

from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.models import UNetBase
from hfgen.pipelines import DDPMPipeline


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """An untrained pipeline of 8 x 8 pixels and 20 training steps."""
    torch.manual_seed(seed)
    unet = UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 20), "ddim")).save_pretrained(folder)
    return folder
