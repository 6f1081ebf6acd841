"""Copies of training images, as the evaluations during training find them."""

import json

import numpy as np
import pytest
from stand_in_features import paintings, watch_drawing
from toy_runs import checkpoint, events, train

from hfgen.evaluation.during_training import is_copying, read_evaluations
from hfgen.evaluation.scores import distances_among, memorisation_report


pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate_state", "colours"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_that_copying_has_begun_is_said_once_and_not_again_after_a_resume(tmp_path, monkeypatch, capsys):
    originals, seen = paintings([0, 1, 2]) * 4, []

    def copy_from_the_second_on(pipeline, index):
        seen.append(index)
        return originals[index] if len(seen) > 12 else None

    watch_drawing(monkeypatch, copy_from_the_second_on)
    arguments = ("--evaluate_every", "2", "--max_train_steps", "6")
    train("gan", tmp_path / "run", *arguments)
    rows = read_evaluations(tmp_path / "run")
    assert [row["copying"] for row in rows] == [False, True, True]
    assert (rows[1]["copies"], rows[1]["copies_by_pixels"]) == (1, 1)
    assert rows[0]["copies"] == rows[0]["copies_by_pixels"] == 0 < rows[0]["copies_expected"]
    # The best is kept that does not copy, although copies score better.
    assert max(rows[1]["fid"], rows[2]["fid"]) < rows[0]["fid"]
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text()).items() >= rows[0].items()
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (4, "warning")
    assert event["what"].startswith(
        "the samples have started to copy training images: 100.0% of them are nearer to a training image"
    )
    assert "warning: step 4: the samples have started to copy training images" in capsys.readouterr().out
    train("gan", tmp_path / "run", *arguments, "--resume", str(checkpoint(tmp_path / "run", 4)))
    assert len(events(tmp_path / "run")) == 1 and read_evaluations(tmp_path / "run")[-1]["copying"]


def test_a_generator_that_does_not_copy_is_not_warned_about(tmp_path):
    train("gan", tmp_path / "run", "--evaluate_every", "2")
    assert not any(row["copying"] for row in read_evaluations(tmp_path / "run"))
    assert events(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["copies", "copies_by_pixels"])
@pytest.mark.parametrize(
    ("num_images", "expected", "share", "copying"),
    [
        # Four standard errors of 1% of 1000 are 1.26%.
        (1000, 0.01, 0.010, False), (1000, 0.01, 0.022, False), (1000, 0.01, 0.023, True),
        # Where none is expected, one more or less is chance.
        (1000, 0.0, 0.002, False), (1000, 0.0, 0.005, True), (10, 0.0, 0.3, False), (10, 0.0, 0.5, True),
        # For a few images the limits are 0.01 + 4 x 0.1 and 0.2 + 4 x 0.126.
        (10, 0.01, 0.4, False), (10, 0.01, 0.5, True), (10, 0.2, 0.7, False), (10, 0.2, 0.8, True),
    ],
)  # fmt: skip
def test_copies_are_told_from_chance(name, num_images, expected, share, copying):
    scores = dict.fromkeys(("copies", "copies_by_pixels", "copies_expected", "copies_by_pixels_expected"), 0.0)
    assert is_copying(scores | {name: share, f"{name}_expected": expected}, num_images, 10**9) is copying


@pytest.mark.parametrize("num_images", [10, 100, 1000])
def test_a_generator_as_good_as_the_data_is_hardly_ever_taken_for_a_copyist(num_images):
    copies = np.random.default_rng(0).binomial(num_images, 0.01, 4000) / num_images
    none = {"copies_expected": 0.01, "copies_by_pixels": 0.0, "copies_by_pixels_expected": 0.0}
    assert np.mean([is_copying({"copies": share, **none}, num_images, 10**9) for share in copies]) < 0.01


@pytest.mark.parametrize("num_real", [100, 300])
def test_the_threshold_of_a_few_real_images_is_uncertain_too(num_real):
    """With the error of the generated images alone, a perfect generator would be suspected in 20 to 40% of cases."""
    rng, suspected = np.random.default_rng(0), []
    for _ in range(40):
        real, fake = rng.normal(size=(num_real, 24)), rng.normal(size=(1000, 24))
        copies = memorisation_report(real, fake, distances_among(real))["num_copies"] / 1000
        scores = {"copies": copies, "copies_expected": 0.01, "copies_by_pixels": 0, "copies_by_pixels_expected": 0}
        suspected.append((is_copying(scores, 1000, num_real), is_copying(scores, 1000, 10**9)))
    honest, naive = np.mean(suspected, axis=0)
    assert honest <= 0.05 and naive >= 3 * max(honest, 0.03)


def test_a_copying_pipeline_never_replaces_one_that_does_not(tmp_path, monkeypatch):
    """Not even when a resumed run scores another number of images, so that the scores cannot be compared."""
    originals, copying = paintings([0, 1, 2]) * 8, []
    watch_drawing(monkeypatch, lambda pipeline, index: originals[index] if copying else None)
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "2")
    first = json.loads((tmp_path / "run" / "best" / "scores.json").read_text())
    copying.append(True)
    more = ("--evaluate_every", "2", "--evaluate_num_images", "20", "--resume", "latest")
    train("gan", tmp_path / "run", *more, "--max_train_steps", "4")
    rows = read_evaluations(tmp_path / "run")
    assert [row["copying"] for row in rows] == [False, True] and rows[1]["num_images"] == 20 != first["num_images"]
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text()) == first
    copying.clear()
    train("gan", tmp_path / "run", *more, "--max_train_steps", "6")
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text())["step"] == 6
