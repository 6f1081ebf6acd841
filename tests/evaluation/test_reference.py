"""Features of the real images: computed once, kept, gone on with after an interruption, and removed when damaged."""

import errno
import itertools
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damages import DAMAGES
from PIL import Image
from stand_in_features import paintings

from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError
from hfgen.evaluation.reference import load_reference
from hfgen.evaluation.scores import memorisation_report, score_floor
from hfgen.metrics.extraction import BATCH_SIZE, Extractor, batched


class Colours(Extractor):
    """Features that are cheap: the mean of each channel."""

    identity = "colours"

    def __init__(self):
        self.calls = 0

    def batches(self, images, count=None):
        self.calls += 1
        for batch in batched(images, BATCH_SIZE):
            yield np.array([image.mean(axis=(0, 1)) for image in batch], dtype=np.float32)


def test_reference_features_are_computed_once_for_each_data_size_and_extractor(monkeypatch):
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
    assert again.floor(20, 1) != floor
    with monkeypatch.context() as patch:
        patch.setattr("hfgen.evaluation.reference.score_floor", None)  # computing again would fail
        assert again.floor(20, 0) == floor
    other = Colours()
    other.identity = "other colours"
    load_reference(settings, other, "--reference")
    assert other.calls == 1


def test_copies_are_found_in_data_that_has_every_image_many_times(tmp_path):
    """Their nearest neighbours are all identical: were they counted, nothing could be nearer than they are."""
    for number, image in enumerate(paintings(range(12))):
        for copy in range(9):
            image.save(tmp_path / f"{number}-{copy}.png")
    settings = DataSettings("toy_paintings:12", sample_size=16)
    once, often = (
        load_reference(replace(settings, dataset=name), Colours(), "--reference")
        for name in (settings.dataset, str(tmp_path))
    )
    assert len(often.images) == 108
    assert often.distances_among(0) == once.distances_among(0) == often.floor(20, 0)["nearest"]
    report = memorisation_report(often.features, once.features[:5], often.distances_among(0))
    assert report["threshold"] > 0 and report["num_copies"] == 5


