"""Is it art or a copy? Distances from generated images to the nearest real one."""

from typing import NamedTuple

import numpy as np
import torch

from hfgen.metrics.frechet import frechet_distance


BLOCK_ROWS = 1024
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


def nearest_images(features: np.ndarray, real_features: np.ndarray, leave_out_self: bool = False) -> Nearest:
    """Find for each image the real one whose features point in the most similar direction.

    Bai et al. 2021 (arXiv:2106.03062), section 3: the distance is one less the absolute cosine.

    Args:
        features: `(num_images, num_features)`.
        real_features: `(num_real, num_features)`.
        leave_out_self: both are the same set, in which an image is not its own neighbour.

    Raises:
        ValueError: if there is no real image to find, or the numbers of features differ.
    """
    if features.shape[1:] != real_features.shape[1:] or len(real_features) < 1 + leave_out_self:
        raise ValueError(f"features of shapes {features.shape} and {real_features.shape} cannot be compared")
    rows, columns = (_directions(part) for part in (features, real_features))
    indices, distances = [], []
    for start in range(0, len(rows), BLOCK_ROWS):
        cosines = (rows[start : start + BLOCK_ROWS] @ columns.T).abs()
        if leave_out_self:
            own = torch.arange(len(cosines))
            cosines[own, start + own] = -1
        nearest = cosines.max(dim=1)
        indices.append(nearest.indices)
        distances.append((1 - nearest.values).clamp(min=0))
    return Nearest(torch.cat(indices).numpy(), torch.cat(distances).numpy())


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


def _directions(features: np.ndarray) -> torch.Tensor:
    """Scale features to length 1; those of length 0, which point nowhere, stay 0 and are far from everything."""
    return torch.nn.functional.normalize(torch.as_tensor(features).double(), dim=1)
