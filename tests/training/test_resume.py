"""Continuing a run: in its folder or in another, with its settings or with others."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from line_method import CountedBatches, LinePipeline, LineSettings, fit, metrics

from hfgen.errors import UserError
from hfgen.training.checkpoints import list_checkpoints, load_progress
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
    changes = ["learning_rate: 0.1 -> 0.2", "max_train_steps: 6 -> 8"]
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
    told = "learning rates: 0.5 times the settings; rollbacks so far: 1"
    assert (told in capsys.readouterr().out) == bool(rollbacks)


def test_a_run_killed_before_its_first_checkpoint_still_continues_the_other(tmp_path):
    fit(tmp_path / "old", max_train_steps=3)
    origin = newest(tmp_path / "old")

    def kill(run):
        raise KeyboardInterrupt

    for resume in (origin, "latest", "latest"):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "new", resume=resume, each_step=kill)
        assert json.loads((tmp_path / "new" / "training_config.json").read_text())["resume"] == origin
    fit(tmp_path / "new", resume="latest")
    assert [launch["from_step"] for launch in launches(tmp_path / "new")] == [3, 3, 3, 3]
    assert [entry["step"] for entry in metrics(tmp_path / "new")] == [4, 5, 6]


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
        ({"network": torch.nn.Linear(2, 1)}, "its network is not the one of these settings .*size mismatch"),
        ({"unet": torch.nn.Linear(1, 1)}, "it has no unet; it was trained by another method"),
        ({"network": torch.nn.Linear(1, 1, bias=False), "optimizer": torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
        )}, "its optimizer is not the one of these settings"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_networks_is_refused_in_one_line(tmp_path, parts, told):
    fit(tmp_path / "old")
    state = RunState(parts, CountedBatches(), LinePipeline(None), "d", Accelerator(cpu=True))
    with pytest.raises(UserError, match=f"--resume .*step-00000006: {told}") as error:
        state.load(*list_checkpoints(tmp_path / "old" / "checkpoints")[-1:])
    assert "\n" not in str(error.value)
