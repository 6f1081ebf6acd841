"""Stopping a run before its last step, on SIGTERM, Ctrl-C or a time budget, on all processes together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


# Exchanged between processes; the larger number takes precedence.
GO_ON, TIME_IS_UP, INTERRUPTED, TERMINATED, NOT_FINITE = range(5)
REASONS = {GO_ON: "", TIME_IS_UP: "time is up", INTERRUPTED: "interrupted by Ctrl-C", TERMINATED: "stopped by SIGTERM"}


class StopRequests:
    """Collects stop requests, which are handled between two updates."""

    def __init__(self) -> None:
        self.request = GO_ON
        self._group: Any = None  # gloo process group, created on first use

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Treat SIGTERM and Ctrl-C as requests to stop after the current update; a second Ctrl-C stops at once."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.request != INTERRUPTED:  # Ctrl-C ends the launcher, too, and then SIGTERM follows
            self.raise_to(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_to(self, request: int) -> None:
        """Record a request; the strongest one so far is kept."""
        self.request = max(self.request, request)

    @contextmanager
    def unless_finite(self) -> Iterator[None]:
        """Request a stop if pixels of generated images are NaN when they are converted: they would be black."""
        try:
            with np.errstate(invalid="raise"):
                yield
        except FloatingPointError:
            self.raise_to(NOT_FINITE)

    def agree(self) -> int:
        """Return the strongest request of all processes; all of them must call this after the same update.

        This uses gloo even if gradients use NCCL: the result is needed on the CPU, and NCCL would force a device sync
        at every step.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")
            request = torch.tensor(self.request)
            dist.all_reduce(request, dist.ReduceOp.MAX, group=self._group)
            self.request = int(request)
        return self.request

    @property
    def exit_status(self) -> int:
        """Exit status of a process ended by a signal, as in a shell; 0 otherwise."""
        return {TERMINATED: 128 + signal.SIGTERM, INTERRUPTED: 128 + signal.SIGINT}.get(self.request, 0)
