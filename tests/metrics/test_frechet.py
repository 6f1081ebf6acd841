"""The Frechet distance against closed forms, scipy's root and clean-fid, and where those fail."""

import numpy as np
import pytest

from hfgen.metrics.frechet import extrapolated_distance, frechet_distance


def normal(seed, count, mean, scale):
    """Draws from a normal distribution of the given mean and factor of the covariance, float64."""
    rng = np.random.default_rng(seed)
    return mean + rng.standard_normal((count, len(mean))) @ scale.T


def by_scipy(a, b):
    from scipy.linalg import sqrtm

    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    assert abs(np.imag(root)).max() < 1e-6
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return means + np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(np.real(root))


@pytest.mark.parametrize(("count_a", "count_b"), [(60, 90), (400, 41)])
def test_it_is_scipys_where_the_covariances_have_full_rank(count_a, count_b):
    rng = np.random.default_rng(0)
    a = normal(1, count_a, rng.normal(size=20), rng.normal(size=(20, 20)))
    b = normal(2, count_b, rng.normal(size=20), rng.normal(size=(20, 20)))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_by_hand_in_one_dimension():
    """Variances 4 and 1 (of two numbers each, with n - 1), means 5 and 1: 16 + (2 - 1)^2."""
    a = np.array([[5 - np.sqrt(2)], [5 + np.sqrt(2)]])
    b = np.array([[1 - np.sqrt(0.5)], [1 + np.sqrt(0.5)]])
    assert frechet_distance(a, b) == pytest.approx(16 + 1)


def test_commuting_covariances_have_a_closed_form():
    """Rotated axes of lengths s and t: |means|^2 + sum of (s - t)^2, whatever the number of images."""
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    unit = np.vstack([np.eye(6), -np.eye(6)]) * np.sqrt(11 / 2)  # covariance 1, of 12 points
    s, t, apart = np.array([3, 2, 1, 0.5, 0.1, 0]), np.array([1, 2, 4, 0.25, 0, 0.3]), np.arange(6)
    expected = np.square(apart).sum() + np.square(s - t).sum()
    assert frechet_distance(unit * s @ axes.T, apart + unit * t @ axes.T) == pytest.approx(expected, rel=1e-12)
    # Each point twice has covariances of 22 / 23 times that, more images than features or not.
    doubled = np.repeat(unit * s @ axes.T, 2, axis=0), apart + np.repeat(unit * t @ axes.T, 2, axis=0)
    assert frechet_distance(*doubled) == pytest.approx(55 + np.square(s - t).sum() * 22 / 23, rel=1e-12)


@pytest.mark.parametrize("count", [300, 700])
def test_a_set_is_at_no_distance_from_itself_in_any_order(count):
    a = np.random.default_rng(4).gamma(0.5, size=(count, 512)).astype(np.float32)
    assert abs(frechet_distance(a, a[::-1].copy())) < 1e-8
    assert frechet_distance(a, a + 1) == pytest.approx(512, rel=1e-6)


def test_few_images_give_a_real_number_where_the_matrix_root_is_complex():
    """300 images against 300 with 2,048 features: what study B never got an FID for."""
    rng = np.random.default_rng(5)
    a, b = rng.gamma(0.5, size=(300, 2048)), rng.gamma(0.6, size=(300, 2048))
    value = frechet_distance(a, b)
    # The same by the eigenvalues of the product in the space that the images of one set span.
    half_a, half_b = ((part - part.mean(axis=0)) / np.sqrt(299) for part in (a, b))
    product = half_a @ half_b.T
    trace = np.sqrt(np.clip(np.linalg.eigvalsh(product @ product.T), 0, None)).sum()
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    assert value == pytest.approx(means + np.square(half_a).sum() + np.square(half_b).sum() - 2 * trace, rel=1e-6)


def test_more_images_than_features_are_no_other_case_than_fewer():
    """Zeros as further features change nothing, but make the images fewer than the features."""
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(50, 8)), 2 * rng.normal(size=(40, 8)) + 1
    padded = [np.hstack([part, np.zeros((len(part), 100))]) for part in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*padded), rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), r"features_a of shape \(1, 4\): at least two images"),
        (np.zeros((5, 4)), np.zeros(4), r"features_b of shape \(4,\)"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "features_a has 4 features and features_b 3"),
        (np.full((5, 4), np.nan), np.zeros((5, 4)), "features_a contains a non-finite number"),
        (np.zeros((5, 4)), np.full((5, 4), np.inf), "features_b contains a non-finite number"),
    ],
)
def test_bad_input_is_named(a, b, told):
    with pytest.raises(ValueError, match=told):
        frechet_distance(a, b)


@pytest.mark.slow
def test_the_extrapolation_takes_the_bias_of_few_generated_images_away():
    """The distance of a distribution from itself is 0; with 100 images of 30 features FID is far from it."""
    real = np.random.default_rng(7).normal(size=(20_000, 30))
    draws = [np.random.default_rng(seed).normal(size=(200, 30)) for seed in range(20)]
    plain = np.mean([frechet_distance(real, fake) for fake in draws])
    extrapolated = np.mean([extrapolated_distance(real, fake) for fake in draws])
    assert plain > 1.0 and abs(extrapolated) < 0.15 * plain
    assert extrapolated_distance(real, draws[0], 1) == extrapolated_distance(real, draws[0], 1)
    assert extrapolated_distance(real, draws[0], 1) != extrapolated_distance(real, draws[0], 2)
    with pytest.raises(ValueError, match="19 images: extrapolation needs at least 20"):
        extrapolated_distance(real, draws[0][:19])
