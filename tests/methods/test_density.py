import contextlib
import json
import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as GaussianFit
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from hfgen.errors import UserError
from hfgen.methods import density as fitting
from hfgen.methods.density import FittedDensity, fit_density
from hfgen.models import GaussianMixture, LatentFlow


EXACTLY = -30.0  # logarithm of the variance of posteriors that are points


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(mean: torch.Tensor, logvar: torch.Tensor | float = EXACTLY, max_components: int = 10, seed: int = 0):
    return fit_density(mean, torch.as_tensor(logvar).expand_as(mean), max_components, seed)


def distribution(weights, means, scale_trils) -> MixtureSameFamily:
    components = MultivariateNormal(torch.as_tensor(means), scale_tril=torch.as_tensor(scale_trils))
    return MixtureSameFamily(Categorical(torch.as_tensor(weights)), components)


def fitted(density: FittedDensity) -> MixtureSameFamily:
    mixture = density.model
    return distribution(mixture.weights, mixture.means, mixture.scale_trils)


def two_clusters(count: int = 3000) -> tuple[torch.Tensor, float, MixtureSameFamily]:
    """Means of posteriors, the logarithm of their variance, and the distribution of latents drawn from them."""
    means = torch.tensor([[-4.0, 1.0], [3.0, -2.0]])
    scales = torch.tensor([[[0.5, 0.0], [0.3, 0.8]], [[1.2, 0.0], [-0.4, 0.2]]])
    posterior_means = distribution([0.3, 0.7], means, scales).sample
    torch.manual_seed(0)
    covariances = scales @ scales.mT + 0.25 * torch.eye(2)
    whole = distribution([0.3, 0.7], means, torch.linalg.cholesky(covariances))
    return posterior_means((count,)), math.log(0.25), whole


def clusters(count: int, images: int = 600) -> torch.Tensor:
    """Points around so many corners, far apart, of a cube of four dimensions."""
    corners = torch.tensor([[8.0 if number >> bit & 1 else -8.0 for bit in range(4)] for number in range(count)])
    return corners[draw(images, seed=1).argsort() % count] + draw(images, 4)


# ---------------------------------------------------------------------------------------------- what the mixture says


def test_the_mixture_that_the_latents_were_drawn_from_is_found_again():
    mean, logvar, truth = two_clusters()
    density = fit(mean, logvar)
    assert density.model.config.num_components == 2
    order = density.model.means[:, 0].argsort()
    weights, means, scales = (
        part[order] for part in (density.model.weights, density.model.means, density.model.scale_trils)
    )
    torch.testing.assert_close(weights, torch.tensor([0.3, 0.7]), atol=0.02, rtol=0)
    torch.testing.assert_close(means, truth.component_distribution.mean, atol=0.08, rtol=0)
    covariances = truth.component_distribution.covariance_matrix
    torch.testing.assert_close(scales @ scales.mT, covariances, atol=0.15, rtol=0)
    assert torch.equal(scales, scales.tril())


def test_held_out_latents_are_nearly_as_likely_as_under_the_true_density():
    mean, logvar, truth = two_clusters(20_000)
    density = fit(mean, logvar)
    torch.manual_seed(1)
    latents = truth.sample((20_000,))
    assert density.held_out_nats == pytest.approx(truth.log_prob(latents).mean().item(), abs=0.08)
    prior = Normal(0.0, 1.0).log_prob(latents).sum(dim=1).mean().item()
    assert density.prior_nats == pytest.approx(prior, abs=0.3)
    assert density.held_out_nats > density.prior_nats + 3


