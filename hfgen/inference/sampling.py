"""Generating images with a trained pipeline, in batches and by seed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.data.decode import UnreadableImageError, decode_image
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.settings import DataSettings
from hfgen.errors import NotFiniteError, UserError
from hfgen.families import family, image_network
from hfgen.files import read_regular
from hfgen.hardware import choose_mixed_precision
from hfgen.inference.interpolation import interpolate_latents
from hfgen.methods.schedules import is_edm
from hfgen.randomness import keyed_seed


def image_size(pipeline: DiffusionPipeline) -> int:
    """Return the height and width, in pixels, of the images that a pipeline generates.

    Raises:
        UserError: if they differ.
    """
    size = image_network(pipeline).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(
            f"this pipeline generates images of {width}x{height} pixels, and only squares can be compared with other "
            "images; hfgen sample generates them"
        )
    return height


def weights_digest(pipeline: DiffusionPipeline) -> str:
    """Return the SHA-256 of the names and values of all weights; it identifies the pipeline that scores belong to."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        state = part.state_dict() if isinstance(part, torch.nn.Module) else {}
        for key, tensor in sorted(state.items()):
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_digest(pipeline: DiffusionPipeline) -> str:
    """Return the SHA-256 of the parameters of the network that makes the images, and of the kind of a VAE's density.

    Unlike `weights_digest`, it is that of a pipeline made again, on a GPU, of the same parameters: BatchNorm's
    statistics and densities are computed anew then, and may differ in the last bits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(image_network(pipeline).named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    if (density := getattr(pipeline, "density", None)) is not None:
        digest.update(f"{type(density).__name__} {density.config.get('num_components')}".encode())
    return digest.hexdigest()


def image_generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """Return one generator per image, so that an image depends on its seed and index, not on its batch."""
    return [torch.Generator().manual_seed(keyed_seed(seed, index)) for index in range(start, start + count)]


@dataclass(frozen=True)
class SamplingOptions:
    """How to generate images with a pipeline of any family.

    Attributes:
        num_images: number of images.
        seed: an image is a function of the seed and its index.
        num_inference_steps: for diffusion: denoising steps; the pipeline's default if None.
        batch_size: images generated at once.
        truncation: for a GAN: the latents are truncated at this value; not truncated if None.
        sample_from: for a VAE: "prior" or "ex_post"; if None, the ex-post density if it has one.
    """

    num_images: int
    seed: int = 0
    num_inference_steps: int | None = None
    batch_size: int = 32
    truncation: float | None = None
    sample_from: str | None = None


def way_of_sampling(pipeline: DiffusionPipeline, sample_from: str | None = None) -> dict[str, str | None]:
    """Return what scores depend on besides the weights and the number of steps, as plain values.

    Args:
        pipeline: of any family.
        sample_from: see `SamplingOptions`.

    Returns:
        `sampler`: the scheduler's class, for diffusion; `sample_from`: where the latents come from, for a VAE.
    """
    kind = family(pipeline)
    source = sample_from or ("prior" if kind != "vae" or pipeline.density is None else "ex_post")
    return {
        "sampler": type(pipeline.scheduler).__name__ if kind == "ddpm" else None,
        "sample_from": source if kind == "vae" else None,
    }


def generate_images(
    pipeline: DiffusionPipeline, options: SamplingOptions, after_each_step: Callable[[], None] = lambda: None
) -> Iterator[Image.Image]:
    """Generate images one by one, computed batch by batch.

    Args:
        pipeline: of any family.
        options: how to generate.
        after_each_step: for diffusion: called after each denoising step; may raise to stop.

    Raises:
        UserError: as `check_sampling` does, or if an image is not finite.
    """
    kind = family(pipeline)
    check_sampling(pipeline, options)
    if kind == "gan":
        of_family: dict[str, Any] = {"truncation": options.truncation}
    elif kind == "vae":
        of_family = {"sample_from": options.sample_from}
    else:
        of_family = {"num_inference_steps": options.num_inference_steps}
        of_family["callback_on_step_end"] = lambda *_: after_each_step()
    for start in range(0, options.num_images, options.batch_size):
        count = min(options.batch_size, options.num_images - start)
        generators = image_generators(options.seed, start, count)
        try:
            with fast_precision(pipeline), finite_images():
                images = pipeline(count, generator=generators, **of_family).images
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        yield from images


@contextmanager
def finite_images() -> Iterator[None]:
    """Let the conversion of generated images raise a `NotFiniteError` if a pixel is NaN, and not show it black."""
    try:
        with np.errstate(invalid="raise"):
            yield
    except FloatingPointError as error:
        raise NotFiniteError(
            "the generated images are not finite: the training has diverged; use an earlier checkpoint, or train "
            "again with a lower --learning_rate"
        ) from error


def check_sampling(pipeline: DiffusionPipeline, options: SamplingOptions) -> None:
    """Raise a `UserError` if a pipeline cannot generate in this way: its family, steps or density do not allow it."""
    kind, steps = family(pipeline), options.num_inference_steps
    if options.truncation is not None and kind != "gan":
        raise UserError(f"--truncation applies only to a GAN; this is a {type(pipeline).__name__}")
    if steps is not None and kind != "ddpm":
        raise UserError(f"--num_inference_steps applies only to diffusion; this is a {type(pipeline).__name__}")
    if steps is not None and not 1 <= steps <= (most := pipeline.scheduler.config.num_train_timesteps):
        raise UserError(f"--num_inference_steps {steps}: must be from 1 to {most}, the pipeline's training timesteps")
    _check_sample_from(pipeline, options.sample_from)


def _check_sample_from(pipeline: DiffusionPipeline, sample_from: str | None) -> None:
    """Raise a `UserError` if the pipeline cannot sample latents from there."""
    if sample_from is None:
        return
    if family(pipeline) != "vae":
        raise UserError(f"--sample_from applies only to a VAE; this is a {type(pipeline).__name__}")
    if sample_from not in ("prior", "ex_post"):
        raise UserError(f"--sample_from {sample_from}: must be prior or ex_post")
    if sample_from == "ex_post" and pipeline.density is None:
        raise UserError(
            "--sample_from ex_post: this pipeline has no ex-post density (fitted at the end of a run); use prior"
        )


def fast_precision(pipeline: DiffusionPipeline) -> AbstractContextManager:
    """Return an autocast to bf16 where the hardware supports it natively.

    A DDPM keeps its precision, because rounding errors add up over its steps. Not so for EDM, where the network's
    output counts less the cleaner the images are: 18 steps differ by 0.1 grey levels on average.
    """
    device = pipeline.device.type
    robust = family(pipeline) != "ddpm" or is_edm(pipeline.scheduler)
    fast = robust and choose_mixed_precision("auto", cpu=device != "cuda") == "bf16"
    return torch.autocast(device, torch.bfloat16) if fast else nullcontext()


def interpolated_images(
    pipeline: DiffusionPipeline, ends: torch.Tensor, parts: Sequence[float], spherical: bool
) -> list[Image.Image]:
    """Generate images between consecutive latents: for each pair one image per fraction of the way.

    Args:
        pipeline: of a GAN or a VAE.
        ends: at least two latents, `(count, latent_dim)`, from `latents_of_seeds` or `latents_of_images`.
        parts: fractions of the way, from 0 to 1.
        spherical: see `interpolate_latents`.
    """
    fractions = torch.tensor(parts)
    ways = [interpolate_latents(*two, fractions, spherical) for two in zip(ends[:-1], ends[1:], strict=True)]
    return decode_latents(pipeline, torch.cat(ways))


def decode_latents(pipeline: DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Generate the images of latents, `(count, latent_dim)`, with a GAN or VAE pipeline."""
    with fast_precision(pipeline), finite_images():
        return pipeline(latents=latents).images


