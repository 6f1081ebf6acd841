"""Is it art or a copy? Distances from generated images to the nearest real one, in features and in pixels."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from hfgen.metrics.frechet import frechet_distance


# Of a matrix of distances, so much is in memory at a time.
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192
# Pixels are compared at this height and width, where a blurred or recompressed copy is still one.
THUMBNAIL_SIDE = 16
# Below this mean cosine distance Kaggle's MiFID punishes; the value of its published example.
MIFID_EPSILON = 0.1
# What the distance of a copy may come to.
ROUNDING = 1e-12


class Nearest(NamedTuple):
    """For each of some images the nearest one of another set.

    Attributes:
        indices: of the nearest images, int64 `(num_images,)`.
        distances: cosine distances, float64 `(num_images,)`: 0 for a copy, 1 for features at right angles.
    """

    indices: np.ndarray
    distances: np.ndarray


class NearestPixels(NamedTuple):
    """For each of some images the real one that is most like it pixel by pixel, mirrored or not.

    Attributes:
        indices: of the nearest real images, int64 `(num_images,)`.
        distances: root mean squared differences to them, in grey levels from 0 to 1, float64 `(num_images,)`.
        ratios: those as parts of the distances to the second nearest: 1 if neither is special, 0 for a copy.
    """

    indices: np.ndarray
    distances: np.ndarray
    ratios: np.ndarray


class CopyingTest(NamedTuple):
    """Whether generated images keep as far from the training images as images do that were held out.

    Attributes:
        share: of all pairs of a held-out and a generated image, those in which the generated one is nearer to the
            training images: 0.5 is expected, more means copies, less that the two differ otherwise.
        p_value: how often chance alone would give so large a share.
    """

    share: float
    p_value: float


def nearest_images(features: np.ndarray, real_features: np.ndarray, own: np.ndarray | None = None) -> Nearest:
    """Find for each image the real one whose features point in the most similar direction.

    Bai et al. 2021 (arXiv:2106.03062), section 3: the distance is one less the absolute cosine.

    Args:
        features: `(num_images, num_features)`.
        real_features: `(num_real, num_features)`.
        own: the index of each image among the real ones, `(num_images,)`, if it is one of them: it is then left out.

    Raises:
        ValueError: if there is no real image to find, or the numbers of features differ.
    """
    if features.shape[1:] != real_features.shape[1:] or len(real_features) < 1 + (own is not None):
        raise ValueError(f"features of shapes {features.shape} and {real_features.shape} cannot be compared")
    indices, distances = [], []
    for start in range(0, len(features), BLOCK_ROWS):
        rows = _directions(features[start : start + BLOCK_ROWS])
        best, found = (
            torch.full((len(rows),), -torch.inf, dtype=torch.float64),
            torch.zeros(len(rows), dtype=torch.int64),
        )
        for column in range(0, len(real_features), BLOCK_COLUMNS):
            cosines = (rows @ _directions(real_features[column : column + BLOCK_COLUMNS]).T).abs()
            if own is not None:
                _leave_out(cosines, own[start : start + BLOCK_ROWS], column, -1)
            nearest = cosines.max(dim=1)
            nearer = nearest.values > best
            best, found = (
                torch.where(nearer, nearest.values, best),
                torch.where(nearer, nearest.indices + column, found),
            )
        indices.append(found)
        distances.append((1 - best).clamp(min=0))
    return Nearest(torch.cat(indices).numpy(), torch.cat(distances).numpy())


def thumbnails(images: Iterable[np.ndarray]) -> np.ndarray:
    """Shrink images for `nearest_pixels`: each uint8 `(height, width, 3)`; float32 `(num_images, 3, 16, 16)`."""
    shrunk = [
        torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, THUMBNAIL_SIDE
        )
        for image in images
    ]
    return torch.stack(shrunk).numpy()


def nearest_pixels(small: np.ndarray, real_small: np.ndarray, own: np.ndarray | None = None) -> NearestPixels:
    """Find for each image the two real ones that are most like it, as they are or mirrored.

    A copy is much nearer to one real image than to any other: Yoon et al. 2023 ("Diffusion Probabilistic Models
    Generalize when They Fail to Memorize") call a sample memorised if the ratio is below 1/3. A threshold on
    the distance itself would take blurred images, which are near to everything, for copies. Real images that are the
    same to the pixel count as one.

    Args:
        small: from `thumbnails`, `(num_images, 3, 16, 16)`.
        real_small: likewise, `(num_real, 3, 16, 16)`.
        own: see `nearest_images`.

    Raises:
        ValueError: if there are not two different real images to find.
    """
    kept, place = _without_repeats(real_small)
    if len(kept) < 2 + (own is not None):
        raise ValueError(f"{len(kept)} different real images: two to compare with are the least")
    real_small, own = real_small[kept], None if own is None else place[own]
    indices, nearest = [], []
    for start in range(0, len(small), BLOCK_ROWS):
        rows = torch.from_numpy(small[start : start + BLOCK_ROWS]).double().flatten(1)
        best, found = torch.empty(len(rows), 0, dtype=torch.float64), torch.empty(len(rows), 0, dtype=torch.int64)
        for column in range(0, len(real_small), BLOCK_COLUMNS):
            real = torch.from_numpy(real_small[column : column + BLOCK_COLUMNS]).double()
            distances = torch.minimum(torch.cdist(rows, real.flatten(1)), torch.cdist(rows, real.flip(3).flatten(1)))
            if own is not None:
                _leave_out(distances, own[start : start + BLOCK_ROWS], column, torch.inf)
            here = distances.topk(min(2, len(real)), dim=1, largest=False)
            candidates = torch.cat([found, here.indices + column], dim=1)
            best, order = torch.cat([best, here.values], dim=1).sort(dim=1, stable=True)
            best, found = best[:, :2], candidates.gather(1, order)[:, :2]
        indices.append(found[:, 0])
        nearest.append(best / rows.shape[1] ** 0.5)
    first, second = torch.cat(nearest).unbind(dim=1)
    ratios = torch.where(second > 0, first / second, 1.0)  # two real images mirror each other, and this one is as well
    return NearestPixels(kept[torch.cat(indices).numpy()], first.numpy(), ratios.numpy())


def _without_repeats(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the different images, and for each image the place of its like among them."""
    places: dict[bytes, int] = {}
    kept: list[int] = []
    place: list[int] = []
    for index, image in enumerate(small):
        key = image.tobytes()
        if key not in places:
            places[key] = len(kept)
            kept.append(index)
        place.append(places[key])
    return np.array(kept), np.array(place)


def copying_test(train_features: np.ndarray, held_out_features: np.ndarray, fake_features: np.ndarray) -> CopyingTest:
    """Compare how near generated and held-out images come to the training images.

    Meehan et al. 2020 (arXiv:2004.05675), section 3: the rank-sum test of Mann and Whitney on the distances to the
    nearest training image, here over all images at once and not cell by cell.

    Args:
        train_features: `(num_train, num_features)`.
        held_out_features: of real images that the generator was not trained on, `(num_held_out, num_features)`.
        fake_features: `(num_fake, num_features)`.
    """
    held_out, fake = (nearest_images(part, train_features).distances for part in (held_out_features, fake_features))
    result = mannwhitneyu(held_out, fake, alternative="greater")
    return CopyingTest(float(result.statistic) / (len(held_out) * len(fake)), float(result.pvalue))


def memorisation_informed_fid(
    real_features: np.ndarray, fake_features: np.ndarray, epsilon: float = MIFID_EPSILON
) -> float:
    """Return Kaggle's MiFID: the FID, divided by the mean distance to the nearest real image where that is small.

    Bai et al. 2021, equations 3 to 5: the mean is taken over the *generated* images, of which each looks for its
    nearest real one. (A library that takes it over the real images punishes a generator that copies one image less.)

    Args:
        real_features: `(num_real, num_features)`, at least 2 images.
        fake_features: `(num_fake, num_features)`, likewise.
        epsilon: from this mean distance on there is no punishment.

    Returns:
        The score; infinite if all generated images are copies.
    """
    distance = float(nearest_images(fake_features, real_features).distances.mean())
    fid = frechet_distance(real_features, fake_features)
    if distance >= epsilon:
        return fid
    return fid / distance if distance > ROUNDING else float("inf")


def _leave_out(values: torch.Tensor, own: np.ndarray, column: int, value: float) -> None:
    """Overwrite, in each row of a block that begins at `column`, the entry of the row's own image if it is there."""
    places = torch.as_tensor(own) - column
    here = ((places >= 0) & (places < values.shape[1])).nonzero().flatten()
    values[here, places[here]] = value


def _directions(features: np.ndarray) -> torch.Tensor:
    """Scale features to length 1; those of length 0, which point nowhere, stay 0 and are far from everything."""
    return torch.nn.functional.normalize(torch.from_numpy(np.array(features, np.float64)), dim=1)
