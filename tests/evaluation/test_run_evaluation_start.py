"""Scores in the course of a run: what is refused before it begins, several processes, and the real features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from line_method import fit
from run_files import state_of
from stand_in_features import Colours
from toy_runs import METHODS, TINY, files_of, train

from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.evaluation.during_training import RunEvaluation, read_evaluations
from hfgen.metrics import feature_spaces
from hfgen.metrics.extraction import feature_batches
from hfgen.training.settings import RunSettings


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
TESTS = Path(__file__).resolve().parents[1]
# A training script whose features are cheap.
WITH_STAND_IN = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
from stand_in_features import Colours
from hfgen.metrics import feature_spaces
colours = Colours()
feature_spaces.build_extractor = lambda *_: colours
from toy_runs import script
script("vae").main(sys.argv[1:])
pathlib.Path(__file__).with_name("calls-" + os.environ["RANK"]).write_text(str(colours.calls))
"""


@pytest.mark.parametrize(
    ("name", "value"), [("evaluate_num_images", 9), ("evaluate_num_images", 0), ("evaluate_every", -1)]
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(UserError, match=f"--{name} {value}: must"):
        RunSettings(**{name: value})
    assert RunSettings(evaluate_num_images=10).evaluate_every == 0


def test_a_stream_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: pytest.fail("loaded"))
    stream = DataSettings("someone/paintings", streaming=True)
    run, _ = fit(tmp_path / "run", max_train_steps=1, evaluate_every=1)
    with pytest.raises(UserError, match="--evaluate_every: cannot compare with streamed images"):
        RunEvaluation(run, stream)
    without, _ = fit(tmp_path / "without", max_train_steps=1)
    RunEvaluation(without, stream)  # nothing is to be evaluated


def test_too_few_training_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    with pytest.raises(UserError, match="--evaluate_every: --dataset toy_paintings:11: 11 images are too few"):
        train("gan", tmp_path / "run", "--dataset", "toy_paintings:11", "--evaluate_every", "1")


def test_missing_weights_are_refused_before_training_and_the_run_can_start_later(tmp_path, monkeypatch):
    pytest.importorskip("cleanfid")

    def missing(path):
        raise UserError(f"no weights at {path}")

    find_weights = feature_spaces.find_weights
    with pytest.raises(UserError, match=r"--feature_weights gone\.pt: no such file"):
        train("gan", tmp_path / "run", "--evaluate_every", "2", "--feature_weights", "gone.pt")
    monkeypatch.setattr(feature_spaces, "find_weights", missing)
    with pytest.raises(UserError, match="no weights at None"):
        train("gan", tmp_path / "run", "--evaluate_every", "2", "--resume", "latest")
    begun = {"metrics.jsonl", "status.json", "checkpoints"}
    assert not begun & {path.name for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(feature_spaces, "find_weights", find_weights)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--resume", "latest")
    train("gan", tmp_path / "other", "--evaluate_every", "2")
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [2, 4, 6]
    assert files_of(tmp_path / "run" / "pipeline") == files_of(tmp_path / "other" / "pipeline")


def test_features_do_not_depend_on_the_precision_that_images_are_drawn_in():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    images = [np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8) for index in range(4)]

    def features():
        cpu = torch.device("cpu")
        return next(feature_batches(images, 4, lambda image: image.astype(np.float32), network, cpu))

    plain = features()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(plain, features())


def test_the_scores_are_those_that_evaluate_gives_of_the_best_pipeline(inception_weights, hfgen, tmp_path):
    """With the real features, in mixed precision."""
    few = ("--dataset", "toy_paintings:12", "--evaluate_num_images", "10", "--max_train_steps", "1")
    train("gan", tmp_path / "run", *few, "--evaluate_every", "5", "--mixed_precision", "bf16", "--seed", "7")
    (row,) = read_evaluations(tmp_path / "run")
    arguments = ("--reference", "toy_paintings:12", "--num_images", "10", "--seed", "7", "--device", "cpu")
    assert hfgen("evaluate", tmp_path / "run" / "best", *arguments, "--output", tmp_path / "scores")[0] == 0
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert row["fid"] == pytest.approx(report["scores"]["fid"], rel=1e-3)
    assert row["kid"] == pytest.approx(report["scores"]["kid"], rel=1e-2)
    assert row["copies"] * 10 == report["memorisation"]["num_copies"]
    assert row["copies_by_pixels"] * 10 == report["memorisation_by_pixels"]["num_copies"]
    ratio = report["memorisation"]["median_distance"] / report["memorisation"]["median_distance_among_real"]
    assert row["nearest_distance_ratio"] == pytest.approx(ratio, rel=1e-2)
    # Training feels nothing of the network of the features.
    train("gan", tmp_path / "without", *few, "--mixed_precision", "bf16", "--seed", "7")
    assert files_of(tmp_path / "run" / "pipeline") == files_of(tmp_path / "without" / "pipeline")


def test_two_processes_evaluate_once_and_end_together(programs, tmp_path):
    """A VAE, of which all processes encode the data and the main one fits and scores."""
    program, folder = tmp_path / "train.py", tmp_path / "run"
    program.write_text(WITH_STAND_IN.format(tests=str(TESTS)))
    arguments = [*TINY, *METHODS["vae"], "--max_train_steps", "4", "--output_dir", folder, "--evaluate_every", "2"]
    ended = programs.run_ranks(2, program, *arguments)
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr[-3000:]
    # Features of the training images, then of two evaluations, by the main process alone.
    assert [(tmp_path / f"calls-{rank}").read_text() for rank in (0, 1)] == ["3", "0"]
    assert [row["step"] for row in read_evaluations(folder)] == [2, 4]
    assert json.loads((folder / "launches.jsonl").read_text())["num_processes"] == 2
    assert (folder / "best" / "pipeline" / "density").is_dir() and (folder / "pipeline" / "density").is_dir()
    # Each is back at its place in the data after it was encoded.
    assert [batches["position"] for batches in state_of(folder, 4)["batches"]] == [4, 4]


def test_two_processes_fail_together_where_weights_are_missing(programs, tmp_path):
    pytest.importorskip("cleanfid")
    arguments = [*TINY, *METHODS["gan"], "--output_dir", str(tmp_path / "run"), "--evaluate_every", "1"]
    arguments += ["--feature_weights", "gone.pt"]
    for rank in programs.run_ranks(2, TESTS.parent / "training_scripts" / "train_gan.py", *arguments):
        assert rank.returncode == 2  # each of them says it, and neither waits for the other
        assert rank.stderr.count("error: --feature_weights gone.pt: no such file") == 1
        assert "Traceback" not in rank.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
