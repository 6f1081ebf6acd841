"""Precision, recall, density and coverage on sets that are laid out by hand."""

import numpy as np
import pytest

from hfgen.metrics import manifold
from hfgen.metrics.kernel import random_subset
from hfgen.metrics.manifold import manifold_scores


def line(*places):
    return np.array(places, dtype=np.float64)[:, None]


def test_by_hand_on_a_line():
    """Real images at 0, 1, 2 and 10, balls to the nearest other one: of radius 1, 1, 1 and 8.

    Generated ones at 0.5 (in two balls: of 0 and 1), at 2.5 (in two: of 2 and 10), at 30 and 31 (in none). Their own
    balls are of radius 2, 2, 1 and 1: the first two hold the real ones at 0, 1 and 2.
    """
    scores = manifold_scores(line(0, 1, 2, 10), line(0.5, 2.5, 30, 31), k=1)
    assert scores.precision == 2 / 4
    assert scores.density == (2 + 2) / 4
    assert scores.recall == 3 / 4
    assert scores.coverage == 4 / 4  # by 0.5, 0.5, 2.5 and 2.5


def test_the_reach_is_that_of_the_kth_neighbour():
    """With k = 2 the balls of 0, 1, 2 and 10 are of radius 2, 1, 2 and 9: 2.5 is in those of 2 and 10, 3.5 too."""
    scores = manifold_scores(line(0, 1, 2, 10), line(2.5, 3.5, 50), k=2)
    assert scores.precision == 2 / 3
    assert scores.density == pytest.approx((2 + 2) / 2 / 3)
    assert scores.coverage == 2 / 4


def test_the_same_images_are_covered_although_distances_are_rounded():
    rng = np.random.default_rng(0)
    real = rng.gamma(0.5, size=(200, 64)) + 100  # long vectors, close together
    scores = manifold_scores(real.astype(np.float32), real[::-1].astype(np.float32).copy())
    assert scores.precision == scores.recall == scores.coverage == 1
    assert scores.density == pytest.approx(6 / 5, abs=0.01)  # the ball's centre and its k neighbours


def test_an_image_on_the_rim_of_a_ball_is_in_it():
    """Of copies two are in each ball: the copy of its centre, and on the rim that of its nearest neighbour."""
    half = np.random.default_rng(6).integers(-50, 50, size=(30, 48)).astype(np.float64)
    real = np.vstack([half, -half])  # of whole numbers around 0, whose distances are not rounded
    far = np.full((3, 48), 10_000.0)
    assert manifold_scores(real, np.vstack([real, far]), k=1).density == pytest.approx(60 * 2 / 63, rel=1e-12)


def test_recall_is_precision_with_the_roles_changed():
    rng = np.random.default_rng(5)
    real, fake = rng.normal(size=(80, 3)), 0.6 * rng.normal(size=(50, 3)) + 0.5
    scores, swapped = manifold_scores(real, fake), manifold_scores(fake, real)
    assert scores.recall == swapped.precision != scores.precision == swapped.recall


def test_copies_of_a_copied_image_are_no_outside_of_its_empty_ball():
    """Seven equal real images have balls of radius 0, which still hold a generated copy."""
    rng = np.random.default_rng(1)
    same = np.repeat(rng.normal(size=(1, 32)), 7, axis=0)
    scores = manifold_scores(same, same[:6], k=5)
    assert scores.precision == scores.coverage == 1


def test_far_images_score_0_and_a_collapsed_generator_covers_next_to_nothing():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(300, 8))
    assert manifold_scores(real, rng.normal(size=(300, 8)) + 50) == (0, 0, 0, 0)
    collapsed = manifold_scores(real, real[:1] + 1e-3 * rng.normal(size=(300, 8)))
    assert collapsed.precision == 1 and collapsed.recall < 0.02 and collapsed.coverage < 0.05


def test_equal_distributions_score_as_the_paper_says():
    """Naeem et al. 2020, section 3.3: density 1, and coverage 1 - (n-1)...(n-k) / (2n-1)...(2n-k), about 1 - 2^-k."""
    rng = np.random.default_rng(3)
    scores = [manifold_scores(rng.normal(size=(150, 6)), rng.normal(size=(150, 6))) for _ in range(30)]
    assert np.mean([one.density for one in scores]) == pytest.approx(1, abs=0.02)
    n = 150
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, 6)])
    assert np.mean([one.coverage for one in scores]) == pytest.approx(expected, abs=0.005)


def test_the_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(70, 5)), 1.2 * rng.normal(size=(45, 5))
    whole = manifold_scores(real, fake)
    monkeypatch.setattr(manifold, "BLOCK_ROWS", 16)
    assert manifold_scores(real, fake) == whole
    assert 0 < whole.precision < 1 and 0 < whole.recall < 1 and 0 < whole.coverage < 1


def test_of_many_images_the_seed_chooses_a_subset_of_both_sets(monkeypatch):
    rng = np.random.default_rng(7)
    real, fake = rng.normal(size=(90, 3)), 0.8 * rng.normal(size=(70, 3)) + 0.4
    rest = [manifold_scores(random_subset(real, 40, seed), random_subset(fake, 40, seed)) for seed in (0, 1)]
    everything = manifold_scores(real, fake)
    monkeypatch.setattr(manifold, "MAX_IMAGES", 40)
    assert [manifold_scores(real, fake, seed=seed) for seed in (0, 1, 1)] == [*rest, rest[1]]
    assert manifold_scores(real, fake) == rest[0] and len({*rest, everything}) == 3
    assert manifold_scores(real[:40], fake[:40], seed=0) == manifold_scores(real[:40], fake[:40], seed=1)


@pytest.mark.parametrize(("real", "fake", "k"), [(5, 9, 5), (9, 5, 5), (9, 9, 0)])
def test_bad_input_is_named(real, fake, k):
    with pytest.raises(ValueError, match=f"with k={k}: more than k images"):
        manifold_scores(np.zeros((real, 3)), np.zeros((fake, 3)), k)
