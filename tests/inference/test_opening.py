"""Pipelines whose files ask for too much, or lack something: one line says so before memory or time is used up."""

import json
import os
import shutil

import pytest
import torch
from damages import DAMAGES
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.logging import is_progress_bar_enabled
from edm_pipelines import edm_pipeline
from safetensors.torch import load_file, save_file
from toy_runs import checkpoint, train

from hfgen.errors import UserError
from hfgen.inference.opening import find_pipeline, open_pipeline
from hfgen.inference.sampling import network_digest
from hfgen.integrity import find_damage, record_digests
from hfgen.models.dcgan import DCGANGenerator
from hfgen.models.unet_base import UNetBase
from hfgen.pipelines import DDPMPipeline, GANPipeline
from hfgen.training.checkpoints import final_progress


@pytest.fixture
def gan(tmp_path):
    generator = DCGANGenerator(sample_size=8, latent_dim=4, base_channels=4)
    GANPipeline(generator).save_pretrained(tmp_path / "gan")
    return tmp_path / "gan"


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("latent_dim", 10**12, "latent_dim is 1,000,000,000,000, more than 65,536"),
        ("block_out_channels", [65537], "block_out_channels is 65,537, more than 65,536"),
        ("block_out_channels", [1] * 65, "block_out_channels has 65 entries, more than 64"),
        ("layers_per_block", 65, "layers_per_block is 65, more than 64"),
    ],
)
def test_sizes_beyond_any_network_are_refused(gan, setting, value, message):
    change(gan / "generator" / "config.json", **{setting: value})
    with pytest.raises(UserError) as raised:
        open_pipeline(str(gan), "cpu")
    assert str(raised.value) == f"{gan / 'generator' / 'config.json'}: {message}"


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), os.mkdir, lambda file: file.write_text(" " * 2**20 + "{}")],
)
def test_a_configuration_is_a_file_of_bounded_size(gan, make):
    file = gan / "generator" / "config.json"
    file.unlink()
    make(file)
    with pytest.raises(UserError, match="config.json: must be a file of at most 1,048,576 bytes"):
        open_pipeline(str(gan), "cpu")


