"""Stores decoded images as raw pixels in a memory-mapped file.

The file is cached under a fingerprint of the source and the preprocessing, so that images are decoded only once for
all runs, processes and machines that share the cache:

    <cache>/<fingerprint>-<digest of the contents of local files>/
        pixels.bin      all images, concatenated, uint8, rows of RGB
        shapes.npy      height and width of each
        report.json     the intake report
        digest.txt      SHA-256 of shapes and pixels, compared when a run is resumed
        digests.json    of the files above: what is damaged is decoded again
        changes.txt     when the local files were last changed: their contents are compared only if this differs
"""

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from hfgen.bars import progress_bar
from hfgen.data.contents import contents_digest, last_changes
from hfgen.data.decode import DecodedImage, UnreadableImageError, decode_image, memory_needed, out_of_memory
from hfgen.data.intake import FactsTable, ImageFacts, IntakeReport, image_facts, make_report, widest_grey
from hfgen.data.memory import map_in_bounded_memory
from hfgen.data.opening import open_source
from hfgen.data.rgb import GREY_BITS
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source
from hfgen.errors import UserError
from hfgen.files import read_json, write_text_atomically
from hfgen.integrity import write_if_needed


# Increase it when the same settings give other pixels or another report than before.
CACHE_VERSION = 5
CACHE_REMEDY = "free space there, or set HFGEN_CACHE (or, for training, --cache_dir) to another folder"
# Settings that determine the cached pixels; the others act on batches.
CACHED_SETTINGS = ("sample_size", "crop", "five_crop", "drop_duplicates")

CHANGES_FILE = "changes.txt"
# Shapes compared in memory at a time.
SHAPES_AT_ONCE = 1 << 20
# Pixels that take more than this fraction of the memory are not read ahead.
MEMORY_PART = 0.5


class ImageStore:
    """Decoded images in a memory-mapped file.

    Args:
        folder: the cache folder described above.

    Attributes:
        digest: changes when the pixels change.
        report: the intake report.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.digest = (folder / "digest.txt").read_text().strip()
        self.report = IntakeReport(**read_json(folder / "report.json"))
        # Mapped, so that processes share it; only images of different sizes need a table of their offsets.
        self._shapes = np.load(folder / "shapes.npy", mmap_mode="r")
        first, parts = self._shapes[0], range(0, len(self._shapes), SHAPES_AT_ONCE)
        same_size = all((self._shapes[start : start + SHAPES_AT_ONCE] == first).all() for start in parts)
        self._offsets = None if same_size else np.concatenate([[0], np.cumsum(self._shapes.prod(axis=1) * 3)])
        self._pixels = _mapped(folder / "pixels.bin")

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one image, uint8 `(height, width, 3)`, without copying it."""
        height, width = self._shapes[index]
        if self._offsets is None:
            start, size = int(index) * int(height) * int(width) * 3, int(height) * int(width) * 3
            return self._pixels[start : start + size].reshape(height, width, 3)
        return self._pixels[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, 3)

    def as_array(self) -> np.ndarray | None:
        """Return all images as uint8 `(images, height, width, 3)` without copying; None if their sizes differ."""
        return self._pixels.reshape(len(self), *self._shapes[0], 3) if self._offsets is None else None


def _mapped(file: Path) -> np.ndarray:
    """Map a file of pixels into memory."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    # Images are read in random order; from a disk, the kernel would read up to 1 MB around each and soon drop it.
    if len(mapped) > MEMORY_PART * physical_memory() and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def physical_memory() -> float:
    """Return the bytes of memory of this machine; infinite if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def load_images(settings: DataSettings) -> ImageStore:
    """Open the dataset's decoded images, decoding them first if they are not cached.

    Raises:
        UserError: if the dataset cannot be opened, is refused, or has no readable image.
    """
    source = open_source(settings)
    wanted = {key: getattr(settings, key) for key in CACHED_SETTINGS}
    key = json.dumps([CACHE_VERSION, source.identity, source.description, wanted])
    cache, fingerprint = cache_folder(settings), hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{fingerprint}.lock").acquire()
    except OSError as error:
        raise UserError(f"cannot cache decoded images in {cache}: {error}; {CACHE_REMEDY}") from error
    with lock:  # processes that start together decode only once
        changes = last_changes(source.files) if source.files else None
        folder = _find_folder(cache, fingerprint, source, changes)

        def decode(temporary: Path) -> None:
            _decode_into(temporary, source, settings)
            # Files that have gone meanwhile, with their disk say, would be missing for good, as this is kept.
            if changes is not None and last_changes(source.files) != changes and _has_other_contents(folder, source):
                raise UserError(
                    f"--dataset {settings.dataset}: some of its files changed or disappeared while they were being "
                    "read; run the same command again"
                )

        write_if_needed(folder, decode, CACHE_REMEDY)
        if changes is not None and _changes_of(folder) != changes:
            write_text_atomically(folder / CHANGES_FILE, changes)
        store = ImageStore(folder)
    store.report.describe_source(source.skipped, source.notes)
    return store


