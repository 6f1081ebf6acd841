"""The pipeline of the GANs: one pass of the generator turns latents into images.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class GANPipeline(DiffusionPipeline):
    """Draws images by a generator: DCGAN, LSGAN, SNGAN and WGAN-GP alike.

    `generator` is the network, as `pipeline.generator`, and the random number generator as an argument of the call, as
    in every diffusers pipeline.

    Args:
        generator: the network, maps latents `(batch_size, latent_dim)` to images
            `(batch_size, channels, height, width)` in [-1, 1]; has `config.latent_dim`.
    """

    model_cpu_offload_seq = "generator"

    def __init__(self, generator: torch.nn.Module):
        super().__init__()
        self.register_modules(generator=generator)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
        truncation: float | None = None,
        chunk_size: int = 64,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many; as many as there are `latents`, or 1, if None.
            generator: the random number generator, or one for each image: then an image does not depend on the
                others of its batch.
            output_type: "pil", "np" (float `(batch_size, height, width, channels)` in [0, 1]), or "pt" (float
                `(batch_size, channels, height, width)` in [0, 1]).
            return_dict: whether to return an `ImagePipelineOutput` instead of a plain tuple.
            latents: `(batch_size, latent_dim)`, standard normal; drawn if None.
            truncation: draws latents from the normal distribution truncated to [-truncation, truncation] (Brock et
                al. 2019, arXiv:1809.11096, section 3.1): more typical images, less variety. Not with `latents`.
            chunk_size: images drawn at once, which bounds the memory whatever `batch_size` is.

        Returns:
            An output whose `images` are the images.

        Raises:
            ValueError: if `latents` have another shape, or `truncation` or `chunk_size` is not positive.
        """
        latent_dim = self.generator.config.latent_dim
        if batch_size is None:
            batch_size = 1 if latents is None else len(latents)
        if truncation is not None and (truncation <= 0 or latents is not None):
            raise ValueError(f"truncation={truncation} must be positive, and latents must not be given with it")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        shape = (batch_size, latent_dim)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit: {shape} is needed")
        if truncation is not None:
            # A normal number's quantile, squeezed into those between -truncation and truncation.
            lowest = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
            quantiles = lowest + (1 - 2 * lowest) * torch.special.ndtr(latents.double().cpu())
            latents = torch.special.ndtri(quantiles).clamp(-truncation, truncation)

        latents = latents.to(self.device, self.generator.dtype)
        images = [self.generator(chunk).float().cpu() for chunk in latents.split(chunk_size)]
        images = self.image_processor.postprocess(torch.cat(images), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
