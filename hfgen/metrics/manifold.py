"""Fidelity and variety apart: precision, recall, density and coverage of generated images.

All four lay a ball around each image, as wide as the way to its k-th nearest neighbour in its own set, and take the
union of the balls for what the set covers.
"""

from typing import NamedTuple

import numpy as np
import torch

from hfgen.metrics.kernel import thinned_out


# More images than this are thinned out at random: the work grows with the square of their number.
MAX_IMAGES = 10_000
# Rows of a distance matrix that are in memory at a time.
BLOCK_ROWS = 1024


class Manifold(NamedTuple):
    """How two sets of features overlap, each from 0; all but the density up to 1.

    Attributes:
        precision: share of generated images in a ball of a real one.
        recall: share of real images in a ball of a generated one.
        density: balls of real images that a generated one is in, as a part of k: 1 is expected of equal distributions.
        coverage: share of real images in whose ball there is a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real_features: np.ndarray, fake_features: np.ndarray, k: int = 5, seed: int = 0) -> Manifold:
    """Compare generated images with real ones by the balls around each.

    Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2 (there k = 3). Density and
    coverage: Naeem et al. 2020 (arXiv:2002.09797), equations 5 and 9 (k = 5): unlike precision, density is not fooled
    by an outlier with a huge ball, and unlike recall, coverage does not grow with outliers among the generated.

    Args:
        real_features: `(num_real, num_features)`, more than k images.
        fake_features: `(num_fake, num_features)`, likewise.
        k: of the nearest neighbour that a ball reaches to.
        seed: chooses the images where a set has more than `MAX_IMAGES`.

    Raises:
        ValueError: if a set has not more than k images, or the numbers of features differ.
    """
    if k < 1 or min(len(real_features), len(fake_features)) <= k or real_features.shape[1] != fake_features.shape[1]:
        shapes = f"{real_features.shape} and {fake_features.shape}"
        raise ValueError(f"features of shapes {shapes} with k={k}: more than k images each, as many features")
    real, fake = (
        torch.from_numpy(np.array(thinned_out(part, MAX_IMAGES, seed), np.float64))
        for part in (real_features, fake_features)
    )
    # Distances come from products of matrices, whose rounding grows with the length of the vectors.
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
    # The image itself is its own nearest neighbour, hence the one after.
    parts = (_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(BLOCK_ROWS))
    return torch.cat(list(parts))


def _distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows, columns, compute_mode="use_mm_for_euclid_dist")
