"""The Gaussian of recent latents, from which a VAE's sheets are sampled during training."""

import pytest
import torch

from hfgen.methods.recent_latents import RecentLatents


CPU = torch.device("cpu")
LOCATION, SPREAD = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([[2.0, 0, 0], [1.5, 0.5, 0], [0, 0, 0.01]])
STANDARD_DEVIATIONS = torch.tensor([0.2, 0.3, 0.4])


def observe(recent, updates, location=LOCATION, spread=SPREAD, seed=0):
    """Show it batches of posteriors whose means have this location and spread."""
    numbers = torch.Generator().manual_seed(seed)
    logvar = (2 * STANDARD_DEVIATIONS.log()).expand(64, 3)[:, :, None, None]
    for _ in range(updates):
        mean = location + torch.randn(64, 3, generator=numbers) @ spread.T
        recent.observe(mean[:, :, None, None], logvar)


def drawn(recent):
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1))
    return recent.to_latents(noise)


def test_before_the_first_update_latents_are_of_the_prior():
    noise = torch.randn(5, 3)
    assert torch.equal(RecentLatents(3, CPU).to_latents(noise), noise)
    assert RecentLatents(3, CPU).density() is None


@pytest.mark.parametrize("updates", [1, 400])
@pytest.mark.parametrize("within", [1.0, 0.0], ids=["posteriors", "points"])
def test_the_density_has_the_mean_and_covariance_of_the_sheets(updates, within):
    recent = RecentLatents(3, CPU)
    if within:
        observe(recent, updates)
    else:  # two points: the covariance is singular
        points = torch.tensor([[1.0, 2.0, 3.0], [1.0, 4.0, 3.0]])[:, :, None, None]
        recent.observe(points, torch.full_like(points, -torch.inf))
    density = recent.density()
    scale, mean = density.scale_trils[0], density.means[0]
    root = recent.to_latents(torch.eye(3)) - recent.to_latents(torch.zeros(1, 3))
    torch.testing.assert_close(mean, recent.to_latents(torch.zeros(1, 3))[0])
    torch.testing.assert_close(scale @ scale.T, root @ root.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(scale, scale.tril()) and scale.norm() > 0.5


@pytest.mark.parametrize("updates", [40, 4000])
def test_mean_and_covariance_are_those_of_samples_of_the_posteriors(updates):
    recent = RecentLatents(3, CPU)
    observe(recent, updates)
    latents = drawn(recent)
    torch.testing.assert_close(latents.mean(dim=0), LOCATION, atol=0.1, rtol=0)
    covariance = SPREAD @ SPREAD.T + torch.diag(STANDARD_DEVIATIONS**2)
    torch.testing.assert_close(latents.T.cov(), covariance, atol=0.2, rtol=0.05)
    assert latents.T.cov()[2, 2] == pytest.approx(0.16, rel=0.05)  # nearly all of it within the posteriors


def test_what_is_long_ago_is_forgotten():
    recent = RecentLatents(3, CPU)
    observe(recent, 4000, location=LOCATION + 100)
    observe(recent, 350)
    halfway = (drawn(recent).mean(dim=0) - LOCATION).mean()
    assert halfway == pytest.approx(50, abs=2)  # half of it is from the last 350 updates
    observe(recent, 3650)
    assert (drawn(recent).mean(dim=0) - LOCATION).abs().max() < 0.2


def test_one_image_at_a_time_is_enough():
    recent = RecentLatents(3, CPU)
    recent.observe(LOCATION[None, :, None, None], (2 * STANDARD_DEVIATIONS.log())[None, :, None, None])
    latents = drawn(recent)
    torch.testing.assert_close(latents.mean(dim=0), LOCATION, atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std(dim=0), STANDARD_DEVIATIONS, atol=0.01, rtol=0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_an_update_that_is_not_finite_changes_nothing(value):
    recent = RecentLatents(3, CPU)
    observe(recent, 3)
    before = drawn(recent)
    recent.observe(torch.full((4, 3, 1, 1), value), torch.zeros(4, 3, 1, 1))
    recent.observe(torch.zeros(4, 3, 1, 1), torch.full((4, 3, 1, 1), torch.nan))
    assert torch.equal(before, drawn(recent))


def test_a_restored_one_goes_on_as_the_other():
    one, other = RecentLatents(3, CPU), RecentLatents(3, CPU)
    observe(one, 10)
    state = one.state_dict()
    observe(one, 10, seed=2)
    other.load_state_dict(state)
    observe(other, 10, seed=2)
    assert torch.equal(drawn(one), drawn(other))