def _find_folder(cache: Path, fingerprint: str, source: Source, changes: str | None) -> Path:
    """Return the cache folder for the present contents of the source; it may be missing."""
    if changes is None:
        return cache / fingerprint
    for folder in cache.glob(f"{fingerprint}-*"):
        if _changes_of(folder) == changes:
            return folder
    return cache / f"{fingerprint}-{contents_digest(source.files)[:16]}"


def _has_other_contents(folder: Path, source: Source) -> bool:
    """Whether the files differ from those that a cache folder is for; their time changes with their mode, too."""
    return folder.name.rpartition("-")[2] != contents_digest(source.files)[:16]


def _changes_of(folder: Path) -> str | None:
    file = folder / CHANGES_FILE
    return file.read_text(errors="replace") if file.is_file() else None


def cache_folder(settings: DataSettings) -> Path:
    """Return the folder for decoded images: `--cache_dir`, `$HFGEN_CACHE`, or `hfgen` in the Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(settings.cache_dir or os.environ.get("HFGEN_CACHE") or Path(HF_HOME) / "hfgen").expanduser()


def _decode_into(folder: Path, source: Source, settings: DataSettings) -> None:
    """Decode a source into a new cache folder."""
    folder.mkdir()
    facts = _write_images(folder, source, settings, GREY_BITS[-1])
    bits = widest_grey(facts)
    if bits is not None and bits < GREY_BITS[-1]:  # known only now: such files are decoded twice
        _write_images(folder, source, settings, bits)


def _write_images(folder: Path, source: Source, settings: DataSettings, bits: int) -> FactsTable:
    """Write the files of a cache folder; `2**bits - 1` is the white of 16- and 32-bit grey images."""
    facts = FactsTable()
    unreadable: list[tuple[str, str]] = []
    seen: set[bytes] = set()
    shapes = array("q")  # height and width of each
    dropped, digest = 0, hashlib.sha256()
    with (folder / "pixels.bin").open("wb") as file, progress_bar("decoding", None) as bar:
        for result in decode_all(source, settings, bits):
            bar.update()
            if isinstance(result, _Unreadable):
                unreadable.append((result.name, result.reason))
                continue
            decoded, fact = result
            facts.append(fact)
            if settings.drop_duplicates:
                if fact.digest in seen:
                    dropped += 1
                    continue
                seen.add(fact.digest)
            for pixels in decoded.pixels:
                shapes.extend(pixels.shape[:2])
                file.write(pixels.tobytes())
                digest.update(repr(pixels.shape).encode() + pixels.tobytes())
    if not len(facts):
        listed = "".join(f"\n  {name}: {reason}" for name, reason in unreadable[:5])
        none = "its only image cannot" if len(unreadable) == 1 else f"none of its {len(unreadable)} images can"
        raise UserError(f"--dataset {settings.dataset}: {none} be read{listed}")
    report = make_report(
        source.description, facts, unreadable, source.skipped, settings.sample_size, len(shapes) // 2, dropped
    )
    np.save(folder / "shapes.npy", np.array(shapes, dtype=np.int64).reshape(-1, 2))
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
    (folder / "digest.txt").write_text(digest.hexdigest())
    return facts


class _Unreadable(NamedTuple):
    name: str
    reason: str


def decode_all(
    source: Source, settings: DataSettings, bits: int
) -> Iterator[tuple[DecodedImage, ImageFacts] | _Unreadable]:
    """Decode a source on all cores, in order and in bounded memory."""

    def decode(item: tuple[str, bytes | Exception]) -> tuple[DecodedImage, ImageFacts] | _Unreadable:
        name, content = item
        if isinstance(content, MemoryError):
            raise out_of_memory(name)
        if isinstance(content, Exception):
            return _Unreadable(name, f"{type(content).__name__}: {content}")
        try:
            decoded = decode_image(name, content, settings, bits)
        except UnreadableImageError as error:
            return _Unreadable(name, str(error))
        return decoded, image_facts(name, decoded)

    def needed_by(item: tuple[str, bytes | Exception]) -> int:
        return memory_needed(item[1], settings)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        yield from map_in_bounded_memory(pool, decode, source.images(), needed_by, ahead=4 * workers)
