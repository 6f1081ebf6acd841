"""The real images that a generator is scored against, and their cached features."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from hfgen.arguments import errors_name_dataset_as
from hfgen.data.settings import DataSettings
from hfgen.data.store import CACHE_REMEDY, ImageStore, cache_folder, load_images
from hfgen.errors import UserError
from hfgen.evaluation.scores import distances_among, score_floor
from hfgen.files import read_json, writing
from hfgen.integrity import write_if_needed
from hfgen.metrics import feature_spaces
from hfgen.metrics.extraction import BATCH_SIZE, Extractor
from hfgen.metrics.memorisation import thumbnails, without_repeats
from hfgen.texts import counted, say


# Each half needs more images than the number of neighbours used by precision and recall.
MIN_IMAGES = 12
# Increase when the output of `score_floor` changes, so that cached floors are recomputed.
FLOOR_VERSION = 6
FEATURES_FILE, FLOOR_FILE = "features.npy", "floor.json"


class ReferenceImages(NamedTuple):
    """Real images, decoded as in training, and their features.

    Attributes:
        images: uint8 `(height, width, 3)` each, by index.
        features: float32 `(num_images, num_features)`, memory-mapped.
        folder: the features' cache folder.
        extractor: computed the features; generated images must be compared in the same ones.
    """

    images: ImageStore
    features: np.ndarray
    folder: Path
    extractor: Extractor

    def floor(self, num_fake: int, seed: int) -> dict[str, Any]:
        """Return `score_floor` of the real images, cached; of equal images, the distances are those of one."""

        def write(temporary: Path) -> None:
            temporary.mkdir()
            floor = score_floor(self.features, num_fake, seed, self.distances_among(seed))
            (temporary / FLOOR_FILE).write_text(json.dumps(floor))

        folder = self.folder.with_name(f"{self.folder.name}-floor{FLOOR_VERSION}-{num_fake}-{seed}")
        _write_under_lock(folder, write)
        return read_json(folder / FLOOR_FILE)

    def distances_among(self, seed: int) -> dict[str, float]:
        """Return `distances_among` of the images, of which those with equal pixels count as one."""
        kept, _ = without_repeats(self.images[index] for index in range(len(self.images)))
        return distances_among(self.features if len(kept) == len(self.images) else self.features[kept], seed)

    def thumbnails(self) -> np.ndarray:
        """Return the images in the form that `nearest_pixels` compares."""
        return thumbnails(self.images[index] for index in range(len(self.images)))


def open_reference(
    data: DataSettings,
    device: torch.device,
    features: str = "inception",
    mode: str = "clean",
    feature_weights: str | None = None,
    argument: str = "--reference",
    fewest: int | None = None,
) -> ReferenceImages:
    """Load a feature network, and open the real images that a generator is scored against.

    Args:
        data: settings of the dataset.
        device: where the network runs.
        features: as for `build_extractor`.
        mode: as for `build_extractor`.
        feature_weights: as for `build_extractor`.
        argument: as for `open_images`.
        fewest: as for `open_images`.

    Raises:
        UserError: as `build_extractor` and `load_reference` do.
    """
    extractor = feature_spaces.build_extractor(features, mode, feature_weights, device)
    return load_reference(data, extractor, argument, fewest)


def open_images(settings: DataSettings, argument: str, fewest: int | None = None) -> ImageStore:
    """Open a dataset that has enough images.

    Args:
        settings: settings of the dataset.
        argument: command-line argument that named the dataset, for messages.
        fewest: number of images that suffices, equal ones included; None: `MIN_IMAGES` different ones, as for a
            reference, which is split and compared with itself.

    Raises:
        UserError: if the dataset cannot be opened, is refused, or has fewer images.
    """
    with errors_name_dataset_as(argument):
        images = load_images(settings)
    if fewest is not None:
        if len(images) < fewest:
            raise UserError(f"{argument} {settings.dataset}: {counted(len(images), 'image')}, but {fewest} are needed")
        return images
    different = set()
    for index in range(len(images)):
        different.add(hash(images[index].tobytes()))
        if len(different) == MIN_IMAGES:
            return images
    found = counted(len(different), "different image" if len(different) < len(images) else "image")
    are = "is" if len(different) == 1 else "are"
    raise UserError(f"{argument} {settings.dataset}: {found} {are} too few to split and compare")


def load_reference(
    settings: DataSettings, extractor: Extractor, argument: str, fewest: int | None = None
) -> ReferenceImages:
    """Open a dataset and compute the features of all its images, or read them from the cache.

    The cache is next to the decoded images, keyed by their digest and the extractor's identity.

    Args:
        settings: settings of the dataset.
        extractor: computes the features.
        argument: as for `open_images`.
        fewest: as for `open_images`.

    Raises:
        UserError: as `open_images` does.
    """
    images = open_images(settings, argument, fewest)
    if unreadable := images.report.unreadable:
        name, reason = unreadable[0]
        others = f" (and {counted(len(unreadable) - 1, 'other')})" if len(unreadable) > 1 else ""
        say(f"warning: {argument} {settings.dataset}: left out {name}: {reason}{others}", err=True)
    folder = features_folder(images, settings, extractor)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        unfinished = folder.with_name(f"{folder.name}.unfinished.npy")
        _compute_features(images, extractor, unfinished)
        unfinished.replace(temporary / FEATURES_FILE)

    _write_under_lock(folder, write)
    return ReferenceImages(
        images, np.load(folder / FEATURES_FILE, mmap_mode="r", allow_pickle=False), folder, extractor
    )


def _compute_features(images: ImageStore, extractor: Extractor, file: Path) -> None:
    """Write the features of all images, as `np.save` does; if a part is there from an interrupted call, go on."""
    known = _rows_in(file, len(images))
    if known:
        say(f"the features of {known:,} of {counted(len(images), 'image')} are already there")
    with file.open("ab") as opened:
        for rows in extractor.batches((images[index] for index in range(known, len(images))), len(images) - known):
            if not opened.tell():
                header = np.lib.format.header_data_from_array_1_0(rows)
                header["shape"] = (len(images), *rows.shape[1:])
                np.lib.format.write_array_header_1_0(opened, header)
            opened.write(np.ascontiguousarray(rows).data)


def _rows_in(file: Path, num_images: int) -> int:
    """Cut an unfinished file of features after its last whole batch; return how many rows it then has.

    At least one batch is left to compute. A power failure may leave zeros, which are cut off, too.
    """
    try:
        with file.open("r+b") as opened:
            np.lib.format.read_magic(opened)
            shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
            start, row_bytes = opened.tell(), shape[1] * dtype.itemsize
            rows = (file.stat().st_size - start) // row_bytes
            empty = np.flatnonzero(~np.memmap(file, dtype, "r", start, (rows, shape[1])).any(axis=1))
            rows = min(int(empty[0]) if len(empty) else rows, num_images - 1)
            rows -= rows % BATCH_SIZE
            opened.truncate(start + rows * row_bytes)
            return rows
    except (OSError, ValueError, IndexError):  # there is none, or none with a whole row
        file.unlink(missing_ok=True)
        return 0


def features_folder(images: ImageStore, settings: DataSettings, extractor: Extractor) -> Path:
    """Return the cache folder for the features of real images."""
    key = hashlib.sha256(f"{images.digest} {extractor.identity}".encode()).hexdigest()[:32]
    return cache_folder(settings) / "features" / key


def _write_under_lock(folder: Path, write: Callable[[Path], object]) -> None:
    """Like `write_if_needed`, by one process at a time; what others compute meanwhile is waited for."""
    with writing(folder, CACHE_REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock")).acquire()
    with lock:
        write_if_needed(folder, write, CACHE_REMEDY)
