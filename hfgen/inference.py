"""Drawing with a trained pipeline, for the command line."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image

from hfgen.checkpoints import PIPELINE_FOLDER, list_checkpoints
from hfgen.data.decode import UnreadableImageError, decode_image
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.figures import interpolate_latents
from hfgen.hardware import choose_mixed_precision
from hfgen.matrix_convolution import use_matrix_products
from hfgen.pipelines import DDPMPipeline, GANPipeline
from hfgen.randomness import keyed_seed
from hfgen.schedules import SAMPLERS, sampling_scheduler


PIPELINES: dict[str, type[DiffusionPipeline]] = {"DDPMPipeline": DDPMPipeline, "GANPipeline": GANPipeline}


def open_pipeline(where: str, device: str = "auto", sampler: str | None = None) -> DiffusionPipeline:
    """Load a pipeline of any family.

    Args:
        where: a run's folder (its pipeline, or that of its newest checkpoint), a checkpoint, a pipeline's folder, or
            a Hub repo id.
        device: "auto", "cpu", "cuda" or "mps".
        sampler: of a diffusion pipeline: "ddim", "dpm", "unipc" or "ddpm"; as saved if None.

    Raises:
        UserError: if there is no pipeline of hfgen, or no such device or sampler.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler}: must be one of {', '.join(SAMPLERS)}")
    path = Path(where).expanduser()
    if path.exists():
        source = str(_pipeline_folder(path))
        problem = f"{source} cannot be loaded"
    elif where.count("/") == 1 and not where.startswith((".", "/", "~")):
        source, problem = where, f"{where}: no such folder, and no pipeline could be had from the Hub"
    else:
        raise UserError(f"{where}: no such folder")
    try:
        pipeline = _pipeline_class(source).from_pretrained(source)
    except UserError:
        raise
    except Exception as error:  # of JSON, safetensors, the disk or the network: whatever it is, there is no pipeline
        raise UserError(f"{problem}: {' '.join(str(error).split())}") from error
    if sampler is not None:
        pipeline.scheduler = sampling_scheduler(pipeline.scheduler, sampler)
    pipeline.set_progress_bar_config(desc="denoising", leave=False)
    if isinstance(pipeline, GANPipeline):
        pipeline.generator.to(memory_format=torch.channels_last)
        use_matrix_products(pipeline.generator)
    return pipeline.to(_device(device))


def _pipeline_folder(path: Path) -> Path:
    """Find the pipeline in a run, a checkpoint or a pipeline's own folder."""
    candidates = [path, path / PIPELINE_FOLDER]
    candidates += [checkpoint / PIPELINE_FOLDER for checkpoint in reversed(list_checkpoints(path / "checkpoints"))]
    for folder in candidates:
        if (folder / "model_index.json").is_file():
            return folder
    raise UserError(f"{path}: no pipeline in this folder: there is no model_index.json in it or in its checkpoints")


def _pipeline_class(source: str) -> type[DiffusionPipeline]:
    """Tell the class by the index of a folder or of a repo of the Hub."""
    index_file = Path(source) / "model_index.json"
    if not index_file.is_file():
        index_file = Path(hf_hub_download(source, index_file.name))
    class_name = json.loads(index_file.read_text()).get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name not in PIPELINES:
        raise UserError(f"{source}: a {class_name} is none of hfgen's pipelines ({', '.join(PIPELINES)})")
    return PIPELINES[class_name]


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name not in ("cpu", "cuda", "mps") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name}: not on this machine; use auto or cpu")
    return torch.device(name)


def image_generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """Return one generator for each image, so that an image depends on its seed and index, not on its batch."""
    return [torch.Generator().manual_seed(keyed_seed(seed, index)) for index in range(start, start + count)]


def draw_images(
    pipeline: DiffusionPipeline,
    num_images: int,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    truncation: float | None = None,
) -> Iterator[Image.Image]:
    """Draw images batch by batch.

    Args:
        pipeline: of any family.
        num_images: how many.
        seed: an image is a function of the seed and its index.
        num_inference_steps: of a diffusion pipeline.
        batch_size: images drawn at once.
        truncation: of a GAN's latents.

    Raises:
        UserError: if the pipeline does not take so many steps, or has no latents to truncate.
    """
    is_gan = isinstance(pipeline, GANPipeline)
    if truncation is not None and not is_gan:
        raise UserError("--truncation is for the latents of a GAN; a diffusion pipeline has none")
    options = {"truncation": truncation} if is_gan else {"num_inference_steps": num_inference_steps}
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        generators = image_generators(seed, start, count)
        try:
            with fast_precision(pipeline):
                images = pipeline(count, generator=generators, **options).images
        except ValueError as error:
            raise UserError(str(error)) from error
        yield from images


def fast_precision(pipeline: DiffusionPipeline) -> AbstractContextManager:
    """Let a GAN draw in bf16 where the hardware multiplies it natively; other pipelines draw as they were saved."""
    device = pipeline.device.type
    fast = isinstance(pipeline, GANPipeline) and choose_mixed_precision("auto", cpu=device != "cuda") == "bf16"
    return torch.autocast(device, torch.bfloat16) if fast else nullcontext()


def interpolate(
    pipeline: DiffusionPipeline, seeds: Sequence[int], parts: Sequence[float], spherical: bool
) -> list[Image.Image]:
    """Draw the images on the way from seed to seed: for each two neighbours one image for each part of the way.

    Args:
        pipeline: of a GAN.
        seeds: at least two; seed s draws what `hfgen sample --seed s` draws first.
        parts: of the way, from 0 to 1.
        spherical: see `interpolate_latents`.

    Raises:
        UserError: if the pipeline has no latents to walk between.
    """
    if not isinstance(pipeline, GANPipeline):
        raise UserError("interpolation needs the latents of a GAN; this pipeline starts from noise")
    latent_dim = pipeline.generator.config.latent_dim
    ends = [torch.randn(1, latent_dim, generator=image_generators(seed, 0, 1)[0])[0] for seed in seeds]
    fractions = torch.tensor(parts)
    ways = [interpolate_latents(*two, fractions, spherical) for two in zip(ends[:-1], ends[1:], strict=True)]
    with fast_precision(pipeline):
        (images,) = pipeline(latents=torch.cat(ways), return_dict=False)
    return images


def open_image(path: Path, size: int) -> Image.Image:
    """Read an image as the training does: RGB, short side resized, centre cropped.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        decoded = decode_image(str(path), path.read_bytes(), DataSettings(sample_size=size))
    except (OSError, UnreadableImageError) as error:
        raise UserError(f"--image {path}: {error}") from error
    return Image.fromarray(decoded.pixels[0])
