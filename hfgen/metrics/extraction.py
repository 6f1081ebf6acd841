"""From images to features, one batch in memory at a time, for any network."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hfgen.bars import progress_bar


BATCH_SIZE = 32


class Extractor(ABC):
    """Computes features of images.

    Attributes:
        identity: names the network, its weights and the resizing; features are comparable if identities are equal.
    """

    identity: str

    @abstractmethod
    def batches(self, images: Iterable[np.ndarray], count: int | None = None) -> Iterator[np.ndarray]:
        """Yield the features of one batch after the other; see `feature_batches`."""

    def __call__(self, images: Iterable[np.ndarray], count: int | None = None) -> np.ndarray:
        """Return the features of all images, float32 `(num_images, num_features)`; see `feature_batches`."""
        return np.concatenate(list(self.batches(images, count)))


@torch.inference_mode()
def feature_batches(
    images: Iterable[np.ndarray],
    count: int | None,
    resize: Callable[[np.ndarray], np.ndarray],
    network: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Iterator[np.ndarray]:
    """Resize images on all cores and compute their features, with a progress bar.

    Args:
        images: each uint8 `(height, width, 3)`, of any size.
        count: number of images, for the progress bar.
        resize: maps one image to float32 `(new_height, new_width, 3)` in [0, 255].
        network: maps pixels `(batch, 3, new_height, new_width)` in [0, 255] to features `(batch, num_features)`.
        device: where the network is.

    Yields:
        float32 `(BATCH_SIZE, num_features)`, for the last batch perhaps fewer.

    Raises:
        ValueError: if an image is not uint8 `(height, width, 3)`, or there are no images.
    """
    batches = 0
    with progress_bar("features", count) as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for batch in batched(images, BATCH_SIZE):
            for image in batch:
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(f"images must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
            # Stacked by torch, whose memory is aligned: else the last bits on a CPU would depend on the address.
            pixels = torch.stack([torch.from_numpy(one) for one in pool.map(resize, batch)])
            pixels = pixels.to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
            # Even if images are generated in mixed precision: features of equal identity must be computed alike.
            with torch.autocast(device.type, enabled=False):
                output = network(pixels)
            features = output.reshape(len(batch), -1).float().cpu().numpy()
            bar.update(len(batch))
            batches += 1
            yield features
    if not batches:
        raise ValueError("no images to compute features of")


def batched(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yield lists of so many images, the last one perhaps shorter (`itertools.batched` needs Python 3.12)."""
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, size)):
        yield batch
