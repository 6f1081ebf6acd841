"""The rails, on a method of three lines: a straight line fitted to points."""

import json
import os
import signal
import sys
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from hfgen.checkpoints import list_checkpoints, load_progress
from hfgen.config import setting
from hfgen.errors import UserError
from hfgen.run import Run
from hfgen.run_settings import RunSettings
from hfgen.trouble import CollapseError, NonFiniteError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@dataclass
class LineSettings:
    learning_rate: float = setting(0.1, "of SGD")


class CountedBatches:
    """Hands out 1, 2, 3, ...: a source with a position."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return torch.tensor([float(self.position)])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


class LinePipeline:
    """Saves the weight, as a diffusers pipeline saves its network."""

    def __init__(self, network):
        self.network = network

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "weight.txt").write_text(repr(self.network.weight.item()))


def fit(folder, *, each_step=lambda run: None, digest="d", line=None, on_collapse="stop", **settings):
    """Run the method and return the run and its network."""
    defaults = {"max_train_steps": 6, "checkpoint_every": 2, "log_every": 1, "report_to": "none", "cpu": True}
    settings = RunSettings(output_dir=str(folder), **{**defaults, **settings})
    run = Run(settings, line or LineSettings())
    run.plan(images_per_step=1, images_per_epoch=4)
    network = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=(line or LineSettings()).learning_rate, momentum=0.9)
    batches = CountedBatches()
    stateful = {"network": network, "optimizer": optimizer}
    run.restore(stateful, batches, LinePipeline(network), digest, on_collapse, max_rollbacks=2)
    run.learning_rate = lambda: optimizer.param_groups[0]["lr"]
    for _ in run.steps():
        point = next(batches) / 6 + torch.randn(1, generator=run.generator("noise")) + torch.randn(1) * 0.1
        loss = (network(point) - 2 * point).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"loss": loss}, {"learning_rate": 0.1})
        each_step(run)
    return run, network


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder):
    return json.loads((folder / "status.json").read_text())


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
    with pytest.raises(UserError, match="holds no run"):
        fit(tmp_path, resume="latest")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_changed_settings_are_refused_with_the_differences(tmp_path):
    fit(tmp_path / "run")
    config = (tmp_path / "run" / "training_config.json").read_text()
    with pytest.raises(UserError) as error:
        fit(tmp_path / "run", resume="latest", seed=3, max_train_steps=8, log_every=5, line=LineSettings(0.2))
    told = str(error.value).splitlines()[1:-1]
    assert told == ["  learning_rate: 0.1 -> 0.2", "  max_train_steps: 6 -> 8", "  seed: 0 -> 3"]
    assert (tmp_path / "run" / "training_config.json").read_text() == config


def test_other_data_is_refused(tmp_path):
    fit(tmp_path / "run")
    with pytest.raises(UserError, match="data_digest was 'd' and is 'other' now"):
        fit(tmp_path / "run", resume="latest", digest="other")


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
    run = Run(RunSettings(output_dir=str(tmp_path / "run"), num_epochs=2.0, report_to="none", cpu=True))
    with pytest.raises(UserError, match="--num_epochs.*--max_train_steps"):
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
    assert "--resume latest goes on from here" in capsys.readouterr().out
    assert status(tmp_path / "run")["reason"] == "time is up"


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

    with pytest.raises(NonFiniteError, match="a weight of network is not finite"):
        fit(tmp_path / "run", each_step=each_step)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


# ---------------------------------------------------------------------------------------------- trouble, and way back


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def collapse_at(step, times=99):
    """Report a good run until `step`, and there that it has collapsed, so many times; note the learning rates."""

    def each_step(run):
        each_step.rates[run.step, run.rollbacks] = run.learning_rate()
        if run.step == step and len(each_step.collapses) < times:
            each_step.collapses.append(run.step)
            run.report(good=False, trouble="all images are green")
        else:
            run.report(good=run.step < step)

    each_step.rates, each_step.collapses = {}, []
    return each_step


def test_after_a_collapse_the_run_goes_on_from_the_last_good_checkpoint_with_half_the_rate(tmp_path):
    watched = collapse_at(5, times=1)
    run, network = fit(tmp_path / "run", each_step=watched, on_collapse="rollback", checkpoint_every=1)
    assert (run.step, run.rollbacks) == (6, 1)
    assert [run for run in watched.rates if run[1] == 1] == [(5, 1), (6, 1)]  # back to step 4, which was good
    assert {key[1]: rate for key, rate in watched.rates.items()} == {0: 0.1, 1: 0.05}
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (5, "rollback") and "all images are green" in event["what"]


def test_after_a_rollback_other_random_numbers_are_drawn(tmp_path):
    drawn = {}

    def each_step(run):
        drawn[run.step, run.rollbacks] = torch.randn(1, generator=run.generator("x")).item(), torch.randn(1).item()
        collapse(run)

    collapse = collapse_at(5, times=1)
    fit(tmp_path / "run", each_step=each_step, on_collapse="rollback")
    assert drawn[5, 0][0] != drawn[5, 1][0] and drawn[5, 0][1] != drawn[5, 1][1]


def test_after_so_many_rollbacks_the_run_gives_up_and_says_what_is_left(tmp_path):
    watched = collapse_at(5)
    with pytest.raises(CollapseError) as stopped:
        fit(tmp_path / "run", each_step=watched, on_collapse="rollback")
    told = str(stopped.value)
    assert "stopped at step 5 after 2 rollbacks: all images are green (" in told and "learning_rate=0.1" in told
    assert "step-00000004" in told and "--augment diffaugment" in told
    assert {key[1]: rate for key, rate in watched.rates.items()} == {0: 0.1, 1: 0.05, 2: 0.025}
    assert status(tmp_path / "run")["status"] == "collapsed"
    assert [event["event"] for event in events(tmp_path / "run")] == ["rollback", "rollback", "collapsed"]
    assert not (tmp_path / "run" / "pipeline").exists()


def test_checkpoints_made_while_it_went_badly_are_dropped_and_the_good_one_outlives_the_limit(tmp_path):
    seen = []

    def each_step(run):
        seen.append([path.name[-1] for path in list_checkpoints(tmp_path / "run" / "checkpoints")])
        if run.step == 6 and not run.rollbacks:
            run.report(good=False, trouble="all images are green")
        else:
            run.report(good=run.step <= 2 or run.rollbacks > 0)

    fit(tmp_path / "run", each_step=each_step, on_collapse="rollback", checkpoint_every=1, checkpoints_total_limit=2)
    # Before steps 1 to 6, then, after the return to step 2, before steps 3 to 6.
    before = [[], ["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"]]
    assert seen == [*before, ["2"], ["2", "3"], ["3", "4"], ["4", "5"]]
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]  # 3 to 5 were logged twice


def test_a_loss_that_is_not_finite_leads_back_as_well(tmp_path):
    def each_step(run):
        run.report(good=True)
        if run.step == 4 and run.rollbacks == 0:
            with torch.no_grad():
                run._state.pipeline.network.weight.fill_(float("nan"))

    run, network = fit(tmp_path / "run", each_step=each_step, on_collapse="rollback", checkpoint_every=1)
    assert run.rollbacks == 1 and network.weight.isfinite().all()
    assert "a weight of network is not finite; back to step-00000003" in events(tmp_path / "run")[0]["what"]


def test_without_a_good_checkpoint_there_is_no_way_back(tmp_path):
    def each_step(run):
        run.report(good=False, trouble="it has not taken off" if run.step == 5 else None)

    with pytest.raises(CollapseError, match="stopped at step 5: it has not taken off .*Last good checkpoint: none"):
        fit(tmp_path / "run", each_step=each_step, on_collapse="rollback")
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2  # they are left for whoever wants to look


def test_a_run_that_shall_stop_stops_at_once_and_one_that_shall_be_warned_goes_on(tmp_path, capsys):
    with pytest.raises(CollapseError, match="stopped at step 5: all images are green"):
        fit(tmp_path / "stop", each_step=collapse_at(5), on_collapse="stop")
    run, _ = fit(tmp_path / "warn", each_step=collapse_at(5), on_collapse="warn")
    assert (run.step, run.rollbacks) == (6, 0)
    (event,) = events(tmp_path / "warn")
    assert (event["step"], event["event"]) == (5, "warning") and "all images are green" in event["what"]
    assert "warning: step 5: all images are green" in capsys.readouterr().out


def test_a_run_resumed_behind_a_rollback_ends_bit_equal(tmp_path):
    def train(folder, **settings):
        watched = collapse_at(4, times=1 if "resume" not in settings else 0)
        _, network = fit(
            folder, each_step=watched, on_collapse="rollback", checkpoint_every=1, max_train_steps=9,
            checkpoints_total_limit=99, **settings,
        )  # fmt: skip
        return network.weight.item()

    uninterrupted = train(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert load_progress(checkpoint)["rollbacks"] == 1
    assert train(tmp_path / "run", resume=str(checkpoint)) == uninterrupted


def test_sheets_of_samples_follow_the_cadence_and_the_last_step(tmp_path):
    def each_step(run):
        if run.sample_due:
            run.save_sheet(Image.new("RGB", (4, 4)))

    fit(tmp_path / "run", each_step=each_step, sample_every=4)
    names = [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step-00000004.png", "step-00000006.png"]


def test_tensorboard_shows_losses_and_sheets_and_forgets_what_a_kill_undid(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def each_step(run):
        if run.sample_due:
            run.save_sheet(Image.new("RGB", (4, 4), "red"))

    fit(tmp_path / "run", each_step=each_step, report_to="tensorboard", checkpoints_total_limit=9)
    resume = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    run, _ = fit(tmp_path / "run", each_step=each_step, report_to="tensorboard", resume=resume)
    run.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "hfgen")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    logged = [entry["loss"] for entry in metrics(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)
    assert [event.step for event in events.Images("samples")] == [6]


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
