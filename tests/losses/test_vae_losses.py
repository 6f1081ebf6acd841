import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Bernoulli, Laplace, Normal, kl_divergence

from hfgen.losses.vae import (
    MIN_SIGMA,
    RECONSTRUCTIONS,
    bits_per_dimension,
    kl_loss,
    kl_per_dimension,
    reconstruction_loss,
    warmed_up,
)


# Two pixels x = 0.2 and -0.6, reconstructed as y = 0.5 and 0.1: worked out by hand.
BY_HAND = {
    # The mean squared error is (0.3^2 + 0.7^2) / 2 = 0.29, so for two pixels 1 + log(2 pi 0.29).
    "calibrated": 1 + 1.8378771 - 1.2378744,
    "mse": (0.3**2 + 0.7**2) / 2 + 1.8378771,
    "l1": 0.3 + 0.7 + 2 * 0.6931472,
    # From [0, 1]: x = 0.6 and 0.2, y = 0.75 and 0.55; -x log y - (1 - x) log(1 - y).
    "bce": 0.6 * 0.2876821 + 0.4 * 1.3862944 + 0.2 * 0.5978370 + 0.8 * 0.7985077,
}
# What a pixel x costs around the reconstruction y.
DISTRIBUTIONS = {
    "calibrated": lambda y, x: -Normal(y, (y - x).square().mean().sqrt()).log_prob(x),
    "mse": lambda y, x: -Normal(y, 1.0).log_prob(x),
    "l1": lambda y, x: -Laplace(y, 1.0).log_prob(x),
    "bce": lambda y, x: -Bernoulli((y + 1) / 2, validate_args=False).log_prob((x + 1) / 2),
}
every_kind = pytest.mark.parametrize("kind", RECONSTRUCTIONS)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_images(batch_size: int = 3, height: int = 5, seed: int = 0) -> torch.Tensor:
    return draw(batch_size, 2, height, 4, seed=seed).tanh()


def nats(reconstruction: torch.Tensor, images: torch.Tensor, kind: str) -> float:
    return reconstruction_loss(reconstruction, images, kind).item()


# --------------------------------------------------------------------------------------------------------- likelihoods


def test_every_kind_has_a_value_by_hand_and_a_distribution():
    assert BY_HAND.keys() == set(RECONSTRUCTIONS) == DISTRIBUTIONS.keys()


@every_kind
def test_a_reconstruction_loss_is_the_one_worked_out_by_hand(kind):
    images, reconstruction = torch.tensor([0.2, -0.6]), torch.tensor([0.5, 0.1])
    loss = reconstruction_loss(reconstruction.view(1, 1, 1, 2), images.view(1, 1, 1, 2), kind)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(BY_HAND[kind], rel=1e-5)


@every_kind
def test_a_reconstruction_loss_is_summed_over_pixels_and_averaged_over_images(kind):
    reconstruction, images = draw_images(seed=1), draw_images(seed=2)
    expected = DISTRIBUTIONS[kind](reconstruction.double(), images.double()).sum(dim=(1, 2, 3)).mean().item()
    assert nats(reconstruction, images, kind) == pytest.approx(expected, rel=1e-5)


@every_kind
def test_twice_the_pixels_cost_twice_the_nats_and_twice_the_images_none(kind):
    reconstruction, images = draw_images(seed=1), draw_images(seed=2)
    once = nats(reconstruction, images, kind)
    tall = nats(torch.cat([reconstruction, reconstruction], 2), torch.cat([images, images], 2), kind)
    more = nats(torch.cat([reconstruction, reconstruction], 0), torch.cat([images, images], 0), kind)
    assert (tall, more) == pytest.approx((2 * once, once), rel=1e-5)


@every_kind
def test_a_reconstruction_in_bfloat16_is_judged_in_float32(kind):
    reconstruction, images = draw_images(32, height=32, seed=1).bfloat16(), draw_images(32, height=32, seed=2)
    loss = reconstruction_loss(reconstruction, images, kind)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, reconstruction_loss(reconstruction.float(), images, kind))


@every_kind
def test_the_gradient_leads_from_the_reconstruction_to_the_image(kind):
    reconstruction, images = draw_images(seed=1).requires_grad_(), draw_images(seed=2)
    reconstruction_loss(reconstruction, images, kind).backward()
    assert (reconstruction.grad * (reconstruction - images).detach() > 0).all()


@pytest.mark.parametrize("kind", ["", "MSE", "gaussian"])
def test_another_kind_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"kind='{kind}' must be one of calibrated, mse, l1, bce"):
        reconstruction_loss(draw_images(), draw_images(), kind)


def test_the_calibrated_loss_is_what_the_loss_of_a_fixed_sigma_becomes_at_its_best():
    reconstruction, images = draw_images(seed=1), draw_images(seed=2)
    rmse = (reconstruction - images).square().mean().sqrt()
    factors = torch.linspace(0.5, 2, 151)  # the 51st is 1
    fixed = torch.stack([-Normal(reconstruction, rmse * f).log_prob(images).sum() / 3 for f in factors])
    assert int(fixed.argmin()) == 50
    assert fixed.min().item() == pytest.approx(nats(reconstruction, images, "calibrated"), rel=1e-5)
    assert fixed[[0, 150]].min() > fixed.min() + 5


def test_the_calibrated_loss_has_the_gradient_of_the_logarithm_of_the_error():
    images, reconstructions = draw_images(seed=2), [draw_images(seed=1).requires_grad_() for _ in range(2)]
    reconstruction_loss(reconstructions[0], images).backward()  # calibrated unless told otherwise
    (2 * 5 * 4 / 2 * (reconstructions[1] - images).square().mean().log()).backward()
    torch.testing.assert_close(reconstructions[0].grad, reconstructions[1].grad, rtol=1e-5, atol=1e-6)


