import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled_sheets import tiles
from oracle_unet import OracleUNet
from PIL import Image, ImageFont

from hfgen.errors import NotFiniteError
from hfgen.inference import figures
from hfgen.inference.figures import (
    GAP,
    LABEL_LINE,
    LABEL_SIZE,
    LABEL_WIDTH,
    denoising_states,
    denoising_steps,
    enlarged,
    image_sheet,
    labelled_rows,
    labelled_sheet,
    noised_states,
    reconstruction_sheet,
)
from hfgen.inference.sampling import image_generators
from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.models import UNetBase
from hfgen.pipelines import DDPMPipeline


def flat_images(count: int, width: int, height: int) -> list[Image.Image]:
    """Images of one colour each, no two alike, none white."""
    return [Image.new("RGB", (width, height), (20 * index, 200 - 20 * index, 7)) for index in range(count)]


def cell(strip: Image.Image, row: int, column: int, size: int) -> np.ndarray:
    """One cell of a strip of square images, as float `(3, size, size)` in [-1, 1]."""
    left, top = column * (size + GAP), row * (size + GAP)
    pixels = np.asarray(strip.crop((left, top, left + size, top + size)), dtype=float)
    return pixels.transpose(2, 0, 1) / 127.5 - 1


def assert_shows(pixels: np.ndarray, expected: np.ndarray | torch.Tensor) -> None:
    """Compare with what was drawn, within half a grey level for rounding and a little for float32."""
    np.testing.assert_allclose(pixels, np.clip(np.asarray(expected, dtype=float), -1, 1), atol=0.55 / 127.5)


# ------------------------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize(
    ("count", "columns", "gap", "rows_and_columns"),
    [
        (1, None, 2, (1, 1)),
        (2, None, 2, (1, 2)),
        (4, None, 2, (2, 2)),
        (5, None, 2, (2, 3)),
        (7, None, 0, (3, 3)),
        (5, 2, 3, (3, 2)),
        (3, 7, 1, (1, 7)),
        (6, 1, 4, (6, 1)),
    ],
)
def test_a_sheet_shows_the_images_row_by_row_on_white_with_gaps_between_them(count, columns, gap, rows_and_columns):
    width, height = 5, 3
    rows, filled_columns = rows_and_columns
    images = flat_images(count, width, height)
    expected = np.full((rows * height + (rows - 1) * gap, filled_columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, filled_columns)
        top, left = row * (height + gap), column * (width + gap)
        expected[top : top + height, left : left + width] = np.asarray(image)
    sheet = image_sheet(images, columns, gap)
    assert sheet.mode == "RGB"
    assert np.array_equal(np.asarray(sheet), expected)


def test_the_gap_of_a_sheet_is_two_pixels_unless_told_otherwise():
    assert image_sheet(flat_images(4, 5, 3)).size == (12, 8)


def test_grey_images_make_a_sheet_too():
    sheet = image_sheet([Image.new("L", (2, 2), 77)])
    assert np.array_equal(np.asarray(sheet), np.full((2, 2, 3), 77))


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [
        (1, 8, ["0", "a"]),
        (3, 8, ["012", "abc"]),
        (4, 2, ["01", "ab", "23", "cd"]),
        (5, 3, ["012", "abc", "34.", "de."]),
        (3, 1, ["0", "a", "1", "b", "2", "c"]),
    ],
)
def test_a_sheet_shows_each_reconstruction_below_its_original_and_pads_with_white(count, columns, rows):
    images = flat_images(2 * count, 5, 3)
    shown = dict(zip("01234"[:count] + "abcde"[:count], images, strict=True))
    shown["."] = Image.new("RGB", (5, 3), "white")
    expected = image_sheet([shown[name] for row in rows for name in row], len(rows[0]))
    sheet = reconstruction_sheet(images[:count], images[count:], columns)
    assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_a_sheet_of_reconstructions_has_eight_columns_unless_told_otherwise():
    images = flat_images(9, 5, 3)
    assert np.array_equal(
        np.asarray(reconstruction_sheet(images, images)), np.asarray(reconstruction_sheet(images, images, 8))
    )
    assert reconstruction_sheet(images, images).size == (8 * 7 - 2, 4 * 5 - 2)


