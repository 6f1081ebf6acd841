"""Bounds on the likelihood of a DDPM: against the paper's equations one by one, and on Gaussian data."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from likelihood_oracle import (
    TYPES,
    Network,
    alphas_cumprod_of,
    decoder_nats,
    few_steps,
    images_of,
    random_images,
    seeded,
    terms_by_the_equations,
    tiny_vae,
)
from scipy.special import ndtr

from hfgen.methods.schedules import edm_schedule, noise_schedule
from hfgen.metrics.likelihood import _strata, diffusion_bits, edm_bits, vae_bits


# ------------------------------------------------------------------------------------------------------- the equations


def test_it_is_the_sum_of_the_paper_s_equations():
    schedule = few_steps()
    predicted = torch.tensor([0.31, 0.3, 0.25, -0.1, 0.9, -0.6], dtype=torch.float64).float()
    network = Network(lambda noisy, timesteps: predicted.double()[timesteps][:, None, None, None], schedule)
    levels = torch.tensor([[0, 255, 166], [1, 254, 7]])
    bits = diffusion_bits(network, schedule, images_of(levels)[:, :, None, None], 5, seeded())
    expected = [
        sum(sum(terms_by_the_equations(schedule, int(level), predicted.tolist())) for level in image) / 3 / math.log(2)
        for image in levels
    ]
    assert bits.tolist() == pytest.approx(expected, rel=1e-9)
    assert (bits.dtype, bits.device.type, bits.requires_grad) == (torch.float64, "cpu", False)


@pytest.mark.parametrize("level", [0, 100, 255])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_of_images_that_the_network_knows_only_the_ends_remain(kind, level):
    schedule = noise_schedule(kind, 1000, "sample")
    images = images_of(torch.full((2, 3, 2, 2), level))
    bits = diffusion_bits(Network(lambda noisy, timesteps: images, schedule), schedule, images, 20, seeded())
    bar, beta = alphas_cumprod_of(schedule), schedule.betas.double()
    sigma = math.sqrt(beta[1] * (1 - bar[0]) / (1 - bar[1]))
    first = decoder_nats(level, float(images[0, 0, 0, 0]), sigma)
    last = 0.5 * float(bar[-1] * (2 * level / 255 - 1) ** 2 - bar[-1] - torch.log1p(-bar[-1]))
    assert bits.tolist() == pytest.approx([(first + last) / math.log(2)] * 2, rel=1e-5)
    assert last < 1e-4 and first < 1


# Means inside and outside of the bin, and so far away that the probability is no float64.
@pytest.mark.parametrize("mean", [-1.0, -0.996, -0.5, 0.0, 0.02, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("beta", [1e-4, 0.05])
def test_the_decoder_integrates_a_gaussian_over_the_bin_with_open_tails(mean, beta):
    schedule = few_steps(betas=(beta, 2 * beta))
    levels = torch.tensor([0, 1, 2, 64, 127, 128, 130, 200, 253, 254, 255, 0])
    images = images_of(levels).reshape(4, 3, 1, 1)
    mean = float(torch.tensor(mean))
    network = Network(lambda noisy, timesteps: torch.tensor(mean, dtype=torch.float64), schedule)
    bits = diffusion_bits(network, schedule, images, 1, seeded())
    terms = [terms_by_the_equations(schedule, int(level), [mean, mean]) for level in levels]
    expected = np.sum(terms, axis=1).reshape(4, 3).mean(axis=1) / math.log(2)
    assert bits.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("mean", [-0.9, 0.4, 1.0])
def test_the_probabilities_of_all_values_add_up_to_one(mean):
    schedule, predicted = few_steps(betas=(0.02, 0.1)), torch.tensor(mean, dtype=torch.float64)
    images = images_of(torch.arange(256))[:, None, None, None].expand(-1, 3, -1, -1)
    bits = diffusion_bits(Network(lambda noisy, timesteps: predicted, schedule), schedule, images, 1, seeded())
    others = [sum(terms_by_the_equations(schedule, level, [mean, mean])[1:]) for level in range(256)]
    nats = bits.numpy() * math.log(2) - others
    assert np.exp(-nats).sum() == pytest.approx(1, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("clip_sample", [False, True])
def test_the_kinds_of_prediction_give_the_same_number(clip_sample):
    images, bits = random_images(3), {}
    for prediction_type in TYPES:
        schedule = few_steps(prediction_type, clip_sample)
        network = Network(lambda noisy, timesteps: (1.2 - 0.1 * timesteps[:, None, None, None]) * noisy, schedule)
        bits[prediction_type] = diffusion_bits(network, schedule, images, 3, seeded()).tolist()
    assert bits["epsilon"] == pytest.approx(bits["sample"], rel=1e-4)
    assert bits["v_prediction"] == pytest.approx(bits["sample"], rel=1e-4)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (2.0, 2.0), (None, 5.0)])
def test_predictions_are_clipped_as_the_schedule_says(limit, expected):
    def bits(prediction, **options):
        schedule = DDPMScheduler(4, trained_betas=[0.1, 0.2, 0.3, 0.4], prediction_type="sample", **options)
        prediction = torch.tensor(prediction, dtype=torch.float64)
        return diffusion_bits(Network(lambda noisy, timesteps: prediction, schedule), schedule, images, 3, seeded())

    images = random_images(2)
    options = {"clip_sample": False} if limit is None else {"clip_sample": True, "clip_sample_range": limit}
    for sign in (-1.0, 1.0):
        wanted = bits(sign * expected, clip_sample=False)
        assert torch.equal(bits(sign * 5.0, **options), wanted)


def test_the_network_gets_the_noisy_images_of_the_timestep():
    schedule = noise_schedule("linear", 1000, "sample")
    images, seen = images_of(torch.full((40, 3, 16, 16), 230)), []

    def predict(noisy, timesteps):
        seen.extend(zip(timesteps.tolist(), noisy.flatten(1), strict=True))
        return noisy

    diffusion_bits(Network(predict, schedule), schedule, images, 7, seeded())
    bar = alphas_cumprod_of(schedule)
    standardised = [
        (noisy - bar[timestep].sqrt() * images[0, 0, 0, 0].double()) / (1 - bar[timestep]).sqrt()
        for timestep, noisy in seen
    ]
    for noise in standardised:  # 768 values: standard errors of 0.036 and 0.026
        assert abs(float(noise.mean())) < 0.18 and float(noise.std()) == pytest.approx(1, abs=0.13)
    # Another draw for each image and each timestep.
    together = torch.stack(standardised)
    assert len(seen) == 40 * 8
    assert float(torch.corrcoef(together).fill_diagonal_(0).abs().max()) < 0.25


# -------------------------------------------------------------------------------------------------- Gaussian data


SPREAD = 0.25


def gaussian_images(count: int = 64) -> torch.Tensor:
    values = SPREAD * torch.randn((count, 3, 8, 8), generator=seeded(3), dtype=torch.float64)
    return images_of(((values + 1) * 127.5).round().clamp(0, 255))


def entropy() -> float:
    edges = np.concatenate([[-np.inf], (2 * np.arange(255) + 1) / 255 - 1, [np.inf]]) / SPREAD
    probabilities = np.diff(ndtr(edges))
    return float(-(probabilities * np.log2(probabilities)).sum())


def gain(schedule: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """The factor of E[x_0 | x_t]."""
    bar = alphas_cumprod_of(schedule)[timesteps][:, None, None, None]
    return SPREAD**2 * bar.sqrt() / (SPREAD**2 * bar + 1 - bar)


def expected_bits(schedule: DDPMScheduler) -> float:
    """The bound of the best network: its squared errors are known, and its L_0 is an integral over the error."""
    bar, beta = alphas_cumprod_of(schedule).numpy(), schedule.betas.double().numpy()
    snr = bar / (1 - bar)
    error_variance = 1 / (1 / SPREAD**2 + snr)
    middle = (0.5 * (snr[:-1] - snr[1:]) * error_variance[1:]).sum()
    last = 0.5 * (bar[-1] * SPREAD**2 - bar[-1] - np.log1p(-bar[-1]))
    sigma = math.sqrt(beta[1] * (1 - bar[0]) / (1 - bar[1]))
    errors = np.linspace(-6, 6, 2001)
    density = np.exp(-(errors**2) / 2) / np.exp(-(errors**2) / 2).sum()
    errors = np.abs(errors) * math.sqrt(error_variance[0])
    first = -(density * np.log(ndtr((1 / 255 - errors) / sigma) - ndtr((-1 / 255 - errors) / sigma))).sum()
    return (first + middle + last) / math.log(2)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_bound_of_gaussian_data_is_exact_and_a_little_above_the_entropy(prediction_type):
    schedule = noise_schedule("linear", 1000, prediction_type)
    network = Network(lambda noisy, timesteps: gain(schedule, timesteps) * noisy, schedule)
    bits = diffusion_bits(network, schedule, gaussian_images(), 999, seeded(1)).mean().item()
    assert bits == pytest.approx(expected_bits(schedule), rel=0.003)
    # Most of the gap is due to the first few timesteps, between which the signal-to-noise ratio falls fast.
    assert 1.05 * entropy() < bits < 1.12 * entropy()


def test_a_worse_network_needs_more_bits_and_one_that_sees_no_noise_many_more():
    schedule, images = noise_schedule("linear", 1000), gaussian_images(8)

    def bits(predict):
        return diffusion_bits(Network(predict, schedule), schedule, images, 999, seeded(2))

    best = bits(lambda noisy, timesteps: gain(schedule, timesteps) * noisy)
    biased = bits(lambda noisy, timesteps: gain(schedule, timesteps) * noisy + 0.01)
    shrunk = bits(lambda noisy, timesteps: 0.96 * gain(schedule, timesteps) * noisy)
    none = diffusion_bits(
        lambda noisy, timesteps: SimpleNamespace(sample=torch.zeros_like(noisy)), schedule, images, 999, seeded(2)
    )
    assert (biased > best + 0.2).all() and (shrunk > best + 0.2).all()
    assert (none > best + 2).all()


# --------------------------------------------------------------------------------------------------------- strata


@pytest.mark.parametrize(
    ("timesteps_per_image", "strata"),
    [
        (1, [range(1, 11)]),
        (3, [range(1, 2), range(2, 6), range(6, 11)]),
        (4, [range(1, 2), range(2, 4), range(4, 7), range(7, 11)]),
        (10, [range(t, t + 1) for t in range(1, 11)]),
        (1000, [range(t, t + 1) for t in range(1, 11)]),
    ],
)
def test_timesteps_are_stratified_and_the_mean_is_the_sum_over_all_of_them(timesteps_per_image, strata):
    schedule = few_steps(betas=np.linspace(0.01, 0.4, 11))
    predicted = torch.linspace(-0.9, 0.8, 11, dtype=torch.float64).square().float().double()
    images = images_of(torch.full((4000, 3, 1, 1), 90))
    network = Network(lambda noisy, timesteps: predicted[timesteps][:, None, None, None], schedule)
    bits = diffusion_bits(network, schedule, images, timesteps_per_image, seeded(4))

    asked = torch.stack(network.asked)
    assert sorted(set(asked[-1].tolist())) == [0]
    assert [sorted(set(timesteps.tolist())) for timesteps in asked[:-1]] == [list(stratum) for stratum in strata]
    for timesteps, stratum in zip(asked, strata, strict=False):
        frequencies = torch.bincount(timesteps - stratum[0]) / 4000
        assert frequencies.numpy() == pytest.approx(np.full(len(stratum), 1 / len(stratum)), abs=0.04)

    exact = sum(terms_by_the_equations(schedule, 90, predicted.tolist())) / math.log(2)
    standard_error = float(bits.std()) / math.sqrt(4000)
    if timesteps_per_image >= 10:
        assert bits.tolist() == pytest.approx([exact] * 4000, rel=1e-9)
    else:
        assert 0 < standard_error < 0.02 * exact
        assert abs(float(bits.mean()) - exact) < 4 * standard_error


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_signal_to_noise_ratio_falls_by_about_as_much_in_each_stratum(kind):
    alphas = (1 - noise_schedule(kind, 1000).betas.double()).cumprod(dim=0)
    log_snr = (alphas / (1 - alphas)).log()
    edges = torch.tensor(_strata(log_snr.exp(), 20))
    assert (edges[0], edges[-1], len(edges)) == (1, 1000, 21) and bool((edges.diff() >= 1).all())
    falls = -log_snr[edges - 1].diff()
    steps = -log_snr.diff()
    # A stratum is off by the last fall before it and by its own last one, at most.
    equal = (log_snr[0] - log_snr[-1]) / 20
    several = edges.diff() > 1
    slack = torch.maximum(steps[edges[:-1] - 2].clamp(min=0), steps[edges[1:] - 2])
    assert bool(((falls - equal).abs() <= slack + 1e-9)[several][1:-1].all())


def test_a_schedule_that_ends_in_pure_noise_has_strata_like_others():
    strata = []
    for zero in (False, True):
        betas = DDPMScheduler(1000, rescale_betas_zero_snr=zero).betas.double()
        alphas = (1 - betas).cumprod(dim=0)
        strata.append(torch.tensor(_strata(alphas / (1 - alphas), 20)).diff())
    assert strata[1].max() < 2 * strata[0].max()


def test_the_expectation_is_over_every_timestep_with_a_network_that_sees_the_noise():
    schedule, images = few_steps("epsilon", betas=np.linspace(0.01, 0.4, 11)), gaussian_images(2000)
    network = Network(lambda noisy, timesteps: gain(schedule, timesteps) * noisy, schedule)
    every, some = (diffusion_bits(network, schedule, images, count, seeded(count)) for count in (10, 3))
    difference = every - some  # of the same images
    standard_error = float(difference.std()) / math.sqrt(2000)
    assert standard_error < 0.01 * float(every.mean())
    assert abs(float(difference.mean())) < 4 * standard_error


@pytest.mark.parametrize("timesteps_per_image", [2, 5])  # of 5 the noise alone is drawn
def test_the_generator_decides_and_nothing_else(timesteps_per_image):
    schedule = few_steps("epsilon")
    network = Network(lambda noisy, timesteps: 0.5 * noisy, schedule)
    first, other, again = (
        diffusion_bits(network, schedule, random_images(3), timesteps_per_image, seeded(seed)) for seed in (1, 2, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    diffusion_bits(network, schedule, random_images(3), timesteps_per_image, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------ errors


def test_few_timesteps_and_another_prediction_type_are_refused():
    network = Network(lambda noisy, timesteps: noisy, few_steps())
    with pytest.raises(ValueError, match="timesteps_per_image=0 must be at least 1"):
        diffusion_bits(network, few_steps(), random_images(1), 0, seeded())
    schedule = few_steps()
    schedule.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow' must be one of"):
        diffusion_bits(network, schedule, random_images(1), 1, seeded())
    assert network.asked == []


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (random_images(1)[0], r"images must have shape \(batch_size, 3, height, width\), not"),
        (random_images(2)[:, :1], r"images must have shape \(batch_size, 3, height, width\), not"),
        (random_images(2)[:0], r"images must have shape \(batch_size, 3, height, width\), not"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "images must be torch.float32, not torch.uint8"),
        (random_images(1, 8).double(), "images must be torch.float32, not torch.float64"),
        (random_images(1, 8) + 1, "images must be in"),
        (random_images(1, 8) - 1, "images must be in"),
        (random_images(1, 8) * math.nan, "images must be in"),
        (random_images(1, 8) * 0.99, "images must be 8-bit values"),
    ],
)
def test_other_images_are_refused(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        diffusion_bits(Network(lambda noisy, timesteps: noisy, few_steps()), few_steps(), images, 1, seeded())
    with pytest.raises(ValueError, match=complaint):
        vae_bits(tiny_vae(), images, seeded())


# ------------------------------------------------------------------------------------------------------------- EDM


class DenoiserOfGaussians:
    """What the best network trained by EDM says of Gaussian data of a standard deviation; notes the levels."""

    def __init__(self, schedule, spread: float = SPREAD):
        self.sigma_data, self.spread, self.levels = schedule.config.sigma_data, spread, []

    def __call__(self, scaled, timesteps):
        assert scaled.dtype == torch.float32 and not torch.is_grad_enabled()
        sigma = (4 * timesteps.double()).exp().view(-1, 1, 1, 1)
        self.levels.append(sigma.flatten())
        total = (sigma**2 + self.sigma_data**2).sqrt()
        noisy = scaled.double() * total
        denoised = self.spread**2 / (self.spread**2 + sigma**2) * noisy
        c_skip, c_out = (self.sigma_data / total) ** 2, sigma * self.sigma_data / total
        return SimpleNamespace(sample=((denoised - c_skip * noisy) / c_out).float())


def test_of_gaussian_data_edm_s_bound_is_the_one_expected_and_close_to_the_entropy():
    schedule = edm_schedule()
    bits = edm_bits(DenoiserOfGaussians(schedule), schedule, gaussian_images(), 400, seeded(1)).mean().item()
    # E |error|^2 / sigma^2 over the logarithm of sigma is 0.5 log(1 + (SPREAD / sigma)^2), end against end.
    ends = [0.5 * math.log1p((SPREAD / sigma) ** 2) for sigma in (0.002, 80.0)]
    prior = SPREAD**2 / (2 * 80.0**2)
    errors = np.linspace(-6, 6, 2001)
    density = np.exp(-(errors**2) / 2) / np.exp(-(errors**2) / 2).sum()
    errors = np.abs(errors) * 0.002
    last = -(density * np.log(ndtr((1 / 255 - errors) / 0.002) - ndtr((-1 / 255 - errors) / 0.002))).sum()
    assert bits == pytest.approx((prior + ends[0] - ends[1] + last) / math.log(2), rel=0.003)
    assert entropy() < bits < 1.15 * entropy()


def test_a_worse_denoiser_needs_more_bits_and_levels_are_stratified():
    schedule, images = edm_schedule(), gaussian_images(8)
    network = DenoiserOfGaussians(schedule)
    best = edm_bits(network, schedule, images, 30, seeded()).mean().item()
    assert edm_bits(DenoiserOfGaussians(schedule, 1.0), schedule, images, 30, seeded()).mean().item() > best + 0.1
    levels = torch.stack(network.levels)  # (31, 8)
    edges = torch.linspace(math.log(0.002), math.log(80), 31, dtype=torch.float64)
    drawn = levels[:30].log()
    slack = 1e-5
    assert (drawn >= edges[:-1, None] - slack).all() and (drawn <= edges[1:, None] + slack).all()
    assert all(len(set(row.tolist())) == 8 for row in drawn)
    torch.testing.assert_close(levels[30], torch.full((8,), 0.002, dtype=torch.float64), rtol=1e-4, atol=0)


def test_edm_s_bound_is_a_function_of_the_generator_and_needs_a_level():
    schedule, images = edm_schedule(), random_images(3)
    network = DenoiserOfGaussians(schedule)
    one, two, other = (edm_bits(network, schedule, images, 4, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (3,)
    with pytest.raises(ValueError, match="levels_per_image=0"):
        edm_bits(network, schedule, images, 0, seeded())
    with pytest.raises(ValueError, match="8-bit"):
        edm_bits(network, schedule, images + 0.001, 4, seeded())
