import math

import pytest
import torch

from hfgen.data.augment import horizontal_flip, prepare_batch, random_erasing, random_rotation
from hfgen.data.settings import DataSettings


ALL_ON = {"horizontal_flip": True, "random_rotation": 20.0, "random_erasing": 0.7}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch_size: int, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    """Images of noise in [-1, 1], no two alike."""
    return torch.rand(batch_size, channels, height, width, generator=seeded(1)) * 2 - 1


def pixels(batch_size: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=seeded(2))


def prepare(images: torch.Tensor, seed: int = 0, **settings) -> torch.Tensor:
    return prepare_batch(images, DataSettings(**settings), seeded(seed))


# Normalisation


def test_bytes_are_spread_evenly_over_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 4, 4, 3)
    images = prepare(levels)
    assert images.dtype == torch.float32 and images.shape == (256, 3, 4, 4)
    assert (images[0] == -1).all() and (images[255] == 1).all()
    wanted = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    assert (images[:, 0, 0, 0].double() - wanted).abs().max() < 1e-7


def test_channels_rows_and_columns_stay_apart():
    batch = pixels(3, 8, 12)
    images = prepare(batch)
    assert images.shape == (3, 3, 8, 12)
    for image, row, column, channel in [(0, 1, 2, 0), (1, 7, 11, 1), (2, 0, 5, 2)]:
        assert images[image, channel, row, column] == batch[image, row, column, channel] / 127.5 - 1


@pytest.mark.parametrize("settings", [{}, ALL_ON, *({key: value} for key, value in ALL_ON.items())])
def test_a_batch_is_channels_last_and_of_float32_whatever_is_switched_on(settings):
    images = prepare(pixels(4), **settings)
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.abs().max() <= 1 + 1e-6


def test_the_pixels_given_are_left_as_they_are():
    batch = pixels(4)
    before = batch.clone()
    prepare(batch, **ALL_ON)
    assert torch.equal(batch, before)


def test_without_augmentations_nothing_is_drawn_and_nothing_is_altered():
    batch, generator = pixels(4), seeded(3)
    images = prepare_batch(batch, DataSettings(), generator)
    assert torch.equal(generator.get_state(), seeded(3).get_state())
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), batch.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ALL_ON)
def test_each_setting_switches_its_augmentation_on(name):
    assert not torch.equal(prepare(pixels(16), **{name: ALL_ON[name]}), prepare(pixels(16)))


def test_the_same_seed_augments_alike_and_another_one_does_not():
    batch = pixels(16)
    assert torch.equal(prepare(batch, seed=5, **ALL_ON), prepare(batch, seed=5, **ALL_ON))
    assert not torch.equal(prepare(batch, seed=5, **ALL_ON), prepare(batch, seed=6, **ALL_ON))


# Flip


def test_about_half_of_the_images_are_mirrored_exactly_and_the_others_are_left_alone():
    images = noise(2000, 4, 5)
    flipped = horizontal_flip(images, seeded(0))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    alone = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ alone).all()
    assert 900 < mirrored.sum() < 1100  # 4.5 standard deviations


def test_whether_an_image_is_mirrored_does_not_depend_on_its_neighbour():
    images = noise(4000, 2, 3)
    mirrored = (horizontal_flip(images, seeded(0)) == images.flip(3)).flatten(1).all(1)
    assert 1800 < (mirrored[1:] == mirrored[:-1]).sum() < 2200


# Rotation


def ramps(batch_size: int, side: int = 33) -> torch.Tensor:
    """Two channels: the column and the row, measured from the centre, in [-1, 1]."""
    line = torch.linspace(-1, 1, side)
    x, y = line[None, :].expand(side, side), line[:, None].expand(side, side)
    return torch.stack([x, y]).expand(batch_size, 2, side, side)


def maps_of(rotated: torch.Tensor) -> torch.Tensor:
    """The linear maps, `(batch_size, 2, 2)`, by which the ramps were turned, read off around the centre."""
    middle = rotated.shape[-1] // 2
    step = 2 / (rotated.shape[-1] - 1)
    along_x = (rotated[:, :, middle, middle + 4] - rotated[:, :, middle, middle - 4]) / (8 * step)
    along_y = (rotated[:, :, middle + 4, middle] - rotated[:, :, middle - 4, middle]) / (8 * step)
    return torch.stack([along_x, along_y], dim=2)


def test_a_rotation_by_nothing_alters_nothing():
    images = noise(8)
    assert (random_rotation(images, 0.0, seeded(0)) - images).abs().max() < 1e-5


@pytest.mark.parametrize("side", [16, 17])
def test_a_rotation_by_ninety_degrees_is_that_of_torch_and_both_directions_are_drawn(side):
    images = noise(1, side, side)
    directions = set()
    for seed in range(12):
        # The angle is uniform: the one number drawn, stretched, is the angle. Stretch it to ninety degrees.
        drawn = torch.rand(1, generator=seeded(seed)).item() * 2 - 1
        rotated = random_rotation(images, 90 / abs(drawn), seeded(seed))
        errors = {turns: (rotated - images.rot90(turns, (2, 3))).abs().max() for turns in (1, -1)}
        direction = min(errors, key=errors.get)
        assert errors[direction] < 1e-4
        directions.add(direction)
    assert directions == {1, -1}


def test_images_are_rotated_neither_stretched_nor_sheared_nor_moved():
    rotated = random_rotation(ramps(500), 180.0, seeded(0))
    maps = maps_of(rotated)
    assert (maps @ maps.transpose(1, 2) - torch.eye(2)).abs().max() < 1e-4
    assert (torch.linalg.det(maps) - 1).abs().max() < 1e-4
    assert rotated[:, :, 16, 16].abs().max() < 1e-5  # the centre stays