# --------------------------------------------------------------------------------------------------- denoising strips


def clean_image() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


@pytest.fixture
def oracle_pipeline() -> DDPMPipeline:
    """A pipeline that always draws `clean_image()`, by DDIM, on the straight way."""
    schedule = noise_schedule("linear", 1000)
    pipeline = DDPMPipeline(OracleUNet.that_knows(clean_image(), schedule), sampling_scheduler(schedule, "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("asked", [[999, 499, 299, 49], [980, 500, 290, 0], [995, 510, 310, 20]])
def test_a_column_shows_what_the_step_nearest_to_its_timestep_has_left(oracle_pipeline, asked):
    states, reached, last = denoising_states(oracle_pipeline, asked, num_images=2, seed=4, num_inference_steps=20)
    assert reached == [999, 499, 299, 49]
    strip = image_sheet(states, 4)
    assert strip.size == (4 * 8 + 3 * GAP, 2 * 8 + GAP)
    alphas = noise_schedule("linear", 1000).alphas_cumprod
    start = torch.cat([torch.randn(1, 3, 8, 8, generator=own) for own in image_generators(4, 0, 2)])
    # DDIM keeps the noise that it finds at the start, and every step goes 50 timesteps down.
    noise = (start - alphas[999].sqrt() * clean_image()) / (1 - alphas[999]).sqrt()
    for column, step in enumerate([999, 499, 299, 49]):
        alpha = alphas[step - 50] if step > 50 else torch.tensor(1.0)
        expected = alpha.sqrt() * clean_image() + (1 - alpha).sqrt() * noise
        for row in range(2):
            assert_shows(cell(strip, row, column, 8), expected[row])
    assert_shows(np.asarray(last, dtype=float).transpose(2, 0, 1) / 127.5 - 1, clean_image())


@pytest.mark.parametrize(("steps", "shown"), [(1, [1]), (4, [1, 2, 3, 4]), (10, [*range(1, 11)]), (50, None)])
def test_without_timesteps_each_step_of_a_few_is_shown_under_its_number(oracle_pipeline, steps, shown):
    shown = shown or [1, 6, 12, 17, 23, 28, 34, 39, 45, 50]
    states, heads, last = denoising_steps(oracle_pipeline, num_images=2, seed=4, num_inference_steps=steps)
    assert heads == [f"step {step} of {steps}" for step in shown]
    timesteps = [round(1000 - 1000 / steps * (step - 1)) - 1 for step in shown]
    same, reached, _ = denoising_states(oracle_pipeline, timesteps, 2, 4, steps)
    assert reached == timesteps and len(states) == 2 * len(shown)
    assert all(np.array_equal(one, other) for one, other in zip(states, same, strict=True))
    assert_shows(np.asarray(last, dtype=float).transpose(2, 0, 1) / 127.5 - 1, clean_image())


def test_the_last_step_shown_is_the_finished_image_for_every_number_of_steps(oracle_pipeline):
    for steps in (61, 103):  # for which diffusers adds a timestep of -1
        states, heads, last = denoising_steps(oracle_pipeline, num_images=1, seed=4, num_inference_steps=steps)
        assert len(heads) == 10 and heads[-1] == f"step {steps} of {steps}"
        assert np.abs(np.asarray(states[-1], int) - np.asarray(last, int)).max() <= 1


def test_a_diverged_network_is_no_black_strip(oracle_pipeline):
    oracle_pipeline.unet.forward = lambda sample, timestep: SimpleNamespace(sample=sample * torch.nan)
    for call in (denoising_steps, lambda *given: denoising_states(given[0], [999, 0], *given[1:])):
        with pytest.raises(NotFiniteError, match="the generated images are not finite"):
            call(oracle_pipeline, 1, 4, 5)


def test_a_strip_goes_from_nearly_noise_to_the_clean_image(oracle_pipeline):
    states, _, _ = denoising_states(
        oracle_pipeline, [999, 750, 500, 250, 0], num_images=3, seed=1, num_inference_steps=50
    )
    strip = image_sheet(states, 5)
    distances = [
        np.mean([np.abs(cell(strip, row, column, 8) - clean_image().numpy()).mean() for row in range(3)])
        for column in range(5)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    assert distances[-1] < 0.55 / 127.5
    assert np.abs(cell(strip, 0, 0, 8) - cell(strip, 1, 0, 8)).mean() > 0.5  # each row has its own noise


def test_a_strip_keeps_no_more_states_than_it_shows(oracle_pipeline, monkeypatch):
    alive: set = set()  # what the strip holds of the 50 states
    scaled = figures.scaled_for_display

    def watched(*arguments):
        state = scaled(*arguments).clone()
        alive.add(weakref.ref(state, alive.discard))
        most.append(len(alive))
        return state

    most: list[int] = []
    monkeypatch.setattr(figures, "scaled_for_display", watched)
    denoising_states(oracle_pipeline, [999, 500, 0], num_images=1, seed=1, num_inference_steps=50)
    assert len(most) > 4 and max(most) <= 4  # three that are shown, and the one of this step


def test_the_third_result_is_the_last_of_the_finished_images():
    torch.manual_seed(0)
    unet = UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    pipeline = DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 20), "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    finished = pipeline(3, generator=image_generators(6, 0, 3), num_inference_steps=5).images
    states, _, last = denoising_states(pipeline, [19, 0], num_images=3, seed=6, num_inference_steps=5)
    strip = image_sheet(states, 2)
    assert np.array_equal(np.asarray(last), np.asarray(finished[2]))
    for row in range(3):
        assert_shows(cell(strip, row, 1, 8), np.asarray(finished[row]).transpose(2, 0, 1) / 127.5 - 1)
    assert not np.array_equal(np.asarray(finished[1]), np.asarray(finished[2]))


# ----------------------------------------------------------------------------------------------------- forward strips


def alpha_of_linear(step: int, trained_steps: int) -> float:
    scale = 1000 / trained_steps
    return float(np.prod(1 - np.linspace(1e-4 * scale, 0.02 * scale, trained_steps)[: step + 1]))


def alpha_of_cosine(step: int, trained_steps: int) -> float:
    def f(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return f((step + 1) / trained_steps) / f(0)


@pytest.mark.parametrize(("trained_steps", "timesteps"), [(1000, [0, 120, 600, 900]), (200, [1, 50, 198])])
def test_the_forward_strip_shows_the_linear_schedule_above_the_cosine_one(trained_steps, timesteps):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    strip = image_sheet(noised_states(Image.fromarray(pixels), timesteps, trained_steps, seed=9), len(timesteps))
    assert strip.size == (len(timesteps) * (8 + GAP) - GAP, 2 * 8 + GAP)
    clean = pixels.transpose(2, 0, 1) / 127.5 - 1
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))[0].numpy()
    for row, alpha_of in enumerate((alpha_of_linear, alpha_of_cosine)):
        for column, step in enumerate(timesteps):
            alpha = alpha_of(step, trained_steps)
            assert_shows(cell(strip, row, column, 8), alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise)


def test_the_end_of_the_forward_strip_is_the_same_noise_in_both_schedules():
    strip = image_sheet(noised_states(Image.new("RGB", (8, 8), (10, 200, 90)), [999], 1000, seed=2), 1)
    np.testing.assert_allclose(cell(strip, 0, 0, 8), cell(strip, 1, 0, 8), atol=2.5 / 127.5)


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("size", "factor"), [((8, 8), 4), ((32, 32), 4), ((64, 64), 2), ((53, 20), 3), ((96, 8), 1)])
def test_small_images_are_enlarged_without_smoothing(size, factor):
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = levels.repeat(factor, axis=0).repeat(factor, axis=1)
    assert np.array_equal(np.asarray(enlarged(Image.fromarray(levels))), expected)


