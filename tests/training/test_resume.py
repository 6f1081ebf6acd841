"""Continuing a run: in its folder or in another, with its settings or with others."""

import json
import os
import re
import shutil
import socket
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from line_method import CountedBatches, LinePipeline, LineSettings, fit, metrics
from toy_runs import checkpoint, files_of, train

import hfgen.training.lock
from hfgen.config import setting
from hfgen.errors import UserError
from hfgen.inference.gifs import progress_frames
from hfgen.training.checkpoints import list_checkpoints, load_progress
from hfgen.training.folder import claim_folder, has_started
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings, steps_for_images
from hfgen.training.state import RunState


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def newest(folder):
    return str(list_checkpoints(folder / "checkpoints")[-1])


def launches(folder):
    return [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]


def roll_back_once(run):
    if run.step == 4 and not run.rollbacks:
        run.report(good=False, trouble="all images are green")


def test_another_folder_continues_with_the_settings_given_now_and_says_so(tmp_path, capsys):
    fit(tmp_path / "old")
    run, _ = fit(tmp_path / "new", resume=newest(tmp_path / "old"), line=LineSettings(0.2), max_train_steps=8)
    assert run.learning_rate() == 0.2
    changes = ["learning_rate: 0.1 -> 0.2"]
    assert launches(tmp_path / "new")[0]["changed_settings"] == changes
    assert f"settings that differ from its run (before -> now): {', '.join(changes)}\n" in capsys.readouterr().out


@pytest.mark.parametrize("rollbacks", [0, 1])
def test_another_folder_with_the_same_settings_ends_bit_equal(tmp_path, rollbacks, capsys):
    options = {"each_step": roll_back_once if rollbacks else lambda run: None, "on_collapse": "rollback"}
    options |= {"checkpoint_every": 1, "checkpoints_total_limit": 9}
    uninterrupted, network = fit(tmp_path / "old", **options)
    checkpoint = tmp_path / "old" / "checkpoints" / "step-00000005"
    assert load_progress(checkpoint)["rollbacks"] == rollbacks
    resumed, continued = fit(tmp_path / "new", resume=str(checkpoint), **options)
    assert torch.equal(network.weight, continued.weight)
    assert uninterrupted.learning_rate() == resumed.learning_rate() == 0.1 * 0.5**rollbacks
    assert "changed_settings" not in launches(tmp_path / "new")[0]
    told = "learning rates halved 1 times by rollbacks so far"
    assert (told in capsys.readouterr().out) == bool(rollbacks)


def test_a_run_killed_before_its_first_checkpoint_still_continues_the_other(tmp_path, monkeypatch):
    fit(tmp_path / "old", max_train_steps=3)
    monkeypatch.chdir(tmp_path)
    origin = newest(tmp_path / "old")

    def kill(run):
        raise KeyboardInterrupt

    for resume in (os.path.relpath(origin), "latest", "latest"):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "new", resume=resume, each_step=kill)
        assert json.loads((tmp_path / "new" / "training_config.json").read_text())["resume"] == origin
    monkeypatch.chdir("/")
    fit(tmp_path / "new", resume="latest")
    assert [launch["from_step"] for launch in launches(tmp_path / "new")] == [3, 3, 3, 3]
    assert [entry["step"] for entry in metrics(tmp_path / "new")] == [4, 5, 6]


def test_a_finished_run_given_more_steps_ends_like_one_that_had_them_from_the_start(tmp_path, capsys):
    _, network = fit(tmp_path / "long", max_train_steps=9)
    fit(tmp_path / "run")
    fit(tmp_path / "run", resume="latest")
    assert "the run is complete; to extend it, give a larger --max_train_steps" in capsys.readouterr().out
    _, extended = fit(tmp_path / "run", resume="latest", max_train_steps=9)
    assert torch.equal(network.weight, extended.weight)
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, 10))
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["max_train_steps"] == 9
    _, by_epochs = fit(tmp_path / "run", resume="latest", max_train_steps=None, num_epochs=3)  # 4 images, 1 a step
    assert len(metrics(tmp_path / "run")) == 12


def test_fewer_steps_than_a_run_has_had_are_refused_and_change_nothing(tmp_path):
    fit(tmp_path / "run")
    before = files_of(tmp_path / "run")
    with pytest.raises(UserError, match="--max_train_steps.* end at step 4, but .*step-00000006 is already at step 6"):
        fit(tmp_path / "run", resume="latest", max_train_steps=4)
    assert files_of(tmp_path / "run") == before


@dataclass
class PlannedSettings(LineSettings):
    lr_scheduler: str = setting("cosine", "schedule")


