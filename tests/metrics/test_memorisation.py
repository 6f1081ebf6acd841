"""Distances to the nearest real image and MiFID, on sets that are laid out by hand."""

import numpy as np
import pytest

from hfgen.metrics import memorisation
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.memorisation import (
    MIFID_EPSILON,
    copying_test,
    memorisation_informed_fid,
    nearest_images,
    nearest_pixels,
    thumbnails,
)


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
    assert MIFID_EPSILON == 0.1  # that of Kaggle's competition


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
    with pytest.raises(ValueError, match="non-finite"):
        nearest_images(np.array([[1.0, np.nan]]), np.ones((2, 2)))


def test_the_rounding_errors_of_exact_copies_are_not_compared():
    train = np.random.default_rng(5).normal(size=(40, 16))
    held_out, fake = train[:15], 3 * train[15:30]
    assert (nearest_images(fake, train).distances == 0).all()
    assert copying_test(train, held_out, fake).share == 0.5


BLOCKS = pytest.mark.parametrize(("rows", "columns"), [(100, 100), (4, 100), (100, 5), (7, 6), (1, 1)])


@BLOCKS
def test_some_of_the_real_images_in_any_order_leave_out_just_themselves(rows, columns, monkeypatch):
    monkeypatch.setattr(memorisation, "BLOCK_ROWS", rows)
    monkeypatch.setattr(memorisation, "BLOCK_COLUMNS", columns)
    rng = np.random.default_rng(3)
    real = rng.normal(size=(23, 4))
    own = rng.permutation(23)[:11]
    distances = 1 - np.abs(np.corrcoef(np.hstack([real, -real])))  # centred rows: the correlation is the cosine
    distances[np.arange(23), np.arange(23)] = np.inf
    nearest = nearest_images(real[own], real, own=own)
    assert nearest.indices.tolist() == distances[own].argmin(axis=1).tolist()
    np.testing.assert_allclose(nearest.distances, distances[own].min(axis=1), atol=1e-12)


