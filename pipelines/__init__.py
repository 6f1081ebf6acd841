"""Inference: one pipeline per family, usable like any diffusers pipeline.

    from hfgen.pipelines import DDPMPipeline

    images = DDPMPipeline.from_pretrained("runs/cats/pipeline")(batch_size=16).images

Each class combines a plain one, whose file is published with the weights, with saving and loading of self-contained
folders.
"""

from hfgen.models import (
    ConvVAE,
    DCGAN256Generator,
    DCGANGenerator,
    GaussianMixture,
    LatentFlow,
    SNGANConvGenerator,
    SNGANGenerator,
    UNetAttention,
    UNetBase,
    UNetCompact,
)
from hfgen.pipelines import pipeline_ddpm, pipeline_gan, pipeline_vae
from hfgen.pipelines.self_contained import SelfContainedPipelineMixin


class DDPMPipeline(SelfContainedPipelineMixin, pipeline_ddpm.DDPMPipeline):  # noqa: D101 (it has one)
    __doc__ = pipeline_ddpm.DDPMPipeline.__doc__
    component_classes = (UNetAttention, UNetBase, UNetCompact)


class GANPipeline(SelfContainedPipelineMixin, pipeline_gan.GANPipeline):  # noqa: D101 (it has one)
    __doc__ = pipeline_gan.GANPipeline.__doc__
    component_classes = (DCGAN256Generator, DCGANGenerator, SNGANConvGenerator, SNGANGenerator)


class VAEPipeline(SelfContainedPipelineMixin, pipeline_vae.VAEPipeline):  # noqa: D101 (it has one)
    __doc__ = pipeline_vae.VAEPipeline.__doc__
    component_classes = (ConvVAE, GaussianMixture, LatentFlow)


__all__ = ["DDPMPipeline", "GANPipeline", "VAEPipeline"]
