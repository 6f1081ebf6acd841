"""The networks: one self-contained file each, because a copy of the file is published with each checkpoint.

To add a network, add a file here and a line below; the tests in `tests/models/` then run on it.
"""

from hfgen.models.dcgan import DCGANDiscriminator, DCGANGenerator
from hfgen.models.dcgan256 import DCGAN256Discriminator, DCGAN256Generator
from hfgen.models.gaussian_mixture import GaussianMixture
from hfgen.models.latent_flow import LatentFlow
from hfgen.models.sngan import SNGANDiscriminator, SNGANGenerator
from hfgen.models.sngan_conv import SNGANConvDiscriminator, SNGANConvGenerator
from hfgen.models.unet_attention import UNetAttention
from hfgen.models.unet_base import UNetBase
from hfgen.models.unet_compact import UNetCompact
from hfgen.models.vae import ConvVAE


__all__ = [
    "ConvVAE",
    "DCGAN256Discriminator",
    "DCGAN256Generator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "GaussianMixture",
    "LatentFlow",
    "SNGANConvDiscriminator",
    "SNGANConvGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "UNetAttention",
    "UNetBase",
    "UNetCompact",
]