@pytest.mark.parametrize("enabled", [True, False])
def test_opening_shows_no_bar_of_diffusers_and_leaves_its_switch_as_it_was(gan, monkeypatch, capsys, enabled):
    monkeypatch.setattr("diffusers.utils.logging._tqdm_active", enabled)
    open_pipeline(str(gan), "cpu")
    assert capsys.readouterr().err == "" and is_progress_bar_enabled() is enabled
    (gan / "generator" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        open_pipeline(str(gan), "cpu")
    assert is_progress_bar_enabled() is enabled


def test_weights_that_lack_a_tensor_are_refused_instead_of_made_up(gan):
    file = gan / "generator" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    dropped = weights.pop(sorted(weights)[0])
    save_file(weights, file)
    stored = sum(tensor.numel() for tensor in weights.values())
    with pytest.raises(
        UserError, match=f"has {stored:,} numbers, and the DCGANGenerator .*{stored + dropped.numel()}"
    ):
        open_pipeline(str(gan), "cpu")


@pytest.mark.parametrize(
    ("scheduler", "settings", "reason"),
    [
        (DDPMScheduler(), {"trained_betas": [[1.0]]}, "DDPMScheduler fails with its settings: "),
        (DPMSolverMultistepScheduler(), {"solver_order": 0}, "DPMSolverMultistepScheduler fails with its settings: "),
        (DDPMScheduler(), {"unet": 1e308}, "sample_size="),
        (DDPMScheduler(), {"unet": 0}, "sample_size="),
    ],
)
def test_a_diffusion_pipeline_that_cannot_take_a_step_is_refused(tmp_path, scheduler, settings, reason):
    torch.manual_seed(0)
    unet = UNetBase(sample_size=8, block_out_channels=(8, 8))
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    numbers = torch.random.get_rng_state()
    open_pipeline(str(tmp_path), "cpu")
    assert torch.equal(torch.random.get_rng_state(), numbers)
    if "unet" in settings:
        change(tmp_path / "unet" / "config.json", sample_size=settings["unet"])
    else:
        change(tmp_path / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(UserError, match=reason.replace("[", r"\[")):
        open_pipeline(str(tmp_path), "cpu")


def test_a_pipeline_saved_with_a_scheduler_that_does_not_suit_its_network_is_refused(tmp_path):
    pipeline = edm_pipeline()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with EDM, for which DDPMScheduler is unsuitable"):
        open_pipeline(str(tmp_path), "cpu")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model_index.json", "generator/diffusion_pytorch_model.safetensors"])
def test_a_damaged_file_of_a_run_s_pipeline_is_named(gan, file, damage):
    record_digests(gan)
    open_pipeline(str(gan), "cpu")
    DAMAGES[damage](gan / file)
    with pytest.raises(UserError, match="model_index.json" if file == "model_index.json" else f"{gan} is .*{file}"):
        open_pipeline(str(gan), "cpu")
    assert not damage == "flipped" or find_damage(gan) == f"the contents of {file} have changed"


def test_a_pipeline_that_somebody_changed_opens_without_its_digests(gan):
    record_digests(gan)
    file = gan / "generator" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=f"if you changed it yourself, delete {gan / 'digests.json'}"):
        open_pipeline(str(gan), "cpu")
    (gan / "digests.json").unlink()
    open_pipeline(str(gan), "cpu")


def test_a_run_that_is_not_there_brings_the_names_of_those_that_are(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="runs/nope: no such folder$"):
        open_pipeline(str(tmp_path / "runs" / "nope"))
    for name in ("cats", "dogs"):
        (tmp_path / "runs" / name / "pipeline").mkdir(parents=True)
        (tmp_path / "runs" / name / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"nope: no such folder \(there are: \S+runs/cats, \S+runs/dogs\)$"):
        open_pipeline(str(tmp_path / "runs" / "nope"))


def test_from_pretrained_finds_the_pipeline_of_a_run(tmp_path, gan):
    (tmp_path / "run").mkdir()
    gan.rename(tmp_path / "run" / "pipeline")
    assert GANPipeline.from_pretrained(tmp_path / "run").generator.config.latent_dim == 4


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_of_a_run_that_goes_on_the_newest_pipeline_is_taken(tmp_path):
    run = tmp_path / "run"
    train("gan", run, "--max_train_steps", "4")
    assert find_pipeline(run) == run / "pipeline"  # that of the last checkpoint's step
    shutil.copytree(run / "pipeline", tmp_path / "of step 4")
    train("gan", run, "--max_train_steps", "6", "--resume", "latest")
    shutil.rmtree(run / "pipeline")
    shutil.copytree(tmp_path / "of step 4", run / "pipeline")  # as if it had been killed after its last checkpoint
    newest = checkpoint(run, 6) / "pipeline"
    assert find_pipeline(run) == newest
    weights = [network_digest(open_pipeline(str(place), "cpu")) for place in (run, newest, run / "pipeline")]
    assert weights[0] == weights[1] != weights[2]
    assert network_digest(GANPipeline.from_pretrained(run)) == weights[0]
    # Neither a copy of a checkpoint, nor one that is incomplete or of a network in trouble, nor a damaged note.
    shutil.copytree(checkpoint(run, 6), run / "checkpoints" / "step-00000009-copy")
    shutil.copytree(newest, run / "checkpoints" / "step-00000008" / "pipeline")
    assert find_pipeline(run) == newest
    progress = checkpoint(run, 6) / "progress.json"
    healthy = progress.read_text()
    progress.write_text(json.dumps(json.loads(healthy) | {"good": False}))
    assert find_pipeline(run) == run / "pipeline"
    progress.write_text(healthy)
    (run / "pipeline" / "progress.json").write_text("{")
    assert find_pipeline(run) == run / "pipeline"
    shutil.rmtree(run / "pipeline")
    assert network_digest(GANPipeline.from_pretrained(str(run))) == weights[0]


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_of_a_run_that_goes_back_the_pipeline_of_the_branch_it_leaves_is_set_aside(tmp_path, capsys):
    run = tmp_path / "run"
    train("gan", run, "--max_train_steps", "6")
    left = (run / "metrics.jsonl").read_text().splitlines()
    train("gan", run, "--max_train_steps", "3", "--resume", "step-00000002")
    assert f"{run / 'pipeline'} is of a later step; it was renamed to abandoned-pipeline" in capsys.readouterr().out
    assert json.loads((run / "abandoned-pipeline" / "progress.json").read_text())["step"] == 6
    assert find_pipeline(run) == run / "pipeline" and final_progress(run / "pipeline")["step"] == 3
    assert (run / "abandoned-metrics.jsonl").read_text().splitlines() == left[2:]
    open_pipeline(str(run / "abandoned-pipeline"), "cpu")
