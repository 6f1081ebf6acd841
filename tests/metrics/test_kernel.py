"""The kernel distance against sums written out, and its standard error against repeated draws."""

import numpy as np
import pytest

from hfgen.metrics import kernel
from hfgen.metrics.kernel import kernel_distance, random_subset
from hfgen.metrics.manifold import manifold_scores


def written_out(a, b):
    """Equation 4 of the paper, pair by pair."""

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    within = [
        sum(k(one[i], one[j]) for i in range(len(one)) for j in range(len(one)) if i != j) / len(one) / (len(one) - 1)
        for one in (a, b)
    ]
    return sum(within) - 2 * sum(k(x, y) for x in a for y in b) / len(a) / len(b)


def test_it_is_the_sum_over_all_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), 1.5 * rng.normal(size=(7, 3)) + 0.5
    assert kernel_distance(a, b).value == pytest.approx(written_out(a, b), rel=1e-12)


def test_the_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(33, 6)).astype(np.float32) + 1
    whole = kernel_distance(a, b)
    monkeypatch.setattr(kernel, "BLOCK_ROWS", 8)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-9)


def test_equal_distributions_have_mean_distance_0_and_the_standard_error_fits():
    rng = np.random.default_rng(2)
    draws = [kernel_distance(rng.normal(size=(40, 4)), rng.normal(size=(60, 4))) for _ in range(300)]
    values, errors = np.array(draws).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(300)
    assert (values < 0).mean() > 0.3
    assert values.std() < errors.mean() < 2 * values.std()  # the jackknife is wide where both are the same


def test_the_standard_error_is_that_of_repeated_draws_where_the_distributions_differ():
    rng = np.random.default_rng(3)
    draws = [kernel_distance(rng.normal(size=(80, 4)), rng.normal(size=(50, 4)) + 1) for _ in range(300)]
    values, errors = np.array(draws).T
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.2)
    # And of both sets' sizes: of four times as many images it is about half.
    many = [
        kernel_distance(rng.normal(size=(320, 4)), rng.normal(size=(200, 4)) + 1).standard_error for _ in range(20)
    ]
    assert np.mean(many) == pytest.approx(errors.mean() / 2, rel=0.2)


def test_the_jackknife_is_the_spread_of_leaving_one_out():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 0.7
    without_a = [written_out(np.delete(a, index, axis=0), b) for index in range(6)]
    without_b = [written_out(a, np.delete(b, index, axis=0)) for index in range(5)]
    variance = sum((len(part) - 1) * np.var(part) for part in (without_a, without_b))
    assert kernel_distance(a, b).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_of_many_images_the_seed_chooses_a_subset(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(90, 3)), rng.normal(size=(20, 3)) + 1
    all_pairs = kernel_distance(a, b).value
    monkeypatch.setattr(kernel, "MAX_IMAGES", 50)
    first, again, other = (kernel_distance(a, b, seed).value for seed in (1, 1, 2))
    assert first == again != other and first != all_pairs
    assert kernel_distance(a[:50], b, 1).value == kernel_distance(a[:50], b, 2).value


def test_a_random_subset_is_of_different_rows_by_the_seed_or_of_all_as_they_are():
    features = np.arange(60).reshape(20, 3)
    chosen = random_subset(features, 7, 3)
    assert chosen.shape == (7, 3) and len(set(chosen[:, 0])) == 7
    assert set(map(tuple, chosen)) <= set(map(tuple, features))
    assert np.array_equal(chosen, random_subset(features, 7, 3))
    assert not np.array_equal(chosen, random_subset(features, 7, 4))
    assert len(random_subset(features, 19, 3)) == 19
    assert np.array_equal(random_subset(features, 20, 3), features)
    assert np.array_equal(random_subset(features, 21, 3), features)
    # Each row as often as any other: 5 of 10 in 400 draws, with three standard errors.
    counts = np.bincount(np.concatenate([random_subset(np.arange(10), 5, seed) for seed in range(400)]), minlength=10)
    assert np.abs(counts - 200).max() < 3.5 * 10


@pytest.mark.parametrize(("shape_a", "shape_b"), [((2, 4), (5, 4)), ((5, 4), (2, 4)), ((5, 4), (5, 3))])
def test_bad_input_is_named(shape_a, shape_b):
    with pytest.raises(ValueError, match="at least 3 images each"):
        kernel_distance(np.zeros(shape_a), np.zeros(shape_b))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_scored(value):
    features, bad = np.ones((9, 4)), np.ones((9, 4))
    bad[3, 2] = value
    for score in (kernel_distance, manifold_scores):
        for pair in ((features, bad), (bad, features)):
            with pytest.raises(ValueError, match="non-finite"):
                score(*pair)
