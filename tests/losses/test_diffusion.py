import pytest
import torch
from diffusers import DDPMScheduler

from hfgen.losses.diffusion import PIXEL_LOSSES, diffusion_loss, match_noise, min_snr_weights, prediction_target
from hfgen.methods.schedules import noise_schedule


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Two images of two pixels: errors 0.3 and -2.5 in the first, 1.7 and 0.4 in the second.
MODEL_OUTPUT = torch.tensor([[[[1.1, -1.8]]], [[[1.5, 0.1]]]])
TARGET = torch.tensor([[[[0.8, 0.7]]], [[[-0.2, -0.3]]]])
# (kind, loss of the first image, loss of the second): worked out by hand.
CASES = [
    ("l1", (0.3 + 2.5) / 2, (1.7 + 0.4) / 2),
    ("l2", (0.09 + 6.25) / 2, (2.89 + 0.16) / 2),
    ("huber", (0.045 + 2.0) / 2, (1.2 + 0.08) / 2),  # beyond 1 it is |error| - 1/2, below it error^2 / 2
]
every_loss = pytest.mark.parametrize(("kind", "first", "second"), CASES)
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
both_schedules = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noised(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Clean images, noise, noisy images and `alphas_cumprod` as `(batch_size, 1, 1, 1)`, in float64."""
    clean_images, noise = draw(len(timesteps), 3, 4, 5, seed=0).tanh(), draw(len(timesteps), 3, 4, 5, seed=1)
    alphas_cumprod = scheduler.alphas_cumprod[timesteps].double()[:, None, None, None]
    noisy_images = alphas_cumprod.sqrt() * clean_images + (1 - alphas_cumprod).sqrt() * noise
    return clean_images, noise, noisy_images, alphas_cumprod


# ------------------------------------------------------------------------------------------------------------- losses


def test_every_loss_has_a_case():
    assert {case[0] for case in CASES} == PIXEL_LOSSES.keys()


@every_loss
def test_a_loss_is_the_mean_over_pixels_and_images_worked_out_by_hand(kind, first, second):
    loss = diffusion_loss(MODEL_OUTPUT, TARGET, kind)
    assert loss.shape == ()
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-6)


@every_loss
def test_weights_multiply_the_images_they_belong_to_and_are_not_normalised(kind, first, second):
    loss = diffusion_loss(MODEL_OUTPUT, TARGET, kind, torch.tensor([0.7, 3.0]))
    assert float(loss) == pytest.approx((0.7 * first + 3.0 * second) / 2, rel=1e-6)


@every_loss
def test_images_of_another_size_weigh_the_same_for_each_pixel(kind, first, second):
    wide = diffusion_loss(MODEL_OUTPUT.repeat(1, 3, 4, 2), TARGET.repeat(1, 3, 4, 2), kind, torch.tensor([2.0, 0.1]))
    assert float(wide) == pytest.approx((2.0 * first + 0.1 * second) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", PIXEL_LOSSES)
def test_the_loss_of_a_bfloat16_prediction_is_computed_in_float32(kind):
    model_output, target = MODEL_OUTPUT.bfloat16(), TARGET.bfloat16()
    loss = diffusion_loss(model_output, target, kind, torch.tensor([0.7, 3.0]))
    assert loss.dtype == torch.float32
    expected = diffusion_loss(model_output.double(), target.double(), kind, torch.tensor([0.7, 3.0]))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", PIXEL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_finite_and_points_from_the_target_to_the_prediction(kind, dtype):
    model_output = (1000 * MODEL_OUTPUT).to(dtype).requires_grad_()
    diffusion_loss(model_output, TARGET, kind, torch.tensor([0.7, 3.0])).backward()
    assert model_output.grad.isfinite().all()
    assert torch.equal(model_output.grad.sign(), (model_output.detach() - TARGET).sign())


@pytest.mark.parametrize("kind", PIXEL_LOSSES)
def test_a_perfect_prediction_costs_nothing(kind):
    assert float(diffusion_loss(TARGET.clone(), TARGET, kind)) == 0


@every_type
@both_schedules
@pytest.mark.parametrize("kind", PIXEL_LOSSES)
def test_a_network_that_knows_the_clean_image_has_no_loss(kind, schedule, prediction_type):
    scheduler = noise_schedule(schedule, 1000, prediction_type)
    timesteps = torch.tensor([1, 40, 500, 990])
    clean_images, noise, noisy_images, alphas_cumprod = noised(scheduler, timesteps)
    epsilon = (noisy_images - alphas_cumprod.sqrt() * clean_images) / (1 - alphas_cumprod).sqrt()
    prediction = {
        "epsilon": epsilon,
        "sample": clean_images,
        "v_prediction": (alphas_cumprod.sqrt() * noisy_images - clean_images) / (1 - alphas_cumprod).sqrt(),
    }[prediction_type]
    target = prediction_target(scheduler, clean_images, noise, timesteps)
    assert float(diffusion_loss(prediction, target, kind)) == pytest.approx(0, abs=1e-5)


def test_a_network_that_predicts_zero_has_the_noise_s_variance_as_its_l2_loss():
    noise = draw(8, 3, 32, 32, seed=4)
    assert float(diffusion_loss(torch.zeros_like(noise), noise, "l2")) == pytest.approx(1, abs=0.03)


# ------------------------------------------------------------------------------------------------------------ targets


@both_schedules
def test_the_targets_are_noise_clean_image_and_velocity_by_their_formulas(schedule):
    timesteps = torch.tensor([0, 3, 60, 99])
    clean_images, noise, _, alphas_cumprod = noised(noise_schedule(schedule, 100), timesteps)
    targets = {
        prediction_type: prediction_target(
            noise_schedule(schedule, 100, prediction_type), clean_images, noise, timesteps
        )
        for prediction_type in PREDICTION_TYPES
    }
    assert torch.equal(targets["epsilon"], noise)
    assert torch.equal(targets["sample"], clean_images)
    velocity = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean_images
    torch.testing.assert_close(targets["v_prediction"], velocity, rtol=1e-6, atol=1e-6)


@both_schedules
def test_noisy_image_and_velocity_together_give_the_clean_image_and_the_noise_back(schedule):
    scheduler = noise_schedule(schedule, 100, "v_prediction")
    timesteps = torch.tensor([0, 3, 60, 99])
    clean_images, noise, noisy_images, alphas_cumprod = noised(scheduler, timesteps)
    velocity = prediction_target(scheduler, clean_images, noise, timesteps)
    recovered = alphas_cumprod.sqrt() * noisy_images - (1 - alphas_cumprod).sqrt() * velocity
    torch.testing.assert_close(recovered, clean_images, rtol=0, atol=1e-6)
    recovered = (1 - alphas_cumprod).sqrt() * noisy_images + alphas_cumprod.sqrt() * velocity
    torch.testing.assert_close(recovered, noise, rtol=0, atol=1e-6)


def test_a_prediction_type_that_there_is_not_is_refused_by_name():
    scheduler = noise_schedule("linear", 10, "flow")
    with pytest.raises(ValueError, match="prediction_type='flow' must be 'epsilon', 'sample' or 'v_prediction'"):
        prediction_target(scheduler, MODEL_OUTPUT, TARGET, torch.tensor([1, 2]))


# ---------------------------------------------------------------------------------------------------- Min-SNR weights


@both_schedules
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_the_clean_image_s_error_alike_for_every_prediction_type(schedule, gamma):
    # An error d of the clean image is an error -sqrt(SNR) d of the noise, as the noisy image is given, and an error
    # -sqrt(SNR + 1) d of the velocity. The loss of all three must be min(SNR, gamma) times the mean of d^2.
    timesteps = torch.tensor([5, 80, 150, 320, 480, 700, 950])
    losses = {}
    for prediction_type in PREDICTION_TYPES:
        scheduler = noise_schedule(schedule, 1000, prediction_type)
        clean_images, noise, noisy_images, alphas_cumprod = noised(scheduler, timesteps)
        estimate = clean_images + 0.3 * draw(*clean_images.shape, seed=2)
        epsilon = (noisy_images - alphas_cumprod.sqrt() * estimate) / (1 - alphas_cumprod).sqrt()
        velocity = alphas_cumprod.sqrt() * epsilon - (1 - alphas_cumprod).sqrt() * estimate
        prediction = {"epsilon": epsilon, "sample": estimate, "v_prediction": velocity}[prediction_type]
        target = prediction_target(scheduler, clean_images, noise, timesteps)
        weights = min_snr_weights(scheduler, timesteps, gamma)
        assert weights.shape == timesteps.shape
        assert weights.dtype == torch.float32
        losses[prediction_type] = float(diffusion_loss(prediction, target, "l2", weights))
    snr = (alphas_cumprod / (1 - alphas_cumprod)).flatten()
    assert snr.min() < gamma < snr.max()
    expected = float((snr.clamp(max=gamma) * (estimate - clean_images).square().flatten(1).mean(dim=1)).mean())
    assert losses == pytest.approx(dict.fromkeys(PREDICTION_TYPES, expected), rel=1e-4)


def test_an_infinite_gamma_leaves_the_weight_that_the_noise_has_without_weights():
    timesteps = torch.arange(1000)
    for schedule in "linear", "cosine":
        alphas_cumprod = noise_schedule(schedule, 1000).alphas_cumprod
        expected = {
            "epsilon": torch.ones(1000),
            "sample": alphas_cumprod / (1 - alphas_cumprod),
            "v_prediction": alphas_cumprod,
        }
        for prediction_type in PREDICTION_TYPES:
            weights = min_snr_weights(noise_schedule(schedule, 1000, prediction_type), timesteps, float("inf"))
            torch.testing.assert_close(weights, expected[prediction_type], rtol=1e-5, atol=0)


@every_type
@both_schedules
@pytest.mark.parametrize("num_train_timesteps", [100, 1000, 4000])
def test_every_timestep_to_the_last_has_a_finite_positive_weight(schedule, num_train_timesteps, prediction_type):
    scheduler = noise_schedule(schedule, num_train_timesteps, prediction_type)
    weights = min_snr_weights(scheduler, torch.arange(num_train_timesteps), 5.0)
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_at_zero_snr_the_weight_of_noise_prediction_is_1_and_nothing_is_nan():
    for prediction_type, last in (("epsilon", 1.0), ("sample", 0.0), ("v_prediction", 0.0)):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        scheduler.alphas_cumprod[-1] = 0  # diffusers keeps it at 2^-24
        assert float(min_snr_weights(scheduler, torch.tensor([999]), 5.0)) == last


# ---------------------------------------------------------------------------------------------- noise near its images


def test_each_image_gets_the_noise_near_it_and_none_is_lost():
    clean_images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    noise = torch.tensor([0.9, -0.8, 0.2]).view(3, 1, 1, 1)
    assert match_noise(clean_images, noise).flatten().tolist() == pytest.approx([-0.8, 0.2, 0.9])
    # The sum decides, not each by itself: -1 is nearer to -0.8 than 0 is, but both cannot have it.
    noise = torch.tensor([-0.8, -3.0, 0.9]).view(3, 1, 1, 1)
    assert match_noise(clean_images, noise).flatten().tolist() == pytest.approx([-3.0, -0.8, 0.9])


def test_matched_noise_is_nearer_and_the_same_as_a_whole():
    numbers = torch.Generator().manual_seed(0)
    clean_images, noise = (torch.randn(16, 3, 4, 4, generator=numbers) for _ in range(2))
    matched = match_noise(clean_images, noise)
    assert (matched - clean_images).flatten(1).norm(dim=1).sum() < (noise - clean_images).flatten(1).norm(dim=1).sum()
    assert torch.equal(matched.flatten(1).sort(dim=0).values, noise.flatten(1).sort(dim=0).values)
