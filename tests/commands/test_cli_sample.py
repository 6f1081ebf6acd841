import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_pipelines import edm_pipeline
from labelled_sheets import tiles
from PIL import Image
from safetensors.torch import save
from tiny_ddpm import save_pipeline

from hfgen.commands.sample import parse_timesteps, sheet_beside
from hfgen.errors import UserError
from hfgen.inference.figures import LABEL_LINE
from hfgen.methods.schedules import SAMPLERS


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("cli") / "pipeline")


@pytest.fixture
def sample(hfgen, tmp_path):
    """Run `hfgen sample` on the CPU with 4 steps into a new folder; return that folder."""

    def run(pipeline, *arguments, name: str = "images") -> Path:
        settings = ("--num_images", 5, "--num_inference_steps", 4, "--device", "cpu")
        status, _, err = hfgen("sample", pipeline, "--output", tmp_path / name, *settings, *arguments)
        assert status == 0, err
        return tmp_path / name

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def pixels(folder: Path) -> np.ndarray:
    """The single images of a folder, in order, `(count, 8, 8, 3)`."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))]).astype(int)


# -------------------------------------------------------------------------------------------------------------- sample


def test_sample_writes_exactly_the_images_asked_for_and_their_sheet(sample, pipeline):
    folder = sample(pipeline)
    names = [f"{index:06d}.png" for index in range(5)]
    assert sorted(contents(folder)) == names
    images = [Image.open(folder / name) for name in names]
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 5
    shown = tiles(folder.with_name("images_sheet.png"), 2, 3, captions=True).reshape(6, 8, 8, 3)
    assert np.array_equal(shown[:5], pixels(folder)) and (shown[5] == 255).all()
    labels = np.asarray(Image.open(folder.with_name("images_sheet.png")).convert("L"))
    assert (labels[:LABEL_LINE] < 128).any() and (labels[-LABEL_LINE:, :34] < 128).any()  # seed above, number below


def test_the_sheet_is_no_image_of_the_folder_and_replaces_nothing(sample, refusal, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sheet_beside(Path("here/images")) == Path("here/images_sheet.png")
    assert sheet_beside(Path()) == tmp_path.with_name(f"{tmp_path.name}_sheet.png")
    (tmp_path / "images_sheet.png").write_text("mine")
    assert "images_sheet.png exists" in refusal("sample", pipeline, "--output", "images")
    assert (tmp_path / "images_sheet.png").read_text() == "mine" and not (tmp_path / "images").exists()


def test_the_same_seed_draws_the_same_bytes_and_another_seed_other_images(sample, pipeline):
    first = sample(pipeline, "--seed", 7, name="first")
    assert contents(sample(pipeline, "--seed", 7, name="second")) == contents(first)
    other = pixels(sample(pipeline, "--seed", 8, name="other"))
    assert np.abs(other - pixels(first)).max(axis=(1, 2, 3)).min() > 10


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_neither_the_batch_size_nor_the_number_of_images_changes_an_image(sample, pipeline, sampler):
    at_once = pixels(sample(pipeline, "--sampler", sampler, "--batch_size", 5))
    for batch_size in 1, 2:
        batched = pixels(sample(pipeline, "--sampler", sampler, "--batch_size", batch_size, name=str(batch_size)))
        assert np.abs(batched - at_once).max() <= 1  # convolutions of another batch size may round otherwise
    fewer = pixels(sample(pipeline, "--sampler", sampler, "--num_images", 3, name="fewer"))
    assert np.abs(fewer - at_once[:3]).max() <= 1
    assert all(np.abs(one - other).max() > 10 for one, other in zip(at_once[:-1], at_once[1:], strict=True))


def test_every_sampler_draws_and_none_gives_the_one_that_was_saved(sample, pipeline):
    drawn = {sampler: contents(sample(pipeline, "--sampler", sampler, name=sampler)) for sampler in SAMPLERS}
    assert contents(sample(pipeline)) == drawn["ddim"]
    assert len({tuple(images.values()) for images in drawn.values()}) == len(SAMPLERS)


@pytest.fixture(scope="module")
def of_edm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edm") / "pipeline"
    edm_pipeline().save_pretrained(folder)
    return folder


def test_a_pipeline_of_edm_is_sampled_by_what_it_has_and_refuses_the_rest_by_name(sample, refusal, of_edm, tmp_path):
    saved, dpm, ddim = (
        contents(sample(of_edm, *arguments, name=name))
        for name, arguments in (("saved", ()), ("dpm", ("--sampler", "dpm")), ("ddim", ("--sampler", "ddim")))
    )
    assert saved == dpm and dpm.keys() == ddim.keys() and dpm["000000.png"] != ddim["000000.png"]
    told = refusal("sample", of_edm, "--output", tmp_path / "x", "--sampler", "unipc")
    assert "--sampler unipc: a network trained with EDM has only ddim and dpm, not unipc" in told
    assert not (tmp_path / "x").exists()


def test_a_pipeline_of_edm_is_denoised_on_the_scale_of_its_timesteps(hfgen, of_edm, tmp_path):
    arguments = ("--num_inference_steps", 5, "--timesteps", "999,500,0", "--device", "cpu")
    status, out, err = hfgen("denoise", of_edm, "--output", tmp_path / "strips", *arguments)
    assert status == 0, err
    assert "denoising.png (timesteps 999, 500, 0)" in out
    assert sorted(contents(tmp_path / "strips")) == ["denoising.png", "forward.png"]


def test_an_empty_folder_may_be_the_output(sample, pipeline, tmp_path):
    (tmp_path / "images").mkdir()
    assert len(contents(sample(pipeline))) == 5


@pytest.mark.parametrize("command", ["sample", "denoise"])
def test_an_output_that_holds_something_is_refused_and_left_alone(command, refusal, pipeline, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    assert "is not empty" in refusal(command, pipeline, "--output", tmp_path)
    assert "is not empty" in refusal(command, pipeline, "--output", tmp_path / "note.txt")
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_an_unknown_sampler_is_refused_with_those_there_are(refusal, pipeline, tmp_path):
    line = refusal("sample", pipeline, "--output", tmp_path / "images", "--sampler", "euler")
    assert line == "error: --sampler euler: must be one of ddim, dpm, unipc, ddpm"
    assert not (tmp_path / "images").exists()


def test_a_device_that_is_not_there_is_refused(refusal, pipeline, tmp_path):
    line = refusal("sample", pipeline, "--output", tmp_path / "images", "--device", "abacus")
    assert line == "error: --device abacus: not available on this machine; use auto or cpu"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(device, refusal, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refusal("sample", pipeline, "--output", tmp_path / "images", "--device", device)
    assert line == f"error: --device {device}: not available on this machine; use auto or cpu"


def test_all_images_are_saved_but_no_more_than_fit_are_kept_for_the_sheet(hfgen, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("hfgen.commands.sample.MAX_ON_SHEET", 4)
    arguments = ("--num_images", 6, "--num_inference_steps", 2, "--device", "cpu", "--output", tmp_path / "images")
    status, out, _ = hfgen("sample", pipeline, *arguments)
    assert status == 0 and "on one sheet (the first 4): " in out
    assert len(list((tmp_path / "images").glob("0*.png"))) == 6
    sheet = Image.open(tmp_path / "images_sheet.png")
    assert sheet.size == (2 * 32 + 2, 2 * 32 + 2 + 3 * LABEL_LINE)
    assert np.array_equal(tiles(sheet, 2, 2, captions=True).reshape(4, 8, 8, 3), pixels(tmp_path / "images")[:4])


def test_more_steps_than_the_training_had_are_refused(refusal, pipeline, tmp_path):
    line = refusal("sample", pipeline, "--output", tmp_path / "images", "--num_inference_steps", 21)
    assert line == "error: --num_inference_steps 21: must be from 1 to 20, the pipeline's training timesteps"


@pytest.mark.parametrize("option", ["--num_images", "--batch_size", "--num_inference_steps"])
def test_a_count_of_zero_is_a_mistake_in_the_command(option, hfgen, pipeline, tmp_path):
    status, _, err = hfgen("sample", pipeline, "--output", tmp_path / "images", option, 0)
    assert status == 2
    assert option in err


@pytest.mark.parametrize("command", ["sample", "denoise"])
def test_a_full_disk_is_an_error_in_one_line_that_names_the_output(hfgen, pipeline, tmp_path, monkeypatch, command):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    few = ("--num_images", 2, "--num_inference_steps", 2, "--device", "cpu")
    status, _, err = hfgen(command, pipeline, *few, "--output", tmp_path / "new")
    (line,) = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error")]
    assert status == 2 and "Traceback" not in err
    assert line.startswith(f"error: could not write {tmp_path / 'new'}: [Errno 28] No space left on device; ")


# -------------------------------------------------------------------------------------------------- finding a pipeline


def test_a_run_without_a_pipeline_is_sampled_from_its_newest_whole_checkpoint(sample, pipeline, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in 9, 10, 200:
        save_pipeline(checkpoints / f"step-{step:08d}" / "pipeline", seed=step)
    for step in 9, 10:
        (checkpoints / f"step-{step:08d}" / "progress.json").write_text("{}")  # without it, a checkpoint is not whole
    newest = contents(sample(checkpoints / "step-00000010" / "pipeline", name="pipeline of the newest"))
    older = contents(sample(checkpoints / "step-00000009", name="older checkpoint"))
    assert newest != older
    assert contents(sample(tmp_path / "run", name="unfinished run")) == newest
    shutil.copytree(pipeline, tmp_path / "run" / "pipeline")
    finished = contents(sample(tmp_path / "run", name="finished run"))
    assert finished == contents(sample(pipeline, name="pipeline")) != newest


def test_a_folder_without_a_pipeline_is_refused(refusal, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    line = refusal("sample", tmp_path / "run", "--output", tmp_path / "images")
    assert line.startswith(f"error: {tmp_path / 'run'}: contains no pipeline")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("where", ["missing", "./missing", "runs/missing", "/runs/missing", "~/runs/missing"])
def test_a_pipeline_that_is_nowhere_is_refused(where, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal("sample", where, "--output", tmp_path / "images")
    assert line.startswith(f"error: {os.path.expanduser(where)}: no such folder")


def test_the_pipeline_of_something_else_is_refused_by_name(refusal, pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    line = refusal("denoise", tmp_path / "pipeline", "--output", tmp_path / "images")
    assert "FluxPipeline is not a pipeline of hfgen (DDPMPipeline, GANPipeline, VAEPipeline)" in line


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model_index.json", b"{"),
        ("unet/config.json", b"{"),
        ("unet/diffusion_pytorch_model.safetensors", b"short"),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("unet/diffusion_pytorch_model.safetensors", save({"of another network": torch.zeros(1)})),
        ("scheduler/scheduler_config.json", None),
    ],
)
def test_a_damaged_pipeline_is_refused_by_name(file, damage, refusal, pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "pipeline")
    if damage is None:
        (tmp_path / "pipeline" / file).unlink()
    else:
        (tmp_path / "pipeline" / file).write_bytes(damage)
    line = refusal("sample", tmp_path / "pipeline", "--output", tmp_path / "images")
    assert line.startswith(f"error: {tmp_path / 'pipeline'}")
    assert any(words in line for words in (" cannot be loaded: ", f"{file} is damaged (", f"{file}: has 1 numbers"))


# ------------------------------------------------------------------------------------------------------------- denoise


@pytest.fixture
def denoise(hfgen, pipeline, tmp_path):
    """Run `hfgen denoise`; return the two strips and what it printed."""

    def run(*arguments) -> tuple[Image.Image, Image.Image, str]:
        settings = ("--num_inference_steps", 4, "--device", "cpu")
        status, out, err = hfgen("denoise", pipeline, "--output", tmp_path / "strips", *settings, *arguments)
        assert status == 0, err
        assert sorted(contents(tmp_path / "strips")) == ["denoising.png", "forward.png"]
        return Image.open(tmp_path / "strips" / "denoising.png"), Image.open(tmp_path / "strips" / "forward.png"), out

    return run


def test_denoise_draws_a_row_an_image_and_a_column_a_timestep(denoise):
    denoising, forward, out = denoise("--timesteps", "3,19,11", "--num_images", 3)
    assert denoising.size == (3 * 34 - 2, 3 * 34 - 2 + 2 * LABEL_LINE)  # below a title and the timesteps
    assert forward.height == 2 * 34 - 2 + LABEL_LINE and forward.width > 3 * 34 - 2
    ink = np.asarray(forward.convert("L")) < 128
    names = ink[:, : forward.width - (3 * 34 - 2)]
    assert all(names[top : top + LABEL_LINE].any() for top in (LABEL_LINE, LABEL_LINE + 34))  # linear, cosine
    assert all(ink[:LABEL_LINE, -34 * column - 32 :][:, :32].any() for column in range(3))
    assert "timesteps 19, 9, 4" in out  # of the steps at 19, 14, 9 and 4, the nearest


def test_denoise_shows_the_sampler_s_steps_unless_told_otherwise(denoise):
    denoising, forward, out = denoise()
    assert denoising.size == (4 * 34 - 2, 4 * 34 - 2 + 2 * LABEL_LINE)
    assert "denoising.png (4 of the sampler's steps)" in out and forward.width > 8 * 34 - 2
    assert parse_timesteps(None, 1000) == [999, 856, 714, 571, 428, 285, 143, 0]


def test_the_forward_strip_starts_from_the_given_image_cropped_to_the_network_s_size(denoise, tmp_path):
    Image.new("RGB", (32, 16), (250, 20, 130)).save(tmp_path / "flat.png")
    _, forward, _ = denoise("--timesteps", "19,0", "--image", tmp_path / "flat.png")
    # After the first of 20 steps 0.5 % of the variance is noise in the linear schedule, and 0.8 % in the cosine one.
    for row in tiles(forward, 2, 2)[:, 0]:
        assert np.abs(row.mean(axis=(0, 1)) - [250, 20, 130]).max() < 12


def test_without_an_image_the_forward_strip_starts_from_the_last_one_drawn(denoise):
    denoising, forward, _ = denoise("--timesteps", "19,0", "--num_images", 2)
    drawn, started = tiles(denoising, 2, 2)[1, 1], tiles(forward, 2, 2)[1, 0]
    assert np.abs(started - drawn).mean() < 15


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ("20,3", "--timesteps 20,3: each must be from 0 to 19"),
        ("3,-1", "--timesteps 3,-1: each must be from 0 to 19"),
        ("3,x", "--timesteps 3,x: must be numbers separated by commas"),
        ("3,,4", "--timesteps 3,,4: must be numbers separated by commas"),
    ],
)
def test_timesteps_that_the_training_did_not_have_are_refused(timesteps, message, refusal, pipeline, tmp_path):
    assert refusal("denoise", pipeline, "--output", tmp_path / "x", "--timesteps", timesteps) == f"error: {message}"
    with pytest.raises(UserError, match=message):
        parse_timesteps(timesteps, 20)


@pytest.mark.parametrize("content", [None, b"no image"])
def test_an_image_that_cannot_be_read_is_refused_by_name(content, refusal, pipeline, tmp_path):
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(content)
    assert f"--image {image}" in refusal("denoise", pipeline, "--output", tmp_path / "x", "--image", image)
    assert not (tmp_path / "x").exists()


def test_denoise_refuses_more_steps_than_the_training_had(refusal, pipeline, tmp_path):
    line = refusal("denoise", pipeline, "--output", tmp_path / "x", "--num_inference_steps", 21)
    assert line == "error: --num_inference_steps 21: must be from 1 to 20, the pipeline's training timesteps"
