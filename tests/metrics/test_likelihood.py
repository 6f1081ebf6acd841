"""Bounds on the likelihood: against the paper's equations one by one, Gaussian data, and the report of the VAE."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy.special import erf, log_ndtr, ndtr

from hfgen.metrics.likelihood import _strata, diffusion_bits, vae_bits
from hfgen.models import ConvVAE
from hfgen.posterior import encode_images
from hfgen.schedules import noise_schedule


TYPES = ("epsilon", "sample", "v_prediction")
FEW_BETAS = (0.003, 0.004, 0.02, 0.1, 0.3, 0.5)


class Network:
    """Predicts the clean images by a function of noisy images and timesteps, and notes what it was asked for.

    Args:
        predict: maps float64 noisy images and timesteps `(batch_size,)` to the predicted clean images.
        schedule: by which the prediction is expressed.
    """

    def __init__(self, predict, schedule: DDPMScheduler):
        self.predict, self.prediction_type, self.asked = predict, schedule.config.prediction_type, []
        self.alphas_cumprod = alphas_cumprod_of(schedule)

    def __call__(self, noisy_images, timesteps):
        assert (noisy_images.dtype, timesteps.dtype) == (torch.float32, torch.int64)
        assert not torch.is_grad_enabled()
        self.asked.append(timesteps)
        noisy_images = noisy_images.double()
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        clean_images = self.predict(noisy_images, timesteps).expand_as(noisy_images)
        noise = (noisy_images - alphas_cumprod.sqrt() * clean_images) / (1 - alphas_cumprod).sqrt()
        velocity = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean_images
        outputs = {"epsilon": noise, "sample": clean_images, "v_prediction": velocity}
        return SimpleNamespace(sample=outputs[self.prediction_type].float())


def alphas_cumprod_of(schedule: DDPMScheduler) -> torch.Tensor:
    return (1 - schedule.betas.double()).cumprod(dim=0)


def few_steps(prediction_type: str = "sample", clip_sample: bool = False, betas=FEW_BETAS) -> DDPMScheduler:
    return DDPMScheduler(
        len(betas), trained_betas=list(betas), prediction_type=prediction_type, clip_sample=clip_sample
    )


def images_of(levels) -> torch.Tensor:
    return 2 * torch.as_tensor(levels).float() / 255 - 1


def random_images(count: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return images_of(torch.randint(0, 256, (count, 3, size, size), generator=generator))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kl_of_gaussians(mean_q, variance_q, mean_p, variance_p):
    return 0.5 * (math.log(variance_p / variance_q) + (variance_q + (mean_q - mean_p) ** 2) / variance_p - 1)


def decoder_nats(level: int, mean: float, sigma: float) -> float:
    """Equation 13 for one value, by the logarithms of the tails where the bin is far from the mean."""
    clean = 2 * level / 255 - 1
    above, below = (clean + 1 / 255 - mean) / sigma, (clean - 1 / 255 - mean) / sigma
    if level == 0:
        return -log_ndtr(above)
    if level == 255:
        return -log_ndtr(-below)
    if min(abs(above), abs(below)) < 5:
        return -math.log((erf(above / math.sqrt(2)) - erf(below / math.sqrt(2))) / 2)
    near, far = sorted((abs(above), abs(below)))
    return -(log_ndtr(-near) + math.log1p(-math.exp(log_ndtr(-far) - log_ndtr(-near))))


def terms_by_the_equations(schedule: DDPMScheduler, level: int, predicted) -> list[float]:
    """L_0, L_1, ..., L_T in nats for one value if the network says `predicted[t - 1]` at Ho et al.'s timestep t."""
    beta = [None, *(float(beta) for beta in schedule.betas.double())]
    bar = np.cumprod([1, *(1 - beta for beta in beta[1:])])
    clean, last = 2 * level / 255 - 1, len(beta) - 1
    variance = [None, *(beta[t] * (1 - bar[t - 1]) / (1 - bar[t]) for t in range(1, last + 1))]
    terms = [decoder_nats(level, predicted[0], math.sqrt(variance[2]))]
    for t in range(2, last + 1):
        noisy = 0.3  # drops out
        means = [
            (math.sqrt(bar[t - 1]) * beta[t] * start + math.sqrt(1 - beta[t]) * (1 - bar[t - 1]) * noisy)
            / (1 - bar[t])
            for start in (clean, predicted[t - 1])
        ]
        terms.append(kl_of_gaussians(means[0], variance[t], means[1], variance[t]))
    return [*terms, kl_of_gaussians(math.sqrt(bar[last]) * clean, 1 - bar[last], 0, 1)]


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
def test_the_decoder_is_the_integral_of_a_gaussian_over_the_bin_and_the_tails_are_open(mean, beta):
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
def test_of_gaussian_data_the_bound_is_the_one_expected_and_a_little_above_the_entropy(prediction_type):
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
def test_each_image_gets_one_timestep_of_each_stratum_and_on_average_the_sum_over_all(timesteps_per_image, strata):
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