def ink(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet.convert("L")) < 128


def test_labels_surround_the_images_and_never_cover_them():
    images = [Image.new("RGB", (32, 32), (200, 150 + index, 255)) for index in range(6)]  # lighter than ink
    labels = {"title": "T" * 500, "heads": ["H" * 90] * 3, "names": ["first", "N " * 99], "captions": ["7"] * 6}
    sheet = labelled_sheet(images, 3, **labels)
    shown = tiles(sheet, 2, 3, 32, captions=True)
    assert np.array_equal(shown.reshape(6, 32, 32, 3), np.stack([np.asarray(image) for image in images]))
    plain, pitch = image_sheet([image.resize((128, 128)) for image in images], 3), 128 + GAP
    left = sheet.width - plain.width
    assert sheet.height == 2 * LABEL_LINE + 2 * (128 + LABEL_LINE) + GAP and 0 < left <= LABEL_WIDTH
    dark = ink(sheet)
    assert dark[:LABEL_LINE].any() and not dark[LABEL_LINE : 2 * LABEL_LINE, :left].any()
    for column in range(3):
        at = slice(left + column * pitch, left + column * pitch + 128)
        assert dark[LABEL_LINE : 2 * LABEL_LINE, at].any()  # its head
        assert dark[-LABEL_LINE:, at].any() and dark[2 * LABEL_LINE + 128 :, at][:LABEL_LINE].any()  # captions
        assert not dark[2 * LABEL_LINE :, at][:128].any()
    names = dark[2 * LABEL_LINE :, :left]
    assert names[: 2 * LABEL_LINE].any() and not names[2 * LABEL_LINE : 128].any()  # one line beside the first row
    assert names[128 + LABEL_LINE + GAP :].any(axis=1).sum() > 3 * 8  # many beside the second


