"""Scores with their spread and floor, copies counted, reference features kept: on features made by hand."""

import json

import numpy as np
import pytest

from hfgen.data.settings import DataSettings
from hfgen.metrics.evaluation import distances_among, memorisation_report, score_features, score_floor
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance
from hfgen.metrics.manifold import manifold_scores
from hfgen.metrics.memorisation import memorisation_informed_fid, nearest_images
from hfgen.metrics.reference import load_reference


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


def test_the_standard_error_of_fid_is_about_its_spread_over_new_draws_and_follows_the_seed():
    draws = [score_features(features(2 * seed, 200), features(2 * seed + 1, 200, 0.3)) for seed in range(12)]
    spread = np.std([one["fid"] for one in draws], ddof=1)
    assert 0.5 * spread < np.mean([one["fid_standard_error"] for one in draws]) < 2 * spread
    real, fake = features(0, 60), features(1, 40)
    errors = [score_features(real, fake, seed)["fid_standard_error"] for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_the_floor_is_of_disjoint_halves_and_of_as_many_draws_as_were_generated():
    real = features(3, 101)
    floor = score_floor(real, 30)
    assert (floor["halves"]["num_real"], floor["halves"]["num_fake"]) == (50, 50)
    assert floor["halves"]["mifid"] > 0  # an image in both halves would not make it 0, but all would
    assert nearest_images(real, real, own=np.arange(len(real))).distances.min() > 0
    # Fewer draws are farther off; a generator as good as the data gets about as much.
    at = [np.mean([score_floor(real, count, seed)["fid_at_n"] for seed in range(8)]) for count in (20, 300)]
    assert at[0] > 2 * at[1] > 0
    fresh = np.mean([frechet_distance(real, features(seed, 50)) for seed in range(50, 60)])
    assert floor["halves"]["fid"] == pytest.approx(fresh, rel=0.6)


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


class Colours:
    """Features that are cheap: the mean of each channel."""

    identity = "colours"

    def __init__(self):
        self.calls = 0

    def __call__(self, images, count=None):
        self.calls += 1
        return np.array([image.mean(axis=(0, 1)) for image in images], dtype=np.float32)


def test_reference_features_are_computed_once_for_each_data_size_and_extractor(tmp_path):
    extractor = Colours()
    settings = DataSettings("toy_paintings:13", sample_size=16)
    first, again = (
        load_reference(settings, extractor, "--reference"),
        load_reference(settings, extractor, "--reference"),
    )
    assert extractor.calls == 1 and np.array_equal(first.features, again.features)
    assert first.features.shape == (13, 3) and first.features.dtype == np.float32
    assert first.features[2] == pytest.approx(first.images[2].mean(axis=(0, 1)), rel=1e-6)
    load_reference(DataSettings("toy_paintings:13", sample_size=8), extractor, "--reference")
    load_reference(DataSettings("toy_paintings:14", sample_size=16), extractor, "--reference")
    assert extractor.calls == 3
    # So is the floor, for each number of images and seed.
    floor = first.floor(20, 0)
    assert floor == json.loads(json.dumps(score_floor(first.features, 20, 0))) != first.floor(30, 0)
    kept = sorted(first.file.parent.glob("*-floor*-20-0.json"))
    assert len(kept) == 1
    kept[0].write_text('{"kept": 1}')
    assert again.floor(20, 0) == {"kept": 1} and again.floor(20, 1) != floor
    other = Colours()
    other.identity = "other colours"
    load_reference(settings, other, "--reference")
    assert other.calls == 1
