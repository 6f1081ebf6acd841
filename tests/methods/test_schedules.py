import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from edm_pipelines import edm_pipeline
from oracle_unet import OracleUNet

from hfgen.methods.schedules import (
    EDM_SAMPLERS,
    SAMPLERS,
    edm_schedule,
    noise_schedule,
    samplers_of,
    sampling_scheduler,
    scaled_for_display,
)
from hfgen.pipelines import DDPMPipeline


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
CLASSES = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddpm": DDPMScheduler,
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
both_schedules = pytest.mark.parametrize("kind", ["linear", "cosine"])
# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def after_each(see: Callable[[int, int, torch.Tensor], object]) -> Callable[..., None]:
    """A callback of the pipeline that shows the step's index, its timestep and the images."""
    return lambda pipeline, index, timestep, tensors: see(index, timestep, tensors["latents"]) and None


def alphas_cumprod(kind: str, num_train_timesteps: int) -> np.ndarray:
    return noise_schedule(kind, num_train_timesteps).alphas_cumprod.double().numpy()


def clean_image() -> torch.Tensor:
    return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


def draw(scheduler, oracle: OracleUNet, num_inference_steps: int, **arguments) -> torch.Tensor:
    """Draw two images, `(2, 3, 4, 4)` in [-1, 1]."""
    pipeline = DDPMPipeline(oracle, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator().manual_seed(1), **arguments}
    return 2 * pipeline(2, num_inference_steps=num_inference_steps, output_type="pt", **arguments).images - 1


# ------------------------------------------------------------------------------------------------- training schedules


def test_the_linear_schedule_of_a_thousand_steps_is_that_of_ho_et_al():
    schedule = noise_schedule("linear", 1000)
    np.testing.assert_allclose(schedule.betas.numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-5)
    np.testing.assert_allclose(alphas_cumprod("linear", 1000)[[0, -1]], [0.9999, 4.0358e-5], rtol=1e-4)


@pytest.mark.parametrize("num_train_timesteps", [100, 250, 500, 750, 1000, 1500])
def test_the_linear_schedule_adds_the_same_noise_whatever_the_number_of_steps(num_train_timesteps):
    alphas = alphas_cumprod("linear", num_train_timesteps)
    # The betas add up to 1000 (0.0001 + 0.02) / 2 = 10.05 for every T, and the product of (1 - beta) < exp(-10.05).
    assert 0 < alphas[-1] < math.exp(-10.05)
    # They agree but for the product's second order, which is the larger the fewer the steps: 0.0075 at T = 100.
    parts = np.arange(1, 51) / 50
    here = alphas[np.round(parts * num_train_timesteps).astype(int) - 1]
    reference = alphas_cumprod("linear", 1000)[np.round(parts * 1000).astype(int) - 1]
    assert np.abs(here - reference).max() < 0.8 / num_train_timesteps


@both_schedules
@pytest.mark.parametrize("num_train_timesteps", [2, 3, 7, 20])
def test_very_few_steps_give_a_schedule_too(kind, num_train_timesteps):
    schedule = noise_schedule(kind, num_train_timesteps)
    assert schedule.config.num_train_timesteps == len(schedule.betas) == num_train_timesteps
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (schedule.betas.diff() > 0).all()


