"""What ends a run before its last step: SIGTERM, Ctrl-C, a time budget; and all processes agreeing on it."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from hfgen.errors import UserError


# What the processes tell each other, the larger number winning.
GO_ON, TIME_IS_UP, INTERRUPTED, TERMINATED, NOT_FINITE = range(5)
REASONS = {GO_ON: "", TIME_IS_UP: "time is up", INTERRUPTED: "interrupted by Ctrl-C", TERMINATED: "stopped by SIGTERM"}


class StopRequests:
    """Collects the requests to stop, to be acted on between two updates."""

    def __init__(self) -> None:
        self.request = GO_ON
        self._group: Any = None  # of gloo, made at the first question

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take SIGTERM and Ctrl-C as requests to stop after the current update; a second Ctrl-C stops at once."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.raise_to(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_to(self, request: int) -> None:
        """Note a request; the strongest one so far is kept."""
        self.request = max(self.request, request)

    def agree(self) -> int:
        """Return the strongest request of all processes; every process must call this after the same update.

        The processes talk over gloo even where the gradients travel by NCCL: the answer is needed on the CPU, and
        asking the accelerator for it would stall it at every step.
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
        """The status that a shell gives a process which a signal ended, so that it is not taken for a finished one."""
        return {TERMINATED: 128 + signal.SIGTERM, INTERRUPTED: 128 + signal.SIGINT}.get(self.request, 0)


def parse_duration(flag: str, text: str | None) -> float | None:
    """Read a duration such as "90s", "45m", "8h50m" or "1.5h".

    Args:
        flag: how an error names it.
        text: the duration; None passes through.

    Returns:
        Seconds, more than 0.

    Raises:
        UserError: if the text is no such duration.
    """
    if text is None:
        return None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise UserError(f"{flag} {text}: write a duration such as 90s, 45m or 8h50m")
    return total
