import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
from toy_studies import make_quick, toy_cell, workspace_in

from hfgen.errors import UserError
from hfgen.studies import launch
from hfgen.studies.launch import check_data, last_error, launch_command, missing_device, train_cell
from hfgen.studies.study_file import Budget
from hfgen.training.lock import lock_folder


STEPS, MINUTES = Budget(steps=20), Budget(minutes=1.5)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace whose training script takes no time."""
    make_quick(monkeypatch)
    return workspace_in(tmp_path)


def launches(workspace, cell):
    file = workspace.run_folder(cell) / "launches.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_a_cell_is_launched_as_a_user_would_launch_it(tmp_path):
    workspace, cell = workspace_in(tmp_path, "photos/"), toy_cell("gan lr=1e-4 seed=0", learning_rate=1e-4)
    folder = tmp_path / "here" / "cells" / "gan-lr=1e-4-seed=0"
    command = launch_command(cell, STEPS, workspace)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    script = command.index(str(tmp_path / "scripts" / "train_gan.py"))
    given = ["--preset", f"{folder}.json", "--dataset", "photos/", "--output_dir", str(folder), "--resume", "latest"]
    assert command[script + 1 :] == given
    assert json.loads((folder.parent / f"{folder.name}.json").read_text()) == cell.settings
    assert not folder.exists()


def test_a_trained_cell_leaves_its_log_and_is_not_trained_again(workspace):
    cell = toy_cell("a")
    for _ in range(2):
        ending = train_cell(cell, STEPS, workspace)
        assert (ending.kind, ending.step) == ("trained", 20)
    assert launches(workspace, cell) == [{"from_step": 0, "time": None, "dataset": "toy_paintings:12"}]
    log = (workspace.output / "cells" / "a.log").read_text()
    assert log.startswith(f"$ {sys.executable} ")
    assert "train_gan.py --preset" in log


def test_a_folder_with_other_settings_or_no_pipeline_is_not_a_trained_cell(workspace):
    train_cell(toy_cell("a", batch_size=4), STEPS, workspace)
    cell = toy_cell("a", batch_size=8)
    assert train_cell(cell, STEPS, workspace).kind == "trained"
    assert len(launches(workspace, cell)) == 2  # the real script refuses: see below
    (workspace.run_folder(cell) / "pipeline" / "model_index.json").unlink()
    assert train_cell(cell, STEPS, workspace).kind == "trained"
    assert [launch["from_step"] for launch in launches(workspace, cell)] == [0, 20, 20]


def test_with_a_budget_in_minutes_a_resumed_cell_gets_the_rest_of_its_time(workspace):
    cell = toy_cell("a", "time is up")
    assert launch_command(cell, MINUTES, workspace)[-2:] == ["--max_train_time", "90.000s"]
    assert train_cell(cell, MINUTES, workspace).kind == "trained"  # and leaves a checkpoint of 40 seconds
    assert launch_command(cell, MINUTES, workspace)[-2:] == ["--max_train_time", "50.000s"]
    assert launch_command(cell, Budget(minutes=0.5), workspace)[-2:] == ["--max_train_time", "1.000s"]
    assert [launch["time"] for launch in launches(workspace, cell)] == ["90.000s"]


def test_a_training_for_another_time_is_not_taken_for_that_of_a_cell(workspace):
    cell = toy_cell("a", "time is up")
    assert train_cell(cell, MINUTES, workspace).kind == "trained"
    for minutes in (0.5, 1, 1.7):  # near enough to 40 seconds
        assert train_cell(cell, Budget(minutes=minutes), workspace).kind == "trained"
    assert len(launches(workspace, cell)) == 1
    assert train_cell(cell, Budget(minutes=3), workspace).kind == "trained"
    assert [launch["time"] for launch in launches(workspace, cell)] == ["90.000s", "140.000s"]  # for longer
    progress = next((workspace.run_folder(cell) / "checkpoints").glob("*/progress.json"))
    progress.write_text(json.dumps({"step": 20, "seconds": 400.0}))
    ending = train_cell(cell, Budget(minutes=3), workspace)
    assert ending.kind == "broken" and "a training of 400 s instead of 180 s: move " in ending.reason
    shutil.rmtree(workspace.run_folder(cell) / "checkpoints")  # as after its scores
    assert train_cell(cell, Budget(minutes=3), workspace).kind == "trained" and len(launches(workspace, cell)) == 2


def test_a_training_by_another_script_is_not_taken_for_that_of_a_cell(workspace):
    cell, script = toy_cell("a"), workspace.scripts / "train_gan.py"
    assert train_cell(cell, STEPS, workspace).kind == "trained"
    script.write_text(script.read_text() + "# improved\n")
    ending = train_cell(cell, STEPS, workspace)
    assert ending.kind == "broken" and len(launches(workspace, cell)) == 1
    folder = workspace.run_folder(cell)
    assert re.fullmatch(
        r"its folder holds a run of another script: training_scripts/train_gan.py: your own with SHA-256 \w{12} -> "
        rf"your own with SHA-256 \w{{12}}; move {folder} elsewhere, or use another --output",
        ending.reason,
    )
    workspace.script_file(cell).unlink()  # as of an earlier version
    assert train_cell(cell, STEPS, workspace).kind == "trained" and len(launches(workspace, cell)) == 1


def test_a_training_on_other_images_is_not_taken_for_that_of_a_cell(workspace):
    cell = toy_cell("a")
    assert train_cell(cell, STEPS, workspace).kind == "trained"
    file = workspace.run_folder(cell) / "launches.jsonl"
    noted = json.loads(file.read_text())
    file.write_text(json.dumps(noted | {"data_digest": launch.training_digest(cell, workspace)}) + "\n")
    assert train_cell(cell, STEPS, workspace).kind == "trained" and len(launches(workspace, cell)) == 1
    ending = train_cell(cell, STEPS, replace(workspace, dataset="toy_paintings:13"))
    assert ending.kind == "broken" and len(launches(workspace, cell)) == 1
    assert "a training on other images than toy_paintings:13: move " in ending.reason


def test_a_run_whose_time_was_up_is_trained_only_if_the_budget_was_the_time(workspace):
    cell = toy_cell("a", "time is up")
    ending = train_cell(cell, STEPS, workspace)
    assert (ending.kind, ending.step) == ("broken", 20)


@pytest.mark.parametrize("how", ["diverged", "collapsed"])
def test_a_training_that_goes_wrong_ends_as_diverged_with_reason_and_step(workspace, how):
    ending = train_cell(toy_cell("a", how), STEPS, workspace)
    assert (ending.kind, ending.reason, ending.step) == ("diverged", f"{how}: a loss is not finite", 3)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("refuse", "status 2: error: --resume latest: settings differ (saved -> now): batch_size: 4 -> 8"),
        ("raise", "status 1: RuntimeError: no space left"),
        ("mutter", "status 5: two / three"),
    ],
)
def test_a_launch_that_fails_is_broken_and_told_with_its_last_error(workspace, act, told):
    for _ in range(2):  # the log of an earlier launch is before that of this one
        ending = train_cell(toy_cell("a", act), STEPS, workspace)
        assert (ending.kind, ending.reason, ending.step) == ("broken", f"training ended with {told}", None)
    assert (workspace.output / "cells" / "a.log").read_text().count("$ ") == 2


def test_a_launch_that_fails_after_a_good_one_is_not_taken_for_good(workspace):
    train_cell(toy_cell("a"), STEPS, workspace)
    ending = train_cell(toy_cell("a", "refuse"), STEPS, workspace)
    assert (ending.kind, ending.step) == ("broken", 20)


def test_a_training_whose_cell_another_worker_has_is_told_to_stop(workspace, monkeypatch):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    cell, looked = toy_cell("a", "linger"), []
    folder = workspace.run_folder(cell)

    def has_lost():
        looked.append((folder / "begun").exists())
        return looked[-1]

    ending = train_cell(cell, STEPS, workspace, has_lost)
    assert (ending.kind, ending.step) == ("lost", None)
    assert looked.count(True) == 1 and len(looked) > 1
    assert json.loads((folder / "status.json").read_text())["step"] == 7  # it had time for a checkpoint


@pytest.mark.parametrize(("taken", "kind"), [(False, "trained"), (True, "lost")])
def test_an_earlier_training_in_the_folder_is_waited_for_unless_the_cell_is_taken(workspace, monkeypatch, taken, kind):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    cell, looked = toy_cell("a"), []
    lock, log = lock_folder(workspace.run_folder(cell)), workspace.output / "cells" / "a.log"

    def has_lost():
        looked.append(log.exists())
        if len(looked) == 3 and not taken:
            lock.release()
        return taken and len(looked) == 3

    assert train_cell(cell, STEPS, workspace, has_lost).kind == kind
    assert looked[:3] == [False] * 3 and log.exists() == (kind == "trained")
    lock.release()


def test_a_training_in_the_folder_that_does_not_stop_is_named(workspace, monkeypatch):
    monkeypatch.setattr(launch, "WAIT_SECONDS", 0.0)
    cell = toy_cell("a")
    folder = workspace.run_folder(cell)
    lock = lock_folder(folder)
    ending = train_cell(cell, STEPS, workspace)
    assert ending.kind == "in use" and ending.reason.startswith(f"{folder} is in use by process {os.getpid()} on ")
    lock.release()
    assert train_cell(cell, STEPS, workspace).kind == "trained"


def test_the_error_of_the_script_is_told_and_not_that_of_the_launcher_after_it():
    launcher = [f"  File launch.py, line {line}, in main" for line in range(14)]
    log = ["$ python first", "ValueError: of an earlier launch", "$ python second", "Error rates: none", "  indented"]
    log += ["Traceback (most recent call last):", "  File script.py", "torch.OutOfMemoryError: 2 GB"]
    log += ["Traceback (most recent call last):", *launcher, "subprocess.CalledProcessError: Command returned 1."]
    assert last_error("\n".join(log)) == "torch.OutOfMemoryError: 2 GB"
    assert last_error("$ python first\nerror: no\n$ python second\nquiet") == "quiet"
    assert last_error("$ python only\n") == ""


def test_data_that_are_a_path_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in (str(tmp_path), "~", "toy_paintings:12", "huggan/monet2photo", "."):
        check_data(workspace_in(tmp_path, named))
    for named in (str(tmp_path / "gone"), "~/gone", "./gone", "../gone/x", "C:\\gone"):
        with pytest.raises(UserError) as refusal:
            check_data(workspace_in(tmp_path, named))
        assert str(refusal.value).startswith(
            f"--dataset {named}: not on this machine; give the path of its images as --dataset"
        )


@pytest.mark.parametrize("there", [True, False])
def test_a_cell_for_cuda_needs_a_machine_that_has_it(monkeypatch, there):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    refused = None if there else "needs a CUDA device, which this machine does not have"
    assert missing_device(toy_cell("a", device="cuda")) == refused
    assert missing_device(toy_cell("a", device="cpu")) is missing_device(toy_cell("a")) is None


def test_the_launcher_asks_for_one_process_on_one_machine():
    asked = dict(zip(launch.LAUNCHER[2::2], launch.LAUNCHER[3::2], strict=True))
    assert asked["--num_processes"] == asked["--num_machines"] == "1"
    assert asked["--mixed_precision"] == asked["--dynamo_backend"] == "no"  # else the user's own configuration counts
