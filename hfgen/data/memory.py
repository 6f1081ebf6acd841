"""The memory that reading images takes, besides what the program itself takes: at most 3 GiB, on any number of cores.

An encoded image has at most `MAX_ENCODED_BYTES`. Images wait to be decoded, are decoded and wait to be used while what
they need together is within `MAX_BYTES`; one that needs more by itself is decoded alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar


MAX_BYTES = 2 << 30
MAX_ENCODED_BYTES = 1 << 29
# A decoded image, its copy turned upright, and its RGB: four bytes each.
BYTES_PER_PIXEL = 12

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def map_in_bounded_memory(
    pool: Executor,
    function: Callable[[Item], Answer],
    items: Iterable[Item],
    needed_by: Callable[[Item], int],
    ahead: int,
) -> Iterator[Answer]:
    """Map in a pool, in order, a few items ahead.

    Args:
        pool: of threads; Pillow decodes and resizes without the GIL.
        function: maps an item.
        items: the items.
        needed_by: returns the bytes that an item takes from now until its answer has been used.
        ahead: the most items in the pool at once.
    """
    pending: deque[tuple[Future[Answer], int]] = deque()
    taken = 0
    try:
        for item in items:
            needed = needed_by(item)
            while pending and (taken + needed > MAX_BYTES or len(pending) >= ahead):
                future, freed = pending.popleft()
                yield future.result()
                del future
                taken -= freed
            pending.append((pool.submit(function, item), needed))
            taken += needed
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:
            future.cancel()
