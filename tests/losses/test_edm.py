"""EDM's objective: the factors of table 1, worked out by hand and by diffusers' schedulers."""

import math

import pytest
import torch

from hfgen.losses.edm import edm_batch, sample_noise_levels
from hfgen.methods.schedules import EDM_SAMPLERS, edm_schedule, sampling_scheduler


LEVELS = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0])


def noised(sigma_data=0.5):
    numbers = torch.Generator().manual_seed(0)
    clean = torch.rand(len(LEVELS), 3, 4, 4, generator=numbers) * 2 - 1
    noise = torch.randn(clean.shape, generator=numbers)
    return clean, clean + LEVELS.view(-1, 1, 1, 1) * noise, edm_batch(clean, noise, LEVELS, sigma_data)


def test_the_factors_are_those_of_table_1():
    clean, noise = torch.tensor(0.25).view(1, 1, 1, 1), torch.tensor(-2.0).view(1, 1, 1, 1)
    inputs, timesteps, target = edm_batch(clean, noise, torch.tensor([0.5]), 0.5)
    # sigma = sigma_data = 1/2: c_in = sqrt(2), c_skip = 1/2, c_out = sqrt(1/8), x = 1/4 - 1 = -3/4
    assert inputs.item() == pytest.approx(-0.75 * 2**0.5)
    assert timesteps.item() == pytest.approx(math.log(0.5) / 4)
    assert target.item() == pytest.approx((0.25 + 0.375) * 8**0.5)


@pytest.mark.parametrize("sampler", EDM_SAMPLERS)
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_from_the_target_the_scheduler_of_diffusers_finds_the_clean_images(sampler, sigma_data):
    clean, noisy, (inputs, timesteps, target) = noised(sigma_data)
    scheduler = sampling_scheduler(edm_schedule(sigma_data), sampler)
    sigma = LEVELS.view(-1, 1, 1, 1)
    torch.testing.assert_close(scheduler.precondition_inputs(noisy, sigma), inputs)
    torch.testing.assert_close(scheduler.precondition_noise(LEVELS), timesteps)
    found = scheduler.precondition_outputs(noisy, target, sigma)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=2e-5)


def test_input_and_target_are_about_as_large_at_every_level():
    numbers = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(len(LEVELS), 3, 64, 64, generator=numbers)
    inputs, _, target = edm_batch(clean, torch.randn(clean.shape, generator=numbers), LEVELS, 0.5)
    for values in inputs, target:
        torch.testing.assert_close(values.flatten(1).std(dim=1), torch.ones(len(LEVELS)), rtol=0.03, atol=0.0)


def test_noise_levels_are_lognormal_and_come_from_the_generator():
    levels = sample_noise_levels(20_000, torch.Generator().manual_seed(0))
    logarithms = levels.double().log()
    # Table 1 of Karras et al. 2022.
    assert abs(logarithms.mean() + 1.2) < 0.03 and abs(logarithms.std() - 1.2) < 0.03
    assert torch.equal(levels, sample_noise_levels(20_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(levels, sample_noise_levels(20_000, torch.Generator().manual_seed(1)))


def test_noise_levels_grow_with_their_scale():
    small, large = (sample_noise_levels(100, torch.Generator().manual_seed(0), scale) for scale in (1, 2.5))
    assert torch.allclose(large, 2.5 * small)


def test_sigma_data_must_be_positive():
    with pytest.raises(ValueError, match="sigma_data=0 must be positive"):
        edm_schedule(0)
