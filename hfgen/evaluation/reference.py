"""The real images that a generator is scored against, and their cached features."""

import contextlib
import hashlib
import json
import os
import shutil
import time
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
from hfgen.files import read_json, write_text_atomically, writing
from hfgen.integrity import write_if_needed
from hfgen.metrics import feature_spaces
from hfgen.metrics.extraction import Extractor
from hfgen.metrics.memorisation import thumbnails, without_repeats
from hfgen.texts import counted, say


# Each half needs more images than the number of neighbours used by precision and recall.
MIN_IMAGES = 12
# Increase when the output of `score_floor` changes, so that cached floors are recomputed.
FLOOR_VERSION = 6
FEATURES_FILE, FLOOR_FILE, PROGRESS_FILE = "features.npy", "floor.json", "progress.json"
# Time between two points from which an interrupted computation of features can go on, and how long it can.
SAVE_SECONDS, UNFINISHED_SECONDS = 10.0, 7 * 24 * 3600.0


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

    unfinished = folder.with_name(f"{folder.name}.unfinished")

    def write(temporary: Path) -> None:
        if folder.is_dir():  # damaged; what is left of computing it may be the same file
            shutil.rmtree(unfinished, ignore_errors=True)
        _compute_features(images, extractor, unfinished)
        temporary.mkdir()
        try:  # it stays in its place until the folder is in its own
            os.link(unfinished / FEATURES_FILE, temporary / FEATURES_FILE)
        except OSError:  # a disk without links
            (unfinished / FEATURES_FILE).replace(temporary / FEATURES_FILE)

    _write_under_lock(folder, write)
    shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process removes them, too
        for one in _abandoned(folder.parent):
            shutil.rmtree(one, ignore_errors=True)
    return ReferenceImages(
        images, np.load(folder / FEATURES_FILE, mmap_mode="r", allow_pickle=False), folder, extractor
    )


def _compute_features(images: ImageStore, extractor: Extractor, folder: Path) -> None:
    """Write the features of all images to a file in a folder, as `np.save` does.

    If a part of them is there from an interrupted call, only the others are computed. What `progress.json` counts has
    reached the disk, whatever ended that call.
    """
    folder.mkdir(exist_ok=True)
    rows, size = _progress(folder)
    if rows == len(images):
        return
    if rows:
        say(f"the features of {rows:,} of {counted(len(images), 'image')} are already there")
    with (folder / FEATURES_FILE).open("r+b" if rows else "wb") as file:

        def save() -> None:
            file.flush()
            os.fsync(file.fileno())
            write_text_atomically(folder / PROGRESS_FILE, json.dumps({"rows": rows, "bytes": size}))

        file.truncate(size)
        file.seek(size)
        saved = time.monotonic()
        try:
            for batch in extractor.batches((images[index] for index in range(rows, len(images))), len(images) - rows):
                if not rows:
                    header = np.lib.format.header_data_from_array_1_0(batch)
                    header["shape"] = (len(images), *batch.shape[1:])
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(batch).data)
                rows, size = rows + len(batch), file.tell()
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()


def _progress(folder: Path) -> tuple[int, int]:
    """Return how many rows of features a folder has, and at which byte of the file the last one ends."""
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
        rows, size = int(progress["rows"]), int(progress["bytes"])
        return (rows, size) if (folder / FEATURES_FILE).stat().st_size >= size else (0, 0)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, 0


def _abandoned(parent: Path) -> list[Path]:
    """Return the folders of unfinished features that nobody has gone on with for long."""
    oldest = time.time() - UNFINISHED_SECONDS
    return [folder for folder in parent.glob("*.unfinished") if folder.stat().st_mtime < oldest]


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
