"""`hfgen train`: what is refused before the images are read, and whose settings a run gets."""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import pytest
from PIL import Image
from train_command import ONE, call, note_starts, settings_of

from hfgen.commands import train as command
from hfgen.commands.train_settings import METHODS, parse_flags, refuse_before_reading, settings_classes
from hfgen.config import default_values, settings_to_dict
from hfgen.files import append_json_line
from hfgen.training.duration import time_left
from hfgen.training_scripts import train_ddpm, train_gan, train_vae


SCRIPTS = {"gan": train_gan, "vae": train_vae, "ddpm": train_ddpm}
PRESETS = [(method, file.stem) for method in METHODS for file in sorted(SCRIPTS[method].PRESETS.glob("*.json"))]
SMALL = ("--batch_size", 4, "--generator_channels", 8, "--max_train_steps", 60)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would be started, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return note_starts(monkeypatch)


@pytest.fixture
def unread(monkeypatch):
    """Fail if the images are read."""

    def read(settings):
        pytest.fail("the images were read")

    monkeypatch.setattr(command, "_about_data", read)


def begin(monkeypatch, started, *arguments):
    """Leave in runs/toy_paintings what a run with these arguments has there after a while; return its settings."""
    assert call(monkeypatch, "toy_paintings:8", *arguments) == 0
    settings = settings_of(started)
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True)
    (folder / "training_config.json").write_text(json.dumps(settings))
    append_json_line(folder / "metrics.jsonl", {"step": 1})
    started.method = started.flags = None
    return settings


