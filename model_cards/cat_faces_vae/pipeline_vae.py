"""The pipeline of the variational autoencoder: generates, reconstructs and encodes images.

This file imports only torch, diffusers and Pillow (which diffusers needs): a copy is published with each checkpoint.
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
from PIL import Image, ImageOps


LIBRARIES = ("diffusers", "transformers")  # their classes need no code next to the weights
HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")


class VAEPipeline(DiffusionPipeline):
    """Generates images by decoding random latents; also encodes and reconstructs images.

    Args:
        vae: the network: `encode(images).latent_dist` and `decode(latents).sample` as in diffusers' `AutoencoderKL`,
            on images `(batch_size, channels, sample_size, sample_size)` in [-1, 1] and latents
            `(batch_size, latent_dim)`; has `config.latent_dim` and `config.sample_size`.
        density: the ex-post density, if one was fitted: maps standard normal `(batch_size, 1 + latent_dim)` to latents
            `(batch_size, latent_dim)`.
    """

    model_cpu_offload_seq = "density->vae"
    _optional_components = ["density"]

    def __init__(self, vae: torch.nn.Module, density: torch.nn.Module | None = None):
        super().__init__()
        self.register_modules(vae=vae, density=density)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
        sample_from: str | None = None,
        chunk_size: int = 64,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images; if None, the number of `latents`, or 1.
            generator: the random number generator, or one per image, which makes each image independent of its batch.
            output_type: "pil", "np" (float `(batch_size, height, width, channels)` in [0, 1]), or "pt" (float
                `(batch_size, channels, height, width)` in [0, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a plain tuple.
            latents: `(batch_size, latent_dim)`, decoded as they are; sampled if None.
            sample_from: distribution of the latents: "prior" or "ex_post"; if None, the ex-post density if the
                pipeline has one, else the prior. Not with `latents`.
            chunk_size: images generated at once; bounds the memory for any `batch_size`.

        Returns:
            The generated images, as `images` of the output.

        Raises:
            ValueError: if `latents` have the wrong shape, the numbers of generators and images differ, `sample_from`
                is unknown, missing from the pipeline or given with `latents`, or `batch_size` or `chunk_size` is not
                positive.
        """
        if batch_size is None:
            batch_size = 1 if latents is None else len(latents)
        _check_generators(generator, batch_size)
        shape = (batch_size, self.vae.config.latent_dim)
        if latents is None:
            latents = self.draw_latents(batch_size, generator, sample_from)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        elif sample_from is not None:
            raise ValueError(f"sample_from={sample_from!r} is about sampled latents; use it without latents")
        return self._decode(latents, output_type, return_dict, chunk_size)

    @torch.no_grad()
    def draw_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_from: str | None = None,
    ) -> torch.Tensor:
        """Sample latents, `(batch_size, latent_dim)`, float32; arguments as for the call.

        Raises:
            ValueError: if `sample_from` is unknown, the pipeline has no ex-post density, or the numbers of generators
                and images differ.
        """
        _check_generators(generator, batch_size)
        sample_from = sample_from or ("prior" if self.density is None else "ex_post")
        if sample_from not in ("prior", "ex_post"):
            raise ValueError(f"sample_from={sample_from!r} must be 'prior' or 'ex_post'")
        latent_dim = self.vae.config.latent_dim
        if sample_from == "prior":
            return randn_tensor((batch_size, latent_dim), generator, self._execution_device, torch.float32)
        if self.density is None:
            raise ValueError("sample_from='ex_post': this pipeline has no ex-post density; use 'prior'")
        noise = randn_tensor((batch_size, 1 + latent_dim), generator, self._execution_device, torch.float32)
        return self.density(noise).float()

    @torch.no_grad()
    def encode(
        self,
        images,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_posterior: bool = False,
        chunk_size: int = 64,
    ) -> torch.Tensor:
        """Encode images to latents.

        Args:
            images: a PIL image or a list of them, of any size, with 8 bits per channel; as in training, they are
                turned upright by their EXIF orientation, what is transparent becomes white, and the largest centred
                square is resized. Or a tensor `(batch_size, channels, sample_size, sample_size)` in [0, 1].
            generator: the random number generator for `sample_posterior`, or one per image.
            sample_posterior: sample from the posterior instead of taking its mean.
            chunk_size: images encoded at once.

        Returns:
            `(batch_size, latent_dim)`, float32, on the CPU.

        Raises:
            ValueError: if there is no image, one is no PIL image or has more than 8 bits per channel, a tensor has the
                wrong shape or range, the numbers of generators and images differ, or `chunk_size` is not positive.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        means, stds = [], []
        pixels = self._to_pixels(images)
        _check_generators(generator, len(pixels))
        for chunk in pixels.split(chunk_size):
            posterior = self.vae.encode(chunk.to(self._execution_device, self.vae.dtype)).latent_dist
            means.append(posterior.mean.flatten(1).float())
            stds.append(posterior.std.flatten(1).float())
        latents = torch.cat(means)
        if sample_posterior:
            noise = randn_tensor(latents.shape, generator, self._execution_device, torch.float32)
            latents = latents + torch.cat(stds) * noise
        self.maybe_free_model_hooks()
        return latents.cpu()

    def reconstruct(
        self,
        images,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_posterior: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        chunk_size: int = 64,
    ) -> ImagePipelineOutput | tuple:
        """Encode images and decode them again; arguments as for `encode` and the call.

        Returns:
            The reconstructions, as `images` of the output.

        Raises:
            ValueError: as `encode` does.
        """
        latents = self.encode(images, generator, sample_posterior, chunk_size)
        return self._decode(latents, output_type, return_dict, chunk_size)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as diffusers does (same arguments), and add the source files of classes that diffusers does not have.

        The folder then loads with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where only torch
        and diffusers are installed, and a pipeline loaded this way can be saved again.
        """
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        _save_code(self, VAEPipeline, Path(save_directory))
        if push_to_hub:  # diffusers would upload before the code is in the folder
            repo_id = hub_arguments.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=kwargs.get("variant"), **hub_arguments)

    def to_pil(self, images: torch.Tensor) -> list:
        """Turn images `(batch_size, channels, height, width)` in [0, 1] into a list of PIL images."""
        return self.image_processor.postprocess(images * 2 - 1, output_type="pil")

    def _to_pixels(self, images) -> torch.Tensor:
        """Return images as `(batch_size, channels, sample_size, sample_size)` in [-1, 1]."""
        size, channels = self.vae.config.sample_size, self.vae.config.in_channels
        if isinstance(images, torch.Tensor):
            if images.ndim != 4 or tuple(images.shape[1:]) != (channels, size, size):
                wanted = ("batch_size", channels, size, size)
                raise ValueError(f"images must have shape {wanted}, not {tuple(images.shape)}")
            if len(images) == 0 or not bool(((images >= 0) & (images <= 1)).all()):
                raise ValueError("images must contain at least one image, with values in [0, 1]")
            return images.float() * 2 - 1
        images = images if isinstance(images, list) else [images]
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError("images must be a PIL image, a list of them, or a tensor")
        if not images or any(image.mode.startswith(("I", "F")) for image in images):
            raise ValueError("images must contain at least one image, with 8 bits per channel; convert others first")
        if channels not in (1, 3):
            raise ValueError(f"PIL images have 1 or 3 channels here, but this VAE has {channels}; give a tensor")
        images = [_square(image, size).convert("L" if channels == 1 else "RGB") for image in images]
        return self.image_processor.preprocess(images)[:, :channels]  # the three channels of a grey image are equal

    @torch.no_grad()
    def _decode(
        self, latents: torch.Tensor, output_type: str, return_dict: bool, chunk_size: int
    ) -> ImagePipelineOutput | tuple:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        latents = latents.to(self._execution_device, self.vae.dtype)
        images = [self.vae.decode(chunk).sample.float().cpu() for chunk in latents.split(chunk_size)]
        images = self.image_processor.postprocess(torch.cat(images), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _square(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an image as the training reads it, resized to `size` pixels."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))


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
