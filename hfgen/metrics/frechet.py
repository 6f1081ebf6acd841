"""The Frechet distance of two sets of features (Heusel et al. 2017, arXiv:1706.08500), exact for any number of images.

Computed without a matrix square root, which fails on few images.
"""

import numpy as np
import torch


MIN_TO_EXTRAPOLATE, POINTS_OF_LINE = 20, 10
# Images per block, as a multiple of the number of features.
BLOCKS_OF_FEATURES = 8


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Return the squared Frechet distance of the Gaussians fitted to two sets: FID, if the features are Inception's.

    Heusel et al. 2017, equation 6: `|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`. With A and B the
    centred features divided by sqrt(n - 1), `C_a = A^T A`, and the trace of the matrix root is the sum of the singular
    values of `A B^T` (the eigenvalues of `C_a C_b` are their squares). This needs no matrix root, so there are no
    complex numbers and nothing to add to a singular covariance; the cost is set by the smaller of the numbers of
    images and features.

    Args:
        features_a: `(num_images_a, num_features)`, at least 2 images; any floating-point precision.
        features_b: `(num_images_b, num_features)`, likewise.

    Returns:
        The distance, computed in float64; non-negative up to rounding.

    Raises:
        ValueError: if a set has fewer than 2 images or non-finite values, or the numbers of features differ.
    """
    mean_a, half_a = _mean_and_half(features_a, "features_a")
    mean_b, half_b = _mean_and_half(features_b, "features_b")
    if len(mean_a) != len(mean_b):
        raise ValueError(
            f"features_a has {len(mean_a)} features and features_b {len(mean_b)}: both must come from the same network"
        )
    root_trace = torch.linalg.svdvals(half_a @ half_b.T).sum()
    return float((mean_a - mean_b).square().sum() + half_a.square().sum() + half_b.square().sum() - 2 * root_trace)


def extrapolated_distance(real_features: np.ndarray, fake_features: np.ndarray, seed: int = 0) -> float:
    """Extrapolate the distance to infinitely many generated images.

    Chong and Forsyth 2020 (arXiv:1911.07023), section 4: the bias of FID is about proportional to 1 / n, so the
    distances of subsets of the generated images lie on a line over 1 / n, which is extrapolated to 0. The bias from
    the number of real images remains. The line is straight only where even the smallest subset, a quarter of the
    images, has more images than there are features.

    Args:
        real_features: `(num_real, num_features)`, at least 2 images.
        fake_features: `(num_fake, num_features)`, at least 20 images.
        seed: chooses the subsets.

    Raises:
        ValueError: if there are fewer than 20 generated images, or as `frechet_distance` does.
    """
    if len(fake_features) < MIN_TO_EXTRAPOLATE:
        raise ValueError(
            f"fake_features has {len(fake_features)} images: extrapolation needs at least {MIN_TO_EXTRAPOLATE}"
        )
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(fake_features) // 4, len(fake_features), POINTS_OF_LINE).astype(int)
    parts = [fake_features[rng.permutation(len(fake_features))[:size]] for size in sizes]
    distances = [frechet_distance(real_features, part) for part in parts]
    _, at_infinity = np.polyfit(1 / sizes, distances, deg=1)
    return float(at_infinity)


def _mean_and_half(features: np.ndarray, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean, `(num_features,)`, and a matrix A with at most num_features rows and `A^T A` = covariance."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} of shape {features.shape}: at least two images with some features are needed")
    count, num_features = features.shape
    starts = range(0, count, BLOCKS_OF_FEATURES * num_features)
    mean = sum(_block(features, start).sum(dim=0) for start in starts) / count
    if not bool(torch.as_tensor(mean).isfinite().all()):
        raise ValueError(f"{name} contains a non-finite number")
    half = torch.empty(0, num_features, dtype=torch.float64)
    for start in starts:
        half = torch.cat([half, (_block(features, start) - mean) / (count - 1) ** 0.5])
        if len(half) > num_features:  # R has the same A^T A with num_features rows
            half = torch.linalg.qr(half, mode="r").R
    return mean, half


def _block(features: np.ndarray, start: int) -> torch.Tensor:
    """Return one block of features in float64, so that only a block is in memory twice."""
    return torch.from_numpy(np.array(features[start : start + BLOCKS_OF_FEATURES * features.shape[1]], np.float64))