# ---------------------------------------- before the images are read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sample_size", 30), "error: sample_size=30 must be a power of two, at least 8, such as 64:"),
        (("--preset", "ddpm", "--sample_size", 30), "error: sample_size=30 does not fit block_out_channels"),
        (("--preset", "vae", "--block_out_channels", *[8] * 7, "--sample_size", 32), "error: sample_size=32"),
        (
            ("--preset", "vae_learned", "--sample_size", 24),
            "error: --feature_weight, --adversarial_weight: sample_size=24",
        ),
        (("--output_dir", "mine"), "error: --output_dir mine is not empty"),
        (("--output_dir", "mine", "--resume", "latest"), "error: --output_dir mine is not the folder of a run"),
        (("--output_dir", "mine/notes.txt"), "error: --output_dir mine/notes.txt: cannot be created"),
    ],
)
def test_what_settings_alone_rule_out_is_refused_before_the_images_are_read(
    monkeypatch, capsys, tmp_path, started, unread, arguments, said
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert call(monkeypatch, "toy_paintings:8", *arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == "" and started.method is None
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_run_that_is_not_resumed_is_refused_before_the_images_are_read(monkeypatch, capsys, started):
    begin(monkeypatch, started)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_about_data", lambda settings: pytest.fail("the images were read"))
        assert call(monkeypatch, "toy_paintings:8") == 2
        assert "runs/toy_paintings is not empty: continue its run with --resume latest" in capsys.readouterr().err
        assert call(monkeypatch, "toy_paintings:8", "--resume", "latest", "--latent_dim", 7) == 2
        assert "latent_dim: 100 -> 7" in capsys.readouterr().err
    started.machine = dataclasses.replace(ONE, rank=1)  # the first machine opens the folder
    assert call(monkeypatch, "toy_paintings:8") == 0


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_no_preset_is_refused(tmp_path, method, preset):
    flags = ["--preset", preset, "--output_dir", str(tmp_path / "run")]
    refuse_before_reading(method, parse_flags(method, flags, "hfgen train"), True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------- runs


def test_a_run_is_no_data_and_the_command_that_resumes_it_is_named(monkeypatch, capsys, tmp_path, started):
    saved = begin(monkeypatch, started, "--preset", "vae", *SMALL[:2])
    run = "runs/toy_paintings"
    resume = f"hfgen train vae --preset {run}/training_config.json --output_dir {run} --resume latest"
    for arguments in ((run,), ("gan", "--dataset", run)):
        assert call(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err == f"error: {run} is a run, not images to train on; to resume it: {resume}\n"
    assert call(monkeypatch, *resume.split()[2:]) == 0
    assert settings_of(started) == saved | {"resume": "latest"}
    (tmp_path / run / "training_config.json").write_text('{"network": "of my own script", "own": 1}')
    assert call(monkeypatch, run) == 2
    assert "to resume it: run its command again with --resume latest" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "learning_rate = 3", '{"epochs": 3}'])
def test_images_beside_another_program_s_training_config_are_data(monkeypatch, capsys, tmp_path, started, content):
    (tmp_path / "photos").mkdir()
    for shade in range(3):
        Image.new("RGB", (64, 64), (80 * shade, 0, 0)).save(tmp_path / "photos" / f"{shade}.png")
    (tmp_path / "photos" / "training_config.json").write_text(content)
    assert call(monkeypatch, "photos") == 0 and settings_of(started)["dataset"] == "photos"
    (tmp_path / "photos" / "metrics.jsonl").write_text("")  # a run whose settings are damaged
    assert call(monkeypatch, "photos") == 2


def test_a_run_is_resumed_with_its_own_settings(monkeypatch, capsys, started):
    saved = begin(monkeypatch, started, *SMALL)
    capsys.readouterr()
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest") == 0
    assert settings_of(started) == saved | {"resume": "latest"}
    _, budget, settings, _ = capsys.readouterr().out.splitlines()
    assert budget == "budget: 240 images (60 steps) of the run, on a CPU"
    assert settings == "settings: those of the run in runs/toy_paintings, which is resumed"
    assert call(monkeypatch, "toy_paintings:8", "--resume=latest", "--output-dir", "runs/toy_paintings") == 0
    assert settings_of(started) == saved | {"resume": "latest"}
    longer = ("--images", 400, "--log_every", 3)
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest", *longer) == 0
    assert settings_of(started) == saved | {"resume": "latest", "max_train_steps": 100, "log_every": 3}


def test_the_time_of_a_run_is_that_of_each_launch_unless_another_is_given(monkeypatch, started):
    saved = begin(monkeypatch, started, "--preset", "vae", "--time", "2h")
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest") == 0
    assert settings_of(started) == saved | {"resume": "latest"} and saved["max_train_time"] == "2h"
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest", "--time", "1h") == 0
    assert settings_of(started) == saved | {"resume": "latest", "max_train_time": "1h"}


def test_the_time_counts_from_the_start_of_the_command(monkeypatch, started):
    call(monkeypatch, "toy_paintings:8", "--time", "1h")
    assert 0 <= time.time() - started.started < 60
    left = []
    monkeypatch.undo()
    script = argparse.Namespace(main=lambda flags: left.append((flags, time_left(3600.0))))
    monkeypatch.setattr("hfgen.commands.processes.importlib.import_module", lambda name: script)
    ONE.start("gan", ["--seed", "1"], time.time() - 600)
    assert left == [(["--seed", "1"], pytest.approx(3000, abs=5))] and time_left(3600.0) == 3600.0


def test_a_run_that_was_to_be_published_still_is_when_it_is_resumed(monkeypatch, started):
    flags = ("--push_to_hub", "--hub_model_id", "me/photos", "--hub_private_repo")
    monkeypatch.setattr("hfgen.commands.train.refuse_before_reading", lambda *_: None)  # asks the Hub
    saved = begin(monkeypatch, started, "--preset", "vae", *flags)
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest") == 0
    assert settings_of(started) == saved | {"resume": "latest"} and saved["hub_model_id"] == "me/photos"
    assert call(monkeypatch, "toy_paintings:8", "--preset", "runs/toy_paintings/training_config.json") == 0
    assert not settings_of(started)["push_to_hub"] and settings_of(started)["hub_model_id"] is None


def test_a_checkpoint_continues_in_another_folder_with_the_settings_of_its_run(monkeypatch, started):
    saved = begin(monkeypatch, started, "--preset", "vae", *SMALL[:2])
    checkpoint = "runs/toy_paintings/checkpoints/step-00000002"
    new = ("--output_dir", "new", "--resume", checkpoint)
    assert call(monkeypatch, "toy_paintings:8", *new) == 0
    assert settings_of(started) == saved | {"output_dir": "new", "resume": checkpoint}


def test_without_a_run_to_resume_a_new_one_is_started(monkeypatch, started):
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest") == 0
    assert settings_of(started)["upsampling"] == "nearest" and started.method == "gan"


# ---------------------------------------- from other weights


OF_THE_START = {
    "gan": ("gan", "--preset", "sngan", "--latent_dim", "50", "--sample_size", "32", "--evaluate_every", "7"),
    "vae": ("vae", "--preset", "vae_learned", "--images", "200000"),
    "ddpm": ("ddpm", "--preset", "ddpm", "--lr_scheduler", "cosine", "--dropout", "0.2"),
}


@pytest.mark.parametrize("method", METHODS)
def test_from_other_weights_the_network_is_theirs_and_the_length_is_not(monkeypatch, started, method):
    folder = Path("old")
    assert call(monkeypatch, *OF_THE_START[method], "--dataset", "toy_paintings:9", "--output_dir", folder) == 0
    old = settings_of(started)
    folder.mkdir()
    (folder / "training_config.json").write_text(json.dumps(old))
    assert call(monkeypatch, "toy_paintings:8", "--init_from", folder, "--images", 9600) == 0
    new, own = settings_of(started), default_values(settings_classes(method)[2:])
    assert started.method == method and new["sample_size"] == old["sample_size"]
    assert new["max_train_steps"] == -(-9600 // old["batch_size"]) and new["evaluate_every"] == 0
    differing = {name for name in own if new[name] != old[name]}
    assert differing <= {"learned_term_start"}
    given = ("--ema_decay", "0.75", "--images", 9600)
    assert call(monkeypatch, "toy_paintings:8", "--init_from", folder, *given) == 0
    assert settings_of(started)["ema_decay"] == 0.75


@pytest.mark.parametrize(
    ("sizes", "given", "attention_size", "noise_scale"),
    [
        ((64, 128), (), 32, 2),
        ((64, 96), (), 24, 1.5),
        ((64, 32), (), 8, 1),
        ((64, 40), (), 10, 1),
        ((64, None), (), 16, 1),
        ((64, 128), ("--attention_size", "16", "--noise_scale", "1.5"), 16, 1.5),
    ],
)
def test_a_diffusion_model_for_other_sizes_keeps_its_levels_of_attention_and_noise(
    monkeypatch, started, sizes, given, attention_size, noise_scale
):
    Path("old").mkdir()
    call(monkeypatch, "ddpm", "--preset", "ddpm", "--dataset", "toy_paintings:9", "--sample_size", sizes[0])
    old = settings_of(started)
    for saved in (old, {name: old[name] for name in old if name not in ("attention_size", "noise_scale")}):  # earlier
        Path("old/training_config.json").write_text(json.dumps(saved))
        size = () if sizes[1] is None else ("--sample_size", sizes[1])
        assert call(monkeypatch, "toy_paintings:8", "--init_from", "old", "--images", 160, *size, *given) == 0
        assert settings_of(started)["sample_size"] == (sizes[1] or 64)
        found = settings_of(started)
        assert (found["attention_size"], found["noise_scale"]) == (attention_size, noise_scale)


def test_what_follows_the_size_is_told(monkeypatch, capsys, started):
    Path("old").mkdir()
    call(monkeypatch, "ddpm", "--preset", "ddpm", "--dataset", "toy_paintings:9")
    Path("old/training_config.json").write_text(json.dumps(settings_of(started)))
    capsys.readouterr()
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old", "--sample_size", 128, "--images", 160) == 0
    told = "settings: ddpm, as in old, for 128 pixels (--attention_size 32, --noise_scale 2); training starts from "
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gan", "vae"])
def test_networks_of_one_image_size_are_refused_another_before_the_images_are_read(
    monkeypatch, capsys, started, unread, method
):
    Path("old").mkdir()
    call(monkeypatch, method, "--dataset", "toy_paintings:9", "--sample_size", 32)
    Path("old/training_config.json").write_text(json.dumps(settings_of(started)))
    started.method = None
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old", "--sample_size", 64) == 2
    told = "error: --sample_size 64: old was trained at 32 pixels, and only diffusion models can go on at another size"
    assert told in capsys.readouterr().err and started.method is None


def test_without_attention_the_noise_alone_follows_the_size(monkeypatch, started):
    Path("old").mkdir()
    own = {
        "unet": "compact",
        "formulation": "edm",
        "attention_size": 0,
        "sample_size": 64,
    }
    Path("old/training_config.json").write_text(json.dumps(own))
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old", "--sample_size", 256, "--images", 160) == 0
    assert (settings_of(started)["attention_size"], settings_of(started)["noise_scale"]) == (0, 4)


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_a_run_limited_by_time_alone_is_resumed_as_it_was(monkeypatch, capsys, started, scheduler):
    Path("two_hours.json").write_text('{"max_train_time": "2h", "network": "resnet", "learned_term_start": 3}')
    flags = ("--max_train_time", "2h", "--lr_scheduler", scheduler, "--max_train_steps", 5)
    saved = begin(monkeypatch, started, "--preset", "vae_learned", *flags) | {"max_train_steps": None}
    Path("runs/toy_paintings/training_config.json").write_text(json.dumps(saved))
    capsys.readouterr()
    assert call(monkeypatch, "toy_paintings:8", "--resume", "latest") == 0
    assert settings_of(started) == saved | {"resume": "latest"}
    assert "learned term" not in capsys.readouterr().out


def test_a_preset_is_preferred_and_weights_without_settings_get_the_recommended_one(monkeypatch, started):
    Path("old").mkdir()
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old") == 0
    assert started.method == "gan" and "--preset" in started.flags
    Path("old/training_config.json").write_text('{"network": "resnet", "batch_size": 3}')
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old", "--preset", "vae") == 0
    assert started.method == "vae" and settings_of(started)["batch_size"] != 3
    Path("old/pipeline").mkdir()
    assert call(monkeypatch, "toy_paintings:8", "--init_from", "old/pipeline") == 0
    assert settings_of(started)["network"] == "resnet" and "--preset" not in started.flags


# ---------------------------------------- files of settings


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_run_of_any_method_are_a_preset(monkeypatch, tmp_path, started, method):
    flags = ["--output_dir", "old", "--resume", "latest", "--sample_size", "32", "--max_train_steps", "7"]
    saved = settings_to_dict(*parse_flags(method, flags, "hfgen train"))
    (tmp_path / "renamed.json").write_text(json.dumps(saved))
    assert call(monkeypatch, "toy_paintings:8", "--preset", "renamed.json") == 0
    changed = {"dataset": "toy_paintings:8", "output_dir": "runs/toy_paintings", "resume": None}
    assert started.method == method and settings_of(started) == saved | changed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"batch_size": 4}', "--preset own.json: its settings fit gan, vae, ddpm; name the method: hfgen train gan"),
        ('{"kl_weight": 1, "snr": 2}', "no method has all of its settings; unknown to the closest, vae: snr"),
        ("[]", "--preset own.json: must contain a JSON object of settings, not a list"),
        ("{", "--preset own.json: not valid JSON"),
    ],
)
def test_a_file_of_settings_that_fit_no_method_or_several_is_refused(monkeypatch, capsys, started, content, said):
    Path("own.json").write_text(content)
    assert call(monkeypatch, "toy_paintings:8", "--preset", "own.json") == 2
    assert said in capsys.readouterr().err and started.method is None


# ---------------------------------------- help


@pytest.mark.parametrize("first", ["photos", "gan"])
def test_help_has_the_options_of_the_command_and_the_settings(monkeypatch, capsys, first):
    assert call(monkeypatch, first, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(option in out for option in ("--time T", "--images N", "--main_process_port", "--latent_dim"))
    assert ("or a JSON file of settings (default: dcgan_nearest)" in out) == (first == "photos")


@pytest.mark.parametrize(
    ("typed", "meant"), [("--imagess", "--images"), ("--tme", "--time"), ("--num-proceses", "--num_processes")]
)
def test_a_misspelt_option_of_the_command_is_recognised(monkeypatch, capsys, started, typed, meant):
    assert call(monkeypatch, "toy_paintings:8", typed, "5") == 2
    assert f"unknown argument {typed}; did you mean {meant}?" in capsys.readouterr().err