@pytest.mark.parametrize("num_train_timesteps", [100, 1000])
def test_the_cosine_schedule_is_the_formula_with_betas_up_to_0_999(num_train_timesteps):
    def f(step: float) -> float:
        return math.cos((step / num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    exact = np.array([f(step) / f(0) for step in range(num_train_timesteps + 1)])
    betas = 1 - exact[1:] / exact[:-1]
    ours = alphas_cumprod("cosine", num_train_timesteps)
    # Study B also clipped betas below at 0.0001, which diffusers does not. At T = 100 no beta is that small; at
    # T = 1000 the first 13 are, the smallest 4.1e-5. It matters most at the 13th step and there by 0.0004 of
    # alphas_cumprod, a tenth of a grey level.
    clipped = betas.clip(1e-4, 0.999)
    np.testing.assert_allclose(ours, np.cumprod(1 - betas.clip(max=0.999)), rtol=1e-4, atol=1e-12)
    difference = np.abs(ours - np.cumprod(1 - clipped))
    assert (betas < 1e-4).sum() == {100: 0, 1000: 13}[num_train_timesteps]
    assert difference.max() < {100: 1e-6, 1000: 4e-4}[num_train_timesteps]
    # Above, only the last beta is clipped: the formula itself ends in pure noise.
    np.testing.assert_allclose(ours[:-1], exact[1:-1], atol=1e-6)
    assert betas[-1] > 0.999
    assert ours[-1] == pytest.approx(ours[-2] * 0.001, rel=1e-4)


@pytest.mark.parametrize("num_train_timesteps", [1, 0, -5])
def test_less_than_two_steps_are_refused(num_train_timesteps):
    with pytest.raises(ValueError, match=f"num_train_timesteps={num_train_timesteps} must be at least 2"):
        noise_schedule("cosine", num_train_timesteps)


# ----------------------------------------------------------------------------------------------------------- samplers


def test_every_sampler_has_a_class_here():
    assert CLASSES.keys() == set(SAMPLERS)


@every_sampler
@both_schedules
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_twenty_steps_of_every_sampler_end_on_the_clean_image_that_the_network_knows(sampler, kind, prediction_type):
    schedule = noise_schedule(kind, 1000, prediction_type)
    scheduler = sampling_scheduler(schedule, sampler)
    assert type(scheduler) is CLASSES[sampler]
    assert scheduler.config.prediction_type == schedule.config.prediction_type == prediction_type
    images = draw(scheduler, OracleUNet.that_knows(clean_image(), schedule), 20)
    torch.testing.assert_close(images, clean_image().expand(2, -1, -1, -1), rtol=0, atol=1e-3)


# For these numbers of 100 and 1000 steps the spacing of diffusers adds a timestep of -1 by a rounding error. There
# DDIM takes the image for pure noise and amplifies it, solvers stop before the clean image; none was trained there.
@every_sampler
@both_schedules
@pytest.mark.parametrize(
    ("num_train_timesteps", "num_inference_steps"), [(100, 29), (100, 97), (1000, 61), (1000, 122)]
)
def test_no_number_of_steps_leads_below_timestep_zero(sampler, kind, num_train_timesteps, num_inference_steps):
    schedule = noise_schedule(kind, num_train_timesteps)
    oracle = OracleUNet.that_knows(clean_image(), schedule)  # refuses timesteps below zero
    steps = []
    images = draw(
        sampling_scheduler(schedule, sampler),
        oracle,
        num_inference_steps,
        callback_on_step_end=after_each(lambda index, timestep, sample: steps.append(timestep)),
    )
    assert num_inference_steps - 1 <= len(steps) == len(set(steps)) <= num_inference_steps
    torch.testing.assert_close(images, clean_image().expand(2, -1, -1, -1), rtol=0, atol=1e-3)


@every_sampler
@both_schedules
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 50])
def test_every_sampler_starts_where_an_image_is_nearly_noise_however_few_its_steps(sampler, kind, num_inference_steps):
    scheduler = sampling_scheduler(noise_schedule(kind, 1000), sampler)
    scheduler.set_timesteps(num_inference_steps)
    first = int(scheduler.timesteps[0])
    # DPM-Solver++ starts a cosine schedule at a log-SNR of -5.1: 0.6 % of an image's amplitude are left there.
    assert alphas_cumprod(kind, 1000)[first] ** 0.5 < 0.0065
    assert first == 999 or (sampler, kind) == ("dpm", "cosine")


