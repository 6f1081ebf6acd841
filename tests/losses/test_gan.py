import math

import pytest
import torch
from torch import nn

from hfgen.losses.gan import GAN_LOSSES, decision_boundary, gradient_penalty, zero_centred_penalty


REAL_LOGITS = torch.tensor([1.3, -0.4])
FAKE_LOGITS = torch.tensor([0.7, -2.6])
SMOOTHING = 0.2
# softplus(x) = log(1 + exp(x)), to seven places; softplus(-x) = softplus(x) - x.
SOFTPLUS = {-2.6: 0.0716446, -2.2: 0.1050833, -1.3: 0.2410085, -0.6: 0.4374880, 0.4: 0.9130152, 0.7: 1.1031860}
SOFTPLUS |= {-3.05: 0.0462717, -2.25: 0.1002066, -0.55: 0.4554925, 0.25: 0.8259394}
# (loss, discriminator's loss, with label smoothing, generator's loss): worked out by hand.
CASES = [
    (
        "non_saturating",
        (SOFTPLUS[-1.3] + SOFTPLUS[0.4]) / 2 + (SOFTPLUS[0.7] + SOFTPLUS[-2.6]) / 2,
        # Each real image costs 0.2 x more: its loss is 0.8 softplus(-x) + 0.2 softplus(x).
        (SOFTPLUS[-1.3] + 0.26 + SOFTPLUS[0.4] - 0.08) / 2 + (SOFTPLUS[0.7] + SOFTPLUS[-2.6]) / 2,
        (SOFTPLUS[0.7] - 0.7 + SOFTPLUS[-2.6] + 2.6) / 2,
    ),
    (
        "least_squares",
        (0.3**2 + 1.4**2) / 4 + (0.7**2 + 2.6**2) / 4,
        (0.5**2 + 1.2**2) / 4 + (0.7**2 + 2.6**2) / 4,
        (0.3**2 + 3.6**2) / 4,
    ),
    ("hinge", (0 + 1.4) / 2 + (1.7 + 0) / 2, (0 + 1.4) / 2 + (1.7 + 0) / 2, (2.6 - 0.7) / 2),
    ("wasserstein", (0.7 - 2.6) / 2 - (1.3 - 0.4) / 2, (0.7 - 2.6) / 2 - (1.3 - 0.4) / 2, (2.6 - 0.7) / 2),
    # The generated image minus the real one in its place: -0.6 and -2.2.
    (
        "relativistic",
        (SOFTPLUS[-0.6] + SOFTPLUS[-2.2]) / 2,
        (SOFTPLUS[-0.6] + SOFTPLUS[-2.2]) / 2,
        (SOFTPLUS[-0.6] + 0.6 + SOFTPLUS[-2.2] + 2.2) / 2,
    ),
    # The mean of the real logits is 0.45 and that of the fake ones -0.95. So the real images are 2.25 and 0.55 above
    # the mean of the fake ones, and the fake images 0.25 above and 3.05 below that of the real ones.
    (
        "relativistic_average",
        (SOFTPLUS[-2.25] + SOFTPLUS[-0.55]) / 2 + (SOFTPLUS[0.25] + SOFTPLUS[-3.05]) / 2,
        (SOFTPLUS[-2.25] + SOFTPLUS[-0.55]) / 2 + (SOFTPLUS[0.25] + SOFTPLUS[-3.05]) / 2,
        (SOFTPLUS[0.25] - 0.25 + SOFTPLUS[-3.05] + 3.05) / 2 + (SOFTPLUS[-2.25] + 2.25 + SOFTPLUS[-0.55] + 0.55) / 2,
    ),
    (
        "relativistic_average_least_squares",
        (1.25**2 + 0.45**2) / 2 + (1.25**2 + 2.05**2) / 2,
        (1.25**2 + 0.45**2) / 2 + (1.25**2 + 2.05**2) / 2,
        (0.75**2 + 4.05**2) / 2 + (3.25**2 + 1.55**2) / 2,
    ),
    (
        "relativistic_average_hinge",
        (0 + 0.45) / 2 + (1.25 + 0) / 2,
        (0 + 0.45) / 2 + (1.25 + 0) / 2,
        (0.75 + 4.05) / 2 + (3.25 + 1.55) / 2,
    ),
]
every_loss = pytest.mark.parametrize("name", GAN_LOSSES)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_with_gradient(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


# ------------------------------------------------------------------------------------------------------------- losses


def test_every_loss_has_a_case():
    assert {case[0] for case in CASES} == GAN_LOSSES.keys()


@pytest.mark.parametrize(("name", "loss_d", "smoothed", "loss_g"), CASES)
def test_a_loss_is_the_one_worked_out_by_hand(name, loss_d, smoothed, loss_g):
    loss = GAN_LOSSES[name]
    values = {
        "discriminator": loss.discriminator(REAL_LOGITS, FAKE_LOGITS, 0.0),
        "smoothed": loss.discriminator(REAL_LOGITS, FAKE_LOGITS, SMOOTHING),
        "generator": loss.generator(REAL_LOGITS, FAKE_LOGITS),
    }
    assert all(value.shape == () for value in values.values())
    expected = {"discriminator": loss_d, "smoothed": smoothed, "generator": loss_g}
    assert {key: float(value) for key, value in values.items()} == pytest.approx(expected, rel=1e-6)


@every_loss
def test_a_loss_tells_truly_whether_it_has_labels_to_be_smoothed(name):
    loss = GAN_LOSSES[name]
    plain, smoothed = (loss.discriminator(REAL_LOGITS, FAKE_LOGITS, smoothing) for smoothing in (0.0, 0.3))
    assert loss.has_labels == (not torch.equal(plain, smoothed))


@pytest.mark.parametrize(
    ("name", "best"), [("non_saturating", math.log(0.8 / 0.2)), ("least_squares", 0.8)], ids=lambda value: str(value)
)
def test_label_smoothing_applies_to_real_logits_only(name, best):
    loss, fake_logits = GAN_LOSSES[name], logits_with_gradient(0.3, -1.2)
    real_logits = torch.full((2,), best, requires_grad=True)
    loss.discriminator(real_logits, fake_logits, 0.2).backward()
    smoothed, fake_logits.grad = fake_logits.grad, None
    assert real_logits.grad.abs().max() < 1e-6
    loss.discriminator(real_logits, fake_logits, 0.0).backward()
    assert torch.equal(smoothed, fake_logits.grad)
    assert (real_logits.grad < -0.01).all()  # without smoothing they are to rise further


def test_the_losses_with_labels_are_those_that_say_so():
    assert {name for name, loss in GAN_LOSSES.items() if loss.has_labels} == {"non_saturating", "least_squares"}


@every_loss
def test_a_loss_tells_truly_whether_its_generator_looks_at_the_real_logits(name):
    loss = GAN_LOSSES[name]
    other = loss.generator(REAL_LOGITS * 3 - 1, FAKE_LOGITS)
    assert loss.compares_sides == (not torch.equal(loss.generator(REAL_LOGITS, FAKE_LOGITS), other))


@every_loss
def test_only_the_paired_relativistic_loss_depends_on_the_pairing(name):
    loss, swapped = GAN_LOSSES[name], FAKE_LOGITS.flip(0)
    for function in (lambda real, fake: loss.discriminator(real, fake, 0.1), loss.generator):
        difference = float(function(REAL_LOGITS, FAKE_LOGITS) - function(REAL_LOGITS, swapped))
        assert (abs(difference) > 0.01) == (name == "relativistic")


@pytest.mark.parametrize("name", [name for name, loss in GAN_LOSSES.items() if loss.boundary is not None])
def test_at_the_boundary_the_discriminator_is_undecided_and_right_beside_it_is_not(name):
    loss, boundary = GAN_LOSSES[name], GAN_LOSSES[name].boundary
    slopes = {}
    for logit in boundary - 0.2, boundary, boundary + 0.2:
        real_logits, fake_logits = logits_with_gradient(logit, logit), logits_with_gradient(logit, logit)
        loss.discriminator(real_logits, fake_logits, 0.0).backward()
        assert (real_logits.grad < 0).all() and (fake_logits.grad > 0).all()
        # What an image of which nobody knows whether it is real gains from a higher logit.
        slopes[logit] = float((real_logits.grad + fake_logits.grad).sum())
    assert slopes[boundary] == pytest.approx(0, abs=1e-7)
    if name != "hinge":  # which is undecided anywhere between -1 and 1: there its boundary is their middle
        assert slopes[boundary - 0.2] < -0.05 and slopes[boundary + 0.2] > 0.05


@pytest.mark.parametrize("smoothing", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("name", [name for name, loss in GAN_LOSSES.items() if loss.has_labels])
def test_the_boundary_moves_with_the_label_of_real_images(name, smoothing):
    boundary = decision_boundary(name, smoothing)
    real_logits, fake_logits = logits_with_gradient(boundary), logits_with_gradient(boundary)
    GAN_LOSSES[name].discriminator(real_logits, fake_logits, smoothing).backward()
    assert float(real_logits.grad + fake_logits.grad) == pytest.approx(0, abs=1e-7)
    assert boundary < GAN_LOSSES[name].boundary == decision_boundary(name, 0.0)


def test_losses_without_labels_keep_their_boundary():
    assert decision_boundary("hinge", 0.0) == 0 and decision_boundary("wasserstein", 0.0) is None


def test_the_boundary_of_the_hinge_is_the_middle_of_its_margins():
    loss = GAN_LOSSES["hinge"]
    for beyond, gradients in ((1.01, (0.0, 1.0)), (-1.01, (-1.0, 0.0)), (0.99, (-1.0, 1.0)), (-0.99, (-1.0, 1.0))):
        logit = loss.boundary + beyond
        real_logits, fake_logits = logits_with_gradient(logit), logits_with_gradient(logit)
        loss.discriminator(real_logits, fake_logits, 0.0).backward()
        assert (float(real_logits.grad), float(fake_logits.grad)) == gradients


def test_losses_without_a_boundary_do_not_change_when_all_logits_shift():
    unbounded = {name: loss for name, loss in GAN_LOSSES.items() if loss.boundary is None}
    assert unbounded.keys() == {"wasserstein"} | {name for name in GAN_LOSSES if name.startswith("relativistic")}
    for loss in unbounded.values():
        before = loss.discriminator(REAL_LOGITS, FAKE_LOGITS, 0.0)
        after = loss.discriminator(REAL_LOGITS + 2.3, FAKE_LOGITS + 2.3, 0.0)
        assert float(after) == pytest.approx(float(before), rel=1e-6)
    for loss in (loss for loss in unbounded.values() if loss.compares_sides):
        after = loss.generator(REAL_LOGITS + 2.3, FAKE_LOGITS + 2.3)
        assert float(after) == pytest.approx(float(loss.generator(REAL_LOGITS, FAKE_LOGITS)), rel=1e-6)


@every_loss
def test_the_gradients_push_real_and_fake_logits_in_the_right_directions(name):
    loss = GAN_LOSSES[name]
    real_logits, fake_logits = logits_with_gradient(0.15, 0.6, 0.83), logits_with_gradient(0.37, 0.91, 0.22)
    loss.discriminator(real_logits, fake_logits, 0.0).backward()
    assert (real_logits.grad < 0).all() and (fake_logits.grad > 0).all()
    fake_logits = logits_with_gradient(0.37, 0.91, 0.22)
    loss.generator(real_logits.detach(), fake_logits).backward()
    assert (fake_logits.grad < 0).all()


@pytest.mark.parametrize("name", ["non_saturating", "relativistic"])
def test_the_generator_s_gradient_is_largest_where_the_discriminator_is_surest(name):
    fake_logits = logits_with_gradient(-30.0, 0.0, 30.0)
    GAN_LOSSES[name].generator(torch.zeros(3), fake_logits).backward()
    assert fake_logits.grad.tolist() == pytest.approx([-1 / 3, -1 / 6, 0], abs=1e-6)


@every_loss
@pytest.mark.parametrize("real", [-1000.0, 1000.0])
@pytest.mark.parametrize("fake", [-1000.0, 1000.0])
def test_losses_and_gradients_are_finite_however_sure_the_discriminator_is(name, real, fake):
    real_logits, fake_logits = logits_with_gradient(real), logits_with_gradient(fake)
    loss = GAN_LOSSES[name]
    loss_d, loss_g = loss.discriminator(real_logits, fake_logits, 0.1), loss.generator(real_logits, fake_logits)
    assert loss_d.isfinite() and loss_g.isfinite()
    (loss_d + loss_g).backward()
    assert real_logits.grad.isfinite().all() and fake_logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- penalties


def linear_critic(slope: float) -> nn.Linear:
    """A critic of images of twelve numbers whose gradient has norm `slope` everywhere."""
    critic = nn.Linear(12, 1)
    with torch.no_grad():
        weight = torch.arange(1.0, 13.0)
        critic.weight.copy_(slope * weight / weight.norm())
    return critic


def judge(critic: nn.Linear):
    return lambda images: critic(images.flatten(1)).flatten()


def half_square(images: torch.Tensor) -> torch.Tensor:
    """A critic whose gradient at an image is the image."""
    return 0.5 * images.flatten(1).square().sum(dim=1)


def images_of_norms(*norms: float) -> torch.Tensor:
    images = draw(len(norms), 3, 2, 2, seed=5)
    return images / images.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * torch.tensor(norms).view(-1, 1, 1, 1)


@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_gradient_penalty_of_a_linear_critic_is_exact(slope, batch_size):
    real_images, fake_images = draw(batch_size, 3, 2, 2, seed=1), draw(batch_size, 3, 2, 2, seed=2)
    penalty = gradient_penalty(judge(linear_critic(slope)), real_images, fake_images, rng())
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-5)


def test_the_gradient_penalty_takes_the_norm_of_each_image_by_itself():
    images = images_of_norms(3.0, 0.5)  # real and generated are the same: so is every point between them
    penalty = gradient_penalty(half_square, images, images.clone(), rng())
    assert penalty.item() == pytest.approx((2.0**2 + 0.5**2) / 2, rel=1e-5)


def test_the_gradient_penalty_trains_the_critic_by_its_formula():
    critic = linear_critic(2.5)
    gradient_penalty(judge(critic), draw(4, 3, 2, 2, seed=1), draw(4, 3, 2, 2, seed=2), rng()).backward()
    # The derivative of (|w| - 1)^2 is 2 (|w| - 1) w / |w|.
    torch.testing.assert_close(critic.weight.grad, 2 * 1.5 / 2.5 * critic.weight.detach(), rtol=1e-5, atol=1e-6)


def test_a_flat_critic_gets_a_finite_gradient_from_both_penalties():
    critic = linear_critic(0.0)
    images = draw(4, 3, 2, 2, seed=1)
    gradient_penalty(judge(critic), images, images + 1, rng()).backward()
    zero_centred_penalty(judge(critic), images).backward()
    assert critic.weight.grad.isfinite().all()


@pytest.mark.parametrize("images_need_gradients", [True, False])
def test_no_gradient_of_a_penalty_reaches_the_images(images_need_gradients):
    critic = linear_critic(2.0)
    real_images, fake_images = (draw(4, 3, 2, 2, seed=seed).requires_grad_(images_need_gradients) for seed in (1, 2))

    def squared_logit(images: torch.Tensor) -> torch.Tensor:
        return judge(critic)(images).square()  # so that its gradient depends on the images

    penalty = gradient_penalty(squared_logit, real_images, fake_images * 2, rng())
    penalty = penalty + zero_centred_penalty(squared_logit, fake_images * 2)
    penalty.backward()
    assert real_images.grad is None and fake_images.grad is None
    assert real_images.requires_grad == images_need_gradients
    assert critic.weight.grad.any()


def points_of_the_penalty(real_images: torch.Tensor, fake_images: torch.Tensor, seed: int) -> torch.Tensor:
    """Where the critic was asked for its gradient."""
    points = []

    def critic(images: torch.Tensor) -> torch.Tensor:
        points.append(images.detach())
        return half_square(images)

    gradient_penalty(critic, real_images, fake_images, rng(seed))
    return torch.cat(points)


def test_the_gradient_penalty_samples_one_uniform_point_on_each_segment():
    real_images, fake_images = draw(2000, 3, 2, 2, seed=1), draw(2000, 3, 2, 2, seed=2)
    points = points_of_the_penalty(real_images, fake_images, seed=3)
    assert points.shape == real_images.shape
    steps = ((points - real_images) * (fake_images - real_images)).flatten(1).sum(dim=1)
    mix = steps / (fake_images - real_images).flatten(1).square().sum(dim=1)
    torch.testing.assert_close(points, torch.lerp(real_images, fake_images, mix.view(-1, 1, 1, 1)))
    assert mix.min() > -1e-5 and mix.max() < 1 + 1e-5
    # A uniform distribution has mean 1/2 and standard deviation 1/sqrt(12); the errors of both are below 1%.
    assert float(mix.mean()) == pytest.approx(1 / 2, abs=0.025)
    assert float(mix.std()) == pytest.approx(12**-0.5, abs=0.025)


def test_the_points_of_the_gradient_penalty_depend_on_the_given_random_numbers_alone():
    real_images, fake_images = draw(5, 3, 2, 2, seed=1), draw(5, 3, 2, 2, seed=2)
    torch.manual_seed(1)
    points = points_of_the_penalty(real_images, fake_images, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(points_of_the_penalty(real_images, fake_images, seed=3), points)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.isclose(points_of_the_penalty(real_images, fake_images, seed=4), points).flatten(1).all(1).any()


@pytest.mark.parametrize("slope", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_zero_centred_penalty_of_a_linear_critic_is_half_its_squared_slope(slope, batch_size):
    penalty = zero_centred_penalty(judge(linear_critic(slope)), draw(batch_size, 3, 2, 2, seed=1))
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(0.5 * slope**2, rel=1e-5)


def test_the_zero_centred_penalty_of_a_quadratic_critic_is_exact():
    penalty = zero_centred_penalty(half_square, images_of_norms(3.0, 0.5))
    assert penalty.item() == pytest.approx((3.0**2 + 0.5**2) / 4, rel=1e-5)


def test_the_zero_centred_penalty_trains_the_critic_by_its_formula():
    critic = linear_critic(2.5)
    zero_centred_penalty(judge(critic), draw(4, 3, 2, 2, seed=1)).backward()
    torch.testing.assert_close(critic.weight.grad, critic.weight.detach(), rtol=1e-5, atol=1e-6)


def test_penalties_under_bfloat16_autocast_are_float32_and_summed_up_in_float32():
    critic = linear_critic(3.0)
    with torch.no_grad():
        critic.weight.copy_(critic.weight.bfloat16())  # so that only the sums could lose digits
    slope = critic.weight.double().norm().item()
    images = draw(4, 3, 2, 2, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert judge(critic)(images).dtype == torch.bfloat16
        penalties = {
            "two-sided": gradient_penalty(judge(critic), images, images + 1, rng()),
            "zero-centred": zero_centred_penalty(judge(critic), images),
            "of bfloat16 images": zero_centred_penalty(judge(critic), images.bfloat16()),
        }
    assert all(penalty.dtype == torch.float32 for penalty in penalties.values())
    expected = {"two-sided": (slope - 1) ** 2, "zero-centred": slope**2 / 2, "of bfloat16 images": slope**2 / 2}
    assert {name: penalty.item() for name, penalty in penalties.items()} == pytest.approx(expected, rel=1e-6)
