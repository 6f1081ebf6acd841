"""What `--report_to` gives to TensorBoard and to wandb in runs of train_gan, read back from what they wrote."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import toy_runs
import yaml
from PIL import Image
from run_files import metrics

from hfgen.errors import UserError


WATCHED = ["--watch_every", "2", "--sample_every", "4"]  # of 6 steps: looks at 2, 4 and 6, sheets at 0, 4 and 6
SIGNALS = {"diversity", "coverage", "overfitting", "d_right"}
LOSSES = {"loss_d", "loss_g", "d_real", "d_fake", "penalty", "augment_probability", "images_per_second"}


@pytest.fixture
def wandb_offline(monkeypatch, tmp_path):
    """No login, no network, and another working folder, into which nothing must be written."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def wandb_records(file: Path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # what is left of a block is too small for a header
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_log(file: Path) -> tuple[dict, dict[int, dict]]:
    """The settings of a run, and what it logged by step."""
    settings, steps = {}, {}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            items = record.history.item
            entry = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            steps.setdefault(entry["_step"], {}).update(entry)
    return settings, steps


def assert_same_numbers(logged: dict, entry: dict) -> None:
    for name in entry.keys() - {"step", "images", "seconds"}:
        assert logged[name] == pytest.approx(entry[name]), name


@pytest.mark.slow
def test_tensorboard_shows_the_losses_the_watch_the_sheets_and_the_settings_of_a_run(tmp_path, fresh_accelerate_state):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    toy_runs.train("gan", folder, *WATCHED, "--report_to", "tensorboard")
    events = accumulator.EventAccumulator(str(folder / "logs" / "hfgen")).Reload()
    assert set(events.Tags()["scalars"]) == LOSSES | SIGNALS
    for names, steps in ((LOSSES, [1, 2, 3, 4, 5, 6]), (SIGNALS, [2, 4, 6])):
        assert all([event.step for event in events.Scalars(name)] == steps for name in names)
    shown = {step: {} for step in range(1, 7)}
    for name in LOSSES | SIGNALS:
        for event in events.Scalars(name):
            shown[event.step][name] = event.value
    for entry in metrics(folder):
        assert_same_numbers(shown[entry["step"]], entry)
    assert [event.step for event in events.Images("samples")] == [0, 4, 6]
    for event in events.Images("samples"):
        sheet = Image.open(folder / "samples" / f"step-{event.step:08d}.png")
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert image.size == (event.width, event.height) == sheet.size
        assert np.array_equal(np.asarray(image), np.asarray(sheet.convert("RGB")))
    (file,) = (folder / "logs" / "hfgen").glob("*/hparams.yml")
    settings = yaml.safe_load(file.read_text())
    assert settings.keys() == json.loads((folder / "training_config.json").read_text()).keys()
    kept = {name: settings[name] for name in ("latent_dim", "learning_rate", "cpu", "loss", "resume")}
    assert kept == {"latent_dim": 6, "learning_rate": 2e-4, "cpu": True, "loss": "non_saturating", "resume": "None"}


@pytest.mark.slow
def test_wandb_offline_keeps_a_run_and_its_resumption_in_the_folder_of_the_run(
    tmp_path, wandb_offline, fresh_accelerate_state
):
    import wandb

    folder = tmp_path / "painter"
    toy_runs.train("gan", folder, *WATCHED, "--report_to", "wandb")
    wandb.teardown()  # as at the end of a process: only then is the last of it on the disk
    (first,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    settings, steps = wandb_log(first)
    assert settings["latent_dim"] == 6 and settings["resume"] == "None" and settings["cpu"] is True
    assert sorted(steps) == [0, 1, 2, 3, 4, 5, 6]
    for entry in metrics(folder):
        assert_same_numbers(steps[entry["step"]], entry)
        assert (steps[entry["step"]].keys() >= SIGNALS) == (entry["step"] in (2, 4, 6))
    for step in (0, 4, 6):
        (file,) = steps[step]["samples/filenames"]
        sheet = Image.open(folder / "samples" / f"step-{step:08d}.png").convert("RGB")
        shown = Image.open(first.parent / "files" / file).convert("RGB")
        assert np.array_equal(np.asarray(shown), np.asarray(sheet))

    toy_runs.train("gan", folder, *WATCHED, "--report_to", "wandb", "--resume", str(toy_runs.checkpoint(folder, 4)))
    wandb.teardown()
    (second,) = set((folder / "logs" / "wandb").glob("offline-run-*/*.wandb")) - {first}
    assert sorted(wandb_log(second)[1]) == [5, 6]
    runs = [record.run for file in (first, second) for record in wandb_records(file) if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1 and {run.display_name for run in runs} == {"painter"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_wandb_without_a_login_says_what_to_do(tmp_path, wandb_offline, monkeypatch, fresh_accelerate_state):
    wandb = pytest.importorskip("wandb")

    def init(**options):  # the real one asks the network first, which takes a minute
        raise wandb.errors.UsageError("No API key configured.")

    remedy = "--report_to wandb: .*No API key.*`wandb login`.*WANDB_MODE=offline"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=remedy):
        patch.setattr(wandb, "init", init)
        toy_runs.train("gan", tmp_path / "run", "--report_to", "wandb")
    toy_runs.train("gan", tmp_path / "run", "--report_to", "wandb", "--resume", "latest")  # nothing is in the way
    assert len(metrics(tmp_path / "run")) == 6
