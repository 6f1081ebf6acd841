"""The pictures of `hfgen data inspect --output`: what a network sees, and what each augmentation makes of it."""

import numpy as np
import pytest
from labelled_sheets import tiles
from PIL import Image

from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.inference.data_figures import NUM_IMAGES, augmentation_sheet, data_sheet
from hfgen.inference.figures import LABEL_LINE


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """Nine pictures of 40 x 16 pixels, no two alike, one of them broken."""
    monkeypatch.setenv("HFGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wide").mkdir()
    for index in range(10):
        levels = np.random.default_rng(index).integers(0, 256, (16, 40, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "wide" / f"{index}.png")
    (tmp_path / "wide" / "0.png").write_bytes(b"broken")
    return DataSettings(str(tmp_path / "wide"), sample_size=16)


def test_each_row_shows_the_same_images_after_one_augmentation(wide):
    plain, crop, parts, flip, turned, erased, all_of_them, some = tiles(augmentation_sheet(wide), 8, 8, 16)
    images = load_images(wide)
    assert np.array_equal(plain, np.stack([images[index] for index in range(8)]))
    for index in range(8):
        whole = np.asarray(Image.open(f"{wide.dataset}/{index + 1}.png"))
        places = [whole[:, left : left + 16] for left in range(25)]
        assert any(np.array_equal(crop[index], place) for place in places)
        assert np.array_equal(flip[index], plain[index]) or np.array_equal(flip[index], plain[index, :, ::-1])
        grey = (np.abs(erased[index] - 127.5) <= 0.5).all(axis=2)
        assert grey.sum() >= 4 and np.array_equal(erased[index][~grey], plain[index][~grey])
    changed = [(row != plain).any(axis=(1, 2, 3)).sum() for row in (crop, parts, flip, turned, all_of_them, some)]
    assert changed[1] == changed[3] == changed[4] == 8 and changed[0] > 4 and 0 < changed[2] < 8
    assert 0 < (some != all_of_them).any(axis=(1, 2, 3)).sum()  # which is weaker


def test_wide_grey_images_are_shown_as_bright_as_a_network_sees_them(tmp_path, monkeypatch, hfgen):
    monkeypatch.setenv("HFGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "grey").mkdir()
    for index, highest in enumerate((4095, 200)):  # 12 bits in all, the second dark
        levels = np.random.default_rng(index).integers(0, highest + 1, (16, 16)).astype(np.uint16)
        levels.flat[0] = highest
        Image.fromarray(levels).save(tmp_path / "grey" / f"{index}.png")
    status, _, err = hfgen("data", "inspect", tmp_path / "grey", "--sample_size", 16, "--output", tmp_path / "out")
    assert status == 0, err
    images = load_images(DataSettings(str(tmp_path / "grey"), sample_size=16))
    plain = tiles(Image.open(tmp_path / "out" / "augmentations.png"), 8, 2, 16)[0]
    assert np.array_equal(plain, np.stack([images[index] for index in range(2)])) and plain[1].max() < 20


def test_the_data_are_shown_evenly_with_their_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("HFGEN_CACHE", str(tmp_path / "cache"))
    few, many = (load_images(DataSettings(f"toy_paintings:{count}", sample_size=8)) for count in (5, 129))
    shown = tiles(data_sheet(few), 2, 3, 8, captions=True).reshape(6, 8, 8, 3)
    assert np.array_equal(shown[:5], np.stack([few[index] for index in range(5)]))
    shown = tiles(data_sheet(many), 8, 8, 8, captions=True).reshape(NUM_IMAGES, 8, 8, 3)
    assert np.array_equal(shown[[0, -1]], np.stack([many[0], many[128]]))
    labels = np.asarray(data_sheet(many).convert("L"))
    assert (labels[:LABEL_LINE] < 128).any() and (labels[-LABEL_LINE:, -34:] < 128).any()


def test_the_command_writes_both_pictures_into_a_new_folder(hfgen, refusal, wide, tmp_path):
    arguments = ("data", "inspect", wide.dataset, "--sample_size", 16, "--output", tmp_path / "pictures")
    status, out, err = hfgen(*arguments)
    assert status == 0, err
    assert "9 images" in out and f"images.png and augmentations.png in {tmp_path / 'pictures'}" in out
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {"images.png", "augmentations.png"}
    assert "is not empty" in refusal(*arguments)
