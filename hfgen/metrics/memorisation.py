"""Memorisation: distances from generated images to the nearest real one, in features and in pixels."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from scipy.stats import mannwhitneyu

from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import finite_rows


# Block of a distance matrix in memory at a time.
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192
# Pixels are compared at this height and width, so that blurred or recompressed copies still match.
THUMBNAIL_SIDE = 16
# Distances of which one is below this fraction of the next belong to two groups (Yoon et al. 2023).
COPY_RATIO = 1 / 3
# Real images that are looked at around each image: 2, and one more for so many real images, up to NEIGHBOURS. All but
# the last may be near duplicates of each other. In a small dataset, a few images that are alike need not be.
IMAGES_PER_NEIGHBOUR, NEIGHBOURS = 25, 8
# Kaggle's MiFID penalises mean cosine distances below this; from its published example.
MIFID_EPSILON = 0.1
# Distance of an exact copy, up to rounding.
ROUNDING = 1e-12


class Nearest(NamedTuple):
    """The nearest image in another set, for each image.

    Attributes:
        indices: indices of the nearest images, int64 `(num_images,)`.
        distances: cosine distances, float64 `(num_images,)`: 0 for a copy, 1 for features at right angles.
        apart: distances to the nearest real image beyond a few that are far nearer, such as the frames of one scene.
    """

    indices: np.ndarray
    distances: np.ndarray
    apart: np.ndarray


class NearestPixels(NamedTuple):
    """The most similar real image by pixels, mirrored or not, for each image.

    Attributes:
        indices: indices of the nearest real images, int64 `(num_images,)`.
        distances: root mean squared differences to them, in grey levels from 0 to 1, float64 `(num_images,)`.
        ratios: the lowest ratio of a distance to the next larger one, among the `NEIGHBOURS` nearest: 1 if all are
            equally near, 0 for a copy of one, or of one of a few that are alike.
    """

    indices: np.ndarray
    distances: np.ndarray
    ratios: np.ndarray


class CopyingTest(NamedTuple):
    """Whether generated images are as far from the training images as held-out images are.

    Attributes:
        share: fraction of pairs of a held-out and a generated image in which the generated one is nearer to the
            training images: 0.5 is expected, more means copies, less means that the two differ in other ways.
        p_value: probability of such a large share by chance.
    """

    share: float
    p_value: float


def nearest_images(features: np.ndarray, real_features: np.ndarray, own: np.ndarray | None = None) -> Nearest:
    """Find the real image with the most similar feature direction for each image.

    Bai et al. 2021 (arXiv:2106.03062), section 3: the distance is 1 minus the absolute cosine.

    Args:
        features: `(num_images, num_features)`.
        real_features: `(num_real, num_features)`.
        own: if the images are real ones themselves, their indices, `(num_images,)`, to exclude each image itself.

    Raises:
        ValueError: if there is no real image to find, the numbers of features differ, or one is not finite.
    """
    if features.shape[1:] != real_features.shape[1:] or len(real_features) < 1 + (own is not None):
        raise ValueError(f"features of shapes {features.shape} and {real_features.shape} cannot be compared")
    count = _neighbours(len(real_features), own)
    indices, nearest = [], []
    for start in range(0, len(features), BLOCK_ROWS):
        rows = _directions(features[start : start + BLOCK_ROWS])
        best = _NearestOfBlocks(len(rows), count)
        for column in range(0, len(real_features), BLOCK_COLUMNS):
            cosines = (rows @ _directions(real_features[column : column + BLOCK_COLUMNS]).T).abs()
            distances = 1 - cosines
            distances[distances < ROUNDING] = 0  # else the rounding errors of exact copies would be compared
            if own is not None:
                _leave_out(distances, own[start : start + BLOCK_ROWS], column)
            best.add(distances, column)
        indices.append(best.indices[:, 0])
        nearest.append(best.distances)
    distances = torch.cat(nearest)
    return Nearest(torch.cat(indices).numpy(), distances[:, 0].numpy(), _apart(distances).numpy())


def thumbnails(images: Iterable[np.ndarray]) -> np.ndarray:
    """Downscale images, each uint8 `(height, width, 3)`, for `nearest_pixels`: float32 `(num_images, 3, 16, 16)`."""
    shrunk = (
        torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, THUMBNAIL_SIDE
        ).numpy()
        for image in images
    )
    return np.fromiter(shrunk, np.dtype((np.float32, (3, THUMBNAIL_SIDE, THUMBNAIL_SIDE))))


def without_repeats(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Find the images that differ from all before them.

    Args:
        images: contiguous arrays of one shape.

    Returns:
        The indices of the distinct images, `(num_distinct,)`, and for each image its position among them,
        `(num_images,)`.
    """
    position_of: dict[bytes, int] = {}
    kept: list[int] = []
    positions: list[int] = []
    for index, image in enumerate(images):
        key = xxhash.xxh3_128_digest(image.data)  # a set of the images themselves would be a second copy of all
        if key not in position_of:
            position_of[key] = len(kept)
            kept.append(index)
        positions.append(position_of[key])
    return np.array(kept), np.array(positions)


