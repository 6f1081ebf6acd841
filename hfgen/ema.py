"""The exponential moving average of a network's weights, which is what gets sampled, saved and shipped."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def averaged_copy(network: nn.Module, decay: float) -> AveragedModel:
    """Return an average of a network, to be updated after each optimizer step by `update_parameters(network)`.

    BatchNorm's statistics are averaged like the weights: averaged weights with stale statistics draw grey images.
    The first update takes the weights as they are; after n updates the decay is `min(decay, (1 + n) / (10 + n))`. So
    a short run's average is not mostly its random start.

    Args:
        network: on its device already. It is copied; the copy is in eval mode and needs no gradient.
        decay: from 0 (no averaging) to below 1.
    """

    def average(averages: Tensors, currents: Tensors, _: object) -> None:
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            for average, current in zip(averages, currents, strict=True):
                average.copy_(current)
            return
        updates = int(averaged.n_averaged)  # stays on the CPU: reading it does not stall the device
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averages, currents, weight)  # as torch's own get_ema_multi_avg_fn does

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    averaged.eval().requires_grad_(False)
    return averaged
