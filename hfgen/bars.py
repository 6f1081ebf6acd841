"""Progress bars of long work, which name it."""

import sys
from typing import Any

from tqdm.auto import tqdm


# Seconds between two updates of a bar in a log, where each is a new line.
IN_A_LOG = 30.0


def update_interval() -> float:
    """Return the seconds between two updates of a bar."""
    return 0.5 if sys.stderr.isatty() else IN_A_LOG


def progress_bar(work: str, total: int | None, unit: str = "image", disable: bool = False) -> Any:
    """Return a bar that appears after a second, and disappears when the work is done.

    Args:
        work: what is done, such as "encoding".
        total: number of units; None if unknown.
        unit: what is counted.
        disable: show nothing.
    """
    return tqdm(
        total=total, desc=work, unit=unit, leave=False, delay=1.0, mininterval=update_interval(), disable=disable
    )