def nearest_pixels(small: np.ndarray, real_small: np.ndarray, own: np.ndarray | None = None) -> NearestPixels:
    """Find the most similar real images for each image, mirrored or not.

    A copy is much nearer to one real image than to any other: Yoon et al. 2023 ("Diffusion Probabilistic Models
    Generalize when They Fail to Memorize") call a sample memorised if the distance to the nearest is below 1/3 of that
    to the second. A threshold on the distance itself would flag blurred images, which are near to everything. Here the
    nearest may be up to seven images, for data with near duplicates. Identical real images count as one.

    Args:
        small: from `thumbnails`, `(num_images, 3, 16, 16)`.
        real_small: likewise, `(num_real, 3, 16, 16)`.
        own: see `nearest_images`.

    Raises:
        ValueError: if there are not two different real images to find.
    """
    kept, positions = without_repeats(real_small)
    if len(kept) < 2 + (own is not None):
        raise ValueError(f"only {len(kept)} different real images: each image needs at least two to compare with")
    real_small, own = real_small[kept], None if own is None else positions[own]
    count = _neighbours(len(real_small), own)
    indices, nearest = [], []
    for start in range(0, len(small), BLOCK_ROWS):
        rows = torch.from_numpy(small[start : start + BLOCK_ROWS]).double().flatten(1)
        best = _NearestOfBlocks(len(rows), count)
        for column in range(0, len(real_small), BLOCK_COLUMNS):
            real = torch.from_numpy(real_small[column : column + BLOCK_COLUMNS]).double()
            distances = torch.minimum(torch.cdist(rows, real.flatten(1)), torch.cdist(rows, real.flip(3).flatten(1)))
            if own is not None:
                _leave_out(distances, own[start : start + BLOCK_ROWS], column)
            best.add(distances, column)
        indices.append(best.indices[:, 0])
        nearest.append(best.distances / rows.shape[1] ** 0.5)
    distances = torch.cat(nearest)
    ratios = _ratios(distances).min(dim=1).values
    return NearestPixels(kept[torch.cat(indices).numpy()], distances[:, 0].numpy(), ratios.numpy())


def _neighbours(num_real: int, own: np.ndarray | None) -> int:
    return min(2 + num_real // IMAGES_PER_NEIGHBOUR, NEIGHBOURS, num_real - (own is not None))


class _NearestOfBlocks:
    """Collects the smallest distances of each row over blocks of columns, in ascending order."""

    def __init__(self, num_rows: int, count: int):
        self._count = count
        self.distances = torch.empty(num_rows, 0, dtype=torch.float64)
        self.indices = torch.empty(num_rows, 0, dtype=torch.int64)

    def add(self, distances: torch.Tensor, first_column: int) -> None:
        here = distances.topk(min(self._count, distances.shape[1]), dim=1, largest=False)
        indices = torch.cat([self.indices, here.indices + first_column], dim=1)
        ordered = torch.cat([self.distances, here.values], dim=1).sort(dim=1, stable=True)
        self.distances = ordered.values[:, : self._count]
        self.indices = indices.gather(1, ordered.indices)[:, : self._count]


def _ratios(distances: torch.Tensor) -> torch.Tensor:
    """Divide each distance, `(num_images, count)` in ascending order, by the next; 1 if both are 0."""
    smaller, larger = distances[:, :-1], distances[:, 1:]
    return torch.where(larger > 0, smaller / larger, 1.0)


def _apart(distances: torch.Tensor) -> torch.Tensor:
    """Return the cosine distance after the last one that is far below the next; the first if none is.

    For small angles it is half the square of the distance between the directions, so `COPY_RATIO` is squared, too.
    """
    positions = torch.arange(1, distances.shape[1]).expand(len(distances), -1)
    after = torch.where(_ratios(distances) < COPY_RATIO**2, positions, 0)
    first = torch.zeros(len(distances), 1, dtype=torch.int64)
    return distances.gather(1, torch.cat([first, after], dim=1).max(dim=1, keepdim=True).values)[:, 0]


def copying_test(train_features: np.ndarray, held_out_features: np.ndarray, fake_features: np.ndarray) -> CopyingTest:
    """Compare how near generated and held-out images come to the training images.

    Meehan et al. 2020 (arXiv:2004.05675), section 3: the rank-sum test of Mann and Whitney on the distances to the
    nearest training image, here over all images at once instead of cell by cell.

    Args:
        train_features: `(num_train, num_features)`.
        held_out_features: features of real images not used in training, `(num_held_out, num_features)`.
        fake_features: `(num_fake, num_features)`.
    """
    held_out, fake = (nearest_images(part, train_features).distances for part in (held_out_features, fake_features))
    result = mannwhitneyu(held_out, fake, alternative="greater")
    return CopyingTest(float(result.statistic) / (len(held_out) * len(fake)), float(result.pvalue))


def memorisation_informed_fid(
    real_features: np.ndarray, fake_features: np.ndarray, epsilon: float = MIFID_EPSILON
) -> float:
    """Return Kaggle's MiFID: the FID, divided by the mean distance to the nearest real image if that is small.

    Bai et al. 2021, equations 3 to 5: the mean is over the *generated* images and their nearest real ones. (A library
    that averages over the real images penalises a generator that copies one image less.)

    Args:
        real_features: `(num_real, num_features)`, at least 2 images.
        fake_features: `(num_fake, num_features)`, likewise.
        epsilon: no penalty from this mean distance on.

    Returns:
        The score; infinite if all generated images are copies.
    """
    distance = float(nearest_images(fake_features, real_features).distances.mean())
    fid = frechet_distance(real_features, fake_features)
    if distance >= epsilon:
        return fid
    return fid / distance if distance > ROUNDING else float("inf")


def _leave_out(distances: torch.Tensor, own: np.ndarray, column: int) -> None:
    """Make each row's own image infinitely far, in a block of columns starting at `column`."""
    places = torch.as_tensor(own) - column
    here = ((places >= 0) & (places < distances.shape[1])).nonzero().flatten()
    distances[here, places[here]] = torch.inf


def _directions(features: np.ndarray) -> torch.Tensor:
    """Normalise features to length 1; zero vectors stay 0 and are far from everything."""
    return torch.nn.functional.normalize(finite_rows(features), dim=1)
