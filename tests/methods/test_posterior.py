"""The watch over the posteriors of a VAE, and the measure of them on the whole training set."""

import io
import json
import math

import pytest
import torch
from accelerate import Accelerator

from hfgen.losses.vae import kl_per_dimension, reconstruction_loss
from hfgen.methods.posterior import (
    ACTIVE_VARIANCE,
    CHECKS_TO_COLLAPSE,
    CHECKS_TO_TAKE_OFF,
    FEW_ACTIVE,
    EncodedImages,
    PosteriorWatch,
    encode_images,
)
from hfgen.methods.watch import WatchResult
from hfgen.models import ConvVAE


REMEDY = "try a lower --kl_weight, --kl_warmup_steps, --free_bits or a lower --learning_rate"


def watch(latent_dim: int = 4) -> PosteriorWatch:
    return PosteriorWatch(latent_dim, torch.device("cpu"))


def observe(watch: PosteriorWatch, *means: list[float], kl: list[float] | None = None) -> None:
    """Show the watch one update: the means of the posteriors of a batch."""
    kl_dimensions = torch.zeros(len(means[0])) if kl is None else torch.tensor(kl)
    watch.observe(torch.tensor(means)[:, :, None, None], kl_dimensions)


def check(watch: PosteriorWatch, active: int, latent_dim: int = 4) -> WatchResult:
    """Let the watch see an update in which so many units are active, and judge."""
    means = [0.5] * active + [0.0] * (latent_dim - active)
    observe(watch, means, [-mean for mean in means])
    return watch.check()


# -------------------------------------------------------------------------------------------------------- active units


@pytest.mark.parametrize(("num_images", "collapsed"), [(1, False), (2, True), (None, True)])
def test_over_a_single_image_units_cannot_vary_and_are_not_judged(num_images, collapsed):
    watch_of_it = PosteriorWatch(4, torch.device("cpu"), num_images)
    troubles = [check(watch_of_it, 0).trouble for _ in range(CHECKS_TO_TAKE_OFF)]
    assert (troubles[-1] is not None) == collapsed


def test_a_unit_is_active_if_the_variance_of_its_mean_is_above_a_hundredth():
    assert ACTIVE_VARIANCE == 0.01
    watch_of_it = watch()
    # Variances 0.0099, 0.0102, 0 far from the prior, and 0.0102 far from it.
    observe(watch_of_it, [0.0995, 0.101, 3.0, 3.101], [-0.0995, -0.101, 3.0, 2.899])
    assert watch_of_it.check().signals["active_units"] == 2


def test_the_variance_is_over_all_images_since_the_last_look():
    watch_of_it = watch(2)
    observe(watch_of_it, [0.3, 0.3], [0.3, 0.3])
    observe(watch_of_it, [-0.3, 0.3], [-0.3, 0.3])
    assert watch_of_it.check().signals["active_units"] == 1
    observe(watch_of_it, [-0.3, 0.3], [-0.3, 0.3])
    assert watch_of_it.check().signals["active_units"] == 0


def test_the_kl_per_dimension_is_the_mean_over_the_updates_since_the_last_look():
    watch_of_it, flat = watch(5), [0.0] * 5
    observe(watch_of_it, flat, kl=[9.0] * 5)
    watch_of_it.check()
    observe(watch_of_it, flat, kl=[1.0, 0.2, 7.0, 2.0, 5.0])
    observe(watch_of_it, flat, kl=[3.0, 0.4, 4.0, 1.0, 8.0])  # means 2, 0.3, 5.5, 1.5, 6.5
    expected = {"active_units": 0, "kl_dimension_min": 0.3, "kl_dimension_median": 2.0, "kl_dimension_max": 6.5}
    assert watch_of_it.check().signals == pytest.approx(expected)


def test_observing_keeps_no_graph_and_changes_nothing_it_is_shown():
    watch_of_it = watch(1)
    mean, kl_dimensions = torch.full((2, 1, 1, 1), 0.5, requires_grad=True), torch.ones(1, requires_grad=True)
    watch_of_it.observe(mean, kl_dimensions)
    assert not watch_of_it.state_dict()["sums"].requires_grad
    assert mean.flatten().tolist() == [0.5, 0.5] and kl_dimensions.tolist() == [1.0]


# ------------------------------------------------------------------------------------------------------------ collapse


