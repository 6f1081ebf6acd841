"""The generators and discriminators of GANs, each as small as it gets, and what goes into them."""

import pytest
import torch
from torch import nn

import hfgen.models
from hfgen.models import (
    DCGAN256Discriminator,
    DCGAN256Generator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANConvDiscriminator,
    SNGANConvGenerator,
)


# Each network small, with options that are not the defaults, so that one that is lost on reload shows. A generator or
# discriminator that joins `hfgen.models` joins this table.
TINY = {
    "DCGANGenerator": {"latent_dim": 6, "base_channels": 3},
    "DCGANDiscriminator": {"base_channels": 3, "normalization": "instance", "spectral_scale": 1.5},
    "DCGAN256Generator": {"latent_dim": 6, "stem_channels": 32},
    "DCGAN256Discriminator": {"base_channels": 3, "dropout": 0.2},
    "SNGANConvGenerator": {"latent_dim": 6, "base_channels": 3, "upsampling": "nearest"},
    "SNGANConvDiscriminator": {"base_channels": 3, "normalization": "instance", "spectral_scale": 1.5},
    "SNGANGenerator": {"latent_dim": 6, "base_channels": 3},
    "SNGANDiscriminator": {"base_channels": 3},
}
GENERATORS = [name for name in TINY if name.endswith("Generator")]
# (discriminator, its options, whether BatchNorm mixes the images of a batch)
DISCRIMINATORS = [
    ("DCGANDiscriminator", {"normalization": "batch"}, True),
    ("DCGANDiscriminator", {"normalization": "instance"}, False),
    ("DCGANDiscriminator", {"normalization": "spectral"}, False),
    ("DCGANDiscriminator", {"normalization": "none"}, False),
    ("DCGAN256Discriminator", {}, True),
    ("SNGANConvDiscriminator", {"normalization": "batch"}, True),
    ("SNGANConvDiscriminator", {"normalization": "instance"}, False),
    ("SNGANConvDiscriminator", {"normalization": "spectral"}, False),
    ("SNGANConvDiscriminator", {"normalization": "none"}, False),
    ("SNGANDiscriminator", {}, False),
]
NORMALIZATIONS = list(dict.fromkeys(options["normalization"] for _, options, _ in DISCRIMINATORS if options))
# How much larger than the initial ones the weights of an untrained network are here: the signal must reach its end.
GAINS = {
    **{DCGANGenerator: 5, DCGANDiscriminator: 5, DCGAN256Generator: 3, DCGAN256Discriminator: 3},
    **{SNGANConvGenerator: 9, SNGANConvDiscriminator: 9},
}
every_generator = pytest.mark.parametrize("name", GENERATORS)
every_discriminator = pytest.mark.parametrize(("name", "options", "mixes"), DISCRIMINATORS)
every_variant = pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in GENERATORS]
    + [("SNGANConvGenerator", {"upsampling": "transposed"})]
    + [(name, options) for name, options, _ in DISCRIMINATORS],
)


def tiny(name: str, sample_size: int = 32, seed: int = 0, **options) -> nn.Module:
    """An untrained network in eval mode whose biases and BatchNorm statistics are not the initial ones."""
    torch.manual_seed(seed)
    network = getattr(hfgen.models, name)(sample_size, **{**TINY[name], **options})
    with torch.no_grad():
        for key, weight in network.named_parameters():
            weight.mul_(GAINS.get(type(network), 1))
            if key.endswith("bias"):
                weight.normal_(std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, count: int = 3, size: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    """Latents for a generator, images for a discriminator."""
    return draw(count, 6, seed=seed) if name in GENERATORS else draw(count, channels, size, size, seed=seed).tanh()


def smallest(name: str) -> int:
    return 16 if "256" in name else 8