@every_sampler
def test_a_sampler_keeps_the_betas_and_the_prediction_type_of_the_training(sampler):
    for training in (
        noise_schedule("cosine", 300, "v_prediction"),
        DDPMScheduler(300, prediction_type="sample", beta_start=0.002, beta_end=0.03),
        DDPMScheduler(300, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        DDPMScheduler(300, prediction_type="sample", trained_betas=[0.001 + step / 1e4 for step in range(300)]),
    ):
        scheduler = sampling_scheduler(training, sampler)
        assert torch.equal(scheduler.betas, training.betas)
        # At zero signal some samplers put 2^-24 in the place of 0.
        torch.testing.assert_close(scheduler.alphas_cumprod, training.alphas_cumprod, rtol=0, atol=1e-7)
        assert scheduler.config.prediction_type == training.config.prediction_type != "epsilon"
        assert scheduler.config.num_train_timesteps == 300


@every_sampler
@both_schedules
@pytest.mark.parametrize("earlier", SAMPLERS)
def test_a_sampler_is_the_same_whichever_the_pipeline_was_saved_with(sampler, kind, earlier, tmp_path):
    training = noise_schedule(kind, 300, "v_prediction")
    sampling_scheduler(training, earlier).save_pretrained(tmp_path)
    changed = sampling_scheduler(CLASSES[earlier].from_pretrained(tmp_path), sampler)
    direct = sampling_scheduler(training, sampler)
    settings = CLASSES[sampler]._get_init_keys(CLASSES[sampler]) - {"self"}
    assert {key: changed.config[key] for key in settings} == {key: direct.config[key] for key in settings}


@every_sampler
@both_schedules
def test_a_sampler_keeps_what_it_predicts_within_the_range_of_images(sampler, kind):
    schedule = noise_schedule(kind, 1000, "sample")
    oracle = OracleUNet.that_knows(torch.full((3, 4, 4), 1.6), schedule)
    seen = []
    draw(
        sampling_scheduler(schedule, sampler),
        oracle,
        10,
        callback_on_step_end=after_each(lambda index, timestep, sample: seen.append(sample)),
    )
    torch.testing.assert_close(seen[-1], torch.ones(2, 3, 4, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "deterministic"), [("ddim", True), ("dpm", True), ("unipc", True), ("ddpm", False)]
)
def test_only_the_ancestral_sampler_draws_noise_on_the_way(sampler, deterministic):
    schedule = noise_schedule("linear", 1000)
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    halfway = []
    for seed in 1, 2:
        draw(
            sampling_scheduler(schedule, sampler),
            OracleUNet.that_knows(clean_image(), schedule),
            4,
            latents=latents,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_each(
                lambda index, timestep, sample: halfway.append(sample) if index == 1 else None
            ),
        )
    assert torch.equal(*halfway) == deterministic


# ---------------------------------------------------------------------------------------------------------------- EDM


class EDMOracle(OracleUNet):
    """Knows the clean image, and answers as a network trained by EDM on it would."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> UNet2DOutput:
        level = (4 * timestep).exp()
        total = (level**2 + 0.5**2).sqrt()
        return UNet2DOutput((self.clean_image - 0.5**2 / total * sample) * total / (0.5 * level))


def edm_oracle() -> EDMOracle:
    oracle = EDMOracle(4, 3)
    oracle.clean_image.copy_(clean_image())
    return oracle


@pytest.mark.parametrize("num_inference_steps", [2, 5, 18, 61])
@pytest.mark.parametrize("sampler", EDM_SAMPLERS)
def test_the_samplers_of_edm_end_on_the_clean_image_that_the_network_knows(sampler, num_inference_steps):
    scheduler = sampling_scheduler(edm_schedule(), sampler)
    steps = []
    images = draw(
        scheduler,
        edm_oracle(),
        num_inference_steps,
        callback_on_step_end=after_each(lambda index, timestep, sample: steps.append(timestep)),
    )
    torch.testing.assert_close(images, clean_image().expand(2, -1, -1, -1), rtol=0, atol=1e-3)
    assert len(steps) == num_inference_steps and steps[0] == 999 and steps[-1] == 0
    assert steps == sorted(set(steps), reverse=True)


@pytest.mark.parametrize("earlier", EDM_SAMPLERS)
@pytest.mark.parametrize("sampler", EDM_SAMPLERS)
def test_a_sampler_of_edm_is_the_same_whichever_the_pipeline_was_saved_with(sampler, earlier):
    training = edm_schedule(0.3)
    changed = sampling_scheduler(sampling_scheduler(training, earlier), sampler)
    assert dict(changed.config) == dict(sampling_scheduler(training, sampler).config)
    assert changed.config.sigma_data == 0.3


def test_what_edm_has_left_on_the_way_is_scaled_for_display():
    scheduler, shown = sampling_scheduler(edm_schedule(), "dpm"), []
    draw(
        scheduler,
        edm_oracle(),
        8,
        callback_on_step_end=after_each(
            lambda index, _, sample: shown.append(scaled_for_display(scheduler, index, sample))
        ),
    )
    assert all(0.3 < images.std() < 1.3 for images in shown)
    torch.testing.assert_close(shown[-1], clean_image().expand(2, -1, -1, -1), rtol=0, atol=1e-3)
    counted = sampling_scheduler(noise_schedule("linear", 10), "ddim")
    assert scaled_for_display(counted, 0, shown[0]) is shown[0]


def test_under_autocast_the_state_stays_in_full_precision():
    dtypes = []
    see_dtype = after_each(lambda index, timestep, sample: dtypes.append(sample.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for sampler in EDM_SAMPLERS:
            pipeline = edm_pipeline(sampler=sampler)
            pipeline(1, num_inference_steps=3, callback_on_step_end=see_dtype)
    assert dtypes == [torch.float32] * 6


def test_what_edm_lacks_is_refused_by_name():
    assert samplers_of(edm_schedule()) == EDM_SAMPLERS
    assert samplers_of(noise_schedule("linear", 10)) == SAMPLERS
    for sampler in set(SAMPLERS) - set(EDM_SAMPLERS):
        with pytest.raises(ValueError, match=f"a network trained with EDM has only ddim and dpm, not {sampler}"):
            sampling_scheduler(edm_schedule(), sampler)