def test_a_posterior_has_collapsed_after_so_many_checks_without_an_active_unit():
    assert CHECKS_TO_COLLAPSE == 3
    watch_of_it = watch()
    troubles = [check(watch_of_it, active).trouble for active in (4, 0, 0, 1, 0, 0, 0, 0, 1, 0)]
    assert [trouble is not None for trouble in troubles] == [False] * 6 + [True] * 2 + [False] * 2
    told = "the posterior has collapsed: none of the 4 latent units is active, in {} checks in a row; " + REMEDY
    assert troubles[6:8] == [told.format(3), told.format(4)]


def test_a_run_whose_units_were_never_active_gets_longer_to_take_off():
    assert CHECKS_TO_TAKE_OFF == 8
    watch_of_it = watch()
    troubles = [check(watch_of_it, 0).trouble for _ in range(9)]
    assert troubles[:7] == [None] * 7
    assert "in 8 checks in a row" in troubles[7] and "in 9 checks in a row" in troubles[8]


def test_a_checkpoint_is_good_if_a_tenth_of_the_units_are_active_or_never_more_were():
    assert FEW_ACTIVE == 0.1
    watch_of_it = watch(30)
    good = [check(watch_of_it, active, 30).good for active in (0, 2, 3, 30, 2, 0)]
    assert good == [False, True, True, True, False, False]


def test_of_few_active_units_the_user_is_warned_once():
    watch_of_it = watch(30)
    warnings = [check(watch_of_it, active, 30).warning for active in (3, 2, 0, 30, 2, 1)]
    assert [warning is not None for warning in warnings] == [False, True, False, False, False, False]
    assert warnings[1].startswith(f"only 2 of 30 latent units are active; if that does not improve, {REMEDY}")


# ------------------------------------------------------------------------------------------------------------ resuming


def story(watch_of_it: PosteriorWatch, first: int, last: int) -> list[WatchResult]:
    """The results of checks `first` to `last` of a run that takes off late and collapses twice."""
    active = [0, 0, 0, 0, 0, 1, 0, 0, 0, 20, 4, 0, 0, 0]
    results = []
    for index in range(first, last):
        results.append(check(watch_of_it, active[index], 30))
        observe(watch_of_it, [0.05] * 30, kl=[float(index)] * 30)  # in the window of the next check
    return results


@pytest.mark.parametrize("saved_at", range(14))
def test_a_watch_that_goes_on_from_a_saved_state_comes_to_the_same_verdicts(saved_at):
    expected = story(watch(30), 0, 14)
    assert len({result[1:] for result in expected}) >= 4
    saved = watch(30)
    story(saved, 0, saved_at)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = watch(30)
    story(resumed, 7, 12)  # what it knew itself is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert story(resumed, saved_at, 14) == expected[saved_at:]


def test_a_saved_state_does_not_change_with_later_observations():
    saved, resumed = watch(2), watch(2)
    observe(saved, [0.5, 1.0], kl=[1.0, 2.0])
    state = saved.state_dict()
    kept = state["sums"].clone()
    resumed.load_state_dict(state)
    for watch_of_it in saved, resumed:
        observe(watch_of_it, [3.0, 1.0], kl=[1.0, 2.0])
    assert torch.equal(state["sums"], kept)
    assert kept.any()


# -------------------------------------------------------------------------------------------------- the whole dataset


class ListedBatches:
    """Hands out batches of a list of images, in their order, and counts them."""

    def __init__(self, images: torch.Tensor, batch_size: int):
        self.batches, self.taken = images.split(batch_size), 0

    def __next__(self):
        self.taken += 1
        return self.batches[self.taken - 1]


@pytest.fixture
def accelerator(fresh_accelerate_state) -> Accelerator:
    return Accelerator(cpu=True)


def tiny_vae() -> ConvVAE:
    torch.manual_seed(0)
    vae = ConvVAE(8, latent_dim=5, block_out_channels=(4, 8), layers_per_block=0).eval()
    with torch.no_grad():
        vae.to_posterior.weight *= 30
        vae.conv_out.weight *= 10
    return vae


