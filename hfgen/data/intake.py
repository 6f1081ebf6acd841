"""The intake report: the contents of a dataset, and warnings before training on it."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hfgen.data.decode import OF_SEVERAL, DecodedImage
from hfgen.data.location import FILE_SUFFIXES, OTHER_PICTURE_SUFFIXES, PACKED_SUFFIXES
from hfgen.data.rgb import GREY_BITS
from hfgen.data.source import counts
from hfgen.texts import counted, printable


FEW_IMAGES = 1000
# Maximum number of differing bits, of 64, between the perceptual hashes of near duplicates (re-encoded or edited).
NEAR_DUPLICATE_BITS = 4
# The time to compare hashes grows with the square of their number: with more images than this the search is skipped,
# and the report says so.
MAX_COMPARED_IMAGES = 50_000
# A dataset is dark if its median image has hardly any pixel as bright as this, of 255, and has low contrast if its
# brightest pixels differ from its darkest by less than that.
DARK, LOW_CONTRAST = 64, 32
DIGEST_BYTES = 16
# Number of printed entries per list; the run's intake.json has all of them.
LISTED = 5


class ImageFacts(NamedTuple):
    """The facts about one image that go into the report."""

    name: str
    format: str
    mode: str
    size: tuple[int, int]
    digest: bytes
    perceptual_hash: int
    grey_bits: int | None = None
    darkest: int = 0
    brightest: int = 255


class FactsTable:
    """The facts of many images in order, each in about 50 bytes and its name; a list takes 450 more."""

    def __init__(self) -> None:
        self._names, self._digests = bytearray(), bytearray()
        self._ends, self._hashes = array("Q"), array("Q")
        self._numbers = array("I")  # width, height, darkest, brightest and index of the kind
        self._kinds: dict[tuple[str, str, int | None], int] = {}  # format, mode and grey bits

    def append(self, fact: ImageFacts) -> None:
        """Add the facts of one image."""
        self._names += fact.name.encode("utf-8", "surrogatepass")
        self._digests += fact.digest
        self._ends.append(len(self._names))
        self._hashes.append(fact.perceptual_hash)
        kind = self._kinds.setdefault((fact.format, fact.mode, fact.grey_bits), len(self._kinds))
        self._numbers.extend((*fact.size, fact.darkest, fact.brightest, kind))

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[ImageFacts]:
        kinds, start, at = list(self._kinds), 0, 0
        rows = zip(self._ends, self._hashes, *[iter(self._numbers)] * 5, strict=True)
        for end, perceptual, width, height, darkest, brightest, kind in rows:
            name = self._names[start:end].decode("utf-8", "surrogatepass")
            digest = bytes(self._digests[at : at + DIGEST_BYTES])
            image_format, mode, grey_bits = kinds[kind]
            size = (width, height)
            yield ImageFacts(name, image_format, mode, size, digest, perceptual, grey_bits, darkest, brightest)
            start, at = end, at + DIGEST_BYTES


def image_facts(name: str, decoded: DecodedImage) -> ImageFacts:
    """Collect the facts of one decoded image."""
    first = decoded.pixels[0]
    digest = hashlib.blake2b(repr(first.shape).encode() + first.tobytes(), digest_size=DIGEST_BYTES).digest()
    darkest, brightest = brightness_range(first)
    return ImageFacts(
        name,
        decoded.format,
        decoded.mode,
        decoded.size,
        digest,
        perceptual_hash(first),
        decoded.grey_bits,
        darkest,
        brightest,
    )


def brightness_range(pixels: np.ndarray) -> tuple[int, int]:
    """Return the brightness, 0 to 255, that 1% of the pixels do not exceed, and the one that 99% do not exceed.

    Args:
        pixels: uint8 `(height, width, 3)`.
    """
    reached = np.cumsum(Image.fromarray(pixels).convert("L").histogram()) / (pixels.shape[0] * pixels.shape[1])
    return int(np.searchsorted(reached, 0.01)), int(np.searchsorted(reached, 0.99))


def perceptual_hash(pixels: np.ndarray) -> int:
    """Hash an image so that similar images differ in few bits.

    Each bit says whether one of the 8 x 8 lowest frequencies of the 32 x 32 greyscale image exceeds their median.

    Args:
        pixels: uint8 `(height, width, 3)`.

    Returns:
        64 bits.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    frequencies = (_COSINES @ grey @ _COSINES.T).flatten()
    bits = frequencies > np.median(frequencies[1:])  # without the mean brightness, which dominates
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


# The first 8 rows of the 32-point discrete cosine transform.
_COSINES = np.cos(np.pi / 32 * np.arange(8)[:, None] * (np.arange(32)[None] + 0.5))


