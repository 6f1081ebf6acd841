"""What every source of encoded images gives, wherever they come from."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hfgen.errors import UserError


class Source(NamedTuple):
    """A set of encoded images that can be read through, again and again in the same order.

    Attributes:
        description: what it is, for the intake report.
        identity: plain values that change whenever the images may have changed.
        images: returns an iterator of `(name, encoded image)`; an image that cannot even be read comes as an
            exception in the place of its bytes.
        not_read: files beside the images that are passed over.
    """

    description: str
    identity: Any
    images: Callable[[], Iterator[tuple[str, bytes | Exception]]]
    not_read: int = 0


def choose_column(where: str, wanted: str | None, candidates: list[str], columns: list[str]) -> str:
    """Return the column of images: the wanted one, or the only candidate.

    Raises:
        UserError: if the wanted one holds no images, or there is none or more than one to choose from.
    """
    if wanted is not None:
        if wanted not in candidates:
            raise UserError(f"--dataset_column {wanted}: {where} has no such column of images; columns: {columns}")
        return wanted
    if len(candidates) != 1:
        what = f"several columns of images: {candidates}" if candidates else f"no column of images, only {columns}"
        raise UserError(f"{where} has {what}; choose one with --dataset_column")
    return candidates[0]
