"""The GAN pipeline: one generator pass turns latents into images.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


LIBRARIES = ("diffusers", "transformers")  # their classes need no code next to the weights
HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")


class GANPipeline(DiffusionPipeline):
    """Generates images with a GAN's generator: DCGAN, LSGAN, SNGAN and WGAN-GP alike.

    `pipeline.generator` is the network; the `generator` argument of a call is the random number generator, as in
    every diffusers pipeline.

    Args:
        generator: the network; maps latents `(batch_size, latent_dim)` to images
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
        """Generate images.

        Args:
            batch_size: number of images; if None, the number of `latents`, or 1.
            generator: the random number generator, or one per image, which makes each image independent of its batch.
            output_type: "pil", "np" (float `(batch_size, height, width, channels)` in [0, 1]), or "pt" (float
                `(batch_size, channels, height, width)` in [0, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a plain tuple.
            latents: `(batch_size, latent_dim)`, standard normal; sampled if None.
            truncation: sample latents from the normal distribution truncated to [-truncation, truncation] (Brock et
                al. 2019, arXiv:1809.11096, section 3.1): more typical images, less variety. Not with `latents`.
            chunk_size: images generated at once; bounds the memory for any `batch_size`.

        Returns:
            The generated images, as `images` of the output.

        Raises:
            ValueError: if `latents` have the wrong shape, the numbers of generators and images differ, `truncation` is
                given with `latents`, or `batch_size`, `truncation` or `chunk_size` is not positive.
        """
        latent_dim = self.generator.config.latent_dim
        if batch_size is None:
            batch_size = 1 if latents is None else len(latents)
        if truncation is not None and (not truncation > 0 or latents is not None):
            raise ValueError(f"truncation={truncation} must be positive, and cannot be combined with latents")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        shape = (batch_size, latent_dim)
        _check_generators(generator, batch_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        if truncation is not None:
            # Map each latent's quantile to the range of quantiles between -truncation and truncation.
            lowest = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
            quantiles = lowest + (1 - 2 * lowest) * torch.special.ndtr(latents.cpu().double())
            latents = torch.special.ndtri(quantiles).clamp(-truncation, truncation)

        latents = latents.to(self._execution_device, self.generator.dtype)
        images = [self.generator(chunk).float().cpu() for chunk in latents.split(chunk_size)]
        images = self.image_processor.postprocess(torch.cat(images), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as diffusers does (same arguments), and add the source files of classes that diffusers does not have.

        The folder then loads with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where only torch
        and diffusers are installed, and a pipeline loaded this way can be saved again.
        """
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        _save_code(self, GANPipeline, Path(save_directory))
        if push_to_hub:  # diffusers would upload before the code is in the folder
            repo_id = hub_arguments.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=kwargs.get("variant"), **hub_arguments)


def _check_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> None:
    """Raise a `ValueError` if there are no images, or a list of generators, but not one for each image."""
    if count < 1:
        raise ValueError(f"batch_size={count} must be at least 1")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator: there are {len(generator)} for {count} images; give one, or one per image")


def _save_code(pipeline: DiffusionPipeline, own_class: type, folder: Path) -> None:
    """Copy the source files of classes that diffusers does not have, and name them in `model_index.json`.

    A pipeline made only of diffusers' own parts, whose class exists in diffusers under the same name, needs no code,
    unless that class cannot use its scheduler. This function is repeated in each pipeline file, because each is
    published on its own.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index.pop("_name_or_path", None)  # a local path, if the pipeline was loaded
    index["_class_name"] = own_class.__name__
    # A compiled network is saved as the one inside.
    kinds = {name: type(getattr(part, "_orig_mod", part)) for name, part in pipeline.components.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind is not type(None)}
    own = {name: kind for name, kind in kinds.items() if kind.__module__.split(".")[0] not in LIBRARIES}
    for name, kind in own.items():
        file = Path(inspect.getfile(kind))
        shutil.copyfile(file, folder / name / file.name)
        index[name] = [file.stem, kind.__name__]
    # diffusers' own DDPMPipeline begins with noise of variance 1, and passes a generator to each step.
    scheduler = pipeline.components.get("scheduler")
    takes_generator = "generator" in inspect.signature(getattr(scheduler, "step", lambda: None)).parameters
    is_usual = takes_generator and scheduler.init_noise_sigma == 1
    if own or not is_usual or not hasattr(diffusers, own_class.__name__):
        file = Path(inspect.getfile(own_class))
        shutil.copyfile(file, folder / file.name)
        index["_class_name"] = [file.stem, own_class.__name__]
    else:
        index.pop("num_inference_steps", None)  # diffusers' class would warn about it
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    for config_file in folder.glob("*/config.json"):
        config = json.loads(config_file.read_text())
        if config.pop("_name_or_path", None) is not None:  # likewise for networks
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
