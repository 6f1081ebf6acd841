"""Progress bars of long work, which name it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


# Seconds between two updates of a bar in a log, where each is a new line.
IN_A_LOG = 30.0
# Seconds after which a bar appears, and between two updates of one whose work cannot be counted.
DELAY = 1.0


def update_interval() -> float:
    """Return the seconds between two updates of a bar."""
    return 0.5 if sys.stderr is not None and sys.stderr.isatty() else IN_A_LOG


def progress_bar(work: str, total: int | None, unit: str = "image", disable: bool = False) -> Any:
    """Return a bar that appears after a second, and disappears when the work is done.

    Args:
        work: what is done, such as "encoding".
        total: number of units; None if unknown.
        unit: what is counted, in the singular.
        disable: show nothing.
    """
    counted = "{desc}: {n_fmt}{unit} [{elapsed}"
    if total is not None:
        counted = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
    return tqdm(
        total=total,
        desc=work,
        unit=f" {unit}s",
        bar_format=counted + ", {rate_noinv_fmt}{postfix}]",
        leave=False,
        delay=DELAY,
        mininterval=update_interval(),
        disable=disable,
    )


@contextmanager
def working_on(work: str) -> Iterator[Any]:
    """Show what is done and for how long, after a second, while the body runs; for work that cannot be counted.

    Args:
        work: what is done, such as "fitting the density".

    Yields:
        The bar; `bar.set_description_str(text, refresh=False)` changes the words.
    """
    bar = tqdm(
        desc=work, bar_format="{desc}, {elapsed}", leave=False, delay=DELAY, mininterval=update_interval(), miniters=0
    )
    done = threading.Event()

    def keep_current() -> None:
        while not done.wait(DELAY):
            bar.update(0)  # shows the time

    thread = threading.Thread(target=keep_current, daemon=True)
    thread.start()
    try:
        yield bar
    finally:
        done.set()
        thread.join()
        bar.close()
