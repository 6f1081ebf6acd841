"""`hfgen train`: what it chooses, what it passes on, and how it ends."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from line_method import status
from PIL import Image
from run_files import assert_equal, state_of
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from toy_runs import METHODS, TINY, checkpoint, train
from train_command import call, note_starts, settings_of
from typer.testing import CliRunner

from hfgen import cli
from hfgen.cli import main
from hfgen.commands import processes as launching
from hfgen.commands import train as command
from hfgen.commands.processes import Processes
from hfgen.commands.train import own_options
from hfgen.errors import UserError
from hfgen.methods import augmentation
from hfgen.metrics import inception


def failure_of(exitcode):
    return ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="none")


@pytest.fixture
def started(monkeypatch):
    return note_starts(monkeypatch)


def test_data_alone_get_a_preset_a_budget_and_a_folder_and_it_says_why(monkeypatch, capsys, started):
    assert call(monkeypatch, "toy_paintings:30") == 0
    settings = settings_of(started)
    assert (started.method, settings["network"], settings["dataset"]) == ("gan", "sngan", "toy_paintings:30")
    assert settings["max_train_steps"] == 100_000 / 16 and settings["output_dir"] == os.path.join(
        "runs", "toy_paintings"
    )
    data, budget, preset, start, same = capsys.readouterr().out.splitlines()
    assert start.startswith("start: untrained weights; with so few images a trained model is the better start")
    assert data == "data: 30 images, short side 64 pixels, RGB; training at 64 x 64 (--sample_size)"
    assert budget == "budget: 100,000 images, the default on a CPU (--images, or --time 2h)"
    assert preset.startswith(
        "preset: dcgan_nearest; the best images for the training time; it reached FID 18.2 after 300,000"
    )
    assert same == f"command: hfgen train gan {' '.join(started.flags)}"


@pytest.mark.parametrize(
    "arguments",
    [["toy_paintings:31"], ["toy_paintings:30", "--init_from", "runs/cats"], ["toy_paintings:30", "vae"]],
)
def test_only_a_new_gan_of_few_images_is_advised_to_start_from_trained_weights(
    monkeypatch, capsys, started, arguments
):
    monkeypatch.setattr(augmentation, "FEW_IMAGES", 31)
    data, *others = arguments
    flags = ["--preset", "vae"] if others == ["vae"] else others
    assert call(monkeypatch, data, *flags) == 0
    assert "start: " not in capsys.readouterr().out


def test_a_stream_is_not_read_before_the_training(monkeypatch, capsys, started):
    assert call(monkeypatch, "somebody/photos", "--streaming", "--images", 64) == 0
    assert capsys.readouterr().out.startswith("data: streamed from the Hub; training at 64 x 64")
    assert settings_of(started)["streaming"] and settings_of(started)["max_train_steps"] == 4


def test_on_a_gpu_the_budget_is_larger_and_the_run_is_scored(monkeypatch, capsys, started):
    started.machine = Processes(2, 1, True, {}, None)
    monkeypatch.setattr(inception, "find_weights", lambda path: path)
    assert call(monkeypatch, "toy_paintings:30") == 0
    settings = settings_of(started)
    assert settings["max_train_steps"] == 9375 and settings["evaluate_every"] == 9375 // 6
    said = capsys.readouterr().out
    assert "budget: 300,000 images, the default on 2 GPUs" in said and "scores: FID every 1,562 steps" in said


@pytest.mark.parametrize(("images", "given", "scored"), [(30, [], 30), (30, [64], 64), (30, [1001], 1001)])
def test_on_a_gpu_no_more_images_are_scored_than_there_are_real_ones(monkeypatch, started, images, given, scored):
    started.machine = Processes(1, 1, True, {}, None)
    monkeypatch.setattr(inception, "find_weights", lambda path: path)
    flags = [one for number in given for one in ("--evaluate_num_images", number)]
    assert call(monkeypatch, f"toy_paintings:{images}", *flags) == 0
    assert settings_of(started)["evaluate_num_images"] == scored


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["somebody/photos", "--streaming"], "streamed images cannot be scored against"),
        (["toy_paintings:11"], "11 images are too few to compare with"),
    ],
)
def test_on_a_gpu_what_cannot_be_scored_is_trained_without_scores(monkeypatch, capsys, started, arguments, why):
    started.machine = Processes(1, 1, True, {}, None)
    monkeypatch.setattr(inception, "find_weights", lambda path: path)
    assert call(monkeypatch, *arguments) == 0
    assert settings_of(started)["evaluate_every"] == 0
    *_, scores, last = (line for line in capsys.readouterr().out.splitlines() if re.match("scores|command", line))
    assert scores.startswith("scores: none during training") and why in scores and "--evaluate_every" not in last


@pytest.mark.parametrize("lacking", ["clean-fid", "weights"])
def test_on_a_gpu_a_run_that_cannot_be_scored_is_told_why(monkeypatch, capsys, started, lacking):
    def none_found(path):
        raise UserError(f"--feature_weights {path}: none found")

    started.machine = Processes(1, 1, True, {}, None)
    monkeypatch.setattr(inception, "find_weights", none_found)
    if lacking == "clean-fid":
        monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert call(monkeypatch, "toy_paintings:30") == 0
    assert settings_of(started)["evaluate_every"] == 0
    why = {"clean-fid": 'pip install "hfgen[eval]"', "weights": "--feature_weights None: none found"}[lacking]
    assert f"scores: none during training; {why}" in capsys.readouterr().out
    if lacking == "weights":
        assert call(monkeypatch, "toy_paintings:30", "--feature_weights", "mine.pt") == 2
        assert "mine.pt: none found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--images", 1000], {"max_train_steps": 63, "max_train_time": None}),
        (["--time", "2h"], {"max_train_steps": 10**8, "max_train_time": "2h"}),
        (["--max_train_time", "2h"], {"max_train_steps": 10**8, "max_train_time": "2h"}),
        (["--preset", "two_hours.json"], {"max_train_steps": 10**8, "max_train_time": "2h"}),
        (["--time=45m", "--max_train_steps", 7], {"max_train_steps": 7, "max_train_time": "45m"}),
        (["--num_epochs", 2], {"max_train_steps": None, "num_epochs": 2.0}),
        (["--preset", "ddpm", "--images", 1000], {"max_train_steps": 63, "formulation": "edm"}),
        (["--preset", "sngan", "--batch_size", 8, "--n_critic", 5, "--images", 1000], {"max_train_steps": 25}),
        (["--output-dir", "here"], {"output_dir": "here"}),
        # A length of the user's replaces that of a preset, of either kind.
        (["--preset", "ddpm_base", "--images", 1280], {"max_train_steps": 10, "num_epochs": None}),
        (["--preset", "ddpm", "--num-epochs", 3], {"max_train_steps": None, "num_epochs": 3.0}),
        (["--preset", "ddpm_base", "--time", "2h"], {"max_train_time": "2h", "num_epochs": 300.0}),
        # A learned term begins within the run: after 4 of 9 updates, as in the preset, unless the user says when.
        (["--preset", "vae_learned", "--images", 1000], {"max_train_steps": 63, "learned_term_start": 28}),
        (["--preset", "vae_learned", "--max_train_steps", 1], {"learned_term_start": 0}),
        (["--preset", "vae_learned", "--images", 1000, "--learned-term-start", 9], {"learned_term_start": 9}),
        (["--preset", "vae_learned", "--images", 240_000], {"learned_term_start": 12_500}),
        (["--preset", "vae_learned", "--time", "2h"], {"max_train_steps": 28_125, "learned_term_start": 12_500}),
    ],
)
def test_what_the_user_gives_is_not_chosen(monkeypatch, tmp_path, started, arguments, expected):
    monkeypatch.chdir(tmp_path)
    Path("two_hours.json").write_text('{"max_train_time": "2h", "network": "resnet"}')
    assert call(monkeypatch, "toy_paintings:8", *arguments) == 0
    settings = settings_of(started)
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "ddpm"], "budget: 1,000,000 images (62,500 steps) of the preset, on a CPU"),
        (["--preset", "ddpm", "--max_train_steps", 7], "budget: 112 images (7 steps) as given, on a CPU"),
        (["--images", 2000], "budget: 2,000 images as given, on a CPU"),
        (["--images", 1], "budget: 1 image as given, on a CPU"),
        (["--time", "2h"], "budget: 2h as given, on a CPU"),
        (
            ["--preset", "vae_learned", "--images", 1000],
            "learned term: from update 29 on, to fit this budget (--learned_term_start)",
        ),
        (
            ["--preset", "vae_learned", "--time", "2h"],
            "budget: 450,000 images (28,125 steps) of the preset or 2h as given (whichever comes first), on a CPU",
        ),
        (
            ["--preset", "vae_learned", "--time", "2h"],
            "learned term: from update 12,501 on; if the time ends before, this is a plain VAE: give --images instead "
            "of --time, or an earlier --learned_term_start",
        ),
        (
            ["--preset", "vae_learned", "--max_train_time", "2h"],
            "learned term: from update 12,501 on; if the time ends before, this is a plain VAE: give --images instead "
            "of --max_train_time, or an earlier --learned_term_start",
        ),
        (["--time", "2h", "--num_epochs", 1], "budget: 1 epoch or 2h as given (whichever comes first), on a CPU"),
    ],
)
def test_it_says_whose_budget_it_is(monkeypatch, capsys, started, arguments, said):
    assert call(monkeypatch, "toy_paintings:8", *arguments) == 0
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("arguments", "name"), [([], "dcgan_nearest"), (["--preset", "vae_200"], "vae_200")])
def test_it_names_the_preset_that_no_reference_run_has(monkeypatch, capsys, started, arguments, name):
    assert call(monkeypatch, "toy_paintings:8", "--sample_size", 32, *arguments) == 0
    said = f"preset: {name}; there is no reference run with these settings (see hfgen presets)"
    assert said in capsys.readouterr().out.splitlines()


def test_a_method_takes_every_setting_of_its_script_and_the_budget_s_short_names(monkeypatch, started):
    arguments = ["--preset", "vae", "--latent_dim", 7, "--dataset", "x", "--output_dir", "y", "--images", 100]
    assert call(monkeypatch, "vae", *arguments) == 0
    settings = settings_of(started)
    assert started.method == "vae"
    assert [settings[name] for name in ("latent_dim", "dataset", "output_dir")] == [7, "x", "y"]
    assert settings["max_train_steps"] == -(-100 // settings["batch_size"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: hfgen train DATA"),
        (["gan"], "usage: hfgen train DATA"),
        (
            ["--preset", "dcgan"],
            "error: hfgen train --preset: the first argument must be the data, or gan, vae or ddpm",
        ),
        (
            ["gan", "--dataset", "x", "--lerning_rate", 1],
            "unknown argument --lerning_rate; did you mean --learning_rat",
        ),
        (["photos", "--lerning_rate", 1], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["photos", "--preset", "dcgam"], "error: --preset dcgam: one of dcgan, dcgan256"),
        (["photos", "--images", 0], "error: --images 0: must be positive"),
        (
            ["toy_paintings:8", "--preset", "vae", "--time", "2h", "--lr_scheduler", "cosine"],
            "error: --time 2h: --lr_scheduler cosine needs to know the last step; give --images or --max_train_steps, "
            "too",
        ),
        (
            ["toy_paintings:8", "--preset", "vae_learned", "--max_train_steps", 9, "--learned_term_start", 9],
            "error: --learned_term_start 9: the run ends after 9 updates, before the learned term begins; use "
            "--learned_term_start 4, or train a VAE without this term",
        ),
        (["photos", "--num_processes", 0], "error: --num_processes 0: must be positive"),
        (["photos", "--images", "many"], "hfgen train: error: argument --images: invalid int value: 'many'"),
        (["photos", "--time", "soon"], "error: --time soon: write a duration such as 90s, 45m or 8h50m"),
        (["photos", "--time", "1h", "--max_train_time", "2h"], "error: --time is the same as --max_train_time"),
        (["photos", "--time", "1h", "--max-train-time", "2h"], "error: --time is the same as --max_train_time"),
        (["photos", "--images", 9, "--max_train_steps", 2], "error: --images sets --max_train_steps: use only one of"),
        (["photos", "--dataset", "others"], "error: hfgen train photos: this and --dataset both name the data"),
        (["photos", "--preset"], "error: argument --preset: expected one argument"),
        (["gan", "--images", 10], "error: hfgen train gan: which images? give --dataset DATA"),
        (["ddpm", "--preset", "ddpm"], "error: hfgen train ddpm: which images? give --dataset DATA"),
        (["GAN", "--dataset", "x"], "error: hfgen train GAN: write gan for the method, or give your images"),
        (["dcgan", "photos"], "error: hfgen train dcgan: a preset; give your images first: hfgen train photos/ --pre"),
        (["my", "photos"], "unknown argument photos; put what has spaces in quotes"),
        (["a/b/nothere", "--images", 10], "error: --dataset a/b/nothere: no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_before_anything_starts(monkeypatch, capsys, started, arguments, said):
    assert call(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err and started.method is None


def test_a_preset_may_name_its_data(monkeypatch, started):
    assert call(monkeypatch, "ddpm", "--preset", "quickstart", "--images", 16) == 0
    assert settings_of(started)["dataset"] == "toy_paintings"


def test_fewer_images_than_a_run_has_had_are_refused_in_the_user_s_words(monkeypatch, capsys, started, tmp_path):
    train("gan", tmp_path / "run", "--max_train_steps", "4")
    capsys.readouterr()
    given = ("toy_paintings:24", "--output_dir", tmp_path / "run", "--resume", "latest", "--images")
    assert call(monkeypatch, *given, 8) == 2
    assert capsys.readouterr().err == (
        "error: --images 8: this is the total of the run, which has already seen 16; give a larger number\n"
    )


def test_presets_are_listed_with_what_they_reached(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hfgen", "presets"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "best FID of a reference run, and after how many images seen" in said.splitlines()[0]
    lines = {line.split()[1]: line for line in said.splitlines() if line and line[0] != "t"}
    assert lines["dcgan_nearest"].endswith("64 px   FID 18.2 after 300,000 images, for 8,000 cat faces of 64 pixels")
    assert lines["dcgan256"].split()[0] == "gan" and lines["dcgan256"].endswith("256 px  no reference run")


def test_reference_curves_are_plotted_and_unknown_presets_refused(tmp_path):
    def presets(*words):
        return CliRunner().invoke(cli.app, ["presets", *words])

    assert presets("--curves", str(tmp_path / "all.png")).exit_code == 0
    assert presets("lsgan", "--curves", str(tmp_path / "one.png")).exit_code == 0
    pictures = [np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("all.png", "one.png")]
    coloured = [np.sum(np.ptp(picture, axis=2) > 50) for picture in pictures]
    assert coloured[0] > 3 * coloured[1] > 300  # the others are grey
    unknown = presets("lsgan", "nope", "--curves", str(tmp_path / "two.png"))
    assert str(unknown.exception).startswith("nope: no reference run of this preset; those with one are dcgan, ")
    assert presets("--curves", str(tmp_path / "two.txt")).exit_code and presets("lsgan").exit_code
    assert "exists; choose another name" in str(presets("--curves", str(tmp_path / "one.png")).exception)
    assert {file.name for file in tmp_path.iterdir()} == {"all.png", "one.png"}


# ---------------------------------------- processes


def config_file(tmp_path, **changed):
    content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "machine_rank": 0, "debug": False}
    content |= {"num_machines": 1, "num_processes": 1, "use_cpu": True, "mixed_precision": "no", **changed}
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps(content))
    return str(file)


@pytest.fixture
def clean_environment(monkeypatch):
    """Undo what a choice sets for the training in the same process."""
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_accelerate_s_configuration_is_honoured(tmp_path, clean_environment):
    def chosen(*arguments, **changed):
        own, _ = own_options().parse_known_args(["--config_file", config_file(tmp_path, **changed), *arguments])
        return Processes.choose(own, False)

    assert (chosen().count, chosen().machines, chosen().precision) == (1, 1, "no")
    machines = {"num_machines": 3, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    several = chosen(num_processes=6, **machines, distributed_type="MULTI_CPU", mixed_precision="bf16")
    assert (several.count, several.machines, several.precision) == (6, 3, "bf16")
    assert chosen("--num_processes=2", num_processes=6, distributed_type="MULTI_CPU").count == 2
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and "CUDA_VISIBLE_DEVICES" not in os.environ
    chosen(gpu_ids="1,3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    asked = chosen("--gpu_ids=2", gpu_ids="1,3", num_processes=2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2" and asked.count == 1
    assert asked.options["gpu_ids"] == "all"  # the launcher would take those of the configuration
    with pytest.raises(ValueError, match="configuration asks for FSDP: not supported"):
        chosen(distributed_type="FSDP")


@pytest.mark.parametrize("content", [None, "", "- 1", "{broken", "num_processes: 2", "a: 1"])
def test_what_is_no_configuration_of_accelerate_is_refused_by_name(tmp_path, clean_environment, content):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    own, _ = own_options().parse_known_args(["--config_file", str(file)])
    with pytest.raises(UserError, match=f"--config_file {file}: not a configuration of accelerate .*accelerate conf"):
        Processes.choose(own, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--num_processes=1"],
            "--num_processes 1: this is the total over 2 machines, each with the same number of processes",
        ),
        (["--num_processes=3"], "give a multiple of 2"),
        (["--num_processes=2"], "--num_machines 2: give --machine_rank, too"),
        (["--num_processes=2", "--machine_rank=0"], "give --main_process_ip, too"),
        (["--gpu_ids=7", "--num_machines=1"], "--gpu_ids 7: no such GPU is visible"),
    ],
)
def test_processes_that_would_not_find_each_other_are_refused(clean_environment, monkeypatch, arguments, told):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", "/nowhere/default.yaml")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    own, _ = own_options().parse_known_args(["--num_machines=2", *arguments])
    with pytest.raises(UserError, match=told):
        Processes.choose(own, False)


TOY = ["train", "gan", "--preset", "dcgan", *TINY, *METHODS["gan"]]


def test_one_process_trains_in_this_one(programs, tmp_path):
    ended = programs.run(programs.hfgen, *TOY, "--output_dir", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert status(tmp_path / "run")["status"] == "complete"


@pytest.mark.slow
def test_several_processes_are_as_ranks_and_end_with_the_script_s_words_and_status(programs, tmp_path):
    start = [*TOY, "--num_processes", "2", "--output_dir"]
    environment = {**os.environ, "PYTHON_EXEC": str(programs.python)}  # what the launcher starts as Python
    wrong = [*start, tmp_path / "no", "--dataset", "nothere/x.zip"]
    wrong = programs.run(programs.hfgen, *wrong, environment=environment)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert {*wrong.stderr.splitlines()} == {"error: --dataset nothere/x.zip: no such file or folder"}
    kept = ["--checkpoints_total_limit", "9999", "--max_train_steps"]
    long = [*start, tmp_path / "run", *kept, "100000"]
    long = programs.start(programs.hfgen, *long, environment=environment)
    deadline = time.monotonic() + 300
    while not checkpoint(tmp_path / "run", 4).is_dir() and time.monotonic() < deadline and long.poll() is None:
        time.sleep(0.05)
    long.send_signal(signal.SIGTERM)
    ended = long.ended()
    assert ended.returncode == 143 and "Traceback" not in ended.stderr
    assert status(tmp_path / "run")["reason"] == "stopped by SIGTERM"
    # What the launcher has started is what the tests of the scripts start without it.
    assert json.loads((tmp_path / "run" / "launches.jsonl").read_text())["num_processes"] == 2
    ranks = programs.run_ranks(2, programs.hfgen, *TOY, "--output_dir", tmp_path / "ranks", *kept, "2")
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert_equal(state_of(tmp_path / "run", 2), state_of(tmp_path / "ranks", 2))
    # And what it resumes.
    resume = [*start, tmp_path / "ranks", *kept, "4", "--resume", "latest"]
    resumed = programs.run(programs.hfgen, *resume, environment=environment)
    assert resumed.returncode == 0, resumed.stderr
    launches = [json.loads(line) for line in (tmp_path / "ranks" / "launches.jsonl").read_text().splitlines()]
    assert [(launch["num_processes"], launch["from_step"]) for launch in launches] == [(2, 0), (2, 2)]
    assert_equal(state_of(tmp_path / "run", 4), state_of(tmp_path / "ranks", 4))


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (subprocess.CalledProcessError(2, "python"), 2),
        (subprocess.CalledProcessError(-15, "python"), 143),
        (SignalException("stopped", signal.SIGINT), 130),
        (ChildFailedError("train", {0: failure_of(3)}), 3),
        (ChildFailedError("train", {1: failure_of(-9)}), 137),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_status_of_a_launch_is_that_of_the_process_that_failed(raised, status):
    def launch(options):
        raise raised

    with pytest.raises(SystemExit) as ended:
        launching._launch_quietly(launch, argparse.Namespace())
    assert ended.value.code == status