def latents_of_seeds(pipeline: DiffusionPipeline, seeds: Sequence[int], sample_from: str | None) -> torch.Tensor:
    """Return the latents, `(count, latent_dim)`, of the first image of `hfgen sample --seed s`, for each seed s.

    Raises:
        UserError: if the pipeline has no latents, or no such density.
    """
    generators = [image_generators(seed, 0, 1)[0] for seed in seeds]
    kind = family(pipeline)
    if kind == "ddpm":
        raise UserError("interpolation needs the latents of a GAN or a VAE; this pipeline starts from noise")
    _check_sample_from(pipeline, sample_from)
    if kind == "vae":
        return pipeline.draw_latents(len(seeds), generators, sample_from).cpu()
    return torch.stack([torch.randn(pipeline.generator.config.latent_dim, generator=own) for own in generators])


def latents_of_images(
    pipeline: DiffusionPipeline, paths: Sequence[Path], argument: str
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Encode image files; return latents, `(count, latent_dim)`, and the images as the encoder sees them.

    Args:
        pipeline: of a VAE.
        paths: image files.
        argument: command-line argument that named them, for messages.

    Raises:
        UserError: if the pipeline has no encoder, or an image cannot be read.
    """
    if family(pipeline) != "vae":
        raise UserError(f"only a VAE can encode images; this is a {type(pipeline).__name__}")
    images = [open_image(path, pipeline.vae.config.sample_size, argument) for path in paths]
    with fast_precision(pipeline):
        return pipeline.encode(images), images


def open_image(path: Path, size: int, argument: str = "--image") -> Image.Image:
    """Read an image as in training: RGB, short side resized, centre-cropped.

    Raises:
        UserError: if it cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{argument} {path}: is a folder; give image files")
    try:
        decoded = decode_image(str(path), read_regular(path, MAX_ENCODED_BYTES), DataSettings(sample_size=size))
    except (OSError, UnreadableImageError) as error:
        raise UserError(f"{argument} {path}: {error}") from error
    return Image.fromarray(decoded.pixels[0])
