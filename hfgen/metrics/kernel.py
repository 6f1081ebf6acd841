"""The kernel distance of two sets of features (Binkowski et al. 2018, arXiv:1801.01401): unbiased at any size."""

from typing import NamedTuple

import numpy as np
import torch


# Larger sets are subsampled at random: the cost is quadratic, and at this size the standard error is small.
MAX_IMAGES = 10_000
# Rows of the kernel matrix in memory at a time.
BLOCK_ROWS = 1024


class KernelDistance(NamedTuple):
    """An estimate and its standard error.

    Attributes:
        value: the unbiased estimate; negative about half of the time if both distributions are the same.
        standard_error: from the jackknife over the images of both sets.
    """

    value: float
    standard_error: float


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray, seed: int = 0) -> KernelDistance:
    """Estimate the squared maximum mean discrepancy of two distributions: KID, if the features are Inception's.

    Binkowski et al. 2018, section 4.2, equation 4, with the kernel `(x y / num_features + 1)^3`: the mean over all
    pairs of different images within each set, minus twice the mean over all pairs across sets. The paper averages
    over random subsets; using all pairs has the same expectation and a smaller variance, and subsets as large as the
    set would show no spread.

    Args:
        features_a: `(num_images_a, num_features)`, at least 3 images.
        features_b: `(num_images_b, num_features)`, likewise.
        seed: chooses the images if a set has more than `MAX_IMAGES`.

    Raises:
        ValueError: if a set has fewer than 3 images or non-finite values, or the numbers of features differ.
    """
    if min(len(features_a), len(features_b)) < 3 or features_a.shape[1:] != features_b.shape[1:]:
        shapes = f"{features_a.shape} and {features_b.shape}"
        raise ValueError(
            f"features of shapes {shapes}: at least 3 images each and equal numbers of features are needed"
        )
    a, b = (finite_rows(random_subset(part, MAX_IMAGES, seed)) for part in (features_a, features_b))
    count_a, count_b = len(a), len(b)
    within_a = _row_sums(a, a) - _kernel((a * a).sum(dim=1), a.shape[1])  # (count_a,), without the image itself
    within_b = _row_sums(b, b) - _kernel((b * b).sum(dim=1), b.shape[1])
    across_a, across_b = _row_sums(a, b), _row_sums(b, a)

    mean_a = within_a.sum() / (count_a * (count_a - 1))
    mean_b = within_b.sum() / (count_b * (count_b - 1))
    across = across_a.sum() / (count_a * count_b)
    value = mean_a + mean_b - 2 * across
    # The leave-one-out estimates.
    pairs_a, pairs_b = (count_a - 1) * (count_a - 2), (count_b - 1) * (count_b - 2)
    without_a = (within_a.sum() - 2 * within_a) / pairs_a - 2 * (across_a.sum() - across_a) / ((count_a - 1) * count_b)
    without_b = (within_b.sum() - 2 * within_b) / pairs_b - 2 * (across_b.sum() - across_b) / ((count_b - 1) * count_a)
    variance = sum((len(part) - 1) * part.var(correction=0) for part in (without_a, without_b))
    return KernelDistance(float(value), float(variance) ** 0.5)


def finite_rows(features: np.ndarray) -> torch.Tensor:
    """Return features in float64; raise a `ValueError` if one is NaN or infinite."""
    rows = torch.from_numpy(np.array(features, np.float64))
    if not bool(rows.isfinite().all()):
        raise ValueError("the features contain a non-finite number")
    return rows


def random_subset(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return `most` of the rows, chosen at random, or all if there are no more."""
    return rows if len(rows) <= most else rows[np.random.default_rng(seed).permutation(len(rows))[:most]]


def _kernel(products: torch.Tensor, num_features: int) -> torch.Tensor:
    return (products / num_features + 1) ** 3


def _row_sums(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row of the kernel matrix, `(num_rows,)`."""
    return torch.cat([_kernel(part @ columns.T, rows.shape[1]).sum(dim=1) for part in rows.split(BLOCK_ROWS)])
