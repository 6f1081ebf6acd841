"""Evaluations during training that fail, or that the time limit or a request to stop ends."""

import errno
import json
import os
import signal
import time

import pytest
from line_method import status
from run_files import metrics
from stand_in_features import Colours, watch_drawing
from toy_runs import events, train

from hfgen.evaluation import during_training as run_evaluation
from hfgen.evaluation.during_training import read_evaluations
from hfgen.metrics import feature_spaces
from hfgen.pipelines import DDPMPipeline


pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate_state", "colours"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_an_evaluation_that_fails_costs_its_score_and_not_the_training(tmp_path, monkeypatch, capsys):
    taken = []

    def before(pipeline, index):
        taken.append(index)
        if len(taken) == 12 + 4:  # of the second evaluation
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/images")

    watch_drawing(monkeypatch, before)
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "6")
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [2, 6]
    assert status(tmp_path / "run")["status"] == "complete"
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (4, "warning") and event["what"].startswith(
        "not scored: could not write"
    )
    assert f"warning: step 4: {event['what']}" in capsys.readouterr().out


def test_scores_that_cannot_be_kept_cost_no_training_either(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "best")

    monkeypatch.setattr(run_evaluation, "_save_best", full)
    train("gan", tmp_path / "run", "--evaluate_every", "3", "--max_train_steps", "6")
    assert status(tmp_path / "run")["status"] == "complete"
    assert [event["what"].partition(":")[0] for event in events(tmp_path / "run")] == ["not scored"] * 2


def test_a_bug_in_an_evaluation_is_not_hidden(tmp_path, monkeypatch):
    watch_drawing(monkeypatch, lambda pipeline, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "6")


def test_the_time_limit_ends_an_evaluation_so_that_the_checkpoint_is_in_time(tmp_path, monkeypatch):
    taken = []

    class Clock:
        """Two hours later from the fifth image of the second evaluation on."""

        def monotonic(self):
            return time.monotonic() + (7200 if len(taken) >= 12 + 5 else 0)

    monkeypatch.setattr("hfgen.training.run.time", Clock())
    watch_drawing(monkeypatch, lambda pipeline, index: taken.append(index))
    arguments = ("--evaluate_every", "2", "--checkpoint_every", "0", "--max_train_steps", "9")
    train("gan", tmp_path / "run", *arguments, "--max_train_time", "1h")
    assert len(taken) < 12 + 8 and [row["step"] for row in read_evaluations(tmp_path / "run")] == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert status(tmp_path / "run")["reason"] == "time is up"
    assert [event["what"] for event in events(tmp_path / "run")] == ["not scored: the time is up"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["drawing", "features"])
def test_a_request_to_stop_ends_an_evaluation_without_a_score(tmp_path, monkeypatch, where):
    taken = []

    def before(pipeline, index):
        taken.append(index)
        if where == "drawing" and len(taken) == 12 + 4:  # of the second evaluation
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_at_third_call(calls):
        if where == "features" and calls == 3:  # of the training images, then of each evaluation
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)

    watch_drawing(monkeypatch, before)
    extractor = Colours(before_each=stop_at_third_call)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: extractor)
    arguments = ("--evaluate_every", "2", "--checkpoint_every", "0", "--max_train_steps", "9")
    with pytest.raises(SystemExit) as end:
        train("gan", tmp_path / "run", *arguments)
    assert end.value.code == 143
    assert len(taken) == {"drawing": 16, "features": 24}[where]
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [2]
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 4 and "fid" not in last and last["images_per_second"] > 4 / 0.8
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "stopped by SIGTERM"


def test_diffusion_heeds_it_after_each_step(tmp_path, monkeypatch):
    """A batch of it may take minutes."""
    steps, run_generator = [], DDPMPipeline.__call__

    def watched(pipeline, *arguments, callback_on_step_end, **options):
        def after_each(pipeline, index, *rest):
            steps.append(index)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            callback_on_step_end(pipeline, index, *rest)

        return run_generator(pipeline, *arguments, callback_on_step_end=after_each, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", watched)
    with pytest.raises(SystemExit):
        train("ddpm", tmp_path / "run", "--evaluate_every", "1", "--sample_every", "0", "--num_inference_steps", "9")
    assert steps == [0, 1, 2] and read_evaluations(tmp_path / "run") == []
