"""Endless batches of training images from a store, in an order that depends only on the seed."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hfgen.data.augment import prepare_batch
from hfgen.data.settings import DataSettings
from hfgen.data.store import ImageStore
from hfgen.randomness import keyed_seed


# Images are kept on the GPU if they fit in this fraction of its free memory.
RESIDENT_PART = 0.25
# Images copied to a GPU at a time.
COPIED_AT_ONCE = 1024


class ImageBatches:
    """Yields the batches of one process.

    The epochs form one endless sequence of images, each epoch a permutation seeded by (seed, epoch). Global batch n is
    the n-th slice of this sequence, split among the processes; a batch may span two epochs, and no image is left out.
    The content of a batch depends only on (seed, n, process), so n is the only state, beside where batch 0 would
    begin in a run that continues one of another batch size.

    Args:
        store: the decoded images.
        settings: augmentations and crop.
        batch_size: images per batch on this process.
        seed: seeds the order, the crops and the augmentations.
        device: device of the batches.
        process_index: index of this process.
        num_processes: number of training processes.
    """

    def __init__(
        self,
        store: ImageStore,
        settings: DataSettings,
        batch_size: int,
        seed: int,
        device: torch.device,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self._store, self._settings, self._batch_size = store, settings, batch_size
        self._seed, self._device = seed, device
        self._process_index, self._num_processes = process_index, num_processes
        self._position = 0
        self._offset = 0  # images by which batch n begins later than n batches of this size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._array = store.as_array()
        self._resident = self._copy_to_device()
        # The next batch can be prefetched; what begins elsewhere has none.
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None
        self._pool = ThreadPoolExecutor(1) if device.type != "cpu" and self._resident is None else None

    def __iter__(self) -> "ImageBatches":
        return self

    def __next__(self) -> torch.Tensor:
        """Return the next batch, float32 `(batch_size, 3, sample_size, sample_size)` in [-1, 1], channels_last."""
        number, self._position = self._position, self._position + 1
        if self._resident is not None:
            pixels = self._resident[torch.from_numpy(self.indices(number)).to(self._device)]
        elif self._pool is not None:
            # Other devices than CUDA's may read memory that has been freed meanwhile.
            pixels = self._gather_ahead(number).to(self._device, non_blocking=self._device.type == "cuda")
        else:
            pixels = self._gather(number).to(self._device)
        generator = torch.Generator().manual_seed(keyed_seed(self._seed, number, self._process_index, "augment"))
        return prepare_batch(pixels, self._settings, generator)

    def indices(self, number: int) -> np.ndarray:
        """Return the store indices of batch `number`, int64 `(batch_size,)`."""
        start = (number * self._num_processes + self._process_index) * self._batch_size + self._offset
        positions = np.arange(start, start + self._batch_size)
        epochs, within = np.divmod(positions, len(self._store))
        return np.array([self._order_of(epoch)[index] for epoch, index in zip(epochs, within, strict=True)])

    def rewind(self) -> None:
        """Go back to the first batch."""
        self._position, self._offset, self._ahead = 0, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches used so far, and that of their images on all processes."""
        return {"position": self._position, "images": self._images_in(self._position) + self._offset}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned, also with another batch size: the same image comes next."""
        self._position, self._ahead = state_dict["position"], None
        own = self._images_in(self._position)
        self._offset = state_dict.get("images", own) - own  # earlier versions did not count them

    def _images_in(self, num_batches: int) -> int:
        return num_batches * self._num_processes * self._batch_size

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.default_rng(keyed_seed(self._seed, int(epoch), "order"))
            self._epoch, self._order = epoch, generator.permutation(len(self._store))
        return self._order

    def _gather_ahead(self, number: int) -> torch.Tensor:
        assert self._pool is not None
        current = (
            self._ahead[1] if self._ahead and self._ahead[0] == number else self._pool.submit(self._gather, number)
        )
        pixels = current.result()
        self._ahead = (number + 1, self._pool.submit(self._gather, number + 1))
        return pixels.pin_memory() if self._device.type == "cuda" else pixels

    def _gather(self, number: int) -> torch.Tensor:
        """Return the pixels of a batch, uint8 `(batch_size, height, width, 3)`."""
        indices = self.indices(number)
        if self._array is not None and self._settings.crop == "center":
            return torch.from_numpy(self._array[indices])
        generator = np.random.default_rng(keyed_seed(self._seed, number, self._process_index, "crop"))
        size = self._settings.sample_size
        return torch.from_numpy(np.stack([random_crop(self._store[index], size, generator) for index in indices]))

    def _copy_to_device(self) -> torch.Tensor | None:
        if self._device.type != "cuda" or self._array is None or self._settings.crop != "center":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        return copied_to(self._device, self._array) if self._array.nbytes <= RESIDENT_PART * free else None


def copied_to(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """Copy images, uint8 `(images, height, width, 3)`, to a device, some at a time: they may be mapped from a disk."""
    copied = torch.empty(array.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(array), COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        copied[part] = torch.from_numpy(array[part].copy()).to(device)
    return copied


def random_crop(pixels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Crop a square at a random position.

    Args:
        pixels: uint8 `(height, width, 3)`, both at least `size`.
        size: side of the square, in pixels.
        generator: random number generator for the position.
    """
    top = generator.integers(pixels.shape[0] - size + 1)
    left = generator.integers(pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]