def test_the_expectation_is_that_of_every_timestep_with_a_network_that_sees_the_noise():
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
    with pytest.raises(ValueError, match="prediction_type='flow' is none of"):
        diffusion_bits(network, schedule, random_images(1), 1, seeded())
    assert network.asked == []


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (random_images(1)[0], "images of shape"),
        (random_images(2)[:, :1], "images of shape"),
        (random_images(2)[:0], "images of shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "images of torch.uint8"),
        (random_images(1, 8).double(), "images of torch.float64"),
        (random_images(1, 8) + 1, "images are not all in"),
        (random_images(1, 8) - 1, "images are not all in"),
        (random_images(1, 8) * math.nan, "images are not all in"),
        (random_images(1, 8) * 0.99, "images are not of 8-bit values"),
    ],
)
def test_other_images_are_refused(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        diffusion_bits(Network(lambda noisy, timesteps: noisy, few_steps()), few_steps(), images, 1, seeded())
    with pytest.raises(ValueError, match=complaint):
        vae_bits(tiny_vae(), images, seeded())


# --------------------------------------------------------------------------------------------------------------- VAE


def tiny_vae() -> ConvVAE:
    torch.manual_seed(0)
    vae = ConvVAE(8, latent_dim=5, block_out_channels=(4, 8), layers_per_block=0).eval()
    with torch.no_grad():
        vae.to_posterior.weight *= 30
        vae.conv_out.weight *= 10
    return vae


def mixed_images() -> torch.Tensor:
    """Three of a flat grey, which are decoded well, and four of noise, which are not."""
    return torch.cat([images_of(torch.full((3, 3, 8, 8), 128)), random_images(4, 8)])


def test_it_is_the_figure_of_the_vae_s_report(fresh_accelerate_state):
    vae, images = tiny_vae(), mixed_images()
    report = encode_images(vae, iter(images.split(1)), 7, seeded(1), Accelerator(cpu=True)).report()
    for batch_size in (1, 3, 7, 64):
        bits = vae_bits(vae, images, seeded(1), batch_size)
        assert isinstance(bits, float)
        assert bits == pytest.approx(report["bits_per_dimension"], rel=1e-5)
    assert vae_bits(vae, images, seeded(2)) != pytest.approx(bits, rel=1e-5)


def test_the_variance_of_a_perfect_decoder_has_a_floor():
    images = random_images(5, 2)
    parameters = torch.tensor([0.5, math.log(0.25)])[:, None, None].expand(5, 2, 1, 1)
    vae = SimpleNamespace(
        device=torch.device("cpu"),
        encode=lambda images: SimpleNamespace(latent_dist=DiagonalGaussianDistribution(parameters)),
        decode=lambda latents: SimpleNamespace(sample=images),
    )
    kl = (0.25 + 0.25 - 1 - math.log(0.25)) / 2
    nats = 6 * math.log(2 * math.pi / 255**2) + kl  # of 12 dimensions
    assert vae_bits(vae, images, seeded()) == pytest.approx((nats / 12 + math.log(127.5)) / math.log(2), rel=1e-6)


def test_no_images_at_a_time_are_refused():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        vae_bits(tiny_vae(), random_images(1, 8), seeded(), 0)
