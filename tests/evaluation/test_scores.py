"""Scores with their spread and floor, and copies counted: on features made by hand."""

import json

import numpy as np
import pytest

from hfgen.evaluation import scores as evaluation
from hfgen.evaluation.scores import (
    distances_among,
    held_out_report,
    memorisation_report,
    pixel_report,
    score_features,
    score_floor,
    spread_over_seeds,
)
from hfgen.metrics import kernel, manifold
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance, random_subset
from hfgen.metrics.manifold import manifold_scores
from hfgen.metrics.memorisation import copying_test, memorisation_informed_fid, nearest_images


def features(seed, count, shift=0.0):
    return np.random.default_rng(seed).gamma(0.5, size=(count, 12)) + shift


def test_every_score_is_that_of_its_function_and_real_comes_first():
    real, fake = features(0, 60), features(1, 40, 0.5)
    scores = score_features(real, fake)
    assert (scores["num_real"], scores["num_fake"]) == (60, 40)
    assert scores["fid"] == frechet_distance(real, fake)
    assert (scores["kid"], scores["kid_standard_error"]) == kernel_distance(real, fake)
    overlap = manifold_scores(real, fake)
    assert {name: scores[name] for name in overlap._fields} == overlap._asdict()
    assert overlap.precision != overlap.recall
    assert scores["mifid"] == memorisation_informed_fid(real, fake) != memorisation_informed_fid(fake, real)
    assert json.loads(json.dumps(scores)) == scores


