"""The common interface of all sources of encoded images."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from hfgen.data.location import SHARD
from hfgen.errors import UserError


class UnusedColumnError(UserError):
    """A column was asked for that has no meaning for the dataset."""


class Source(NamedTuple):
    """A set of encoded images that can be read repeatedly in the same order.

    Attributes:
        description: description for the intake report.
        identity: plain values that change whenever the images may have changed.
        images: returns an iterator over `(name, encoded image)`; if an image cannot be read, its exception takes the
            place of its bytes.
        skipped: number of other files, which are ignored, by suffix.
        files: local files whose contents decide about the images; none if `identity` says everything.
        notes: what the user should know about the choice of images, for the report.
        has_columns: whether the images are in columns, features or named arrays, of which `--dataset_column` chooses.
    """

    description: str
    identity: Any
    images: Callable[[], Iterator[tuple[str, bytes | Exception]]]
    skipped: dict[str, int] = {}
    files: Sequence[Path] = ()
    notes: Sequence[str] = ()
    has_columns: bool = False


# Errors of the system that say something about the file; any other may be gone next time.
LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM),
    *(errno.EINVAL, errno.EFBIG, errno.EILSEQ, errno.ENXIO, None),
}


def lasting_error(file: object, error: Exception) -> Exception:
    """Return the error of an image that cannot be read, unless it may be readable next time.

    Without the image the dataset would silently be another one, even for later runs, as it is kept in the cache.

    Raises:
        UserError: if a disk or a network did not answer, say.
    """
    if isinstance(error, OSError) and error.errno not in LASTING:
        remedy = "run the same command again, or remove it if it stays unreadable"
        raise UserError(f"{file}: cannot be read now ({error.strerror}); {remedy}") from error
    return error


def file_identity(files: Iterable[Path], root: Path) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of each file; their contents are compared by `contents.py`."""
    identity, above = [], os.path.join(root, "")
    for file in map(str, files):
        try:
            stat = os.stat(file)
        except OSError:
            if Path(file).exists():  # raises what is more than a link to nowhere
                raise
            continue
        # A million files make the difference: relpath takes as long as reading their sizes.
        name = file.removeprefix(above) if file.startswith(above) else os.path.relpath(file, root)
        identity.append((name, stat.st_size, stat.st_mtime_ns))
    return identity


def count_suffixes(files: Iterable[PurePath]) -> dict[str, int]:
    """Count files by their suffix in lower case, the most frequent first; "no suffix" if they have none."""
    return dict(Counter(SHARD.sub("", file.suffix.lower()) or "no suffix" for file in files).most_common())


def notes_on_shards(files: Iterable[Path]) -> list[str]:
    """Return a note for each set of shards, such as `cats-00000-of-00002.parquet`, of which some are missing."""
    found: dict[tuple[str, int], set[str]] = {}
    for file in files:
        if match := SHARD.search(file.name):
            name = str(file.with_name(SHARD.sub(f"-*-of-{match[2]}", file.name)))
            found.setdefault((name, int(match[2])), set()).add(match[1])
    return [
        f"{name}: only {len(present)} of {count} files are there; the images of the others are missing"
        for (name, count), present in found.items()
        if len(present) < count
    ]


def counts(numbers: dict[str, int], listed: int = 8) -> str:
    """Return counts in words, such as ".csv 2, .txt 1", the first `listed` of them."""
    shown = [f"{name} {count}" for name, count in list(numbers.items())[:listed]]
    return ", ".join(shown + (["..."] if len(numbers) > listed else [])) or "none"


def choose_column(where: str, wanted: str | None, candidates: list[str], columns: list[str]) -> str:
    """Return the image column: the wanted one, or the only candidate.

    Raises:
        UserError: if the wanted column has no images, or if there is not exactly one candidate.
    """
    if wanted is not None:
        if wanted not in candidates:
            raise UserError(f"--dataset_column {wanted}: {where} has no image column of that name; columns: {columns}")
        return wanted
    if len(candidates) != 1:
        if not candidates:
            raise UserError(
                f"{where} has no image column, only {columns}; encoded images, their paths or base64 are read"
            )
        raise UserError(f"{where} has several image columns: {candidates}; choose one with --dataset_column")
    return candidates[0]