def test_a_perfect_reconstruction_is_worth_what_half_a_grey_level_is():
    images = draw_images()
    reconstruction = images.clone().requires_grad_()
    loss = reconstruction_loss(reconstruction, images)
    loss.backward()
    assert loss.item() == pytest.approx(40 * (0.9189385 - 5.5412635), rel=1e-5)  # log(2 pi) / 2 and log 255
    assert not reconstruction.grad.any()


def test_below_half_a_grey_level_the_variance_of_the_calibrated_loss_stays():
    assert MIN_SIGMA == pytest.approx(1 / 255)
    images = draw_images()
    reconstruction = (images + draw(3, 2, 5, 4, seed=5) * 0.002).requires_grad_()
    loss = reconstruction_loss(reconstruction, images)
    loss.backward()
    expected = -Normal(reconstruction.detach(), 1 / 255).log_prob(images).sum() / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient = (reconstruction - images).detach() * 255**2 / 3
    torch.testing.assert_close(reconstruction.grad, gradient, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------ KL


def test_the_kl_of_a_dimension_is_the_one_worked_out_by_hand():
    mean, logvar = torch.tensor([[0.5, -1.2], [2.0, 0.0]]), torch.tensor([[4.0, 0.25], [1.0, 3.0]]).log()
    # (mean^2 + variance - 1 - log variance) / 2 of each: log 4 = 1.3862944, log 3 = 1.0986123.
    first = ((0.25 + 3 - 1.3862944) / 2 + 4 / 2) / 2
    second = ((1.44 - 0.75 + 1.3862944) / 2 + (2 - 1.0986123) / 2) / 2
    assert kl_per_dimension(mean, logvar).tolist() == pytest.approx([first, second], rel=1e-6)


@pytest.mark.parametrize("further", [(), (1, 1)])
def test_the_kl_is_that_of_torch_and_that_of_diffusers_in_the_mean_over_the_images(further):
    mean, logvar = draw(4, 7, 1, 1, seed=1), draw(4, 7, 1, 1, seed=2) * 1.5
    kl = kl_per_dimension(mean.view(4, 7, *further), logvar.view(4, 7, *further))
    assert kl.shape == (7,)
    of_torch = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean(dim=0).flatten()
    torch.testing.assert_close(kl, of_torch, rtol=1e-5, atol=1e-6)
    of_diffusers = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)).kl().mean()
    assert kl_loss(kl).item() == pytest.approx(of_diffusers.item(), rel=1e-5)


def test_the_kl_is_exact_near_the_prior_and_zero_at_it():
    logvar = torch.tensor([[0.0, 1e-3, -1e-3]])
    kl = kl_per_dimension(torch.zeros(1, 3), logvar)
    # (exp(l) - 1 - l) / 2 = l^2 / 4 + l^3 / 12 + ...
    assert kl.tolist() == pytest.approx([0, 2.500833e-7, 2.499167e-7], rel=1e-3, abs=0)


def test_the_kl_of_parameters_in_bfloat16_is_float32():
    mean, logvar = draw(64, 3, seed=1).bfloat16(), draw(64, 3, seed=2).bfloat16()
    kl = kl_per_dimension(mean, logvar)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, kl_per_dimension(mean.float(), logvar.float()))


@pytest.mark.parametrize(
    ("free_bits", "value", "gradient"),
    [(0.0, 0.1 + 0.5 + 2.0, [1, 1, 1]), (0.3, 0.3 + 0.5 + 2.0, [0, 1, 1]), (0.7, 0.7 + 0.7 + 2.0, [0, 0, 1])],
)
def test_a_dimension_below_its_free_bits_costs_them_and_is_not_pushed(free_bits, value, gradient):
    kl_dimensions = torch.tensor([0.1, 0.5, 2.0], requires_grad=True)
    loss = kl_loss(kl_dimensions, free_bits)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert kl_dimensions.grad.tolist() == gradient


@pytest.mark.parametrize(
    ("step", "warmup_steps", "expected"),
    [(1, 4, 0.2), (3, 4, 0.6), (4, 4, 0.8), (5, 4, 0.8), (900, 4, 0.8), (1, 0, 0.8), (1, 1, 0.8)],
)
def test_a_weight_rises_evenly_and_is_full_from_the_last_step_of_the_warm_up_on(step, warmup_steps, expected):
    assert warmed_up(0.8, step, warmup_steps) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- bits


def test_bits_per_dimension_are_those_worked_out_by_hand():
    # (100 / 50 + log 127.5) / log 2
    assert bits_per_dimension(100.0, 50) == pytest.approx((2 + 4.8481164) / 0.6931472, rel=1e-6)
    of_tensor = bits_per_dimension(torch.tensor([100.0, 50.0]), 50)
    assert of_tensor.tolist() == pytest.approx([6.8481164 / 0.6931472, 5.8481164 / 0.6931472], rel=1e-6)


def test_a_uniform_density_costs_the_bits_of_255_levels():
    assert bits_per_dimension(12 * math.log(2), 12) == pytest.approx(math.log2(255))


def test_the_bits_of_a_density_are_those_that_coding_the_8_bit_levels_by_it_takes():
    density = Normal(torch.tensor(0.1, dtype=torch.double), 0.3)
    levels = torch.arange(256) / 127.5 - 1  # half a grey level is 1/255
    probabilities = density.cdf(levels + 1 / 255) - density.cdf(levels - 1 / 255)
    code_length = -(probabilities * probabilities.log2()).sum() / probabilities.sum()
    of_density = -(probabilities * density.log_prob(levels)).sum() / probabilities.sum()
    assert bits_per_dimension(7 * of_density, 7).item() == pytest.approx(code_length.item(), abs=1e-3)
