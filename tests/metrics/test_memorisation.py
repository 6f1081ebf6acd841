"""Distances to the nearest real image and MiFID, on sets that are laid out by hand."""

import numpy as np
import pytest

from hfgen.metrics import memorisation
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.memorisation import memorisation_informed_fid, nearest_images


def test_the_distance_is_one_less_the_absolute_cosine_and_length_does_not_count():
    real = np.array([[1.0, 0, 0], [0, 2.0, 0]])
    images = np.array([[3.0, 0, 0], [1.0, 1.0, 0], [-5.0, 0, 0.0], [3.0, 4.0, 0], [0, 0, 7.0]])
    nearest = nearest_images(images, real)
    assert nearest.distances == pytest.approx([0, 1 - np.sqrt(0.5), 0, 1 - 0.8, 1], abs=1e-12)
    assert list(nearest.indices[[0, 2, 3]]) == [0, 0, 1]


def test_an_image_is_not_its_own_neighbour_if_left_out(monkeypatch):
    monkeypatch.setattr(memorisation, "BLOCK_ROWS", 2)
    features = np.array([[1.0, 0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    nearest = nearest_images(features, features, own=np.arange(5))
    assert list(nearest.indices) == [4, 3, 3, 1, 0]
    assert nearest.distances == pytest.approx([0, 0.04, 0.2, 0.04, 0], abs=1e-12)
    assert nearest_images(features, features).distances == pytest.approx(np.zeros(5), abs=1e-12)


def test_an_image_without_features_is_far_from_everything():
    assert nearest_images(np.zeros((1, 3)), np.ones((2, 3))).distances == [1]
    assert nearest_images(np.ones((1, 3)), np.zeros((2, 3))).distances == [1]


def test_mifid_is_the_fid_divided_by_the_mean_distance_of_the_generated_images():
    rng = np.random.default_rng(0)
    real = rng.gamma(0.5, size=(40, 16))
    # Half of the generated images are copies: the mean over generated images is half that of the others.
    fresh = rng.gamma(0.5, size=(10, 16))
    fake = np.vstack([real[:10], fresh])
    mean = nearest_images(fresh, real).distances.mean() / 2
    fid = frechet_distance(real, fake)
    assert mean < 0.4
    assert memorisation_informed_fid(real, fake, epsilon=0.5) == pytest.approx(fid / mean)
    assert memorisation_informed_fid(real, fake, epsilon=mean / 2) == pytest.approx(fid)


def test_a_generator_that_copies_one_image_is_punished_in_kaggles_direction():
    """All of its images have a neighbour at distance 0, but hardly any real image has."""
    rng = np.random.default_rng(1)
    real = rng.gamma(0.5, size=(50, 16))
    fake = np.repeat(real[:1], 20, axis=0)
    assert memorisation_informed_fid(real, fake) == np.inf
    nearly = fake + 1e-3 * rng.normal(size=fake.shape)
    assert 1e3 * frechet_distance(real, nearly) < memorisation_informed_fid(real, nearly) < np.inf
    over_real = nearest_images(real, fake).distances.mean()
    assert over_real > 0.1  # the other direction lets it pass


def test_giving_the_real_images_back_is_the_worst_that_one_can_do():
    real = np.random.default_rng(2).gamma(0.5, size=(30, 8))
    assert abs(frechet_distance(real, real)) < 1e-9 and memorisation_informed_fid(real, real) == np.inf


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        nearest_images(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 4\)"):
        nearest_images(np.ones((1, 4)), np.ones((1, 4)), own=np.arange(1))
