"""Exponential moving average (EMA) of a network's weights: the network used for sampling and saved."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def averaged_copy(network: nn.Module, decay: float) -> AveragedModel:
    """Return the EMA of a network; call `update_parameters(network)` on it after each optimizer step.

    BatchNorm statistics are averaged like the weights: averaged weights with stale statistics generate grey images.
    The first update copies the weights; after n updates the decay is `min(decay, (1 + n) / (10 + n))`, so that the
    average of a short run is not dominated by its random initialisation.

    Args:
        network: already on its device. It is copied; the copy is in eval mode and needs no gradient.
        decay: in [0, 1); 0 means no averaging.
    """

    def average(averages: Tensors, currents: Tensors, _: object) -> None:
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            for average, current in zip(averages, currents, strict=True):
                average.copy_(current)
            return
        updates = int(averaged.n_averaged)  # on the CPU, so reading it needs no device sync
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averages, currents, weight)  # as torch's own get_ema_multi_avg_fn does

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    averaged.eval().requires_grad_(False)
    return averaged


@contextmanager
def recomputed_statistics(network: nn.Module, batches: Sequence[torch.Tensor]) -> Iterator[None]:
    """Temporarily replace BatchNorm statistics by those of the network's own activations.

    Averaged running statistics describe the networks seen during training, whose weights are noisier than their
    average: activations vary less under averaged weights. Averaged statistics therefore normalise a generator with
    averaged weights wrongly.

    Args:
        network: with or without BatchNorm.
        batches: inputs of the network, each `(batch_size, ...)`, weighted equally. If empty, nothing changes.
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
    """A pipeline with an EMA network, used with recomputed BatchNorm statistics.

    They are recomputed only when the weights have changed: a sheet, a check and a checkpoint of one step share them.

    Args:
        pipeline: samples with `network`.
        network: the EMA network.
        batches: inputs to compute the statistics from; see `recomputed_statistics`.
    """

    def __init__(self, pipeline: DiffusionPipeline, network: nn.Module, batches: Sequence[torch.Tensor]):
        self._pipeline, self._network, self._batches = pipeline, network, batches
        self._norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self._weights: list[torch.Tensor] = []  # those that the statistics belong to
        self._statistics: list[dict[str, torch.Tensor]] = []

    @contextmanager
    def use(self) -> Iterator[DiffusionPipeline]:
        """Yield the pipeline with fresh statistics; the old ones are restored afterwards."""
        weights = list(self._network.parameters())
        known = bool(self._statistics) and all(map(torch.equal, weights, self._weights))
        with recomputed_statistics(self._network, [] if known else self._batches):
            if known:
                for norm, buffers in zip(self._norms, self._statistics, strict=True):
                    norm.load_state_dict(buffers, strict=False)
            elif self._norms and self._batches:
                self._weights, self._statistics = [], []  # not to be trusted, should the next lines fail
                statistics = [{name: value.clone() for name, value in norm.named_buffers()} for norm in self._norms]
                self._weights = [weight.detach().clone() for weight in weights]
                self._statistics = statistics
            yield self._pipeline

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save the pipeline with fresh statistics."""
        with self.use() as pipeline:
            pipeline.save_pretrained(save_directory)
