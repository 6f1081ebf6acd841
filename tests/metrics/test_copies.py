"""Which changed pictures are still found as copies by their pixels, on toy paintings of 64 x 64."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hfgen.data.toy_paintings import paint
from hfgen.evaluation.scores import COPY_RATIO, pixel_report
from hfgen.metrics.memorisation import nearest_pixels, thumbnails, without_repeats


NUM_REAL, NUM_CHANGED = 120, 40


@pytest.fixture(scope="module")
def real():
    return [paint(index, 64) for index in range(NUM_REAL)]


@pytest.fixture(scope="module")
def real_small(real):
    return thumbnails(real)


def recompressed(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def blurred(picture, radius):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def brightened(picture, factor):
    return (picture * factor + 0.5).clip(0, 255).astype(np.uint8)


def mirrored(picture):
    return np.ascontiguousarray(picture[:, ::-1])


def halved(picture):
    return np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC))


def noisy(picture, levels):
    noise = np.random.default_rng(0).normal(0, levels, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


# The largest ratios are 0.32 (5% brighter), 0.30 (a pixel to the right) and 0.26 (JPEG 30); of new paintings the
# smallest is 0.74, of averages 0.76.
COPIES = {
    "as it is": lambda picture: picture,
    "mirrored": mirrored,
    "JPEG 90": lambda picture: recompressed(picture, 90),
    "JPEG 30": lambda picture: recompressed(picture, 30),
    "blurred by a pixel": lambda picture: blurred(picture, 1),
    "3% brighter": lambda picture: brightened(picture, 1.03),
    "5% brighter": lambda picture: brightened(picture, 1.05),
    "3% darker": lambda picture: brightened(picture, 0.97),
    "at half the size": halved,
    "noise of 20 levels": lambda picture: noisy(picture, 20),
    "a pixel to the right": lambda picture: np.roll(picture, 1, axis=1),
    "mirrored, blurred and JPEG 50": lambda picture: recompressed(blurred(mirrored(picture), 0.7), 50),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_slightly_changed_painting_is_found_as_a_copy_of_itself(name, real, real_small):
    found = nearest_pixels(thumbnails(map(COPIES[name], real[:NUM_CHANGED])), real_small)
    assert found.indices.tolist() == list(range(NUM_CHANGED))
    assert found.ratios.max() < COPY_RATIO


def test_new_paintings_are_no_copies(real_small):
    report = pixel_report(real_small, thumbnails(paint(index, 64) for index in range(5000, 5000 + NUM_CHANGED)))
    assert report["num_copies"] == 0 and report["share_among_real"] == 0
    assert report["median_distance"] == pytest.approx(report["median_distance_among_real"], rel=0.1)
    assert 0.1 < report["median_distance"] < 0.2


@pytest.mark.parametrize("of", [2, 3, 8, 30])
def test_averages_of_several_paintings_are_no_copies(of, real, real_small):
    """Blurred or not: what is near to everything is special to nothing, though its distance may be small."""
    averages = [np.mean(real[index : index + of], axis=0).astype(np.uint8) for index in range(NUM_CHANGED)]
    sharp = nearest_pixels(thumbnails(averages), real_small)
    soft = nearest_pixels(thumbnails(blurred(average, 6) for average in averages), real_small)
    assert min(sharp.ratios.min(), soft.ratios.min()) > 0.5  # not a third


def test_a_threshold_on_the_distance_alone_would_take_averages_for_copies(real, real_small):
    """They are nearer to the real ones than these are to each other."""
    averages = thumbnails(
        blurred(np.mean(real[index : index + 30], axis=0).astype(np.uint8), 6) for index in range(40)
    )
    among_real = nearest_pixels(real_small, real_small, own=np.arange(NUM_REAL)).distances
    assert np.median(nearest_pixels(averages, real_small).distances) < np.median(among_real)


def test_what_changes_the_picture_a_lot_is_beyond_it(real, real_small):
    """The limits: a fifth brighter or blurred beyond recognition is nearest to its original, but not three times."""
    for change in (lambda picture: brightened(picture, 1.2), lambda picture: blurred(picture, 4)):
        found = nearest_pixels(thumbnails(map(change, real[:NUM_CHANGED])), real_small)
        assert (found.indices == np.arange(NUM_CHANGED)).mean() > 0.9
        assert (found.ratios < COPY_RATIO).mean() < 0.1
    upside_down = nearest_pixels(thumbnails(picture[::-1] for picture in real[:NUM_CHANGED]), real_small)
    assert (upside_down.ratios < COPY_RATIO).sum() == 0


def test_copies_among_new_paintings_are_counted_exactly(real, real_small):
    generated = [recompressed(mirrored(real[index]), 60) for index in range(7)]
    generated += [paint(index, 64) for index in range(5000, 5013)]
    report = pixel_report(real_small, thumbnails(generated))
    assert (report["num_copies"], report["num_fake"]) == (7, 20)
    assert report["statement"].startswith("7 of 20 are copies by their pixels")


def test_finding_the_repeats_of_small_images_makes_no_copy_of_them():
    images = np.random.default_rng(0).integers(0, 256, (2000, 16, 16, 3), dtype=np.uint8)
    small = thumbnails(images)
    tracemalloc.start()
    try:
        kept, _ = without_repeats(small)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.2 * small.nbytes and len(kept) == 2000
