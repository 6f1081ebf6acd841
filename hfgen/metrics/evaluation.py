"""All scores of a generator against real images, each with what is needed to read it: n, spread and floor."""

from typing import Any

import numpy as np

from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance
from hfgen.metrics.manifold import manifold_scores
from hfgen.metrics.memorisation import memorisation_informed_fid, nearest_images


# Draws with replacement, for standard errors.
RESAMPLINGS = 10
# A generated image counts as a copy if it is nearer to a real one than this part of the real ones are to each other.
COPY_QUANTILE = 0.01


def score_features(real: np.ndarray, fake: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Score generated images by their features.

    Args:
        real: features of the real images, `(num_real, num_features)`.
        fake: features of the generated images, `(num_fake, num_features)`.
        seed: of the resamplings.

    Returns:
        Plain values by name. `fid_standard_error` is the spread over draws with replacement from both sets; it does
        not contain the bias, which makes FID too large by about 1 / n: compare at equal n, and with the floor.
    """
    distance = kernel_distance(real, fake, seed)
    rng = np.random.default_rng(seed)
    resampled = [frechet_distance(_resampled(real, rng), _resampled(fake, rng)) for _ in range(RESAMPLINGS)]
    return {
        "num_real": len(real),
        "num_fake": len(fake),
        "fid": frechet_distance(real, fake),
        "fid_standard_error": float(np.std(resampled, ddof=1)),
        "kid": distance.value,
        "kid_standard_error": distance.standard_error,
        **manifold_scores(real, fake)._asdict(),
        "mifid": memorisation_informed_fid(real, fake),
    }


def score_floor(real: np.ndarray, num_fake: int, seed: int = 0) -> dict[str, Any]:
    """Score the real images against themselves: what a perfect generator would get with so few images.

    Args:
        real: features of the real images, `(num_real, num_features)`.
        num_fake: generated images that the floor is for.
        seed: of the split and the draw.

    Returns:
        `halves`: all scores of one random half against the other; `fid_at_n`: the FID of `num_fake` real images, drawn
        with replacement, against all.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(real))
    half = len(real) // 2
    drawn = real[rng.integers(len(real), size=num_fake)]
    return {
        "halves": score_features(real[order[:half]], real[order[half : 2 * half]], seed),
        "fid_at_n": frechet_distance(real, drawn),
    }


def memorisation_report(real: np.ndarray, fake: np.ndarray) -> dict[str, Any]:
    """Tell how many generated images are copies of real ones, by the distances that real images have to each other.

    Args:
        real: features of the training images, `(num_real, num_features)`.
        fake: features of the generated images, `(num_fake, num_features)`.

    Returns:
        Plain values: `threshold`, the cosine distance below which `COPY_QUANTILE` of the real images have another real
        image, `num_copies` generated ones below it, medians of both kinds of distance, and `statement`, a sentence.
    """
    among_real = nearest_images(real, real, leave_out_self=True).distances
    of_fake = nearest_images(fake, real).distances
    threshold = float(np.quantile(among_real, COPY_QUANTILE))
    copies = int((of_fake < threshold).sum())
    return {
        "threshold": threshold,
        "num_copies": copies,
        "num_fake": len(fake),
        "median_distance": float(np.median(of_fake)),
        "median_distance_among_real": float(np.median(among_real)),
        "statement": (
            f"{copies} of {len(fake):,} samples are nearer to a training image than {1 - COPY_QUANTILE:.0%} of the "
            "training images are to each other"
        ),
    }


def _resampled(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return features[rng.integers(len(features), size=len(features))]
