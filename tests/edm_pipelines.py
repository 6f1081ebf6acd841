"""A pipeline of a network trained by EDM, at toy size."""

import torch
from torch import nn

from hfgen.methods.schedules import edm_schedule, sampling_scheduler
from hfgen.models import UNetCompact
from hfgen.pipelines import DDPMPipeline


def edm_pipeline(size: int = 8, sampler: str = "dpm") -> DDPMPipeline:
    """Untrained; its last layers, which start at zero, have random weights."""
    torch.manual_seed(0)
    network = UNetCompact(size, block_out_channels=(4, 8), layers_per_block=1, time_scale=1000.0).eval()
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.05)
    pipeline = DDPMPipeline(network, sampling_scheduler(edm_schedule(), sampler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
