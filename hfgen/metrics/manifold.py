"""Fidelity and diversity separately: precision, recall, density and coverage of generated images.

All four put a ball around each image, with its radius the distance to the k-th nearest neighbour in its own set; the
union of the balls approximates the set's support.
"""

from typing import NamedTuple

import numpy as np
import torch

from hfgen.metrics.kernel import finite_rows, random_subset


# Larger sets are subsampled at random: the cost is quadratic.
MAX_IMAGES = 10_000
# Rows of a distance matrix in memory at a time.
BLOCK_ROWS = 1024


class Manifold(NamedTuple):
    """How two sets of features overlap; all values are in [0, 1], except density, which can exceed 1.

    Attributes:
        precision: fraction of generated images inside a real image's ball.
        recall: fraction of real images inside a generated image's ball.
        density: real images' balls around a generated image, divided by k; about 1 for equal distributions.
        coverage: fraction of real images with a generated image inside their ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real_features: np.ndarray, fake_features: np.ndarray, k: int = 5, seed: int = 0) -> Manifold:
    """Compare generated and real images by the balls around each.

    Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2 (there k = 3). Density and
    coverage: Naeem et al. 2020 (arXiv:2002.09797), equations 5 and 9 (k = 5): unlike precision, density is not fooled
    by an outlier with a huge ball, and unlike recall, coverage does not grow with outliers among the generated.

    Args:
        real_features: `(num_real, num_features)`, more than k images.
        fake_features: `(num_fake, num_features)`, likewise.
        k: a ball reaches to the k-th nearest neighbour.
        seed: chooses the images if a set has more than `MAX_IMAGES`.

    Raises:
        ValueError: if a set has at most k images or non-finite values, or the numbers of features differ.
    """
    if k < 1 or min(len(real_features), len(fake_features)) <= k or real_features.shape[1] != fake_features.shape[1]:
        shapes = f"{real_features.shape} and {fake_features.shape}"
        raise ValueError(
            f"features of shapes {shapes} with k={k}: more than k images each and equal numbers of features are needed"
        )
    real, fake = (finite_rows(random_subset(part, MAX_IMAGES, seed)) for part in (real_features, fake_features))
    # Centred, because distances come from matrix products, whose rounding error grows with the vectors' length.
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    in_real_balls = torch.zeros(len(fake), dtype=torch.int64)
    covered, recalled = [], []
    for part, radii in zip(real.split(BLOCK_ROWS), real_radii.split(BLOCK_ROWS), strict=True):
        distances = _distances(part, fake)  # (rows, num_fake)
        inside = distances <= radii[:, None]
        in_real_balls += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((distances <= fake_radii).any(dim=1))
    return Manifold(
        precision=float((in_real_balls > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(in_real_balls.double().mean() / k),
        coverage=float(torch.cat(covered).double().mean()),
    )


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Return the distance of each image to its k-th nearest other one, `(num_images,)`."""
    # k + 1, because each image is its own nearest neighbour.
    parts = (_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(BLOCK_ROWS))
    return torch.cat(list(parts))


def _distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows, columns, compute_mode="use_mm_for_euclid_dist")