def test_a_sheet_without_labels_is_the_enlarged_images_alone():
    images = flat_images(3, 5, 3)
    expected = image_sheet([image.resize((20, 12)) for image in images], 3)
    assert np.array_equal(np.asarray(labelled_sheet(images, 3)), np.asarray(expected))


def test_names_that_forge_lines_or_are_no_text_are_shown_escaped():
    for name in ("a\u202eb", "a\x1b[31m", "a\udcff"):
        assert ink(labelled_sheet(flat_images(1, 64, 64), captions=[name]))[-LABEL_LINE:].any()
        assert ink(labelled_sheet(flat_images(1, 64, 64), names=[name]))[:, :20].any()
        assert labelled_rows([(name, flat_images(1, 64, 64)[0])]).width == LABEL_WIDTH + 64


@pytest.mark.parametrize("names", [("Моне", "Ренуар"), ("αβγ", "δεζ"), ("é", "ü")])
def test_names_in_other_alphabets_are_no_boxes(names):
    # What a font lacks is a box, and all boxes are alike.
    one, other = (ink(labelled_sheet(flat_images(1, 64, 64), names=[name[:1]])) for name in names)
    assert one.any() and not np.array_equal(one[:, :30], other[:, :30])
    assert ink(labelled_rows([(name, flat_images(1, 8, 8)[0]) for name in names]))[:, :LABEL_WIDTH].any()


def test_names_stay_left_of_the_pictures_and_are_shown_whole():
    words = "discriminator_channels 128, generator_channels 64, num_train_timesteps 1000, adam_beta1 0.5"
    sheet = np.array(
        labelled_rows(
            [(f"Diffusion\n{words}", Image.new("RGB", (50, 20), "black")), ("W" * 60, Image.new("RGB", (9, 9), "red"))]
        )
    )
    assert sheet[:, LABEL_WIDTH - 4 : LABEL_WIDTH].min() == 255  # nothing runs into the pictures
    length = ImageFont.load_default(LABEL_SIZE).getlength(words)
    ink_rows = (sheet[:, :LABEL_WIDTH].min(axis=(1, 2)) < 200).astype(int)
    lines = int((np.diff(ink_rows, prepend=0) == 1).sum())
    assert lines >= 2 + length / LABEL_WIDTH  # each line of text is one stripe of ink
    top_of_second = np.flatnonzero((sheet[:, LABEL_WIDTH : LABEL_WIDTH + 9] == (255, 0, 0)).all(axis=(1, 2)))[0]
    assert (sheet[top_of_second - 6 : top_of_second, :LABEL_WIDTH].min(axis=(1, 2)) == 255).any()
