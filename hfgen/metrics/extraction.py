"""From images to features, one batch in memory at a time, for any network."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from hfgen.bars import progress_bar


BATCH_SIZE = 32


class Extractor(Protocol):
    """Computes features of images.

    Attributes:
        identity: names the network, its weights and the resizing; features are comparable if identities are equal.
    """

    identity: str

    def __call__(self, images: Iterable[np.ndarray], count: int | None = None) -> np.ndarray: ...  # noqa: D102


@torch.inference_mode()
def extract_features(
    images: Iterable[np.ndarray],
    count: int | None,
    resize: Callable[[np.ndarray], np.ndarray],
    network: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> np.ndarray:
    """Resize images on all cores and compute their features, with a progress bar.

    Args:
        images: each uint8 `(height, width, 3)`, of any size.
        count: number of images, for the progress bar.
        resize: maps one image to float32 `(new_height, new_width, 3)` in [0, 255].
        network: maps pixels `(batch, 3, new_height, new_width)` in [0, 255] to features `(batch, num_features)`.
        device: where the network is.

    Returns:
        float32 `(num_images, num_features)`.

    Raises:
        ValueError: if an image is not uint8 `(height, width, 3)`, or there are no images.
    """
    features: list[np.ndarray] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        # Stacked by torch, whose memory is aligned: otherwise the last bits on a CPU would depend on the address.
        pixels = torch.stack([torch.from_numpy(one) for one in pool.map(resize, batch)]).to(device).permute(0, 3, 1, 2)
        # Even if images are generated in mixed precision: features of equal identity must be computed alike.
        with torch.autocast(device.type, enabled=False):
            output = network(pixels.float().contiguous(memory_format=torch.channels_last))
        features.append(output.reshape(len(batch), -1).float().cpu().numpy())
        bar.update(len(batch))
        batch.clear()

    with progress_bar("features", count) as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"images must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
            batch.append(image)
            if len(batch) == BATCH_SIZE:
                flush()
        if batch:
            flush()
    if not features:
        raise ValueError("no images to compute features of")
    return np.concatenate(features)