def test_the_standard_error_of_fid_is_about_its_spread_and_depends_on_the_seed():
    draws = [score_features(features(2 * seed, 200), features(2 * seed + 1, 200, 0.3)) for seed in range(12)]
    spread = np.std([one["fid"] for one in draws], ddof=1)
    assert 0.5 * spread < np.mean([one["fid_standard_error"] for one in draws]) < 2 * spread
    real, fake = features(0, 60), features(1, 40)
    errors = [score_features(real, fake, seed)["fid_standard_error"] for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_the_intervals_lie_1_96_standard_errors_to_either_side():
    scores = score_features(features(0, 60), features(1, 40, 0.5))
    for name in ("fid", "kid"):
        low, high = scores[f"{name}_interval"]
        assert (low + high) / 2 == pytest.approx(scores[name])
        assert high - low == pytest.approx(2 * 1.96 * scores[f"{name}_standard_error"])
        assert low < scores[name] < high


def test_all_that_is_drawn_follows_the_seed(monkeypatch):
    for module in (kernel, manifold):
        monkeypatch.setattr(module, "MAX_IMAGES", 30)
    real, fake = features(0, 60), features(1, 40, 0.5)
    for seed in (0, 1):
        scores = score_features(real, fake, seed)
        assert (scores["kid"], scores["kid_standard_error"]) == kernel_distance(real, fake, seed)
        assert {name: scores[name] for name in manifold.Manifold._fields} == manifold_scores(
            real, fake, seed=seed
        )._asdict()
    assert manifold_scores(real, fake, seed=0) != manifold_scores(real, fake, seed=1)


def test_the_spread_over_seeds_is_that_of_a_sample_of_the_scores_alone():
    draws = [
        {"num_fake": 7, "fid": fid, "fid_standard_error": 9.0, "fid_interval": [0.0, 1.0], "recall": recall}
        for fid, recall in ((1.0, 0.5), (2.0, 0.5), (6.0, 0.5))
    ]
    assert spread_over_seeds(draws) == {
        "mean": {"fid": 3.0, "recall": 0.5},
        "standard_deviation": {"fid": pytest.approx(np.sqrt((4 + 1 + 9) / 2)), "recall": 0.0},
    }
    scores = [score_features(features(0, 60), features(seed, 40), seed) for seed in (1, 2)]
    assert spread_over_seeds(scores)["mean"].keys() == {
        *("fid", "kid", "mifid"),
        *manifold.Manifold._fields,
    }


def test_the_floor_is_of_as_many_real_images_as_were_generated_against_the_others():
    real = features(3, 101)
    floor = score_floor(real, 30)
    assert (floor["split"]["num_fake"], floor["split"]["num_real"]) == (30, 71)
    assert nearest_images(real, real, own=np.arange(len(real))).distances.min() > 0
    # Half of them, where there are not twice as many.
    halves = score_floor(real, 300)["split"]
    assert (halves["num_fake"], halves["num_real"]) == (50, 51)
    assert halves["mifid"] > 0  # an image in both parts would not make it 0, but all would
    # Coverage depends on the number of generated images: this is the one to compare a generator's with.
    fresh = [manifold.manifold_scores(features(3, 71), features(seed, 30)).coverage for seed in range(50, 60)]
    assert floor["split"]["coverage"] == pytest.approx(np.mean(fresh), abs=0.15) and halves["coverage"] > 0.9
    # Fewer draws are farther off; a generator as good as the data gets about as much.
    at = [np.mean([score_floor(real, count, seed)["fid_at_n"] for seed in range(8)]) for count in (20, 300)]
    assert at[0] > 2 * at[1] > 0
    assert floor["nearest"] == distances_among(real)
    fresh = np.mean([frechet_distance(real, features(seed, 50)) for seed in range(50, 60)])
    assert halves["fid"] == pytest.approx(fresh, rel=0.6)


def test_copies_are_counted_and_said():
    real = features(4, 200)
    fake = np.vstack([real[:7] * 1.5, features(5, 43)])  # brighter, but in the same direction
    report = memorisation_report(real, fake, distances_among(real))
    among = np.sort(nearest_images(real, real, own=np.arange(len(real))).distances)
    assert among[0] < report["threshold"] < among[4]
    assert report["num_copies"] == 7 and report["num_fake"] == 50
    assert report["statement"].startswith("7 of 50 samples are nearer to a training image than 99% of")
    assert report["median_distance"] == np.median(nearest_images(fake, real).distances)
    assert report["median_distance_among_real"] == np.median(among)


def test_the_threshold_is_the_first_percentile_and_a_distance_equal_to_it_is_no_copy():
    real = features(4, 200)
    among = np.sort(nearest_images(real, real, own=np.arange(200)).distances)
    threshold = distances_among(real)["copy_threshold"]
    assert threshold == pytest.approx(among[1] + 0.99 * (among[2] - among[1]))  # at place 0.01 * 199
    among_real = {"copy_threshold": 1.0, "median": 1.0, "share_below": 0.01}
    right_angle = memorisation_report(np.eye(3)[:2], np.eye(3)[2:], among_real)
    assert right_angle["num_copies"] == 0


def test_of_many_real_images_some_look_for_neighbours_among_all_of_them(monkeypatch):
    real = features(6, 80)
    distances = nearest_images(real, real, own=np.arange(80)).distances
    every = distances_among(real, 5)
    assert every == distances_among(real, 6)
    monkeypatch.setattr(evaluation, "MAX_AMONG_REAL", 1)
    single = [distances_among(real, seed) for seed in range(30)]
    assert all(one["copy_threshold"] == one["median"] for one in single)
    found = np.array([one["median"] for one in single])
    assert np.abs(found[:, None] - distances).min(axis=1).max() < 1e-12  # each that of one image to all others
    assert len(set(found)) > 15
    monkeypatch.setattr(evaluation, "MAX_AMONG_REAL", 30)
    chosen = distances[random_subset(np.arange(80), 30, 2)]
    assert distances_among(real, 2)["median"] == pytest.approx(np.median(chosen)) != every["median"]
    assert score_floor(real, 30, 2)["nearest"] == distances_among(real, 2) != distances_among(real, 0)


def small_images(seed, count):
    return np.random.default_rng(seed).random((count, 3, 16, 16), dtype=np.float32)


def test_copies_by_pixels_are_counted_and_said(monkeypatch):
    """2 of the 20 real images are nearly equal; 5 of 8 generated ones are copies, 1 of them of those two."""
    real = small_images(0, 20)
    real[19] = real[0] + 1e-3
    copies = real[[0, 3, 3, 4, 5]] + 1e-6
    copies[1] = copies[1, :, :, ::-1]
    report = pixel_report(real, np.vstack([copies, small_images(1, 3)]))
    assert (report["num_copies"], report["num_fake"], report["share_among_real"]) == (5, 8, 0.1)
    assert report["median_distance"] == pytest.approx(1e-6, rel=0.2)
    assert report["median_distance_among_real"] == pytest.approx(np.sqrt(1 / 6), rel=0.1)  # of uniform noise
    assert report["statement"].startswith("5 of 8 are copies by their pixels (at least three times as near to one")
    assert report["statement"].endswith("of the training images themselves, 10.0% are")
    # Where there are many, a draw of them stands for all, and looks for its neighbours among all.
    monkeypatch.setattr(evaluation, "MAX_AMONG_REAL", 10)
    shares = [pixel_report(real, copies, seed)["share_among_real"] for seed in range(40)]
    assert set(shares) <= {0.0, 0.1, 0.2} and len(set(shares)) == 3
    assert np.mean(shares) == pytest.approx(0.1, abs=0.03)


def test_a_third_of_the_way_to_the_second_nearest_is_no_copy_any_more():
    real = np.stack([np.full((3, 16, 16), level, np.float32) for level in (0, 1, 0.9)])
    for level, copies in ((0.21, 1), (0.24, 0)):  # ratios 0.21 / 0.69 and 0.24 / 0.66
        assert pixel_report(real, np.full((1, 3, 16, 16), level, np.float32))["num_copies"] == copies


@pytest.mark.parametrize("num_train", [100, 2000])
def test_copies_are_nearer_to_the_training_images_than_held_out_ones_are(num_train):
    train, held_out, fresh = features(0, num_train), features(1, 90), features(2, 80)
    copies = np.vstack([train[:60] * 1.01, fresh[:20]])
    copied, learned = (held_out_report(train, held_out, fake) for fake in (copies, fresh))
    medians = [np.median(nearest_images(part, train).distances) for part in (held_out, copies)]
    assert [copied["distance_of_held_out"], copied["distance_of_fake"]] == medians
    assert copied["gap"] == medians[0] - medians[1] > 0.8 * medians[0]
    assert abs(learned["gap"]) < 0.2 * copied["gap"]
    assert copied["copying_share"] > 0.8 > 0.6 > learned["copying_share"] > 0.4
    assert copied["copying_p_value"] < 1e-6 < 0.01 < learned["copying_p_value"]
    assert (copied["copying_share"], copied["copying_p_value"]) == copying_test(train, held_out, copies)
    assert copied["num_held_out"] == 90
    assert copied["fid"] == frechet_distance(held_out, copies)
    assert copied["statement"].startswith(f"in {copied['copying_share']:.0%} of all pairs the sample is nearer to the")
    # What copies the held-out images is as far from the training images as those are.
    reversed_roles = held_out_report(train, held_out, held_out * 1.01)
    assert reversed_roles["gap"] == pytest.approx(0, abs=1e-12)
    assert reversed_roles["copying_share"] == pytest.approx(0.5, abs=0.5 / 90)  # 90 ties that rounding may break


def test_held_out_images_that_were_trained_on_are_told():
    train, fake = features(0, 100), features(2, 80)
    mixed = held_out_report(train, np.vstack([features(1, 50), train[:3]]), fake)
    assert mixed["num_also_in_train"] == 3
    assert mixed["statement"].endswith("; warning: 3 of the held-out images are also training images")
    apart = held_out_report(train, features(1, 50), fake)
    assert apart["num_also_in_train"] == 0 and "warning" not in apart["statement"]


@pytest.mark.parametrize("frames", [2, 4, 7])
def test_near_duplicates_in_the_data_do_not_hide_copies(frames):
    """Such as frames of one scene: they would make the threshold tiny, and no copy would be nearest to one alone."""
    rng = np.random.default_rng(6)
    real = rng.normal(size=(300, 32))
    scenes = real[:40].repeat(frames, axis=0) + 0.01 * rng.normal(size=(40 * frames, 32))
    filmed = np.vstack([real[40:], scenes])
    threshold = distances_among(filmed)["copy_threshold"]
    assert 0.7 < threshold / distances_among(real)["copy_threshold"] < 1.5
    fake = np.vstack([scenes[::frames] + 0.03 * rng.normal(size=(40, 32)), rng.normal(size=(60, 32))])
    among = distances_among(filmed)
    assert 40 <= memorisation_report(filmed, fake, among)["num_copies"] <= 43
    # As many real images are as near to another one: a generator that also films the scenes does as the data does.
    assert among["share_below"] == pytest.approx(40 * frames / len(filmed), abs=0.02)
    others = real[:40].repeat(frames, axis=0) + 0.01 * rng.normal(size=(40 * frames, 32))
    new = np.vstack([rng.normal(size=(260, 32)), others])  # other frames of the same scenes
    report = memorisation_report(filmed, new, among)
    assert report["num_copies"] / len(new) == pytest.approx(report["share_among_real"], abs=0.03)
    others = f"than {1 - among['share_below']:.0%} of the training images are to their nearest neighbour"
    assert f"samples are nearer to a training image {others}" in report["statement"]

    pictures = rng.random((60, 3, 16, 16)).astype(np.float32)
    scenes = pictures[:20].repeat(frames, axis=0) + rng.normal(0, 0.01, (20 * frames, 3, 16, 16)).astype(np.float32)
    filmed = np.concatenate([pictures[20:], scenes])
    copies = scenes[::frames] + rng.normal(0, 0.01, (20, 3, 16, 16)).astype(np.float32)
    new = rng.random((30, 3, 16, 16)).astype(np.float32)
    report = pixel_report(filmed, np.concatenate([copies, new]))
    assert report["num_copies"] == 20
    assert report["share_among_real"] == pytest.approx(20 * frames / len(filmed))


def test_mirrored_files_in_the_data_do_not_hide_copies():
    pictures = np.random.default_rng(7).random((40, 3, 16, 16)).astype(np.float32)
    both = np.concatenate([pictures, pictures[..., ::-1]])
    for copies in (pictures[:9], pictures[:9] * np.float32(0.99)):
        assert pixel_report(both, copies)["num_copies"] == 9


def test_files_that_are_there_twice_do_not_hide_copies():
    """Neither by features, where they would make the threshold 0, nor by pixels, where both would be as near."""
    real = features(4, 200)
    twice = np.vstack([real, real[:40]])
    fake = np.vstack([real[:7] * 1.5, features(5, 43)])
    assert distances_among(twice)["copy_threshold"] > 0.5 * distances_among(real)["copy_threshold"] > 0
    assert memorisation_report(twice, fake, distances_among(twice))["num_copies"] == 7
    same = distances_among(np.ones((9, 4)))  # all are one file
    assert same == {"copy_threshold": 0, "median": 0, "share_below": 0.01}
    pictures = np.random.default_rng(0).random((30, 3, 16, 16)).astype(np.float32)
    doubled = np.concatenate([pictures[:10], pictures])
    report = pixel_report(doubled, pictures[[0, 5, 20]] * np.float32(0.99))
    assert (report["num_copies"], report["share_among_real"]) == (3, 0)
