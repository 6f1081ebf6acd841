"""Which schedulers of diffusers a DDPMPipeline takes, and how it steps with them."""

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from edm_pipelines import edm_pipeline
from tiny_ddpm import ZeroUNet, build, draw, quiet, seeded

from hfgen.methods.schedules import SAMPLERS, noise_schedule, sampling_scheduler
from hfgen.models import UNetBase
from hfgen.pipelines import DDPMPipeline


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("saved", SAMPLERS)
def test_another_scheduler_can_be_set_in_the_way_of_diffusers(saved, scheduler_class):
    pipeline = build(sampler=saved)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    images = draw(pipeline, num_inference_steps=6)
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.05


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_a_scheduler_of_timesteps_is_refused_for_a_network_trained_with_edm(scheduler_class):
    """It would take noise levels for timesteps, and the images would be noise."""
    pipeline = edm_pipeline()
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    with pytest.raises(
        ValueError, match=f"was trained with EDM, for which {scheduler_class.__name__} is unsuitable; use"
    ):
        draw(pipeline)
    for suitable in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        pipeline.scheduler = suitable.from_config(pipeline.scheduler.config)
        assert draw(quiet(pipeline), num_inference_steps=4).std() > 0


@pytest.mark.parametrize("network", ["base", "attention", "compact"])
@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_an_edm_scheduler_is_refused_for_a_network_trained_on_timesteps(network, scheduler_class):
    pipeline = build(network)
    for scheduler in (scheduler_class.from_config(pipeline.scheduler.config), scheduler_class()):
        pipeline.scheduler = scheduler
        with pytest.raises(
            ValueError, match=f"was trained on timesteps, for which {scheduler_class.__name__} is unsuitable"
        ):
            draw(pipeline)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        *(FlowMatchEulerDiscreteScheduler, RePaintScheduler, CMStochasticIterativeScheduler, DDIMInverseScheduler),
        *(DPMSolverMultistepInverseScheduler, DDPMWuerstchenScheduler, ScoreSdeVeScheduler),
        *(IPNDMScheduler, CogVideoXDDIMScheduler),
    ],
)
def test_a_scheduler_for_something_else_is_refused(scheduler_class):
    pipeline = build()
    pipeline.scheduler = scheduler_class()
    with pytest.raises(ValueError, match=f"^{scheduler_class.__name__} is not for diffusion models like this; use"):
        draw(pipeline)


def test_the_noise_is_scaled_as_a_scheduler_in_another_parametrisation_wants_it():
    # Euler's samples have the standard deviation of their noise, 157 at first; the network is shown them at about 1.
    scheduler = EulerDiscreteScheduler.from_config(noise_schedule("linear", 1000).config, timestep_spacing="trailing")
    unet, samples = ZeroUNet(), []
    pipeline = quiet(DDPMPipeline(unet, scheduler))
    latents = torch.randn(2, 3, 8, 8, generator=seeded(3))
    draw(pipeline, latents=latents, callback_on_step_end=lambda *given: samples.append(given[3]["latents"]))
    torch.testing.assert_close(unet.shown[0], latents, rtol=1e-3, atol=0)
    torch.testing.assert_close(samples[-1], latents * float(scheduler.init_noise_sigma))
    assert float(scheduler.init_noise_sigma) > 100


class RoundingUNet(ZeroUNet):
    """Predicts all noise, from what it was shown, in the precision of its weights."""

    def forward(self, sample, timestep):
        self.shown.append(sample)
        return UNet2DOutput(sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_do_not_round_the_images_on_the_way(dtype):
    scheduler = sampling_scheduler(noise_schedule("cosine", 1000), "unipc")
    pipeline, on_the_way = quiet(DDPMPipeline(RoundingUNet().to(dtype), scheduler)), []
    images = draw(pipeline, callback_on_step_end=lambda *given: on_the_way.append(given[3]["latents"].dtype))
    assert np.isfinite(images).all() and set(on_the_way) == {torch.float32}
    assert {shown.dtype for shown in pipeline.unet.shown} == {dtype}
    first = torch.randn(2, 3, 8, 8, generator=seeded(3))  # the same noise for the same seed in any precision
    assert torch.equal(pipeline.unet.shown[0], first.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "warned"), [(30, True), (50, False), (1000, False)])
def test_steps_that_ddim_of_diffusers_cannot_divide_are_pointed_out(steps, warned, caplog, monkeypatch):
    from diffusers.utils import logging

    monkeypatch.setattr(logging.get_logger("hfgen.pipelines.pipeline_ddpm"), "propagate", True)
    network = UNetBase(8, block_out_channels=(4, 8))
    pipeline = DDPMPipeline(network, sampling_scheduler(noise_schedule("linear", 1000), "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    with caplog.at_level("WARNING"):
        pipeline(1, num_inference_steps=steps)
    assert (f"num_inference_steps={steps} does not divide 1000" in caplog.text) is warned
