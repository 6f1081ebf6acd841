"""The bits per dimension of a pipeline: of which images, by which of the two bounds, and what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from edm_pipelines import edm_pipeline
from stand_in_features import Colours, paintings

from hfgen.errors import UserError
from hfgen.evaluation import bits_per_dimension as likelihoods
from hfgen.evaluation.bits_per_dimension import check_has_likelihood, likelihood_report
from hfgen.evaluation.reference import ReferenceImages
from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.metrics.likelihood import diffusion_bits, edm_bits, vae_bits
from hfgen.models import ConvVAE, DCGANGenerator, UNetBase
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline


def reference(count):
    """So many training images, of 16 pixels."""
    return ReferenceImages(
        [np.asarray(image) for image in paintings(range(count))], np.zeros((count, 1)), Path(), Colours()
    )


def pixels(indices):
    """The images as the networks see them, in [-1, 1]."""
    images = np.stack([np.asarray(image) for image in paintings(indices)])
    return 2 * torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 1


def vae(seed=0):
    torch.manual_seed(seed)
    return VAEPipeline(ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)).eval())


def ddpm(sampler="dpm"):
    torch.manual_seed(0)
    unet = UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    return DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 60), sampler))


def test_a_vae_is_measured_by_its_elbo():
    pipeline = vae()
    report = likelihood_report(pipeline, reference(9), 5)
    by_hand = vae_bits(pipeline.vae, pixels(range(9)), torch.Generator().manual_seed(5))
    assert report["bits_per_dimension"] == pytest.approx(by_hand, rel=1e-6) and 1 < by_hand < 20
    assert (report["num_images"], report["held_out"]) == (9, False)
    told = f"at most {by_hand:.3f} bits per dimension for 9 images that may have been in its training data"
    assert report["statement"] == told
    assert likelihood_report(pipeline, reference(9), 6)["bits_per_dimension"] != by_hand
    for images, words in (("training", "images of its training data"), ("held_out", "held-out images")):
        assert likelihood_report(pipeline, reference(9), 5, images)["statement"].endswith(f"for 9 {words}")


def test_a_ddpm_is_scored_by_its_variational_bound_whatever_its_saved_sampler():
    pipeline = ddpm()
    report = likelihood_report(pipeline, reference(4), 5, "held_out")
    schedule = sampling_scheduler(pipeline.scheduler, "ddpm")
    by_hand = diffusion_bits(pipeline.unet, schedule, pixels(range(4)), 50, torch.Generator().manual_seed(5))
    assert report["bits_per_dimension"] == pytest.approx(float(by_hand.mean()), rel=1e-6)
    assert report["statement"].endswith(" bits per dimension for 4 held-out images") and report["held_out"]
    other = likelihood_report(ddpm("ddim"), reference(4), 5, "held_out")
    assert other["bits_per_dimension"] == pytest.approx(report["bits_per_dimension"], rel=1e-6)


def test_the_mean_is_over_images_however_they_are_batched(monkeypatch):
    sizes = []

    def brightness(unet, schedule, images, timesteps, generator):
        sizes.append((len(images), timesteps))
        return images.mean(dim=(1, 2, 3)).double()

    monkeypatch.setattr(likelihoods, "diffusion_bits", brightness)
    report = likelihood_report(ddpm(), reference(7), 0, batch_size=3)
    assert sizes == [(3, 50), (3, 50), (1, 50)]
    assert report["bits_per_dimension"] == pytest.approx(pixels(range(7)).mean().item(), rel=1e-5)


def test_of_many_images_some_are_chosen_by_the_seed(monkeypatch):
    monkeypatch.setattr(likelihoods, "MAX_IMAGES", 5)
    shown = []
    monkeypatch.setattr(likelihoods, "vae_bits", lambda vae, images, numbers, batch_size: shown.append(images) or 1.0)
    for seed in (0, 0, 1):
        assert likelihood_report(vae(), reference(12), seed)["num_images"] == 5
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])
    known = [torch.isclose(image, pixels(range(12)), atol=1e-6).flatten(1).all(dim=1).nonzero() for image in shown[0]]
    assert len({int(index) for index in known}) == 5


def test_a_trained_vae_needs_fewer_bits_for_its_images_and_more_for_noise():
    torch.manual_seed(0)
    pipeline, images = vae(), pixels(range(8))
    before = likelihood_report(pipeline, reference(8), 0)["bits_per_dimension"]
    optimizer = torch.optim.Adam(pipeline.vae.parameters(), 1e-2)
    for _ in range(60):
        loss = (pipeline.vae(images).sample - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = likelihood_report(pipeline, reference(8), 0)["bits_per_dimension"]
    noise = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in range(8)]
    of_noise = likelihood_report(pipeline, ReferenceImages(noise, np.zeros((8, 1)), Path(), Colours()), 0)
    assert after < before and of_noise["bits_per_dimension"] > after + 0.5


def test_a_gan_has_no_likelihood():
    with pytest.raises(UserError, match="--bits_per_dimension: a GANPipeline has no likelihood"):
        check_has_likelihood(GANPipeline(DCGANGenerator(16, 4, base_channels=4)))
    for pipeline in (vae(), ddpm(), edm_pipeline()):
        check_has_likelihood(pipeline)


def test_what_cannot_be_measured_is_refused_before_anything_is_generated():
    grey = UNetBase(16, in_channels=1, block_out_channels=(4, 8), time_embedding_dim=6)
    pipeline = DDPMPipeline(grey, sampling_scheduler(noise_schedule("linear", 60), "ddim"))
    with pytest.raises(UserError, match="--bits_per_dimension: this pipeline's images have 1 channel, not 3"):
        check_has_likelihood(pipeline)
    foreign = ddpm()
    foreign.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="--bits_per_dimension: "):
        check_has_likelihood(foreign)


@pytest.mark.slow
def test_an_edm_network_is_scored_by_its_bound_whatever_its_saved_sampler():
    pipeline = edm_pipeline(16)
    report = likelihood_report(pipeline, reference(4), 5, "held_out")
    numbers = torch.Generator().manual_seed(5)
    by_hand = edm_bits(pipeline.unet, pipeline.scheduler, pixels(range(4)), 50, numbers).mean().item()
    assert report["bits_per_dimension"] == pytest.approx(by_hand, rel=1e-6)
    other = likelihood_report(edm_pipeline(16, "ddim"), reference(4), 5, "held_out")
    assert other["bits_per_dimension"] == pytest.approx(by_hand, rel=1e-6)
