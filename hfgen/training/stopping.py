"""Stopping a run before its last step, on a signal or a time budget, on all processes together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hfgen.errors import NotFiniteError


# How long processes wait for the main one, which generates and scores images; PyTorch's default is half an hour.
MAX_WAIT = timedelta(hours=3)
# Exchanged between processes; the larger number takes precedence.
GO_ON, TIME_IS_UP, INTERRUPTED, TERMINATED, HUNG_UP = range(5)
REASONS = {
    GO_ON: "",
    TIME_IS_UP: "time is up",
    INTERRUPTED: "interrupted by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
    HUNG_UP: "stopped by SIGHUP, which a closed terminal sends",
}
HANG_UP = getattr(signal, "SIGHUP", None)  # not on Windows
REQUESTS: dict[int, int] = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}
REQUESTS |= {} if HANG_UP is None else {HANG_UP: HUNG_UP}


class StopRequests:
    """Collects stop requests, which are handled between two updates.

    Attributes:
        agreed: the strongest request of all processes when they last exchanged theirs.
        not_finite: whether a loss or a generated image was non-finite, on this process; after `agree`, on any process.
    """

    def __init__(self) -> None:
        self.not_finite, self.agreed = False, GO_ON
        # A signal may come between reading an attribute and writing it: only its handler writes this one.
        self._of_signals = GO_ON
        self._of_run = GO_ON
        self._group: Any = None  # gloo process group, created on first use

    @property
    def request(self) -> int:
        """The strongest request so far."""
        return max(self._of_signals, self._of_run)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Treat SIGTERM, Ctrl-C and SIGHUP as requests to stop after the current update.

        A second Ctrl-C stops at once. SIGHUP stays ignored if it is, as with `nohup`.
        """
        previous = {number: signal.getsignal(number) for number in REQUESTS}
        if HANG_UP is not None and previous[HANG_UP] == signal.SIG_IGN:
            del previous[HANG_UP]
        for number in previous:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.request != INTERRUPTED:  # Ctrl-C ends the launcher, too, and then SIGTERM follows
            self._of_signals = max(self._of_signals, REQUESTS[number])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_to(self, request: int) -> None:
        """Record a request of the run itself, or of another process; the strongest one so far is kept."""
        self._of_run = max(self._of_run, request)

    @contextmanager
    def unless_finite(self) -> Iterator[None]:
        """Note if generated images or latents are NaN; pixels also when they are converted: they would be black."""
        try:
            with np.errstate(invalid="raise"):
                yield
        except (FloatingPointError, NotFiniteError):
            self.not_finite = True

    def agree(self) -> int:
        """Return the strongest request of all processes; all of them must call this after the same update.

        What comes while they exchange their requests counts at the next call. This uses gloo even if gradients use
        NCCL: the result is needed on the CPU, and NCCL would force a device sync at every step.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            self.agreed = self.request
            return self.agreed
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=MAX_WAIT)
        strongest = torch.tensor([self.request, self.not_finite])
        dist.all_reduce(strongest, dist.ReduceOp.MAX, group=self._group)
        request, not_finite = strongest.tolist()
        self.raise_to(request)
        self.not_finite, self.agreed = bool(not_finite), request
        return request

    @property
    def exit_status(self) -> int:
        """Exit status of a process ended by a signal, as in a shell; 0 otherwise."""
        return next((128 + number for number, request in REQUESTS.items() if request == self.request), 0)
