"""What the rails do when training goes wrong: go back to the last good checkpoint, or stop with a reason."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from line_method import CountedBatches, LinePipeline, fit, metrics, status
from PIL import Image

from hfgen.training.checkpoints import list_checkpoints, load_progress
from hfgen.training.state import RunState
from hfgen.training.trouble import CollapseError, NonFiniteError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


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


def test_after_a_collapse_the_run_restarts_from_the_good_checkpoint_at_half_rate(tmp_path):
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
    assert "step-00000004" in told and told.endswith("or try another preset")  # only GANs have --augment
    assert {key[1]: rate for key, rate in watched.rates.items()} == {0: 0.1, 1: 0.05, 2: 0.025}
    assert status(tmp_path / "run")["status"] == "collapsed"
    assert [event["event"] for event in events(tmp_path / "run")] == ["rollback", "rollback", "collapsed"]
    assert not (tmp_path / "run" / "pipeline").exists()


def test_bad_checkpoints_are_dropped_and_the_good_one_outlives_the_limit(tmp_path):
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
    assert "non-finite weights in network; back to step-00000003" in events(tmp_path / "run")[0]["what"]


def test_a_sheet_that_is_not_finite_leads_back_as_well_and_none_is_saved(tmp_path, capsys):
    def each_step(run):
        with run.generating():
            value = float("nan") if run.step == 5 and not run.rollbacks else 0.5
            pixels = (np.full((4, 4, 3), value) * 255).round().astype("uint8")
            run.save_sheet(Image.fromarray(pixels))

    run, _ = fit(tmp_path / "run", each_step=each_step, on_collapse="rollback")
    run.finish()
    assert run.rollbacks == 1 and [event["event"] for event in events(tmp_path / "run")] == ["rollback"]
    assert "step 5: a generated image is not finite. Back to step 4" in capsys.readouterr().out
    assert {Image.open(sheet).getpixel((0, 0)) for sheet in (tmp_path / "run" / "samples").iterdir()} == {(128,) * 3}


def test_a_last_sheet_that_is_not_finite_is_no_completion(tmp_path):
    def after(run):
        with run.generating():
            np.full((4, 4, 3), np.nan).astype("uint8")
        run.finish()

    with pytest.raises(NonFiniteError, match="a generated image is not finite.*Last good checkpoint: .*step-00000006"):
        fit(tmp_path / "run", after=after)
    assert status(tmp_path / "run")["status"] == "diverged" and not (tmp_path / "run" / "pipeline").exists()


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


def test_a_schedule_keeps_lowered_rates_and_loses_them_with_an_older_checkpoint(tmp_path):
    network, accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True)
    groups = [{"params": [network.weight], "lr": 0.4}, {"params": [network.bias], "lr": 0.1}]
    optimizer = accelerator.prepare(torch.optim.SGD(groups))
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
    parts = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule}
    state = RunState(parts, CountedBatches(), LinePipeline(network), "d", accelerator)

    def rates() -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    def update() -> None:
        optimizer.step()
        schedule.step()

    update()
    state.save(tmp_path / "checkpoints", {"step": 1}, 5)
    for factor in 0.5, 0.25:  # the second time from the same checkpoint
        state.scale_learning_rates(factor)
        assert rates() == pytest.approx([0.9 * 0.4 * factor, 0.9 * 0.1 * factor])
        update()
        assert rates() == schedule.get_last_lr() == pytest.approx([0.8 * 0.4 * factor, 0.8 * 0.1 * factor])
        state.load(*list_checkpoints(tmp_path / "checkpoints"))
        assert rates() == pytest.approx([0.9 * 0.4, 0.9 * 0.1])


def test_images_that_are_not_finite_at_a_collapse_cost_no_second_rollback(tmp_path):
    def each_step(run):
        if run.step == 5 and not run.rollbacks:
            run._stop_requests.not_finite = True  # as a sheet of the same step finds
            run.report(good=False, trouble="all images are green")
        else:
            run.report(good=True)

    run, _ = fit(tmp_path / "run", each_step=each_step, on_collapse="rollback")
    assert run.rollbacks == 1 and [event["event"] for event in events(tmp_path / "run")] == ["rollback"]


def test_sheets_of_the_steps_that_a_rollback_takes_back_are_set_aside(tmp_path):
    def each_step(run):
        if not run.rollbacks:
            run.save_sheet(Image.new("RGB", (4, 4)))
        run.report(good=run.step < 5, trouble="all images are green" if run.step == 5 and not run.rollbacks else None)

    fit(tmp_path / "run", each_step=each_step, on_collapse="rollback")
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["abandoned-step-00000005.png", *(f"step-0000000{step}.png" for step in (1, 2, 3, 4))]


def test_the_pipeline_of_steps_that_a_rollback_takes_back_is_set_aside(tmp_path):
    fit(tmp_path / "run", each_step=lambda run: run.report(good=run.step <= 4), after=lambda run: run.finish())
    assert (tmp_path / "run" / "pipeline").is_dir()

    def each_step(run):
        run.report(good=run.rollbacks > 0, trouble="all images are green" if run.step == 8 else None)

    with pytest.raises(CollapseError):
        fit(tmp_path / "run", each_step=each_step, on_collapse="rollback", max_train_steps=9, resume="latest")
    assert (tmp_path / "run" / "abandoned-pipeline").is_dir() and not (tmp_path / "run" / "pipeline").exists()
