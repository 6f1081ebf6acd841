"""The exponential moving average of a network's weights, which is what gets sampled, saved and shipped."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn


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


@contextmanager
def recomputed_statistics(network: nn.Module, batches: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give BatchNorm the statistics of the network's own activations for a while; those of before come back after it.

    An average of running statistics belongs to the networks that training passed through, whose weights are noisier
    than their average: under averaged weights activations vary less. So a generator that is sampled with averaged
    weights is normalised wrongly by averaged statistics.

    Args:
        network: with or without BatchNorm.
        batches: inputs of the network, `(batch_size, ...)` each; every batch counts alike. If there are none,
            nothing changes.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    training, momenta = network.training, [norm.momentum for norm in norms]
    try:
        if norms and batches:
            update_bn(batches, network)
        yield
    finally:
        network.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for norm, buffers in zip(norms, kept, strict=True):
            norm.load_state_dict(buffers, strict=False)


class FreshStatistics:
    """A pipeline around an averaged network, used under statistics that BatchNorm computes anew.

    Args:
        pipeline: samples with `network`.
        network: the averaged one.
        batches: what the statistics are computed from; see `recomputed_statistics`.
    """

    def __init__(self, pipeline: DiffusionPipeline, network: nn.Module, batches: Sequence[torch.Tensor]):
        self._pipeline, self._network, self._batches = pipeline, network, batches

    @contextmanager
    def use(self) -> Iterator[DiffusionPipeline]:
        """Lend the pipeline with fresh statistics; afterwards training's are back."""
        with recomputed_statistics(self._network, self._batches):
            yield self._pipeline

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save the pipeline with fresh statistics."""
        with self.use() as pipeline:
            pipeline.save_pretrained(save_directory)