@pytest.mark.parametrize("max_degrees", [3.0, 25.0, 180.0])
def test_angles_are_uniform_between_the_largest_in_both_directions(max_degrees):
    maps = maps_of(random_rotation(ramps(2000), max_degrees, seeded(0)))
    angles = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0])) / max_degrees
    assert angles.abs().max() <= 1 + 1e-3
    parts = torch.histc(angles, bins=8, min=-1, max=1)
    assert parts.sum() >= 1999 and (parts - 250).abs().max() < 70  # 4.7 standard deviations


@pytest.mark.parametrize("value", [-1.0, 1.0, 0.3])
def test_a_rotated_flat_image_has_no_corners_of_another_color(value):
    rotated = random_rotation(torch.full((64, 3, 16, 16), value), 180.0, seeded(0))
    assert (rotated - value).abs().max() < 1e-5


def test_what_turns_in_from_outside_is_the_image_mirrored_at_its_border():
    images = noise(50)
    wide = torch.cat([images.flip(3), images, images.flip(3)], dim=3)
    surrounded = torch.cat([wide.flip(2), wide, wide.flip(2)], dim=2)
    middle = random_rotation(surrounded, 180.0, seeded(0))[:, :, 16:32, 16:32]
    assert (random_rotation(images, 180.0, seeded(0)) - middle).abs().max() < 1e-4


def test_rotated_values_stay_within_the_range_of_the_image():
    rotated = random_rotation(noise(200), 180.0, seeded(0))
    assert rotated.abs().max() <= 1 + 1e-6


# Erasing


def erased_parts(images: torch.Tensor, probability: float, seed: int = 0) -> torch.Tensor:
    """Which pixels were erased, bool `(batch_size, height, width)`; the others must be as they were."""
    erased = random_erasing(images, probability, seeded(seed))
    altered = erased != images
    assert (erased[altered] == 0.0).all()
    assert (altered == altered[:, :1]).all()  # all channels alike
    return altered[:, 0]


def boxes(masks: torch.Tensor) -> torch.Tensor:
    """Top, bottom, left and right of the box around each mask, `(batch_size, 4)`."""
    ends = []
    for lines in (masks.any(2).byte(), masks.any(1).byte()):
        ends += [lines.argmax(1), lines.shape[1] - lines.flip(1).argmax(1)]
    return torch.stack(ends, dim=1)


def test_erasing_with_probability_0_changes_nothing_and_with_1_every_image():
    images = noise(2000, 8, 8)
    assert not erased_parts(images, 0.0).any()
    assert erased_parts(images, 1.0).flatten(1).any(1).all()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_as_many_images_are_erased_as_the_probability_says(probability):
    share = erased_parts(noise(4000, 8, 8), probability).flatten(1).any(1).double().mean()
    assert abs(share - probability) < 4.5 * math.sqrt(probability * (1 - probability) / 4000)


def test_what_is_erased_is_one_whole_rectangle():
    masks = erased_parts(noise(300, 32, 32), 1.0)
    for mask, (top, bottom, left, right) in zip(masks, boxes(masks), strict=True):
        assert mask[top:bottom, left:right].all()
        assert mask.sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
def test_area_and_aspect_ratio_of_the_rectangle_are_those_of_the_paper(height, width):
    # Zhong et al. 2017, table and section 4.1: 0.02 to 0.33 of the area, ratio 0.3 to 1/0.3.
    ends = boxes(erased_parts(torch.ones(1000, 1, height, width), 1.0)).double()
    heights, widths = ends[:, 1] - ends[:, 0], ends[:, 3] - ends[:, 2]
    areas, ratios = heights * widths / (height * width), heights / widths
    whole = (heights < height) & (widths < width)  # not cut off at the border
    assert 0.018 < areas.min() < 0.026
    assert 0.31 < areas.max() < 0.336
    assert areas.mean() == pytest.approx((0.02 + 0.33) / 2, abs=0.01)  # uniform
    assert 0.28 < ratios[whole].min() < 0.35 and 2.9 < ratios[whole].max() < 3.5
    assert ratios.log().mean() == pytest.approx(0, abs=0.1)  # as often wide as tall


def test_rectangles_lie_everywhere_in_the_image():
    masks = erased_parts(torch.ones(4000, 1, 16, 16), 1.0)
    often = masks.double().mean(0)
    assert often.min() > 0.005  # each pixel, the corners too
    for turned in (often.flip(0), often.flip(1), often.T):
        assert (turned - often).abs().max() < 0.03


def test_each_image_gets_its_own_rectangle():
    ends = boxes(erased_parts(noise(200, 32, 32), 1.0))
    assert len(ends.unique(dim=0)) > 150


def test_size_and_place_of_a_rectangle_do_not_hang_together():
    ends = boxes(erased_parts(torch.ones(2000, 1, 64, 64), 1.0)).double()
    free_rows, free_columns = 64 - (ends[:, 1] - ends[:, 0]), 64 - (ends[:, 3] - ends[:, 2])
    usable = (free_rows > 8) & (free_columns > 8)
    place = torch.stack([ends[:, 0] / free_rows, ends[:, 2] / free_columns, free_rows, free_columns])[:, usable]
    correlations = torch.corrcoef(place)
    assert correlations[0, 1:].abs().max() < 0.1 and correlations[1, 2:].abs().max() < 0.1