def test_thumbnails_are_means_of_equal_parts_red_first():
    image = np.random.default_rng(4).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    small = thumbnails(iter([image, image[::-1]]))
    assert small.shape == (2, 3, 16, 16) and small.dtype == np.float32
    parts = image.reshape(16, 4, 16, 2, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(small[0], parts.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(small[1], small[0, :, ::-1], atol=1e-6)
    assert thumbnails([np.full((37, 21, 3), 51, np.uint8)]) == pytest.approx(0.2)  # no border is filled with black
    assert np.array_equal(thumbnails([image[:8, :8]]), thumbnails([image[:8, :8].repeat(2, 0).repeat(2, 1)]))


def grey(*levels):
    return np.array(levels, dtype=np.float32)[:, None, None, None] * np.ones((3, 16, 16), np.float32)


def test_distances_by_pixels_are_in_grey_levels_and_parts_of_the_second():
    found = nearest_pixels(grey(0.125, 0.75, 0.5), grey(0, 0.5, 1))
    assert found.indices[[0, 2]].tolist() == [0, 1]
    assert found.distances == pytest.approx([0.125, 0.25, 0], abs=1e-9)
    assert found.ratios == pytest.approx([0.125 / 0.375, 1, 0], abs=1e-9)
    # Only one of three colours: a third of the squares.
    red = grey(0.5)
    red[:, 0] = 0.75
    assert nearest_pixels(red, grey(0.5, 0)).distances == pytest.approx([0.25 / np.sqrt(3)])


def test_a_mirrored_image_is_the_same_one_but_not_one_upside_down():
    real = np.random.default_rng(5).random((6, 3, 16, 16), dtype=np.float32)
    mirrored = nearest_pixels(real[:, :, :, ::-1].copy(), real)
    assert mirrored.indices.tolist() == list(range(6))
    assert mirrored.distances == pytest.approx(np.zeros(6), abs=1e-6)
    assert mirrored.ratios == pytest.approx(np.zeros(6), abs=1e-6)
    assert nearest_pixels(real[:, :, ::-1].copy(), real).ratios.min() > 0.9
    # The mirror image of the nearest is not the second nearest.
    symmetric = (real + real[:, :, :, ::-1]) / 2
    assert nearest_pixels(symmetric[:1], symmetric).ratios == pytest.approx([0], abs=1e-6)


@BLOCKS
@pytest.mark.parametrize("left_out", [False, True])
def test_the_nearest_by_pixels_are_those_of_all_distances(rows, columns, left_out, monkeypatch):
    monkeypatch.setattr(memorisation, "BLOCK_ROWS", rows)
    monkeypatch.setattr(memorisation, "BLOCK_COLUMNS", columns)
    rng = np.random.default_rng(6)
    real = (0.5 + 0.2 * rng.normal(size=(40, 3, 4, 4)).repeat(4, 2).repeat(4, 3)).astype(np.float32)
    own = rng.permutation(40)[:17]
    images = real[own] if left_out else (real[own] + 0.1 * rng.normal(size=(17, 3, 16, 16))).astype(np.float32)
    both = np.stack([real, real[:, :, :, ::-1]]).astype(np.float64)
    distances = np.sqrt(np.square(images[:, None, None] - both).mean(axis=(3, 4, 5))).min(axis=1)  # (17, 40)
    if left_out:
        distances[np.arange(17), own] = np.inf
    found = nearest_pixels(images, real, own=own if left_out else None)
    first, second, third = np.sort(distances, axis=1)[:, :3].T
    assert found.indices.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.distances, first, rtol=1e-6)
    np.testing.assert_allclose(found.ratios, np.minimum(first / second, second / third), rtol=1e-6)


def test_real_images_that_are_the_same_count_as_one():
    found = nearest_pixels(grey(0.5, 0.25, 0.45), grey(0.5, 0.25, 0.5))
    assert found.indices.tolist() == [0, 1, 0]
    assert found.ratios == pytest.approx([0, 0, 0.25], abs=1e-6) and found.distances[:2].tolist() == [0, 0]
    # Nor is an image its own twin's copy.
    among = nearest_pixels(grey(0.5, 0.25), grey(1, 0.25, 0.5, 0.5), own=np.array([3, 1]))
    assert among.indices.tolist() == [1, 2] and among.distances == pytest.approx([0.25, 0.25])


def test_two_real_images_to_compare_with_are_the_least():
    nearest_pixels(grey(0.5), grey(0, 1))
    nearest_pixels(grey(0), grey(0, 1, 0.5), own=np.array([0]))
    with pytest.raises(ValueError, match="only 1 different real images: each image needs at least two"):
        nearest_pixels(grey(0.5), grey(0))
    with pytest.raises(ValueError, match="only 2 different real images: each image needs at least two"):
        nearest_pixels(grey(0), grey(0, 1), own=np.array([0]))


def at_angles(*degrees):
    return np.column_stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def test_the_copying_test_by_hand():
    """Angles to the one training image: 20 and 40 of the held-out, 10 and 30 of the generated images.

    The generated one is nearer in (20, 10), (40, 10) and (40, 30). Two of the six ways to deal out four ranks have
    three such pairs or more.
    """
    train, held_out, fake = at_angles(0, 90), at_angles(20, 40), at_angles(10, 30)
    assert copying_test(train, held_out, fake) == pytest.approx((3 / 4, 2 / 6))
    assert copying_test(train, fake, held_out) == pytest.approx((1 / 4, 5 / 6))
    assert copying_test(train, held_out, held_out).share == 0.5


def test_no_copying_is_found_among_new_draws_and_almost_all_pairs_with_copies():
    rng = np.random.default_rng(7)
    tests = [copying_test(*(rng.normal(size=(count, 6)) for count in (100, 40, 60))) for _ in range(100)]
    shares, chances = np.array(tests).T
    assert abs(shares.mean() - 0.5) < 3 * shares.std() / 10
    assert 0.3 < shares.mean() < 0.7 and 0 <= (chances < 0.05).mean() <= 0.12  # 5% of 100, and three errors of 2.2%
    train, held_out = rng.normal(size=(100, 6)), rng.normal(size=(40, 6))
    copies = copying_test(train, held_out, train[:30] * 2 + 1e-3)
    assert copies.share > 0.99 and copies.p_value < 1e-9
    axis = np.hstack([rng.normal(size=(300, 6)), np.zeros((300, 1))])
    elsewhere = copying_test(axis[:200], axis[200:], np.eye(7)[[6] * 30] + 0.1 * rng.normal(size=(30, 7)))
    assert elsewhere.share < 0.01 and elsewhere.p_value > 0.99
