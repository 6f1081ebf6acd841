"""The training scripts in two processes: one model, from the images and random numbers of both."""

from pathlib import Path

import pytest
import torch
from run_files import metrics
from toy_runs import METHODS, TINY


TESTS = Path(__file__).resolve().parents[1]
# A training script that tells, for each process, its parameters after the run, its random numbers and its losses.
TELLING = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import torch
from hfgen.training.run import Run
from toy_runs import script
told = {{"losses": [], "numbers": []}}
restore, log = Run.restore, Run.log

def restore_and_keep(run, stateful, *rest, **named):
    told["networks"] = {{name: part for name, part in stateful.items() if isinstance(part, torch.nn.Module)}}
    return restore(run, stateful, *rest, **named)

def log_and_keep(run, losses, *rest):
    told["losses"].append({{name: float(value.detach()) for name, value in losses.items()}})
    told["numbers"].append(torch.randn(4, generator=run.generator("latents 0")))
    return log(run, losses, *rest)

Run.restore, Run.log = restore_and_keep, log_and_keep
kind, *arguments = sys.argv[1:]
script(kind).main(arguments)
told["networks"] = {{name: dict(part.named_parameters()) for name, part in told["networks"].items()}}
torch.save(told, pathlib.Path(__file__).with_name("told-" + os.environ["RANK"]))
"""
LEARNED = ("--feature_weight", "1", "--adversarial_weight", "0.2", "--discriminator_channels", "4")
RUNS = {
    "gan": ("gan", "--augment", "none"),
    # No BatchNorm, whose statistics differ between processes.
    "relativistic gan": (
        *("gan", "--loss", "relativistic", "--normalization", "none", "--r1_weight", "1", "--n_critic", "2"),
    ),
    "vae": ("vae", "--density_components", "0"),
    "vae with a learned term": ("vae", "--density_components", "0", *LEARNED),
    "ddpm": ("ddpm",),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_hold_one_model_and_each_draws_numbers_of_its_own(programs, tmp_path, name):
    kind, *settings = RUNS[name]
    program = tmp_path / "train.py"
    program.write_text(TELLING.format(tests=str(TESTS)))
    arguments = [*TINY, *METHODS[kind], *settings, "--max_train_steps", "3", "--output_dir", tmp_path / "run"]
    ended = programs.run_ranks(2, program, kind, *arguments)
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr[-3000:]
    assert not any("FutureWarning" in rank.stderr for rank in ended)  # of what accelerate passes to torch
    one, other = (torch.load(tmp_path / f"told-{rank}", weights_only=True) for rank in (0, 1))
    for network, parameters in one["networks"].items():
        different = [
            key for key, value in parameters.items() if not torch.equal(value, other["networks"][network][key])
        ]
        assert parameters and not different, network
    numbers = torch.stack([*one["numbers"], *other["numbers"]])
    assert len(numbers) == 6 and len(numbers.unique(dim=0)) == 6
    # What is logged is the mean over both, whose images and noise differ.
    for step, entry in enumerate(metrics(tmp_path / "run")):
        for loss, value in one["losses"][step].items():
            mean = (value + other["losses"][step][loss]) / 2
            assert entry[loss] == pytest.approx(mean, rel=1e-5, abs=1e-7), loss
    loss = "loss_d" if kind == "gan" else "loss"
    assert one["losses"][0][loss] != other["losses"][0][loss]
