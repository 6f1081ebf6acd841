"""The gradients of an update: of a batch in parts, where it does not fit into memory, and their clipping."""

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from hfgen.hardware import give_freed_memory_back, seed_global_generator
from hfgen.training.run import Run


Result = TypeVar("Result")
# What convolutions on a CPU, and the libraries of a GPU, say if they get no memory.
NO_MEMORY = re.compile(
    "could not (create|execute) a (primitive|memory)|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|unable to find an engine"
)


class GradientAccumulation:
    """Computes the gradients of a batch in equal parts, and in at least twice as many whenever memory runs out.

    The effective batch size and the learning rate stay as they are. What is computed over a batch, BatchNorm and a
    VAE's calibrated likelihood and free bits, is then computed over each part. A checkpoint stores the number of
    parts. Several processes would have to run out of memory together, so there the error is left to the user.

    Args:
        run: its accelerator and random numbers are used, and its log for the warning.
        batch_size: images per update and process.
        parts: number of parts to begin with, which divides the batch size.
        may_split: whether more parts are allowed.
        smallest: the fewest images of a part into which a batch is split when memory runs out.

    Attributes:
        parts: number of parts of each batch.
    """

    def __init__(self, run: Run, batch_size: int, parts: int = 1, may_split: bool = True, smallest: int = 1):
        self._run, self._batch_size, self._asked, self.parts = run, batch_size, parts, parts
        self._smallest = smallest
        self._may_split = may_split and run.accelerator.num_processes == 1

    def backward(
        self, network: torch.nn.Module, loss_of: Callable[[slice], tuple[torch.Tensor, Result]]
    ) -> list[Result]:
        """Add the gradients of the mean loss of a batch to those of a network, which must be zero.

        Args:
            network: as accelerate has prepared it.
            loss_of: given a slice of the batch, returns the mean loss of its images, and anything else.

        Returns:
            What `loss_of` has returned beside the loss, for each part.

        Raises:
            RuntimeError: PyTorch's, if memory is short for the smallest part, or the batch may not be split.
        """
        while True:
            try:
                return [self._backward(network, loss_of, part) for part in range(self.parts)]
            except RuntimeError as error:
                more = self._more_parts() if self._may_split else None
                if more is None or not (should_reduce_batch_size(error) or NO_MEMORY.search(str(error))):
                    raise
            self._split(network, more)  # not within the `except`, whose error holds on to the memory

    def _backward(
        self, network: torch.nn.Module, loss_of: Callable[[slice], tuple[torch.Tensor, Result]], part: int
    ) -> Result:
        size, accelerator = self._batch_size // self.parts, self._run.accelerator
        # Processes synchronise gradients once per update, on its last part.
        with contextlib.nullcontext() if part == self.parts - 1 else accelerator.no_sync(network):
            loss, result = loss_of(slice(part * size, (part + 1) * size))
            accelerator.backward(loss / self.parts)
        return result

    def _more_parts(self) -> int | None:
        """Return the next number of parts, at least twice as many; None if they would be too small."""
        fitting = range(2 * self.parts, self._batch_size // self._smallest + 1)
        return next((parts for parts in fitting if self._batch_size % parts == 0), None)

    def _split(self, network: torch.nn.Module, parts: int) -> None:
        batch, self.parts = self._batch_size, parts
        network.zero_grad()
        give_freed_memory_back()
        again = self._run.generator("out of memory").initial_seed()  # for dropout
        seed_global_generator(again, self._run.device)
        self._run.warn(
            f"out of memory: from now on the {batch} images of an update are computed in {self.parts} parts; the "
            "effective batch size stays the same"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts, the number asked for, and the batch size."""
        return {"parts": self.parts, "asked": self._asked, "batch_size": self._batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compute in parts as small as before if memory had run out, also if there is more now.

        A run that is continued with another batch size may need another number of them.
        """
        # Earlier versions stored only the number of parts.
        if not self._may_split or state_dict["parts"] == state_dict.get("asked", 1):
            return
        largest = max(1, state_dict.get("batch_size", self._batch_size) // state_dict["parts"])
        fewest = max(self.parts, -(-self._batch_size // largest))
        self.parts = next(count for count in range(fewest, self._batch_size + 1) if self._batch_size % count == 0)


def clip_gradients(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_norm: float,
) -> torch.Tensor:
    """Scale the gradients of an optimizer down to a norm of at most `max_norm`.

    With fp16 they are first divided by the scale of the loss. `Accelerator.clip_grad_norm_` would do that for every
    optimizer, and twice for weights that two of them share.

    Returns:
        The norm before, a scalar; 0 with fp16 if gradients overflow: the scaler then skips the update, and lowers the
        scale of the loss.
    """
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm if accelerator.scaler is None else norm.where(norm.isfinite(), 0.0)