@dataclass
class IntakeReport:
    """Contents of a dataset.

    Attributes:
        source: description of the dataset.
        images: number of readable images.
        training_images: number of images used in training: with added crops, without dropped duplicates.
        sample_size: the training size in pixels.
        formats: number of images by file format.
        modes: number of images by Pillow mode.
        sizes: number of images by size, as "width x height", for the most frequent sizes.
        short_side: smallest, median and largest short side in pixels.
        upsampled: number of images whose short side is smaller than the training size.
        unreadable: name and reason of each file that was skipped.
        not_read: number of other files, which were ignored.
        skipped: number of these by suffix.
        grey_bits: bits that the values of 16- and 32-bit grey files use at most; None if there are no such files.
        brightness: where the brightness of the median image begins and ends, from 0 to 255, without the outermost 1%.
        exact_duplicates: groups of names of images with identical pixels at the training size.
        near_duplicates: groups of names of nearly identical images; None if there were too many images to compare.
        dropped: number of images left out as exact duplicates.
        notes: what to know about the choice of images, with names of files; a model card does not repeat it.
        warnings: what may spoil the training, such as many small images, one sentence each.
    """

    source: str
    images: int
    training_images: int
    sample_size: int
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: dict[str, int]
    short_side: list[int]
    upsampled: int
    unreadable: list[tuple[str, str]]
    not_read: int
    exact_duplicates: list[list[str]]
    near_duplicates: list[list[str]] | None
    dropped: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    grey_bits: int | None = None
    brightness: list[int] = field(default_factory=lambda: [0, 255])
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def describe_source(self, skipped: dict[str, int], notes: Sequence[str]) -> None:
        """Say what is known of the source besides its images: it may change while the images stay the same."""
        self.skipped, self.not_read, self.notes = skipped, sum(skipped.values()), list(notes)
        self.warnings = _warnings(self)

    def __str__(self) -> str:
        near = "not searched" if self.near_duplicates is None else count_copies(self.near_duplicates)
        copies = count_copies(self.exact_duplicates)
        low, median, high = self.short_side
        used, side = counted(self.training_images, "image"), self.sample_size
        lines = [
            f"{self.source}: {counted(self.images, 'image')}",
            f"  formats {counts(self.formats)}; modes {counts(self.modes)}",
            f"  sizes {counts(self.sizes)}; short side {low} to {high}, median {median} pixels",
            f"  used for training: {used} of {side} x {side} pixels",
            f"  unreadable: {len(self.unreadable)}; exact duplicates: {copies} ({self.dropped} dropped); "
            f"near duplicates: {near}; other files: {self.not_read}"
            + (f" ({counts(self.skipped)})" if self.skipped else ""),
        ]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.unreadable[:LISTED]]
        lines += [f"  identical: {_first_names(group)}" for group in self.exact_duplicates[:LISTED]]
        lines += [f"  nearly identical: {_first_names(group)}" for group in (self.near_duplicates or [])[:LISTED]]
        lines += [f"  note: {note}" for note in [*self.notes, *self.warnings]]
        return "\n".join(map(printable, lines))


