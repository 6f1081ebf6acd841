"""The bound on the likelihood of a VAE: against the report of its training, and at the ends."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from likelihood_oracle import (
    images_of,
    random_images,
    seeded,
    tiny_vae,
)

from hfgen.methods.posterior import encode_images
from hfgen.metrics.likelihood import vae_bits


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
