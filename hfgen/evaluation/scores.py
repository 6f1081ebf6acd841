"""All scores of a generator against real images, with what is needed to interpret them: n, spread and floor."""

from typing import Any

import numpy as np

from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance, random_subset
from hfgen.metrics.manifold import manifold_scores
from hfgen.metrics.memorisation import (
    COPY_RATIO,
    copying_test,
    memorisation_informed_fid,
    nearest_images,
    nearest_pixels,
)


# Bootstrap resamples for standard errors.
RESAMPLINGS = 10
# 95% of a normal distribution lie within this many standard errors.
INTERVAL_95 = 1.96
# A generated image is a copy if its distance to a real one is below this quantile of the distances among real images.
COPY_QUANTILE = 0.01
# Cosine distance below which two real images count as the same file.
SAME_IMAGE = 1e-6
# Maximum number of real images for measuring distances among real images.
MAX_AMONG_REAL = 5000


def score_features(real: np.ndarray, fake: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Score generated images by their features.

    Args:
        real: features of the real images, `(num_real, num_features)`.
        fake: features of the generated images, `(num_fake, num_features)`.
        seed: seed of the resampling.

    Returns:
        Plain values by name. `fid_standard_error` is the bootstrap spread over both sets. Resampling with replacement
        repeats images, so that it is too large, near the floor several times; and it does not include the bias, which
        makes FID too large by about 1 / n: compare at equal n, and with the floor. The interval of KID covers 95% if
        its error is normal, that of FID usually more.
    """
    distance = kernel_distance(real, fake, seed)
    rng = np.random.default_rng(seed)
    resampled = [frechet_distance(_resampled(real, rng), _resampled(fake, rng)) for _ in range(RESAMPLINGS)]
    fid, error = frechet_distance(real, fake), float(np.std(resampled, ddof=1))
    return {
        "num_real": len(real),
        "num_fake": len(fake),
        "fid": fid,
        "fid_standard_error": error,
        "fid_interval": [fid - INTERVAL_95 * error, fid + INTERVAL_95 * error],
        "kid": distance.value,
        "kid_standard_error": distance.standard_error,
        "kid_interval": [distance.value + sign * INTERVAL_95 * distance.standard_error for sign in (-1, 1)],
        **manifold_scores(real, fake, seed=seed)._asdict(),
        "mifid": memorisation_informed_fid(real, fake),
    }


def spread_over_seeds(scores: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean and sample standard deviation of each score over image sets with different seeds."""
    names = [name for name, value in scores[0].items() if isinstance(value, float) and "error" not in name]
    values = {name: np.array([one[name] for one in scores]) for name in names}
    return {
        "mean": {name: float(part.mean()) for name, part in values.items()},
        "standard_deviation": {name: float(part.std(ddof=1)) for name, part in values.items()},
    }


def score_floor(
    real: np.ndarray, num_fake: int, seed: int = 0, nearest: dict[str, float] | None = None
) -> dict[str, Any]:
    """Score real images against other real images: what a perfect generator would get with as few images.

    Args:
        real: features of the real images, `(num_real, num_features)`.
        num_fake: number of generated images to give the floor for.
        seed: seed of the split and the resample.
        nearest: from `distances_among`, if the images are not to be all of these.

    Returns:
        `split`: all scores of `num_fake` random real images, but at most half of them, against the others;
        `fid_at_n`: the FID of `num_fake` real images, sampled with replacement, against all; `nearest`: the result of
        `distances_among`.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(real))
    # As many as are generated: FID, recall and coverage depend on the number.
    count = min(num_fake, len(real) // 2)
    resampled = real[rng.integers(len(real), size=num_fake)]
    return {
        "split": score_features(real[order[count:]], real[order[:count]], seed),
        "fid_at_n": frechet_distance(real, resampled),
        "nearest": distances_among(real, seed) if nearest is None else nearest,
    }


def distances_among(real: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Measure how near real images are to each other: cosine distances to the nearest other image.

    Duplicates and near duplicates, which are far nearer than any other image, are left out: with them, the threshold
    would be so low that no copy is found.

    Args:
        real: features of the real images, `(num_real, num_features)`.
        seed: chooses the images to measure if there are more than `MAX_AMONG_REAL`.

    Returns:
        `copy_threshold`, the `COPY_QUANTILE` of the distances, and their `median`; `share_below`, the fraction of real
        images whose nearest other one, near duplicates included, is closer than the threshold, at least
        `COPY_QUANTILE`: a generator as good as the data has as many.
    """
    chosen = random_subset(np.arange(len(real)), MAX_AMONG_REAL, seed)
    nearest = nearest_images(real[chosen], real, own=chosen)
    apart, distances = _of_different_images(nearest.apart), _of_different_images(nearest.distances)
    threshold = float(np.quantile(apart, COPY_QUANTILE))
    share = max(COPY_QUANTILE, float((distances < threshold).mean()))
    return {"copy_threshold": threshold, "median": float(np.median(apart)), "share_below": share}


def _of_different_images(distances: np.ndarray) -> np.ndarray:
    """Leave out the distances of images to their duplicates, unless there are no others."""
    return distances[distances > SAME_IMAGE] if (distances > SAME_IMAGE).any() else distances


def memorisation_report(
    real: np.ndarray, fake: np.ndarray, among_real: dict[str, float], called: str = "training"
) -> dict[str, Any]:
    """Count generated images that are copies of real ones, compared with the distances among real images.

    Args:
        real: features of the training images, `(num_real, num_features)`.
        fake: features of the generated images, `(num_fake, num_features)`.
        among_real: from `distances_among`.
        called: what the statement calls the real images, if not training images.

    Returns:
        Plain values: `num_copies` below the threshold, `share_among_real` (fraction of real images below it), the
        medians of both distances, and `statement`, a sentence.
    """
    distances = nearest_images(fake, real).distances
    copies = int((distances < among_real["copy_threshold"]).sum())
    return {
        "threshold": among_real["copy_threshold"],
        "num_copies": copies,
        "num_fake": len(fake),
        "share_among_real": among_real["share_below"],
        "median_distance": float(np.median(distances)),
        "median_distance_among_real": among_real["median"],
        "statement": (
            f"{copies} of {len(fake):,} samples are nearer to a {called} image than "
            f"{1 - among_real['share_below']:.0%} of the {called} images are to their nearest neighbour"
        ),
    }


def pixel_report(
    real_small: np.ndarray, fake_small: np.ndarray, seed: int = 0, called: str = "training"
) -> dict[str, Any]:
    """Count generated images that are copies of real ones pixel by pixel, including mirrored ones.

    Args:
        real_small: the training images from `thumbnails`.
        fake_small: the generated images, likewise.
        seed: chooses the real images that are checked in the same way, for comparison.
        called: as for `memorisation_report`.

    Returns:
        Plain values: `num_copies`, `share_among_real` (fraction of real images that count as a copy of another), the
        median distance in grey levels from 0 to 1, and `statement`, a sentence.
    """
    chosen = random_subset(np.arange(len(real_small)), MAX_AMONG_REAL, seed)
    among_real = nearest_pixels(real_small[chosen], real_small, own=chosen)
    of_fake = nearest_pixels(fake_small, real_small)
    copies = int((of_fake.ratios < COPY_RATIO).sum())
    share = float((among_real.ratios < COPY_RATIO).mean())
    return {
        "num_copies": copies,
        "num_fake": len(fake_small),
        "share_among_real": share,
        "median_distance": float(np.median(of_fake.distances)),
        "median_distance_among_real": float(np.median(among_real.distances)),
        "statement": (
            f"{copies} of {len(fake_small):,} are copies by their pixels (at least three times as near to one "
            f"{called} image, or to a few that are alike, as to any other); of the {called} images themselves, "
            f"{share:.1%} are"
        ),
    }


def held_out_report(
    train: np.ndarray, held_out: np.ndarray, fake: np.ndarray, called: str = "training"
) -> dict[str, Any]:
    """Test whether generated images are closer to the training images than held-out images are.

    Args:
        train: features of the training images, `(num_train, num_features)`.
        held_out: features of real images not used in training, `(num_held_out, num_features)`.
        fake: features of the generated images, `(num_fake, num_features)`.
        called: as for `memorisation_report`.

    Returns:
        Plain values: `num_also_in_train`, held-out images that were trained on; `fid` against the held-out images;
        `distance_of_held_out` and `distance_of_fake`, medians of the distances to the nearest training image, and
        `gap`, the first minus the second, positive if there are copies; `copying_share` and `copying_p_value` of
        `copying_test`; `statement`, a sentence.
    """
    held_out_distances = nearest_images(held_out, train).distances
    of_held_out = float(np.median(held_out_distances))
    of_fake = float(np.median(nearest_images(fake, train).distances))
    test = copying_test(train, held_out, fake)
    shared = int((held_out_distances < SAME_IMAGE).sum())
    warning = f"; warning: {shared} of the held-out images are also {called} images" if shared else ""
    return {
        "num_held_out": len(held_out),
        "num_also_in_train": shared,
        "fid": frechet_distance(held_out, fake),
        "distance_of_held_out": of_held_out,
        "distance_of_fake": of_fake,
        "gap": of_held_out - of_fake,
        "copying_share": test.share,
        "copying_p_value": test.p_value,
        "statement": (
            f"in {test.share:.0%} of all pairs the sample is nearer to the {called} images than the held-out image is "
            f"(50% are expected; p = {test.p_value:.2g}){warning}"
        ),
    }


def _resampled(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return features[rng.integers(len(features), size=len(features))]
