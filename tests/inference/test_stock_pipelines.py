"""Pipelines of diffusers' own: other sizes, channels and schedulers. They work, or one line says what is missing."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from hfgen.errors import UserError
from hfgen.evaluation.scoring import generated_images
from hfgen.hub.method import describe_method
from hfgen.inference.figures import denoising_states, noised_states
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images, image_size
from hfgen.methods.schedules import sampling_scheduler


WITHOUT_EVERY_KEY = ("PNDM", "HeunDiscrete", "LMSDiscrete", "DEISMultistep", "KDPM2Discrete", "DPMSolverSinglestep")


def save(folder, scheduler=None, sample_size=8, channels=3, **settings):
    """Save a small pipeline of diffusers; return its path."""
    settings = {"in_channels": channels, "out_channels": channels, "block_out_channels": (4,), **settings}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2}
    torch.manual_seed(0)
    network = UNet2DModel(sample_size, layers_per_block=1, add_attention=False, **blocks, **settings)
    DDPMPipeline(network, scheduler or DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def sampled(where, sampler=None):
    """Two images, as arrays; their denoising has as many states as it should have."""
    pipeline = open_pipeline(where, "cpu", sampler)
    images = list(generate_images(pipeline, SamplingOptions(2, 0, 5)))
    states, _, last = denoising_states(pipeline, [900, 0], 2, 0, 5)
    assert [state.size for state in states] == [images[0].size] * 4
    assert [state.size for state in noised_states(last, [0, 900], 1000, 0)] == [images[0].size] * 4
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("name", WITHOUT_EVERY_KEY)
def test_a_sampler_replaces_every_scheduler_of_ddpm_and_keeps_its_betas(tmp_path, name):
    kind = getattr(diffusers, f"{name}Scheduler")
    betas = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction"}
    where = save(tmp_path, kind(num_train_timesteps=500, **betas))
    assert np.array(sampled(where)).std() > 0
    ddim = open_pipeline(where, "cpu", "ddim").scheduler
    assert isinstance(ddim, DDIMScheduler)
    assert {key: ddim.config[key] for key in ("num_train_timesteps", *betas)} == {"num_train_timesteps": 500, **betas}
    expected = save(tmp_path / "ddpm", DDPMScheduler(num_train_timesteps=500, **betas))
    assert np.array_equal(sampled(where, "ddim"), sampled(expected, "ddim"))


@pytest.mark.parametrize(
    ("sample_size", "channels", "shape", "text"),
    [((8, 16), 3, (8, 16, 3), "16x8"), ([8, 8], 3, (8, 8, 3), "8x8"), (8, 1, (8, 8), "8x8"), (8, 4, (8, 8, 4), "8x8")],
)
def test_sizes_and_channels_of_images(tmp_path, sample_size, channels, shape, text):
    where = save(tmp_path, sample_size=sample_size, channels=channels)
    assert [image.shape for image in sampled(where)] == [shape] * 2
    assert f"generates {text}-pixel images" in describe_method(tmp_path, None, None).summary
    pipeline = open_pipeline(where, "cpu")
    if text == "16x8":
        with pytest.raises(UserError, match="images of 16x8 pixels, and only squares can be compared"):
            image_size(pipeline)
        return

    def features(images, count):
        return np.stack([image.mean(axis=(0, 1)) for image in images])

    with generated_images(pipeline, SamplingOptions(3, 0, 2), features, lambda: None) as generated:
        assert generated.images.shape == (3, 8, 8, 3) and generated.features.shape == (3, 3)


@pytest.mark.parametrize(
    ("scheduler", "network", "told"),
    [
        ("FlowMatchEulerDiscrete", {}, "its FlowMatchEulerDiscreteScheduler has no .*, and no other sampler can"),
        ("RePaint", {}, "its RePaintScheduler also needs mask, original_image; --sampler ddim replaces it"),
        ("DDPM", {"num_class_embeds": 3}, "its UNet2DModel needs a class for each image"),
        ("DDPM", {"out_channels": 6}, "its UNet2DModel has 3 channels in and 6 out"),
        ("DDPM", {"in_channels": 5, "out_channels": 5}, "its UNet2DModel has sample_size=8 and in_channels=5"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_loading(tmp_path, scheduler, network, told):
    where = save(tmp_path, getattr(diffusers, f"{scheduler}Scheduler")(), **network)
    with pytest.raises(UserError, match=f"{where}: hfgen cannot sample from this pipeline: {told}"):
        open_pipeline(where, "cpu")


def test_a_number_of_steps_that_does_not_suit_a_scheduler_is_named(tmp_path):
    pipeline = open_pipeline(save(tmp_path, diffusers.PNDMScheduler()), "cpu")
    with pytest.raises(UserError, match="num_inference_steps=2 does not work with its PNDMScheduler .*try more steps"):
        list(generate_images(pipeline, SamplingOptions(1, 0, 2, 1)))


def test_a_schedule_of_another_kind_is_not_taken_for_ddpm_s(tmp_path):
    for kind in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.IPNDMScheduler):
        with pytest.raises(ValueError, match=f"the saved {kind.__name__} is not a DDPM or EDM schedule"):
            sampling_scheduler(kind(), "ddim")
    where = save(tmp_path, diffusers.IPNDMScheduler())
    with pytest.raises(UserError, match="--sampler ddim: the saved IPNDMScheduler is not a DDPM or EDM schedule"):
        open_pipeline(where, "cpu", "ddim")