def make_report(
    source: str,
    facts: FactsTable | Sequence[ImageFacts],
    unreadable: list[tuple[str, str]],
    skipped: dict[str, int],
    sample_size: int,
    training_images: int,
    dropped: int,
) -> IntakeReport:
    """Create the report from the facts of all readable images, at least one."""
    formats, modes, sizes = Counter[str](), Counter[str](), Counter[tuple[int, int]]()
    values = array("q")  # short side, darkest and brightest of each
    for fact in facts:  # once, as a table makes them anew each time
        formats[fact.format] += 1
        modes[fact.mode] += 1
        sizes[fact.size] += 1
        values.extend((min(fact.size), fact.darkest, fact.brightest))
    sides, *ends = np.frombuffer(values, np.int64).reshape(-1, 3).T
    sides = np.sort(sides)
    near = near_duplicates(list(facts)) if len(facts) <= MAX_COMPARED_IMAGES else None
    report = IntakeReport(
        source=source,
        images=len(facts),
        training_images=training_images,
        sample_size=sample_size,
        formats=dict(formats.most_common()),
        modes=dict(modes.most_common()),
        sizes={f"{width} x {height}": count for (width, height), count in sizes.most_common(5)},
        short_side=[int(sides[index]) for index in (0, len(sides) // 2, -1)],
        upsampled=int((sides < sample_size).sum()),
        unreadable=unreadable,
        not_read=sum(skipped.values()),
        skipped=skipped,
        exact_duplicates=exact_duplicates(facts),
        near_duplicates=near,
        dropped=dropped,
        grey_bits=widest_grey(facts),
        brightness=[int(np.median(end)) for end in ends],
    )
    report.warnings = _warnings(report)
    return report


def count_copies(groups: list[list[str]]) -> int:
    """Return how many images the groups of duplicates hold besides the first of each."""
    return sum(len(group) - 1 for group in groups)


def _first_names(group: list[str]) -> str:
    more = len(group) - LISTED
    return ", ".join(group[:LISTED]) + (f" and {more} more" if more > 0 else "")


def widest_grey(facts: Iterable[ImageFacts]) -> int | None:
    """Return the bits that the values of all 16- and 32-bit grey files fit in; None if there are no such files."""
    return max((fact.grey_bits for fact in facts if fact.grey_bits is not None), default=None)


def exact_duplicates(facts: Iterable[ImageFacts]) -> list[list[str]]:
    """Group the names of images with identical pixels."""
    starts = np.fromiter((int.from_bytes(fact.digest[:8], "big") for fact in facts), np.uint64)
    values, numbers = np.unique(starts, return_counts=True)
    repeated = set(values[numbers > 1].tolist())  # names are kept only of these
    groups: dict[bytes, list[str]] = {}
    for fact in facts:
        if int.from_bytes(fact.digest[:8], "big") in repeated:
            groups.setdefault(fact.digest, []).append(fact.name)
    return [names for names in groups.values() if len(names) > 1]


def near_duplicates(facts: list[ImageFacts]) -> list[list[str]]:
    """Group the names of images that are not identical but have nearly equal perceptual hashes.

    An image is in a group if its hash is near that of any other one there: the frames of a scene are one group. Each
    hash is compared with those that have no group yet, so the time is at most quadratic and the memory linear.
    """
    first = {fact.digest: fact for fact in reversed(facts)}
    distinct = [fact for fact in facts if first[fact.digest] is fact]
    hashes, place = np.unique(np.array([fact.perceptual_hash for fact in distinct], np.uint64), return_inverse=True)
    group = np.arange(len(hashes))
    left, left_hashes = group.copy(), hashes
    while left.size:
        start = left[0]
        to_compare, left, left_hashes = [start], left[1:], left_hashes[1:]
        while to_compare:
            near = np.bitwise_count(left_hashes ^ hashes[to_compare.pop()]) <= NEAR_DUPLICATE_BITS
            if near.any():
                group[left[near]] = start
                to_compare += left[near].tolist()
                left, left_hashes = left[~near], left_hashes[~near]
    names: dict[int, list[str]] = {}
    for fact, index in zip(distinct, place, strict=True):
        names.setdefault(int(group[index]), []).append(fact.name)
    return [members for members in names.values() if len(members) > 1]


def _warnings(report: IntakeReport) -> list[str]:
    notes = []
    if report.images < FEW_IMAGES:
        images, them = counted(report.images, "image"), "it" if report.images == 1 else "them"
        notes.append(f"only {images}: a generator may memorise {them}; compare its samples with the data")
    if report.upsampled:
        are, were = ("is", "was") if report.upsampled == 1 else ("are", "were")
        images = counted(report.upsampled, "image")
        notes.append(f"{images} {are} smaller than {report.sample_size} pixels and {were} enlarged")
    if report.exact_duplicates and not report.dropped:
        notes.append("identical images get more weight in training; --drop_duplicates removes the copies")
    if several := sum(count for name, count in report.formats.items() if name.endswith(OF_SEVERAL)):
        notes.append(
            f"{counted(several, 'file')} with several frames or pages: only the first of each is used; save the "
            "others as files of their own to train on them"
        )
    if report.near_duplicates is None:
        notes.append(f"near duplicates were not searched for: there are more than {MAX_COMPARED_IMAGES} images")
    return notes + _notes_on_brightness(report) + _notes_on_skipped(report.skipped)


def _notes_on_brightness(report: IntakeReport) -> list[str]:
    notes, (darkest, brightest) = [], report.brightness
    if report.grey_bits is not None and report.grey_bits < GREY_BITS[-1]:
        notes.append(
            f"the 16- or 32-bit grey files hold values of {report.grey_bits} bits: {2**report.grey_bits - 1} is white"
        )
    if brightest < DARK:
        notes.append(
            f"dark: hardly any pixel of the median image exceeds {brightest} of 255; scale the values first if "
            "these are label masks, or colours of 10 or 12 bits in 16-bit files"
        )
    elif brightest - darkest < LOW_CONTRAST:
        notes.append(
            f"low contrast: the brightness of the median image goes from {darkest} to {brightest} of 255 only"
        )
    return notes


def _notes_on_skipped(skipped: dict[str, int]) -> list[str]:
    """Return a note for each kind of skipped files that probably hold images."""
    pictures = {suffix: count for suffix, count in skipped.items() if suffix in OTHER_PICTURE_SUFFIXES}
    packed = {suffix: count for suffix, count in skipped.items() if suffix in FILE_SUFFIXES | PACKED_SUFFIXES}
    notes = []
    if pictures:
        notes.append(f"images or videos in unsupported formats: {counts(pictures)}; convert them to PNG or JPEG")
    if packed:
        notes.append(
            f"files next to the images that may contain more images: {counts(packed)}; not read: unpack "
            "them, or pass one as --dataset (zip, tar, ...)"
        )
    return notes
