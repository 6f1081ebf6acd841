import itertools
import math

import pytest
import torch

from hfgen.methods.augmentation import (
    diff_augment,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy_images(count: int, height: int = 16, width: int = 24, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=rng(seed)).tanh()


# --------------------------------------------------------------------------------- the operations, written out plainly


def with_other_colours(image: torch.Tensor, brightness: float, saturation: float, contrast: float) -> torch.Tensor:
    """Add the brightness, then multiply the distance from grey, then that from the mean of the image."""
    image = image + brightness
    grey = sum(image) / len(image)
    image = torch.stack([grey + saturation * (channel - grey) for channel in image])
    return image.mean() + contrast * (image - image.mean())


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    for row, column in itertools.product(range(height), range(width)):
        if 0 <= row - down < height and 0 <= column - right < width:
            result[:, row, column] = image[:, row - down, column - right]
    return result


def cut_out(image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Half the side: of 16 rows those from 4 above the centre to 3 below it, as far as they are in the image."""
    height, width = image.shape[1:]
    result = image.clone()
    for y, x in itertools.product(range(height), range(width)):
        if -height // 4 <= y - row < height // 4 and -width // 4 <= x - column < width // 4:
            result[:, y, x] = 0
    return result


def augmented_plainly(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Image by image. Of uniform numbers: what is done, then the colours, then shifts and centres of the cut."""
    count, _, height, width = images.shape
    done = torch.rand(3, count, generator=generator) < probability
    colours = torch.rand(3, count, generator=generator).tolist()
    places = torch.rand(4, count, generator=generator).tolist()
    results = []
    for index, image in enumerate(images):
        if done[0, index]:
            brightness, saturation, contrast = (numbers[index] for numbers in colours)
            image = with_other_colours(image, brightness - 0.5, 2 * saturation, contrast + 0.5)
        if done[1, index]:
            furthest_down, furthest_right = height // 8, width // 8
            down = math.floor(places[0][index] * (2 * furthest_down + 1)) - furthest_down
            right = math.floor(places[1][index] * (2 * furthest_right + 1)) - furthest_right
            image = shifted(image, down, right)
        if done[2, index]:
            image = cut_out(image, math.floor(places[2][index] * height), math.floor(places[3][index] * width))
        results.append(image)
    return torch.stack(results)


@pytest.mark.parametrize("probability", [0.5, 1.0])
@pytest.mark.parametrize(("height", "width", "channels"), [(16, 24, 3), (8, 8, 3), (40, 16, 4)])
def test_images_are_altered_one_by_one_as_written_out_plainly(height, width, channels, probability):
    images = noisy_images(24, height, width, channels)
    expected = augmented_plainly(images, probability, rng(7))
    torch.testing.assert_close(diff_augment(images, probability, rng(7)), expected, rtol=1e-5, atol=1e-5)


def test_every_kind_of_alteration_occurs_alone_and_with_each_other():
    images = torch.full((400, 3, 16, 16), 0.75)
    altered = diff_augment(images, 0.5, rng(1))
    kinds = set()
    for image in altered:
        inner = image[:, 2:-2, 2:-2]  # no shift gets as far as here
        colour = inner[inner != 0].unique() if (inner != 0).any() else torch.tensor([0.75])
        cut = (inner == 0).any().item()
        shift = any((edge == 0).all() for edge in (image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]))
        assert len(colour.round(decimals=4).unique()) == 1
        kinds.add((not torch.isclose(colour[0], torch.tensor(0.75)).item(), shift, cut))
    assert kinds == set(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_with_probability_0_images_stay_as_they_are_and_with_1_none_does(as_tensor):
    images = noisy_images(200)
    never, always = (torch.tensor(value) if as_tensor else value for value in (0.0, 1.0))
    assert torch.equal(diff_augment(images, never, rng()), images)
    assert ((diff_augment(images, always, rng()) - images).abs().flatten(1).amax(dim=1) > 0.01).all()


def test_the_given_images_are_not_changed_themselves():
    images = noisy_images(5)
    before = images.clone()
    diff_augment(images, 1.0, rng())
    assert torch.equal(images, before)


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_each_operation_is_applied_independently_with_the_given_probability(probability):
    count = 3000
    altered = diff_augment(torch.full((count, 1, 16, 16), 0.75), probability, rng(3))
    inner = altered[:, 0, 2:-2, 2:-2].flatten(1)
    cut = (inner == 0).any(dim=1)
    recoloured = (inner.amax(dim=1) - 0.75).abs() > 1e-4
    shares = [cut.float().mean().item(), recoloured.float().mean().item(), (cut & recoloured).float().mean().item()]
    error = 4 * math.sqrt(0.25 / count)
    assert shares == pytest.approx([probability, probability, probability**2], abs=error)


def test_all_images_of_a_batch_get_their_own_numbers():
    altered = diff_augment(noisy_images(1).expand(30, -1, -1, -1), 1.0, rng(2))
    for one, other in itertools.combinations(altered, 2):
        assert (one - other).abs().max() > 1e-3


def test_the_random_numbers_come_from_the_given_generator_alone():
    images = noisy_images(6)
    torch.manual_seed(1)
    altered = diff_augment(images, 0.7, rng(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(diff_augment(images, 0.7, rng(5)), altered)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(diff_augment(images, 0.7, rng(6)), altered)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_channels_last_as_the_networks_want_it(memory_format):
    images = noisy_images(4).contiguous(memory_format=memory_format)
    altered = diff_augment(images, 1.0, rng())
    assert altered.shape == images.shape
    assert altered.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(altered, diff_augment(noisy_images(4), 1.0, rng()))


# ---------------------------------------------------------------------------------------------------- distributions


def test_brightness_saturation_and_contrast_are_uniform_over_their_ranges():
    count = 4000
    # A chessboard of light and dark grey, redder at each pixel by 0.2 and bluer by -0.2 than grey.
    board = torch.tensor([[0.4, -0.4], [-0.4, 0.4]]).repeat(8, 8)
    image = torch.stack([board + 0.2, board, board - 0.2]) + 0.1
    altered = diff_augment(image.expand(count, -1, -1, -1), 1.0, rng(4))
    kept = (altered != 0).all(dim=1, keepdim=True)
    highest = altered.masked_fill(~kept, -torch.inf).amax(dim=(2, 3))
    lowest = altered.masked_fill(~kept, torch.inf).amin(dim=(2, 3))
    contrast = (highest - lowest)[:, 1] / 0.8
    drawn = {
        "brightness": (highest + lowest)[:, 1] / 2 - 0.1,
        "saturation": (highest[:, 0] - highest[:, 2]) / 0.4 / contrast,
        "contrast": contrast,
    }
    for name, (low, high) in {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}.items():
        numbers, width = drawn[name], high - low
        assert low - 1e-4 <= numbers.min() < low + 0.01 * width, name
        assert high - 0.01 * width < numbers.max() <= high + 1e-4, name
        assert numbers.mean().item() == pytest.approx((low + high) / 2, abs=4 * width / math.sqrt(12 * count)), name
        assert numbers.std().item() == pytest.approx(width / math.sqrt(12), rel=0.04), name
    together = torch.corrcoef(torch.stack(list(drawn.values())))
    assert (together - torch.eye(3)).abs().max() < 4 / math.sqrt(count)


def bright_dot(count: int, row: int, column: int, side: int = 32) -> torch.Tensor:
    images = torch.zeros(count, 1, side, side)
    images[:, :, row, column] = 1000  # far from what any colour operation makes of the rest
    return images


def test_shifts_up_to_an_eighth_of_the_side_are_uniform_in_both_directions():
    count = 9 * 9 * 60
    altered = diff_augment(bright_dot(count, 15, 17), 1.0, rng(5))[:, 0]
    images, rows, columns = (altered > 400).nonzero(as_tuple=True)
    assert len(images.unique()) == len(images) > 0.6 * count  # the dots of the others were cut out
    for offsets in rows - 15, columns - 17:
        values, counts = offsets.unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 9] * 9, abs=4 * math.sqrt(1 / 9 / len(images)))
    assert len(torch.unique(torch.stack([rows, columns]), dim=1).T) == 81


def test_what_is_shifted_out_is_lost_and_does_not_come_in_on_the_other_side():
    altered = diff_augment(bright_dot(300, 0, 31), 1.0, rng(6))[:, 0]
    images, rows, columns = (altered > 400).nonzero(as_tuple=True)
    assert 20 < len(images) < 300 * 0.45  # of the 9 x 9 shifts 5 x 5 keep it in the image
    assert rows.max() == 4 and columns.min() == 27


def test_the_cutout_has_half_the_side_and_a_uniform_centre():
    count, side = 6000, 32
    inner = diff_augment(torch.full((count, 1, side, side), 5.0), 1.0, rng(7))[:, 0]
    cut = inner == 0
    cut_rows, cut_columns = cut[:, :, 4:-4].all(dim=2), cut[:, 4:-4].all(dim=1)
    assert not (cut_rows & ~cut.any(dim=2)).any() and not (cut_columns & ~cut.any(dim=1)).any()
    # A pixel in the middle is cut out if the centre is one of 16 x 16 of the 32 x 32 places.
    share = cut[:, 10:-10, 10:-10].float().mean(dim=0)
    assert share.min() > 0.25 - 5 * math.sqrt(0.25 * 0.75 / count)
    assert share.max() < 0.25 + 5 * math.sqrt(0.25 * 0.75 / count)
    # Nearer to the edges fewer centres reach it: at row 4, centres from 0 to 12 (and column 16: half of them).
    assert cut[:, 4, 16].float().mean().item() == pytest.approx(13 / 32 / 2, abs=0.03)
    assert cut[:, 27, 16].float().mean().item() == pytest.approx(12 / 32 / 2, abs=0.03)


# -------------------------------------------------------------------------------------------------------- gradients


def test_a_pixel_gets_a_gradient_if_it_is_still_to_be_seen_and_only_then():
    images = (torch.arange(1, 60 * 16 * 24 + 1).view(60, 1, 16, 24) / 1024).requires_grad_()  # no two pixels alike
    altered = diff_augment(images, 0.5, rng(8))
    altered.sum().backward()
    checked = hidden = 0
    for image, result, gradient in zip(images, altered, images.grad, strict=True):
        if torch.isin(result[result != 0], image).all():  # else its colours were altered
            seen = torch.isin(image, result)
            assert torch.equal(gradient, seen.float())
            checked += 1
            hidden += int(not seen.all())
    assert checked > 20 and hidden > 12


def test_the_gradient_is_that_of_the_alteration_colours_and_all():
    images, change = noisy_images(10).requires_grad_(), noisy_images(10, seed=2)
    weights = noisy_images(10, seed=3)
    altered = diff_augment(images, 1.0, rng(9))
    (weights * altered).sum().backward()
    with torch.no_grad():  # with the same random numbers, the alteration is linear but for a constant
        moved = (weights * (diff_augment(images + change, 1.0, rng(9)) - altered)).sum()
    assert (images.grad * change).sum().item() == pytest.approx(moved.item(), rel=1e-4)
    assert images.grad.flatten(1).any(dim=1).all()