@pytest.mark.parametrize(("count", "taken"), [(1, 1), (3, 1), (5, 2), (6, 2)])
def test_so_many_images_are_encoded_and_reconstructed_from_a_draw(accelerator, count, taken):
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)).tanh()
    vae, batches = tiny_vae(), ListedBatches(images, 3)
    encoded = encode_images(vae, batches, count, torch.Generator().manual_seed(2), accelerator)
    assert batches.taken == taken
    posterior = vae.encode(images[:count]).latent_dist
    assert encoded.mean.shape == encoded.logvar.shape == (count, 5)
    torch.testing.assert_close(encoded.mean, posterior.mean.detach().flatten(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.logvar, posterior.logvar.detach().flatten(1), atol=1e-5, rtol=1e-4)
    # One draw a batch, so the numbers of the first three images come before those of the next three.
    generator = torch.Generator().manual_seed(2)
    noise = torch.cat([torch.randn(3, 5, 1, 1, generator=generator) for _ in range(taken)])[:count]
    with torch.no_grad():
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (reconstruction - images[:count]).square().mean().item()
    assert encoded.mean_squared_error == pytest.approx(error, rel=1e-4)
    assert encoded.num_dims == 192
    assert not encoded.mean.requires_grad


def test_encoding_leaves_the_network_as_it_was(accelerator):
    vae, batches = tiny_vae(), ListedBatches(torch.randn(4, 3, 8, 8).tanh(), 4)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    encode_images(vae, batches, 4, torch.Generator(), accelerator)
    assert not vae.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_the_report_is_the_one_worked_out_by_hand():
    encoded = EncodedImages(
        mean=torch.tensor([[0.1, 2.0, 0.08], [0.5, -1.0, -0.08]]),
        logvar=torch.tensor([[0.25, 4.0, 1.0], [0.25, 1.0, 1.0]]).log(),
        mean_squared_error=0.04,
        num_dims=12,
    )
    report = encoded.report()
    assert json.loads(json.dumps(report)) == report
    # (mean^2 + variance - 1 - log variance) / 2, log 4 = 1.3862944
    first = (0.13 - 0.75 + 1.3862944) / 2
    second = ((4 + 3 - 1.3862944) / 2 + 1 / 2) / 2
    third = 0.0064 / 2
    likelihood = 6 * (1 + math.log(2 * math.pi * 0.04))
    total = likelihood + first + second + third
    expected = {
        "num_images": 2,
        "rmse": 0.2,
        "sigma": 0.2,
        "reconstruction_loss": likelihood,
        "kl_loss": first + second + third,
        "negative_elbo": total,
        "bits_per_dimension": (total / 12 + math.log(127.5)) / math.log(2),
        "active_units": 2,  # of variances 0.04, 2.25 and 0.0064
    }
    assert {key: report[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert report.keys() == {*expected, "kl_dimensions"}
    assert report["kl_dimensions"] == [1.6534, 0.3831, 0.0032] == [round(kl, 4) for kl in (second, first, third)]


def test_the_variance_of_two_images_is_the_one_over_all_of_them():
    # As a part of a larger whole it would be 0.0128 and active.
    encoded = EncodedImages(torch.tensor([[0.08], [-0.08]]), torch.zeros(2, 1), 0.1, 3)
    assert encoded.report()["active_units"] == 0


@pytest.mark.parametrize("mean_squared_error", [0.3, 1e-6, 0.0])
def test_the_report_agrees_with_the_losses_of_the_training(mean_squared_error):
    mean, logvar = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.full((6, 3), -1.0)
    report = EncodedImages(mean, logvar, mean_squared_error, 48).report()
    images = torch.zeros(2, 3, 4, 4)
    loss = reconstruction_loss(images + mean_squared_error**0.5, images)
    assert report["reconstruction_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["kl_loss"] == pytest.approx(kl_per_dimension(mean, logvar).sum().item(), rel=1e-5)
    assert report["sigma"] == pytest.approx(max(mean_squared_error**0.5, 1 / 255))
    assert report["rmse"] == pytest.approx(mean_squared_error**0.5)


def test_the_watch_needs_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none."""
    calls, watch = [], PosteriorWatch(3, torch.device("cpu"))
    watch.observe(torch.zeros(2, 3, 1, 1), torch.zeros(3))
    for name in ("cpu", "double"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda own, name=name, method=method: calls.append(name) or method(own)
        )
    watch.check()
    assert calls[:2] == ["cpu", "double"]
