"""Generating images: what a diverged training leaves is no picture, and names that libraries refuse are named."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from demo_pages import toy_pipelines
from toy_runs import train

from hfgen.errors import UserError, run_reporting_user_errors
from hfgen.families import image_network
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, decode_latents, generate_images
from hfgen.methods.schedules import SAMPLERS


NOT_UTF8 = "run" + os.fsdecode(b"\xff")


def diverged(name):
    pipeline = toy_pipelines()[name]
    with torch.no_grad():
        list(image_network(pipeline).parameters())[-1].fill_(torch.nan)
    return pipeline


@pytest.mark.parametrize("name", ["gan", "vae", "ddpm"])
def test_images_that_are_not_finite_are_refused_and_not_black(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert len(list(generate_images(toy_pipelines()[name], SamplingOptions(2)))) == 2
    with pytest.raises(UserError, match="the generated images are not finite: the training has diverged"):
        list(generate_images(diverged(name), SamplingOptions(2)))
    if name != "ddpm":
        latent_dim = image_network(diverged(name)).config.latent_dim
        with pytest.raises(UserError, match="the generated images are not finite"):
            decode_latents(diverged(name), torch.zeros(1, latent_dim))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_no_sampler_computes_anything_that_is_not_finite(tmp_path):
    toy_pipelines()["ddpm"].save_pretrained(tmp_path)
    for sampler in SAMPLERS:
        for steps in (1, 2, 7):
            images = generate_images(open_pipeline(str(tmp_path), "cpu", sampler), SamplingOptions(1, 0, steps))
            assert len(list(images)) == 1


@pytest.mark.parametrize(("kind", "rate"), [("ddpm", "1e30"), ("gan", "1e38")])
def test_a_training_that_diverges_in_its_last_step_has_failed(tmp_path, kind, rate, capsys):
    with pytest.raises((UserError, SystemExit)):
        run_reporting_user_errors(lambda: train(kind, tmp_path, "--learning_rate", rate, "--max_train_steps", "1"))
    assert "finite" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text())["status"] in ("failed", "diverged")


def test_a_name_that_is_not_utf8_is_refused_before_the_work(hfgen, tmp_path):
    toy_pipelines()["gan"].save_pretrained(tmp_path / "good")
    os.rename(tmp_path / "good", tmp_path / NOT_UTF8)
    toy_pipelines()["gan"].save_pretrained(tmp_path / "good")
    with pytest.raises(UserError, match="--output_dir .* the name is not UTF-8"):
        train("gan", tmp_path / (NOT_UTF8 + "2"))
    new = tmp_path / NOT_UTF8.replace("run", "new")
    for arguments in (
        ("sample", tmp_path / NOT_UTF8, "--output", tmp_path / "out"),
        ("export", tmp_path / "good", "--output", new),
        ("publish", tmp_path / "good", "me/x", "--output", new),
    ):
        status, _, err = hfgen(*arguments)
        assert status == 2 and "the name is not UTF-8, so weights there cannot be read; rename it" in err
    assert {path.name for path in Path(tmp_path).iterdir()} == {"good", NOT_UTF8}