def test_the_features_of_the_data_are_written_as_numpy_writes_them(tmp_path):
    found = load_reference(DataSettings("toy_paintings:70", sample_size=16), Colours(), "--reference")
    wanted = np.array([found.images[index].mean(axis=(0, 1)) for index in range(70)], dtype=np.float32)
    np.save(tmp_path / "wanted.npy", wanted)
    assert (found.folder / "features.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()


class Interrupted(Colours):
    """Stops after two batches."""

    def batches(self, images, count=None):
        yield from itertools.islice(super().batches(images, count), 2)
        raise KeyboardInterrupt


def left_whole(folder: Path) -> None:
    pass


def left_as_it_was_saved_last(folder: Path) -> None:
    """What was written later may or may not have reached the disk."""
    end = (folder / "features.npy").stat().st_size - 32 * 12
    (folder / "progress.json").write_text(json.dumps({"rows": 32, "bytes": end}))
    contents = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(contents[: end + 5] + bytes(500))


def left_too_short(folder: Path) -> None:
    contents = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(contents[:-1])


def left_without_a_file(folder: Path) -> None:
    (folder / "features.npy").unlink()


def left_without_progress(folder: Path) -> None:
    (folder / "progress.json").unlink()


def left_with_damaged_progress(folder: Path) -> None:
    (folder / "progress.json").write_text("{}")


class Asked(Colours):
    """Notes how many images each call is for."""

    def __init__(self):
        super().__init__()
        self.asked: list[int] = []

    def batches(self, images, count=None):
        self.asked.append(count)
        return super().batches(images, count)


def features_of_an_uninterrupted_call(settings: DataSettings, monkeypatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setenv("HFGEN_CACHE", tempfile.mkdtemp(dir=os.environ["HFGEN_CACHE"]))
        return (load_reference(settings, Colours(), "--reference").folder / "features.npy").read_bytes()


@pytest.mark.parametrize(
    ("leave", "num_images", "computed_again"),
    [
        (left_whole, 70, [6]),
        (left_whole, 64, []),  # interrupted after the last one
        (left_as_it_was_saved_last, 70, [38]),
        (left_too_short, 70, [70]),
        (left_without_a_file, 70, [70]),
        (left_without_progress, 70, [70]),
        (left_with_damaged_progress, 70, [70]),
    ],
)
def test_an_interrupted_computation_of_features_goes_on(leave, num_images, computed_again, monkeypatch, capsys):
    settings = DataSettings(f"toy_paintings:{num_images}", sample_size=16)
    expected = features_of_an_uninterrupted_call(settings, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        load_reference(settings, Interrupted(), "--reference")
    (unfinished,) = Path(os.environ["HFGEN_CACHE"]).glob("features/*.unfinished")
    leave(unfinished)
    extractor = Asked()
    capsys.readouterr()
    found = load_reference(settings, extractor, "--reference")
    assert extractor.asked == computed_again
    assert (found.folder / "features.npy").read_bytes() == expected and not unfinished.exists()
    known = num_images - sum(computed_again)
    said = f"the features of {known} of {num_images} images are already there\n" if 0 < known < num_images else ""
    assert capsys.readouterr().out == said


def test_while_features_are_computed_they_are_saved_now_and_then(monkeypatch):
    monkeypatch.setattr("hfgen.evaluation.reference.SAVE_SECONDS", 0.0)
    saved = []

    class Looking(Colours):
        def batches(self, images, count=None):
            for batch in super().batches(images, count):
                yield batch
                (progress,) = Path(os.environ["HFGEN_CACHE"]).glob("features/*.unfinished/progress.json")
                saved.append(json.loads(progress.read_text())["rows"])

    load_reference(DataSettings("toy_paintings:70", sample_size=16), Looking(), "--reference")
    assert saved == [32, 64, 70]


def test_features_are_kept_if_the_disk_is_full_at_the_end(monkeypatch):
    settings, extractor = DataSettings("toy_paintings:70", sample_size=16), Asked()
    load_images(settings)
    with monkeypatch.context() as patch:
        patch.setattr("hfgen.integrity.record_digests", full_disk)
        with pytest.raises(UserError, match="No space left"):
            load_reference(settings, extractor, "--reference")
    assert extractor.asked == [70]
    found = load_reference(settings, extractor, "--reference")
    assert extractor.asked == [70] and found.features.shape == (70, 3)


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_features_are_computed_again_if_all_that_is_left_of_them_is_damaged(monkeypatch):
    settings = DataSettings("toy_paintings:70", sample_size=16)
    expected = features_of_an_uninterrupted_call(settings, monkeypatch)
    file = load_reference(settings, Colours(), "--reference").folder / "features.npy"
    left = file.parent.with_name(f"{file.parent.name}.unfinished")  # as if the call had been killed before the end
    left.mkdir()
    (left / "progress.json").write_text(json.dumps({"rows": 70, "bytes": file.stat().st_size}))
    os.link(file, left / "features.npy")
    DAMAGES["flipped"](file)
    assert load_reference(settings, Colours(), "--reference").folder == file.parent
    assert file.read_bytes() == expected and not left.exists()


def test_unfinished_features_that_nobody_has_gone_on_with_are_removed():
    for name, days in (("older", 8), ("newer", 6)):
        folder = Path(os.environ["HFGEN_CACHE"]) / "features" / f"{name}.unfinished"
        folder.mkdir(parents=True)
        os.utime(folder, times=(time.time() - days * 24 * 3600,) * 2)
    load_reference(DataSettings("toy_paintings:13", sample_size=16), Colours(), "--reference")
    assert [folder.stem for folder in folder.parent.glob("*.unfinished")] == ["newer"]


def test_damaged_features_and_floors_are_computed_again(capsys):
    extractor, settings = Colours(), DataSettings("toy_paintings:13", sample_size=16)
    first = load_reference(settings, extractor, "--reference")
    features, floor = np.array(first.features), first.floor(20, 0)
    for damage in DAMAGES.values():
        damage(first.folder / "features.npy")
        damage(next(first.folder.parent.glob("*-floor*-20-0")) / "floor.json")
        again = load_reference(settings, extractor, "--reference")
        assert np.array_equal(again.features, features) and again.floor(20, 0) == floor
        said = capsys.readouterr().out
        assert "damaged" in said and "features.npy" in said and "floor.json" in said
    assert extractor.calls == 1 + len(DAMAGES)


def test_one_picture_many_times_is_too_little_to_compare_with(tmp_path):
    for index in range(20):
        Image.fromarray(np.full((16, 16, 3), min(index, 10), np.uint8)).save(tmp_path / f"{index}.png")
    settings = DataSettings(str(tmp_path), sample_size=16)
    with pytest.raises(UserError, match=r"--reference .*: 11 different images are too few to split"):
        load_reference(settings, Colours(), "--reference")
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(tmp_path / "another.png")
    assert load_reference(settings, Colours(), "--reference").features.shape == (21, 3)