def test_the_network_draws_from_the_mixture_that_was_fitted():
    mean, logvar, truth = two_clusters()
    density = fit(mean, logvar)
    assert type(density.model) is GaussianMixture and not density.model.training
    latents = density.model(draw(20_000, 3))
    torch.testing.assert_close(latents.mean(dim=0), truth.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(latents.var(dim=0), truth.variance, atol=0.4, rtol=0)
    log_density = fitted(density).log_prob(latents).mean().item()
    assert log_density == pytest.approx(density.held_out_nats, abs=0.1)


def test_latents_are_drawn_from_the_posteriors_not_only_their_means():
    density = fit(torch.tensor([0.7, -2.0]).expand(50, 2), torch.tensor([0.25, 4.0]).log())
    assert density.model.config.num_components == 1
    torch.testing.assert_close(density.model.means[0], torch.tensor([0.7, -2.0]), atol=0.05, rtol=0)
    expected = torch.tensor([[0.5, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(density.model.scale_trils[0], expected, atol=0.05, rtol=0)
    # The entropy of independent Gaussians of standard deviations 0.5 and 2: 1 + log(2 pi).
    assert density.held_out_nats == pytest.approx(-2.8378771, abs=0.05)


def test_the_density_under_the_prior_is_the_one_worked_out_by_hand():
    mean = torch.tensor([[1.5, -0.4], [-1.5, 0.4], [0.4, 1.5], [-0.4, -1.5]])  # whichever is held out
    # (1.5^2 + 0.4^2) / 2 + log(2 pi)
    assert fit(mean).prior_nats == pytest.approx(-(2.41 / 2 + 1.8378771), rel=1e-4)


def test_the_held_out_image_was_not_seen_when_it_is_judged_and_is_seen_in_the_end():
    apart = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    density = fit(apart, max_components=1)  # to one of them, and it is asked for the other
    assert density.held_out_nats < -1000
    assert (fitted(density).log_prob(apart) > -10).all()
    assert fit(draw(20, 2) / 10, max_components=2).held_out_nats > -5


def test_images_are_held_out_at_random_and_not_by_their_place():
    """Ten clusters in turn: every tenth image is all that there is of one of them."""
    centres = 30 * torch.eye(10)
    mean = centres[torch.arange(200) % 10] + 0.1 * draw(200, 10)
    assert fit(mean, max_components=10).model.config.num_components > 1


# --------------------------------------------------------------------------------------------- how many components


def test_of_one_gaussian_one_component_is_taken():
    mean = draw(1000, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, -0.7], [0.0, 0.0, 2.0]])
    assert fit(mean).model.config.num_components == 1


@pytest.mark.parametrize(("count", "chosen"), [(2, 2), (5, 5), (10, 10)])
def test_of_clusters_far_apart_each_gets_its_component(count, chosen):
    mixture = fit(clusters(count), max_components=100).model
    assert mixture.config.num_components == len(mixture.weights) == chosen
    assert mixture.weights.tolist() == pytest.approx([1 / count] * count, abs=0.02)


@pytest.mark.parametrize(("max_components", "chosen"), [(1, 1), (2, 2), (4, 2), (5, 5), (9, 5)])
def test_no_more_components_are_taken_than_allowed(max_components, chosen):
    assert fit(clusters(10), max_components=max_components).model.config.num_components == chosen


@pytest.mark.parametrize("images", [2, 5, 12])
def test_few_images_of_many_dimensions_give_a_finite_density_of_no_more_components(images):
    density = fit(3 * draw(images, 8), max_components=100)
    assert density.model.config.num_components < images
    assert all(weight.isfinite().all() for weight in density.model.parameters())
    assert math.isfinite(density.held_out_nats) and math.isfinite(density.prior_nats)
    assert density.model(draw(4, 9)).shape == (4, 8)


def test_components_are_not_copies_of_single_images():
    # Each image is a point: with a component an image, those that were seen would be as likely as one likes.
    assert fit(draw(40, 3), max_components=100).model.config.num_components <= 2


def test_each_fit_is_announced_in_words(monkeypatch):
    said = []

    class Bar:
        def set_description_str(self, text, refresh):
            said.append(text)

    monkeypatch.setattr("hfgen.methods.density.working_on", lambda _: contextlib.nullcontext(Bar()))
    fit(clusters(2), max_components=2)
    assert said == [
        "fitting the density: mixture of 1 Gaussian to 17,820 latents",
        "fitting the density: mixture of 2 Gaussians to 17,820 latents",
        "fitting the density: mixture of 2 Gaussians to 19,800 latents",
    ]


def test_what_float32_cannot_fit_is_fitted_in_float64(monkeypatch):
    kinds = []

    class Strict(GaussianFit):
        def fit(self, latents):
            kinds.append(latents.dtype.name)
            if latents.dtype == np.float32:
                raise ValueError("ill-defined empirical covariance")
            return super().fit(latents)

    expected = fit(clusters(2))
    monkeypatch.setattr("hfgen.methods.density.Fit", Strict)
    density = fit(clusters(2))
    assert kinds[:2] == ["float32", "float64"] and density.model.config.num_components == 2
    assert density.held_out_nats == pytest.approx(expected.held_out_nats, abs=0.01)  # as good


# ------------------------------------------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others():
    mean, logvar, _ = two_clusters(300)
    torch.manual_seed(1)
    one = fit(mean, logvar, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two, other = fit(mean, logvar, seed=4), fit(mean, logvar, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, two.model.state_dict()[name])
        assert not torch.equal(weight, other.model.state_dict()[name])
    assert one.report() == two.report() != other.report()


def test_the_report_is_of_plain_values():
    density = fit(clusters(2))
    report = json.loads(json.dumps(density.report()))
    assert report == {
        "kind": "mixture",
        "tried": {"mixture": density.held_out_nats},
        "num_components": 2,
        "held_out_nats": density.held_out_nats,
        "prior_nats": density.prior_nats,
    }


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**40 + 7])
def test_a_seed_that_a_run_takes_is_a_seed_here(seed):
    assert fit(draw(30, 2), max_components=1, seed=seed).model.config.num_components == 1


# ------------------------------------------------------------------------------------------------------------ the flow


@pytest.fixture
def short_flow(monkeypatch):
    monkeypatch.setattr("hfgen.methods.density.FLOW_STEPS", 200)


def bent(count: int = 2000) -> torch.Tensor:
    """Points along a parabola: nothing for a Gaussian."""
    along = 2 * draw(count, seed=3)
    return torch.stack([along, along.square() + 0.3 * draw(count, seed=4)], dim=1)


@pytest.mark.slow
def test_a_flow_beats_one_gaussian_where_the_latents_are_bent_and_draws_like_them(short_flow):
    latents = bent()
    logvar = torch.full_like(latents, math.log(0.01))
    density = fit_density(latents, logvar, 1, 0, "auto")
    assert isinstance(density.model, LatentFlow)
    assert density.tried["flow"] == density.held_out_nats > density.tried["mixture"] + 0.5
    drawn = density.model(draw(4000, 3))
    residual = drawn[:, 1] - drawn[:, 0].square()
    assert residual.abs().median() < 0.6 and drawn[:, 0].std().item() == pytest.approx(2, abs=0.3)
    with torch.no_grad():
        again = density.model.log_density(latents[:200]).mean().item()
    assert again == pytest.approx(density.held_out_nats, abs=0.5)


@pytest.mark.slow
def test_auto_keeps_the_mixture_where_it_is_likelier_and_tells_both(short_flow):
    mean, logvar, _ = two_clusters(400)
    density = fit_density(mean, torch.full_like(mean, logvar), 10, 0, "auto")
    assert isinstance(density.model, GaussianMixture) and density.tried.keys() == {"mixture", "flow"}
    told = density.report()
    assert told["kind"] == "mixture" and told["num_components"] == 2 and told["tried"] == density.tried
    only = fit_density(mean, torch.full_like(mean, logvar), 10, 0, "flow").report()
    assert only["kind"] == "flow" and "num_components" not in only and only["tried"].keys() == {"flow"}


@pytest.mark.slow
def test_fitting_a_flow_depends_on_the_seed_only_and_leaves_the_global_state_alone(short_flow, monkeypatch):
    monkeypatch.setattr("hfgen.methods.density.FLOW_STEPS", 20)
    state = torch.get_rng_state()
    one, two, other = (fit_density(bent(50), torch.zeros(50, 2), 1, seed, "flow").model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    noise = draw(9, 3)
    assert torch.equal(one(noise), two(noise)) and not torch.equal(one(noise), other(noise))


def test_one_number_and_few_images_have_no_flow_and_other_kinds_are_refused():
    for shape in ((40, 1), (2, 3), (19, 3)):
        assert isinstance(fit_density(draw(*shape), torch.zeros(shape), 2, 0, "flow").model, GaussianMixture)
    with pytest.raises(ValueError, match="kind='spline' must be"):
        fit_density(draw(40, 2), torch.zeros(40, 2), 2, 0, "spline")


@pytest.mark.parametrize(("mean", "logvar"), [(math.nan, 0.0), (math.inf, 0.0), (0.0, 3000.0)])
def test_latents_of_a_training_that_has_diverged_are_refused(mean, logvar):
    means, logvars = torch.zeros(30, 2), torch.zeros(30, 2)
    means[3, 1], logvars[3, 1] = mean, logvar
    with pytest.raises(UserError, match="latents of training images are not finite: .* lower --learning_rate"):
        fit_density(means, logvars, 1, 0)


def test_the_flow_that_is_kept_is_the_one_that_described_unseen_latents_best(monkeypatch):
    """Looked at four times, it was best at the second look: what it became later is forgotten."""
    states, nats = [], [0.0, 5.0, 1.0, 2.0]

    def look(flow, unseen):
        states.append({key: value.clone() for key, value in flow.state_dict().items()})
        return nats[len(states) - 1]

    monkeypatch.setattr(fitting, "_mean_log_density", look)
    monkeypatch.setattr(fitting, "FLOW_LOOK_EVERY", 2)
    monkeypatch.setattr(fitting, "FLOW_STEPS", 6)
    mean = draw(300, 4)
    flow = fitting._fit_flow(mean, torch.full_like(mean, -2.0), torch.Generator().manual_seed(0))
    assert len(states) == 4
    kept = [all(torch.equal(flow.state_dict()[key], state[key]) for key in state) for state in states]
    assert kept == [False, True, False, False]