def test_another_length_of_a_planned_schedule_is_refused_with_the_way_that_works(tmp_path):
    fit(tmp_path / "run", line=PlannedSettings())
    before = files_of(tmp_path / "run")
    way = "continue with these in another folder: --resume .*step-00000006 --output_dir NEW$"
    with pytest.raises(UserError, match=rf"cosine schedule .*\(max_train_steps: 6 -> 9\); .*{way}") as error:
        fit(tmp_path / "run", line=PlannedSettings(), resume="latest", max_train_steps=9)
    assert "\n" not in str(error.value) and files_of(tmp_path / "run") == before
    run, _ = fit(tmp_path / "new", line=PlannedSettings(), resume=newest(tmp_path / "run"), max_train_steps=9)
    assert run.step == 9


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize("left", [["intake.json"], ["intake.json", "metrics.jsonl", "logs/events"]])
def test_the_folder_of_a_start_that_failed_takes_the_corrected_command(tmp_path, resume, left):
    Run(RunSettings(output_dir=str(tmp_path / "run"), report_to="none", cpu=True), LineSettings(0.3))
    (tmp_path / "run" / "logs").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    fit(tmp_path / "run", resume=resume)
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["learning_rate"] == 0.1


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_second_run_in_a_folder_is_refused_and_told_who_has_it(tmp_path, monkeypatch, resume):
    monkeypatch.setattr(hfgen.training.lock, "WAIT_SECONDS", 0.1)
    holder = f"in use by process {os.getpid()} on {socket.gethostname()} since 20"

    def start_another(run):
        if run.step in (1, 5):  # before the first checkpoint, and after one
            before = files_of(tmp_path)
            with pytest.raises(UserError, match=f"--output_dir .*run: {re.escape(holder)}.*; stop that run, wait"):
                fit(tmp_path / "run", resume=resume)
            assert files_of(tmp_path) == before

    fit(tmp_path / "run", each_step=start_another)
    fit(tmp_path / "run", resume="latest")  # free again


def test_a_folder_that_cannot_be_locked_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    def refuse(lock, timeout):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(hfgen.training.lock.FileLock, "acquire", refuse)
    run, _ = fit(tmp_path / "run")
    assert run.step == 6 and "run cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().out


def test_a_lock_is_not_left_in_a_folder_of_somebody_else_s(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    for resume in (None, "latest"):
        with pytest.raises(UserError, match="--output_dir"):
            fit(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_moved_run_resumes_where_it_is_now(tmp_path):
    fit(tmp_path / "old", max_train_steps=3)
    (tmp_path / "old").rename(tmp_path / "new")
    run, _ = fit(tmp_path / "new", resume="latest", max_train_steps=3)
    assert run.step == 3


def test_images_of_earlier_steps_count_as_they_were(tmp_path):
    fit(tmp_path / "old")
    fit(tmp_path / "new", resume=newest(tmp_path / "old"), images_per_step=5, max_train_steps=8)
    assert [entry["images"] for entry in metrics(tmp_path / "new")] == [11, 16]
    assert load_progress(list_checkpoints(tmp_path / "new" / "checkpoints")[-1])["images"] == 16


def optimized(learning_rate, beta1, weight_decay, warmup_steps, kind="cosine"):
    """An optimizer with its schedule after no update, and the state of both."""
    torch.manual_seed(0)
    network, accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True)
    settings = {"lr": learning_rate, "betas": (beta1, 0.99), "weight_decay": weight_decay, "fused": True}
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters(), **settings))
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=9)
    parts = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule}
    return parts, RunState(parts, CountedBatches(), LinePipeline(network), "d", accelerator)


def update(parts, times):
    """Train so many steps; return the learning rate of each."""
    rates = []
    for _ in range(times):
        parts["network"](torch.ones(3, 1)).square().mean().backward()
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["lr_scheduler"].step()
        parts["optimizer"].zero_grad()
    return rates


@pytest.mark.parametrize(
    "now", [(0.3, 0.5, 0.1, 2), (0.3, 0.8, 0.2, 2), (0.7, 0.5, 0.1, 0), (0.3, 0.5, 0.1, 2, "linear")]
)
def test_optimizer_and_schedule_have_the_settings_given_now(tmp_path, now):
    before = (0.3, 0.5, 0.1, 2)
    parts, state = optimized(*before)
    update(parts, 4)
    state.save(tmp_path, {"step": 4}, 1)
    expected_rates, expected = update(parts, 4), parts["network"].weight.detach().clone()
    resumed, state = optimized(*now)
    state.load(*list_checkpoints(tmp_path))
    group = resumed["optimizer"].param_groups[0]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((now[1], 0.99), now[2], now[0])
    rates = update(resumed, 4)
    anew, _ = optimized(*now)
    assert rates == update(anew, 8)[4:]
    if now == before:
        assert rates == expected_rates and torch.equal(resumed["network"].weight, expected)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"network": torch.nn.Linear(2, 1)}, "its network does not match the current settings .*size mismatch"),
        ({"unet": torch.nn.Linear(1, 1)}, "it has no unet; it was trained by another method"),
        ({"network": torch.nn.Linear(1, 1, bias=False), "optimizer": torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
        )}, "its optimizer does not match the current settings"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_networks_is_refused_in_one_line(tmp_path, parts, told):
    fit(tmp_path / "old")
    state = RunState(parts, CountedBatches(), LinePipeline(None), "d", Accelerator(cpu=True))
    with pytest.raises(UserError, match=f"--resume .*step-00000006: {told}") as error:
        state.load(*list_checkpoints(tmp_path / "old" / "checkpoints")[-1:])
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_created_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("a file, where a folder is needed")
    with pytest.raises(UserError, match=r"--output_dir .*run: cannot be created, because .*file is not a folder"):
        claim_folder(tmp_path / "file" / "run", None, [])


@pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(12, 2, 5), (2, 1, 6)])
def test_epochs_count_the_images_of_batches_of_another_size(tmp_path, batch_size, epochs, steps):
    """Of 24 images, two batches of 8 are done: 32 are left of two epochs, and 8 of one."""
    train("gan", tmp_path / "run", "--batch_size", "8", "--max_train_steps", "2")
    arguments = ("--batch_size", str(batch_size), "--max_train_steps", "999", "--num_epochs", str(epochs))
    train("gan", tmp_path / "more", *arguments, "--resume", checkpoint(tmp_path / "run", 2))
    log = [json.loads(line) for line in (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()]
    end = json.loads((checkpoint(tmp_path / "more", steps) / "progress.json").read_text())
    assert end["step"] == steps and end["images"] == 16 + batch_size * (steps - 2)
    assert log[-1]["images"] == end["images"]


def test_the_images_of_hfgen_train_count_those_of_batches_of_another_size(tmp_path):
    (tmp_path / "progress.json").write_text(json.dumps({"step": 100, "images": 1600}))
    assert steps_for_images(3200, 16, tmp_path) == 200
    assert steps_for_images(3200, 64, tmp_path) == 125
    assert steps_for_images(1000, 64, tmp_path) == 91  # which is refused: it has had more
    assert steps_for_images(1, 1, tmp_path) == 0
    assert steps_for_images(3200, 64, None) == 50
    (tmp_path / "progress.json").write_text(json.dumps({"step": 100}))  # of an earlier version
    assert steps_for_images(3200, 16, tmp_path) == 200


def test_a_trained_pipeline_without_checkpoints_is_not_overwritten_by_a_new_start(tmp_path):
    train("gan", tmp_path / "run", "--max_train_steps", "4")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # to save space
    before = files_of(tmp_path / "run")
    told = rf"--resume latest: {tmp_path}/run has a trained pipeline, but no checkpoint .*--init_from {tmp_path}/run"
    with pytest.raises(UserError, match=told):
        train("gan", tmp_path / "run", "--resume", "latest", "--max_train_steps", "8")
    assert files_of(tmp_path / "run") == before
    train("gan", tmp_path / "new", "--init_from", tmp_path / "run", "--max_train_steps", "1")  # as the message says


def test_a_checkpoint_may_be_given_by_its_name(tmp_path):
    fit(tmp_path / "run")
    run, _ = fit(tmp_path / "run", resume="step-00000004", max_train_steps=5)
    assert [launch["from_step"] for launch in launches(tmp_path / "run")] == [0, 4] and run.step == 5
    with pytest.raises(UserError, match="--resume step-00000077: not a checkpoint"):
        fit(tmp_path / "run", resume="step-00000077")


def test_sheets_of_abandoned_steps_are_not_those_of_the_run(tmp_path, capsys):
    train("gan", tmp_path / "run", "--sample_every", "2")
    train("gan", tmp_path / "run", "--sample_every", "2", "--resume", "step-00000002", "--max_train_steps", "3")
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == [*(f"abandoned-step-0000000{step}.png" for step in (4, 6)),
                     *(f"step-0000000{step}.png" for step in (0, 2, 3))]  # fmt: skip
    assert f"sample sheet: {tmp_path / 'run'}/samples/step-00000003.png" in capsys.readouterr().out
    assert len(progress_frames(tmp_path / "run")) == 3


def test_a_first_sheet_is_nothing_to_lose(tmp_path):
    """The first update may run out of memory, or diverge, and the user lowers a setting."""
    folder = tmp_path / "run"
    train("gan", folder, "--max_train_steps", "1", "--checkpoint_every", "0", "--sample_every", "1")
    assert has_started(folder)
    for name in ("metrics.jsonl", "samples/step-00000001.png", "training_images/step-00000001.png"):
        (folder / name).unlink()
    for name in ("checkpoints", "pipeline", "training_images"):
        shutil.rmtree(folder / name, ignore_errors=True)
    assert not has_started(folder)
    train("gan", folder, "--learning_rate", "1e-5")
    (folder / "samples" / "mine.png").touch()
    assert has_started(folder)
