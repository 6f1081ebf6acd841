"""Generating images with a trained pipeline, for the command line."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download
from PIL import Image

from hfgen.data.decode import UnreadableImageError, decode_image
from hfgen.data.location import hub_id_of_address, is_hub_id
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.families import family, image_network
from hfgen.files import read_json
from hfgen.hardware import choose_mixed_precision
from hfgen.inference.interpolation import interpolate_latents
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.methods.schedules import SAMPLERS, is_edm, sampling_scheduler
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline
from hfgen.randomness import keyed_seed
from hfgen.training.checkpoints import PIPELINE_FOLDER, list_checkpoints


PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "DDPMPipeline": DDPMPipeline,
    "GANPipeline": GANPipeline,
    "VAEPipeline": VAEPipeline,
}


CHANNELS = (1, 3, 4)  # that an image can have


def open_pipeline(
    where: str, device: str = "auto", sampler: str | None = None, plain: bool = False
) -> DiffusionPipeline:
    """Load a pipeline of any family.

    Args:
        where: a run folder (its pipeline, or that of its newest checkpoint), a checkpoint, a pipeline folder, or a
            Hub repo id.
        device: "auto", "cpu", "cuda" or "mps".
        sampler: for diffusion: "ddim", "dpm", "unipc" or "ddpm"; the saved one if None.
        plain: leave the networks as saved, without the memory format and matrix products that make GANs and VAEs
            faster; for code that reads the network itself, such as an export.

    Raises:
        UserError: if there is no hfgen pipeline, or no such device or sampler.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler}: must be one of {', '.join(SAMPLERS)}")
    where = hub_id_of_address(where, "models", "DIR")
    path = Path(where).expanduser()
    if path.exists():
        source = str(find_pipeline(path))
        problem = f"{source} cannot be loaded"
    elif is_hub_id(where) and "/" in where:  # unlike some data sets, every pipeline on the Hub has an owner
        source, problem = where, f"{where}: no such folder, and no pipeline could be loaded from the Hub"
    else:
        raise UserError(f"{where}: no such folder")
    chosen_device = choose_device(device)
    try:
        # Moved inside the try block, because missing weights only show up here.
        pipeline = _pipeline_class(source).from_pretrained(source).to(chosen_device)
    except UserError:
        raise
    except Exception as error:  # from JSON, safetensors, disk or network: in any case there is no pipeline
        raise UserError(f"{problem}: {' '.join(str(error).split())}") from error
    if sampler is not None:
        try:
            pipeline.scheduler = sampling_scheduler(pipeline.scheduler, sampler)
        except ValueError as error:
            raise UserError(f"--sampler {sampler}: {error}") from error
    if family(pipeline) == "ddpm" and (missing := what_is_missing(pipeline)):
        raise UserError(f"{where}: hfgen cannot sample from this pipeline: {missing}")
    pipeline.set_progress_bar_config(desc="denoising", leave=False)
    if not plain and family(pipeline) != "ddpm":
        network = image_network(pipeline)
        network.to(memory_format=torch.channels_last)
        use_matrix_products(network)
    return pipeline


def what_is_missing(pipeline: DiffusionPipeline) -> str | None:
    """Return why a diffusion pipeline, perhaps of diffusers, cannot denoise pure noise; None if it can."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    config, name = unet.config, type(unet).__name__
    if needed := _needed_arguments(unet.forward) - {"sample", "timestep"}:
        return f"its {name} also needs {', '.join(sorted(needed))}"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        return f"its {name} needs a class for each image"
    if config.get("sample_size") is None or config.in_channels not in CHANNELS:
        return f"its {name} has sample_size={config.get('sample_size')} and in_channels={config.in_channels}"
    if config.get("out_channels", config.in_channels) != config.in_channels:
        return f"its {name} has {config.in_channels} channels in and {config.out_channels} out"
    name = type(scheduler).__name__
    lacks = [part for part in ("step", "set_timesteps", "scale_model_input", "init_noise_sigma")
             if not hasattr(scheduler, part)]  # fmt: skip
    lacks += [] if "num_train_timesteps" in scheduler.config else ["num_train_timesteps"]
    if lacks:
        return f"its {name} has no {lacks[0]}{_remedy(scheduler)}"
    if needed := _needed_arguments(scheduler.step) - {"model_output", "timestep", "sample"}:
        return f"its {name} also needs {', '.join(sorted(needed))}{_remedy(scheduler)}"
    return None


def _remedy(scheduler: SchedulerMixin) -> str:
    try:
        sampling_scheduler(scheduler, "ddim")
    except ValueError:
        return ", and no other sampler can replace it"
    return "; --sampler ddim replaces it"


def _needed_arguments(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}


def find_pipeline(path: Path) -> Path:
    """Find the pipeline in a run, checkpoint or pipeline folder.

    Raises:
        UserError: if there is none.
    """
    candidates = [path, path / PIPELINE_FOLDER]
    candidates += [checkpoint / PIPELINE_FOLDER for checkpoint in reversed(list_checkpoints(path / "checkpoints"))]
    for folder in candidates:
        if (folder / "model_index.json").is_file():
            return folder
    raise UserError(f"{path}: contains no pipeline: there is no model_index.json in it or in its checkpoints")


def _pipeline_class(source: str) -> type[DiffusionPipeline]:
    """Return the class named in the index of a folder or a Hub repo."""
    index_file = Path(source) / "model_index.json"
    if not index_file.is_file():
        index_file = Path(hf_hub_download(source, index_file.name))
    class_name = read_json(index_file).get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name not in PIPELINES:
        raise UserError(f"{source}: {class_name} is not a pipeline of hfgen ({', '.join(PIPELINES)})")
    return PIPELINES[class_name]


def choose_device(name: str) -> torch.device:
    """Return the device named by `--device`; "auto" takes the fastest available.

    Raises:
        UserError: if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name):
        raise UserError(f"--device {name}: not available on this machine; use auto or cpu")
    return torch.device(name)


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


def generate_images(
    pipeline: DiffusionPipeline, options: SamplingOptions, after_each_step: Callable[[], None] = lambda: None
) -> Iterator[Image.Image]:
    """Generate images one by one, computed batch by batch.

    Args:
        pipeline: of any family.
        options: how to generate.
        after_each_step: for diffusion: called after each denoising step; may raise to stop.

    Raises:
        UserError: if the pipeline does not support that many steps, truncation or the density.
    """
    kind = family(pipeline)
    if options.truncation is not None and kind != "gan":
        raise UserError(f"--truncation applies only to a GAN; this is a {type(pipeline).__name__}")
    _check_sample_from(pipeline, options.sample_from)
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
            with fast_precision(pipeline):
                images = pipeline(count, generator=generators, **of_family).images
        except ValueError as error:
            raise UserError(str(error)) from error
        yield from images


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


def interpolate(
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
    with fast_precision(pipeline):
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
    try:
        decoded = decode_image(str(path), path.read_bytes(), DataSettings(sample_size=size))
    except (OSError, UnreadableImageError) as error:
        raise UserError(f"{argument} {path}: {error}") from error
    return Image.fromarray(decoded.pixels[0])
