import dataclasses

import numpy as np
import pytest

from hfgen.data import toy_paintings
from hfgen.data.toy_paintings import TOY_PAINTINGS_COUNT, paint


@pytest.fixture(scope="module")
def gallery() -> np.ndarray:
    """300 paintings at 32 px, (300, 32, 32, 3), uint8."""
    return np.stack([paint(index, 32) for index in range(300)])


def halved(painting: np.ndarray) -> np.ndarray:
    side = len(painting) // 2
    return painting.reshape(side, 2, side, 2, 3).mean(axis=(1, 3))


def blurred(painting: np.ndarray) -> np.ndarray:
    """8 x 8 block means: the composition without its strokes."""
    block = len(painting) // 8
    return painting.reshape(8, block, 8, block, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("sample_size", [8, 32, 50, 64, 100, 128])
def test_a_painting_is_square_rgb_bytes_of_the_size_asked_for(sample_size):
    painting = paint(5, sample_size)
    assert painting.dtype == np.uint8
    assert painting.shape == (sample_size, sample_size, 3)
    assert painting.flags.c_contiguous


def test_the_default_painting_is_64_pixels_wide_from_seed_0():
    assert np.array_equal(paint(3), paint(3, sample_size=64, seed=0))


def test_the_same_arguments_give_the_same_pixels_whatever_was_painted_before():
    first = paint(11, 64, seed=4)
    np.random.seed(1)
    paint(12, 32)
    assert np.array_equal(first, paint(11, 64, seed=4))


def test_different_indices_give_clearly_different_paintings():
    assert np.abs(paint(0).astype(float) - paint(1)).mean() > 10


def test_different_seeds_give_clearly_different_paintings():
    assert np.abs(paint(0).astype(float) - paint(0, seed=1)).mean() > 10


def test_index_and_seed_do_not_stand_in_for_each_other():
    assert np.abs(paint(1, seed=2).astype(float) - paint(2, seed=1)).mean() > 10


@pytest.mark.slow
def test_three_hundred_paintings_are_pairwise_distinct_even_as_blurred_compositions(gallery):
    compositions = np.stack([blurred(painting) for painting in gallery]).reshape(len(gallery), -1)
    squared = (compositions**2).sum(axis=1)
    distances = squared[:, None] + squared[None] - 2 * compositions @ compositions.T
    np.fill_diagonal(distances, np.inf)
    assert np.sqrt(distances.min() / compositions.shape[1]) > 4  # grey levels, root mean square of the closest pair


@pytest.mark.parametrize("sample_size", [32, 64, 128])
def test_the_same_scene_appears_at_every_resolution(sample_size):
    indices = range(12)
    small = [paint(index, sample_size).astype(float) for index in indices]
    large = [halved(paint(index, 2 * sample_size)) for index in indices]
    gaps = np.array([[np.abs(one - other).mean() for other in large] for one in small])
    same, different = np.diag(gaps), gaps[~np.eye(len(gaps), dtype=bool)]
    assert same.max() < 13  # grey levels; strokes' edges differ, the scene does not
    assert same.max() < 0.5 * different.min()


def test_strokes_are_visible_as_texture_within_the_sky(monkeypatch):
    painting = paint(7, 128).astype(float)
    assert np.abs(np.diff(painting[:40], axis=0)).mean() > 10
    scene = dataclasses.replace(toy_paintings._compose(np.random.default_rng(0)), night=False)  # no stars
    monkeypatch.setattr(toy_paintings, "_look", lambda scene, x, y: (np.full((len(x), 3), 0.5), np.zeros(len(x), int)))
    strokes = toy_paintings._strokes(scene, np.random.default_rng(0))
    assert strokes[:, 6:].std(axis=0).min() > 0.03  # each stroke strays from the colour it was read from


def test_water_mirrors_what_stands_above_the_horizon_and_a_field_does_not():
    x, depth = np.random.default_rng(0).uniform(0, [[1], [0.25]], (2, 500))
    likeness = {True: [], False: []}
    for index in range(20):
        scene = toy_paintings._compose(np.random.default_rng(index))
        for water in likeness:
            either = dataclasses.replace(scene, water=water, things=scene.things[:0])
            above, below = (toy_paintings._look(either, x, scene.horizon + sign * depth)[0] for sign in (-1, 1))
            likeness[water].append(np.corrcoef(above.ravel(), below.ravel())[0, 1])
    assert np.median(likeness[True]) > 0.95
    assert np.median(likeness[False]) < 0.7


def test_the_sky_is_lighter_than_the_ground_and_neither_is_black_or_burnt_out(gallery):
    sky, ground = gallery[:, :10].mean(axis=(1, 2, 3)), gallery[:, 24:].mean(axis=(1, 2, 3))
    assert sky.mean() > ground.mean() + 15
    assert 110 < sky.mean() < 200
    assert sky.min() > 15
    assert sky.max() < 250


def test_skies_and_grounds_vary_between_paintings(gallery):
    assert gallery[:, :10].mean(axis=(1, 2)).std(axis=0).min() > 25
    assert gallery[:, 24:].mean(axis=(1, 2)).std(axis=0).min() > 25


def test_no_painting_is_grey_or_flat(gallery):
    pixels = gallery.astype(float)
    assert pixels.std(axis=(1, 2, 3)).min() > 12
    saturation = pixels.max(axis=3) - pixels.min(axis=3)
    assert saturation.mean(axis=(1, 2)).min() > 12
    assert saturation.mean() > 45


def test_a_painting_is_covered_by_paint_to_its_edges_without_a_frame():
    edges, insides = [], []
    for index in range(12):
        painting = paint(index, 128).astype(float)
        edges.append(np.abs(painting[:, 0] - painting[:, 1]).mean())
        insides.append(np.abs(painting[:, 1:-2] - painting[:, 2:-1]).mean())
    assert np.mean(edges) < 1.5 * np.mean(insides)


def test_later_strokes_cover_earlier_ones():
    canvas = np.zeros((16, 16, 3), dtype=np.float32)
    stroke = [0.5, 0.5, 0.0, 0.5, 0.5, 0.0]
    toy_paintings._lay(canvas, np.array([[*stroke, 1, 0, 0], [*stroke, 0, 1, 0]], dtype=np.float32))
    assert canvas[8, 8, 1] > 0.9
    assert canvas[..., 0].max() == 0


def test_the_data_set_has_four_thousand_paintings_and_the_last_one_can_be_painted():
    assert TOY_PAINTINGS_COUNT == 4000
    assert paint(TOY_PAINTINGS_COUNT - 1, 32).std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "index must be at least 0, got -1"),
        ({"index": 0, "sample_size": 7}, "sample_size must be at least 8, got 7"),
        ({"index": 0, "sample_size": -64}, "sample_size must be at least 8, got -64"),
        ({"index": 0, "seed": -3}, "seed must be at least 0, got -3"),
    ],
)
def test_an_argument_that_is_too_small_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        paint(**arguments)
