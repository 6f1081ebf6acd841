"""The rails, on a method of three lines: a straight line fitted to points."""

import io
import json
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from line_method import LineSettings, fit, metrics, status
from PIL import Image

from hfgen.errors import UserError
from hfgen.hardware import seed_global_generator
from hfgen.integrity import record_digests
from hfgen.training.folder import list_results
from hfgen.training.log import TrainingBar
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings
from hfgen.training.trouble import NonFiniteError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_a_finished_run_leaves_its_settings_log_checkpoints_and_pipeline(tmp_path):
    run, network = fit(tmp_path / "run", checkpoints_total_limit=2)
    run.finish()
    folder = tmp_path / "run"
    assert json.loads((folder / "training_config.json").read_text())["learning_rate"] == 0.1
    assert [entry["step"] for entry in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert float((folder / "pipeline" / "weight.txt").read_text()) == network.weight.item()
    assert status(folder)["status"] == "complete"
    launch = json.loads((folder / "launches.jsonl").read_text())
    assert (
        launch["from_step"] == 0
        and launch["num_processes"] == 1
        and launch["torch"] == torch.__version__.split("+")[0]
    )


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, step):
    _, uninterrupted = fit(tmp_path / "run", checkpoints_total_limit=9)
    entries = metrics(tmp_path / "run")
    run, resumed = fit(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
    assert torch.equal(uninterrupted.weight, resumed.weight)
    timeless = [{key: entry[key] for key in ("step", "loss")} for entry in metrics(tmp_path / "run")]
    assert timeless == [{key: entry[key] for key in ("step", "loss")} for entry in entries]
    assert json.loads((tmp_path / "run" / "launches.jsonl").read_text().splitlines()[1])["from_step"] == step


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone(tmp_path):
    drawn = {}

    def draw(name):
        def each_step(run):
            drawn[name, run.step] = (torch.randn(2, generator=run.generator("noise")).tolist(), torch.rand(1).item())

        return each_step

    fit(tmp_path / "a", each_step=draw("a"))
    fit(tmp_path / "b", each_step=draw("b"))
    fit(tmp_path / "c", each_step=draw("c"), seed=1)
    assert all(drawn["a", step] == drawn["b", step] for step in range(1, 7))
    assert all(drawn["a", step] != drawn["c", step] for step in range(1, 7))
    assert len({str(drawn["a", step]) for step in range(1, 7)}) == 6


def test_latest_starts_anew_where_there_is_nothing_yet(tmp_path):
    run, _ = fit(tmp_path / "run", resume="latest")
    assert run.step == 6


def test_resuming_a_complete_run_trains_no_further(tmp_path):
    _, network = fit(tmp_path / "run")
    run, again = fit(tmp_path / "run", resume="latest")
    run.finish()
    assert torch.equal(network.weight, again.weight)
    assert status(tmp_path / "run")["status"] == "complete"


def test_a_folder_with_a_run_is_not_clobbered(tmp_path):
    fit(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--output_dir .*run is not empty.*--resume latest"):
        fit(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_something_else_is_left_alone_even_when_resuming(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="is not the folder of a run"):
        fit(tmp_path, resume="latest")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_changed_settings_are_refused_with_the_differences(tmp_path):
    fit(tmp_path / "run")
    config = (tmp_path / "run" / "training_config.json").read_text()
    with pytest.raises(UserError) as error:
        fit(tmp_path / "run", resume="latest", seed=3, cpu=False, log_every=5, line=LineSettings(0.2))
    told = str(error.value).splitlines()[1:-1]
    assert told == ["  cpu: True -> False", "  learning_rate: 0.1 -> 0.2", "  seed: 0 -> 3"]
    assert (tmp_path / "run" / "training_config.json").read_text() == config


def test_other_data_is_refused(tmp_path):
    fit(tmp_path / "run")
    config = (tmp_path / "run" / "training_config.json").read_text()
    with pytest.raises(UserError, match="--dataset: these are not the images that .*step-00000006 was"):
        fit(tmp_path / "run", resume="latest", digest="other", log_every=5)
    assert (tmp_path / "run" / "training_config.json").read_text() == config
    (tmp_path / "run" / "intake.json").write_text('{"images": 40}')
    with pytest.raises(
        UserError, match=r"step-00000006 was trained on \(40 images then\); give the same images, without"
    ):
        fit(tmp_path / "run", resume="latest", digest="other", log_every=5)


def test_settings_that_may_change_are_kept_as_they_are_now(tmp_path):
    fit(tmp_path / "run", log_every=1)
    fit(tmp_path / "run", resume="latest", log_every=5)
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["log_every"] == 5


def test_losses_are_logged_as_means_over_the_steps_between(tmp_path):
    fit(tmp_path / "each")
    fit(tmp_path / "pairs", log_every=2)
    each, pairs = metrics(tmp_path / "each"), metrics(tmp_path / "pairs")
    assert [entry["step"] for entry in pairs] == [2, 4, 6]
    for index, entry in enumerate(pairs):
        mean = (each[2 * index]["loss"] + each[2 * index + 1]["loss"]) / 2
        assert entry["loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("max_train_steps", "num_epochs", "steps"), [(None, 1.1, 5), (3, 1.1, 3), (6, 1.1, 5), (3, None, 3)]
)
def test_a_run_ends_with_its_steps_or_its_epochs_whichever_come_first(tmp_path, max_train_steps, num_epochs, steps):
    run, _ = fit(tmp_path / "run", max_train_steps=max_train_steps, num_epochs=num_epochs)  # 4 images, 1 a step
    assert run.step == steps


def test_without_steps_or_epochs_a_run_has_a_hundred_thousand(tmp_path):
    run = Run(RunSettings(output_dir=str(tmp_path / "run"), report_to="none", cpu=True))
    assert run.plan(images_per_step=64, images_per_epoch=None) == 100_000


def test_a_stream_has_no_epochs(tmp_path):
    for name, steps in (("epochs", None), ("both", 9)):
        settings = {"max_train_steps": steps, "num_epochs": 2.0, "report_to": "none", "cpu": True}
        run = Run(RunSettings(output_dir=str(tmp_path / name), **settings))
        with pytest.raises(UserError, match="--num_epochs 2: a stream has no length; give --max_train_steps instead"):
            run.plan(images_per_step=1, images_per_epoch=None)


def test_sigterm_ends_the_run_with_a_checkpoint_and_its_own_exit_status(tmp_path):
    def each_step(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run, _ = fit(tmp_path / "run", each_step=each_step, checkpoint_every=0)
    assert run.step == 3
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    with pytest.raises(SystemExit) as exit_info:
        run.finish()
    assert exit_info.value.code == 143
    assert status(tmp_path / "run") == {
        **status(tmp_path / "run"),
        "status": "stopped",
        "reason": "stopped by SIGTERM",
    }
    resumed, network = fit(tmp_path / "run", resume="latest", checkpoint_every=0)
    _, uninterrupted = fit(tmp_path / "other")
    assert torch.equal(network.weight, uninterrupted.weight)


def test_the_time_budget_ends_the_run_with_a_checkpoint(tmp_path, capsys):
    run, _ = fit(tmp_path / "run", max_train_time="0.001s", checkpoint_every=0)
    run.finish()
    assert run.step == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
    assert "run the same command with --resume latest" in capsys.readouterr().out
    assert status(tmp_path / "run")["reason"] == "time is up"


def test_another_number_of_processes_is_refused(tmp_path):
    fit(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(progress | {"num_processes": 2}))
    record_digests(checkpoint, ["progress.json", "state.pt"])
    with pytest.raises(UserError, match="num_processes was 2 and is now 1; it must not change on resume"):
        fit(tmp_path / "run", resume="latest", max_train_steps=8)


def test_no_step_is_begun_for_which_the_time_does_not_suffice(tmp_path, monkeypatch):
    """Of 25 seconds two steps of ten seconds each are left: a third would end after the limit."""
    passed, real = [0.0], time.monotonic

    def slow(run):
        passed[0] += 10

    monkeypatch.setattr("hfgen.training.run.time.monotonic", lambda: real() + passed[0])
    run, _ = fit(tmp_path / "run", max_train_time="25s", checkpoint_every=0, each_step=slow)
    assert run.step == 2


def test_the_random_numbers_of_two_processes_differ(tmp_path):
    run, _ = fit(tmp_path / "run", max_train_steps=1)
    alone = torch.rand(3, generator=run.generator("noise"))
    run.accelerator = SimpleNamespace(process_index=1)
    other = torch.rand(3, generator=run.generator("noise"))
    run.accelerator.process_index = 0
    assert not torch.equal(alone, other) and torch.equal(alone, torch.rand(3, generator=run.generator("noise")))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    def each_step(run):
        if run.step == 4:
            run.log({"loss": torch.tensor(float("nan"))})

    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path / "run", each_step=each_step, log_every=100)
    told = str(error.value)
    assert "stopped at step 4" in told and "learning_rate=0.1" in told and "step-00000002" in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert status(tmp_path / "run")["status"] == "diverged"


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    def each_step(run):
        if run.step == 4:
            with torch.no_grad():
                run._state.pipeline.network.weight.fill_(float("inf"))

    with pytest.raises(NonFiniteError, match="non-finite weights in network"):
        fit(tmp_path / "run", each_step=each_step)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_sheets_of_samples_follow_the_cadence_and_the_last_step(tmp_path):
    def each_step(run):
        if run.sample_due:
            run.save_sheet(Image.new("RGB", (4, 4)))

    fit(tmp_path / "run", each_step=each_step, sample_every=4)
    names = [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step-00000004.png", "step-00000006.png"]


@pytest.mark.parametrize(
    ("steps", "logged", "sheets"),
    [(6, 1, 10), (40, 1, 10), (100, 2, 10), (1000, 25, 100), (62_500, 50, 1000), (10**8, 50, 1000)],
)
def test_short_runs_log_and_sample_often_enough_for_a_curve_and_a_film(steps, logged, sheets):
    settings = RunSettings()
    assert (settings.log_interval(steps), settings.sample_interval(steps)) == (logged, sheets)
    settings = RunSettings(log_every=7, sample_every=0)
    assert (settings.log_interval(steps), settings.sample_interval(steps)) == (7, 0)


def test_sheets_and_checkpoints_are_announced_and_the_best_sheet_named_last(tmp_path, capsys):
    def each_step(run):
        if run.sample_due:
            run.save_sheet(Image.new("RGB", (4, 4)))
            run.save_sheet(Image.new("RGB", (4, 4)), "others")

    run, _ = fit(tmp_path / "run", each_step=each_step, sample_every=2)
    printed, samples = capsys.readouterr().out.splitlines(), tmp_path / "run" / "samples"
    for step in (2, 4, 6):
        assert f"step {step}: sample sheet {samples / f'step-{step:08d}.png'}" in printed
        assert f"step {step}: checkpoint {tmp_path / 'run' / 'checkpoints' / f'step-{step:08d}'}" in printed
    assert not any("others" in line for line in printed)
    run.finish()
    assert capsys.readouterr().out.splitlines()[-1] == f"sample sheet: {samples / 'step-00000006.png'}"
    scores = {"step": 4, "num_images": 9, "fid": 1.0, "kid": 0.1, "copying": False}
    (tmp_path / "run" / "best").mkdir()
    (tmp_path / "run" / "best" / "scores.json").write_text(json.dumps(scores))
    assert list_results(tmp_path / "run")[-1] == f"sample sheet: {samples / 'step-00000004.png'}"
    (tmp_path / "run" / "ex_post").mkdir()
    (tmp_path / "run" / "ex_post" / "step-00000006.png").touch()
    assert list_results(tmp_path / "run")[-1] == f"sample sheet: {tmp_path / 'run' / 'ex_post' / 'step-00000006.png'}"
    (samples / "step-00000008.png").touch()  # the run was prolonged, and has not fitted its density again
    assert list_results(tmp_path / "run")[-1] == f"sample sheet: {samples / 'step-00000004.png'}"
    shutil.rmtree(tmp_path / "run" / "best")
    assert list_results(tmp_path / "run")[-1] == f"sample sheet: {samples / 'step-00000008.png'}"


def test_a_new_run_shows_its_untrained_network_and_a_resumed_one_does_not(tmp_path):
    due = []
    for resume in (None, "latest"):
        run = fit(tmp_path / "run", before=lambda run: due.append(run.first_sheet_due), resume=resume)[0]
        run.finish()
    fit(tmp_path / "other", before=lambda run: due.append(run.first_sheet_due), sample_every=0)
    assert due == [True, False, False]


@pytest.mark.parametrize(
    ("steps", "time_limit", "seconds", "shown"),
    [
        (62_500, None, 2.0, " 38%| 23779/62500, 21:30:4"),
        (10**8, 7200.0, 1800.5, " 25%| step 23779, 1:29:59 left"),
        (62_500, 7200.0, 0.01, " 38%| step 23779, 06:27 left"),  # the steps end before the time
    ],
)
def test_the_bar_keeps_its_bar_and_the_time_left_in_80_columns(steps, time_limit, seconds, shown):
    with TrainingBar(23_778, steps, time_limit, False) as bar:
        bar.fp, bar.ncols, bar.dynamic_ncols = io.StringIO(), 80, None
        bar.set_postfix_str("d 1.39, g 0.847, 19.2 images/s", refresh=False)
        bar.update()
        bar.start_t = bar._time() - seconds
        line = str(bar)
    share, drawn, rest = line.split("|")
    assert len(line) <= 80 and len(drawn) >= 10
    assert f"{share}|{rest}".startswith(shown) and rest.endswith(" left, d 1.39, g 0.847, 19.2 images/s")


def test_after_a_rollback_behind_the_start_the_bar_does_not_know_the_time_left():
    with TrainingBar(100, 1000, None, False) as bar:
        bar.fp = io.StringIO()
        bar.n = 90
        assert "90/1000, ? left" in str(bar)


@pytest.fixture
def event_accumulator(monkeypatch):
    """TensorBoard's reader, for files of one second in the wrong order: in their names, 9 comes after 10 as text."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", SimpleNamespace(get=iter(range(9, 0, -1)).__next__))
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_shows_losses_and_sheets_and_forgets_what_a_kill_undid(tmp_path, event_accumulator):
    def each_step(run):
        if run.sample_due:
            run.save_sheet(Image.new("RGB", (4, 4), "red"))

    def logged(folder):
        return event_accumulator.EventAccumulator(str(folder / "logs" / "hfgen")).Reload()

    settings = {"each_step": each_step, "report_to": "tensorboard", "sample_every": 6}
    fit(tmp_path / "run", checkpoints_total_limit=9, **settings)
    resume = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    run, _ = fit(tmp_path / "run", resume=resume, **settings)
    run.finish()
    events = logged(tmp_path / "run")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    losses = [entry["loss"] for entry in metrics(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Images("samples")] == [6]

    def kill(run):
        if run.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before its first checkpoint, so it begins again
        fit(tmp_path / "killed", **settings | {"each_step": kill, "checkpoint_every": 5})
    run, _ = fit(tmp_path / "killed", resume="latest", **settings)
    run.finish()
    assert [event.step for event in logged(tmp_path / "killed").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_forgets_what_a_rollback_undid(tmp_path, event_accumulator):
    def each_step(run):
        is_green = run.step == 5 and not run.rollbacks
        run.report(good=True, trouble="all images are green" if is_green else None)

    run, _ = fit(
        tmp_path / "run", each_step=each_step, on_collapse="rollback", report_to="tensorboard", checkpoint_every=3
    )
    run.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "hfgen")).Reload()
    assert run.rollbacks == 1 and [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [entry["loss"] for entry in metrics(tmp_path / "run")]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_train_steps", 0), ("log_every", 0), ("checkpoint_every", -1), ("num_epochs", 0.0), ("max_train_time", "x")],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        RunSettings(**{name: value})


def test_fp16_without_cuda_is_refused_and_not_ignored(tmp_path):
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a CUDA device"):
        fit(tmp_path / "run", mixed_precision="fp16")


def test_a_tracker_that_is_not_installed_is_named_and_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((UserError, ValueError), match="wandb"):
        fit(tmp_path / "run", report_to="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the latter stands for a device of which nothing is known
def test_the_global_generator_is_seeded_as_torch_does_it(device):
    seed_global_generator(2**62 + 5, torch.device(device))
    drawn = torch.rand(3)
    torch.manual_seed(2**62 + 5)
    assert torch.equal(drawn, torch.rand(3))
