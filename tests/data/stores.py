"""Stores of decoded images at 16 pixels, and what is in them."""

from pathlib import Path

import numpy as np

from hfgen.data.settings import DataSettings
from hfgen.data.store import ImageStore, load_images


def settings_of(path: Path, **settings) -> DataSettings:
    return DataSettings(**{"dataset": str(path), "sample_size": 16, **settings})


def load(path: Path, **settings) -> ImageStore:
    return load_images(settings_of(path, **settings))


def pictures_in(store: ImageStore) -> list[np.ndarray]:
    return [store[index] for index in range(len(store))]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def entries(cache: Path) -> list[str]:
    """What a cache holds, without the lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")
