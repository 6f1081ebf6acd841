"""Opening a trained pipeline, from a run, a folder or the Hub."""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from hfgen.data.location import hub_id_of_address, is_hub_id
from hfgen.errors import UserError
from hfgen.families import family, image_network
from hfgen.files import read_json, require_utf8
from hfgen.integrity import DIGESTS_FILE, find_damage
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.methods.schedules import SAMPLERS, default_num_inference_steps, sampling_scheduler
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline
from hfgen.pipelines.pipeline_ddpm import mismatch
from hfgen.pipelines.self_contained import pipeline_of_run
from hfgen.run_files import DISCRIMINATOR_FILE, SETTINGS_FILE, TRAINING_FILE
from hfgen.texts import one_line


PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "DDPMPipeline": DDPMPipeline,
    "GANPipeline": GANPipeline,
    "VAEPipeline": VAEPipeline,
}


# What is downloaded of a repo: no code, as hfgen has it, and no pickled weights.
FILES_OF_A_PIPELINE = [
    *("model_index.json", SETTINGS_FILE, TRAINING_FILE),
    *("*/config.json", "*/scheduler_config.json"),
    *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-*-of-*.safetensors"),
    "*/diffusion_pytorch_model.safetensors.index.json",
]
# And of a repo that has only a variant, such as "fp16".
FILES_OF_VARIANTS = ["*/diffusion_pytorch_model.*.safetensors", "*/diffusion_pytorch_model.safetensors.index.*.json"]
CHANNELS = (1, 3, 4)  # that an image can have
# More in a configuration is a damaged file, or one that is made to use up the memory: channels, pixels, dimensions;
# blocks; and layers of a block.
MAX_SIZE, MAX_BLOCKS, MAX_LAYERS = 65536, 64, 64
MAX_CONFIG_BYTES = 1 << 20
MAX_NAMED = 8  # folders in a message


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
        require_utf8(path, "DIR")
        source = str(find_pipeline(path))
        problem = f"{source} cannot be loaded"
    elif is_hub_id(where) and "/" in where:  # unlike some datasets, every pipeline on the Hub has an owner
        source = where
        problem = f"{where}: no such folder{runs_beside(path)}, and no pipeline could be loaded from the Hub"
    else:
        raise UserError(f"{where}: no such folder{runs_beside(path)}")
    chosen_device = choose_device(device)
    try:
        folder = Path(source) if path.exists() else _download(source)
        _check_files(folder)
        with _without_a_bar():
            pipeline = _pipeline_class(folder).from_pretrained(folder)
        _check_that_weights_are_complete(pipeline, folder)
        pipeline.to(chosen_device)
    except UserError:
        raise
    except Exception as error:  # from JSON, safetensors, disk or network: in any case there is no pipeline
        raise UserError(f"{problem}: {one_line(error)}") from error
    if sampler is not None:
        if family(pipeline) != "ddpm":
            raise UserError(f"--sampler applies only to diffusion; {where} is a {type(pipeline).__name__}")
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


@contextlib.contextmanager
def _without_a_bar() -> Iterator[None]:
    """Hide diffusers' bar of the components, which are read within a second."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def what_is_missing(pipeline: DiffusionPipeline) -> str | None:
    """Return why a diffusion pipeline, perhaps of diffusers, cannot denoise pure noise; None if it can."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    config, name = unet.config, type(unet).__name__
    if needed := _needed_arguments(unet.forward) - {"sample", "timestep"}:
        return f"its {name} also needs {', '.join(sorted(needed))}"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        return f"its {name} needs a class for each image"
    if not _is_size(config.get("sample_size")) or config.in_channels not in CHANNELS:
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
    return mismatch(unet, scheduler) or _why_it_cannot_step(pipeline)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(isinstance(side, int) and 0 < side <= MAX_SIZE for side in sides)


def _why_it_cannot_step(pipeline: DiffusionPipeline) -> str | None:
    """Return why the scheduler fails, with its settings, at the first step on an image of one pixel."""
    scheduler, pixel = copy.deepcopy(pipeline.scheduler), torch.zeros(1, 1, 1, 1)
    try:
        scheduler.set_timesteps(default_num_inference_steps(pipeline))
        first = scheduler.timesteps[0]
        with torch.random.fork_rng(devices=[]):  # the step may draw noise
            scheduler.step(scheduler.scale_model_input(pixel, first), first, pixel)
    except Exception as error:  # whatever its settings lead to
        return f"its {type(scheduler).__name__} fails with its settings: {one_line(error)}"
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


def runs_beside(path: Path) -> str:
    """Name the folders with a pipeline that stand where a missing one was looked for; empty if there are none."""
    try:
        found = [beside for beside in sorted(path.parent.iterdir()) if beside.is_dir() and _has_pipeline(beside)]
    except OSError:
        return ""
    listed = ", ".join(str(one) for one in found[:MAX_NAMED]) + (", ..." if len(found) > MAX_NAMED else "")
    return f" (there are: {listed})" if found else ""


def _has_pipeline(path: Path) -> bool:
    try:
        find_pipeline(path)
    except (UserError, OSError):
        return False
    return True


def find_pipeline(path: Path) -> Path:
    """Find the pipeline in a run (its newest one), checkpoint or pipeline folder.

    Raises:
        UserError: if there is none.
    """
    for folder in (path, pipeline_of_run(path)):
        if folder is not None and (folder / "model_index.json").is_file():
            return folder
    raise UserError(f"{path}: contains no pipeline: there is no model_index.json in it or in its checkpoints")


def _pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """Return the class named in the index of a pipeline."""
    class_name = read_json(folder / "model_index.json").get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name not in PIPELINES:
        raise UserError(f"{folder}: {class_name} is not a pipeline of hfgen ({', '.join(PIPELINES)})")
    return PIPELINES[class_name]


def _download(repo_id: str) -> Path:
    """Download the files of a pipeline; return their folder."""
    folder = Path(snapshot_download(repo_id, allow_patterns=FILES_OF_A_PIPELINE))
    if not any(folder.glob("*/*.safetensors")):
        folder = Path(snapshot_download(repo_id, allow_patterns=[*FILES_OF_A_PIPELINE, *FILES_OF_VARIANTS]))
    return folder


def settings_beside(where: str) -> dict[str, Any] | None:
    """Return the settings that a pipeline was trained with, from its run, its folder or its Hub repo.

    Args:
        where: as in `open_pipeline`; from the Hub, their file is downloaded.

    Returns:
        None if they are not there, or cannot be downloaded.

    Raises:
        UserError: if the file is damaged.
    """
    where = hub_id_of_address(where, "models", "DIR")
    path, file = Path(where).expanduser(), None
    if path.exists():
        folders = (path, *path.resolve().parents[:3])  # RUN/checkpoints/STEP/pipeline
        file = next((folder / SETTINGS_FILE for folder in folders if (folder / SETTINGS_FILE).is_file()), None)
    elif is_hub_id(where):
        with contextlib.suppress(UserError):  # said when the weights are downloaded
            file = _downloaded(where, SETTINGS_FILE)
    return None if file is None else read_json(file)


def load_discriminator(where: str) -> dict[str, torch.Tensor] | None:
    """Return the weights of the discriminator that was published with a pipeline, 32-bit floats by name.

    Args:
        where: as in `open_pipeline`; from the Hub, its file is downloaded.

    Returns:
        None if the pipeline was published without one.

    Raises:
        UserError: if there is no pipeline, the download fails, or the file is damaged.
    """
    where = hub_id_of_address(where, "models", "DIR")
    path = Path(where).expanduser()
    file = find_pipeline(path) / DISCRIMINATOR_FILE if path.exists() else _downloaded(where, DISCRIMINATOR_FILE)
    if file is None or not file.is_file():
        return None
    try:
        weights = load_file(file)
    except Exception as error:  # of safetensors or the disk
        raise UserError(f"{file} cannot be read: {one_line(error)}; download or publish it again") from error
    return {name: one.float() if one.is_floating_point() else one for name, one in weights.items()}


def _downloaded(repo_id: str, name: str) -> Path | None:
    """Download a file of a repo; return None if the repo has none of this name."""
    try:
        return Path(hf_hub_download(repo_id, name))
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it says nothing of the repo
        raise UserError(f"{repo_id}: {name} could not be downloaded: {one_line(error)}") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # from the network or the disk
        raise UserError(f"{repo_id}: {name} could not be downloaded: {one_line(error)}") from error


def _check_files(folder: Path) -> None:
    """Raise a `UserError` if a file is damaged, or a configuration asks for more than any network of images has."""
    if (folder / DIGESTS_FILE).is_file() and (damage := find_damage(folder, trust_times=True)):
        remedy = f"take another checkpoint, or, if you changed it yourself, delete {folder / DIGESTS_FILE}"
        raise UserError(f"{folder} is damaged: {damage}; {remedy}")
    for file in sorted(folder.glob("*/config.json")):
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file}: must be a file of at most {MAX_CONFIG_BYTES:,} bytes")
        for name, value in _numbers(read_json(file)):
            limit = MAX_LAYERS if "layers" in name else MAX_SIZE
            if isinstance(value, list) and len(value) > MAX_BLOCKS:
                raise UserError(f"{file}: {name} has {len(value):,} entries, more than {MAX_BLOCKS}")
            if isinstance(value, int) and value > limit:
                raise UserError(f"{file}: {name} is {value:,}, more than {limit:,}")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration, and the entries of those that are lists."""
    for name, value in config.items():
        yield name, value
        for entry in value[:MAX_BLOCKS] if isinstance(value, list) else []:
            yield name, entry


def _check_that_weights_are_complete(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Raise a `UserError` if a network has weights that its files lack: diffusers leaves them random, with a warning.

    Numbers are counted instead of compared by name, because diffusers renames those of older networks.
    """
    for name, part in pipeline.components.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not isinstance(part, torch.nn.Module) or not files:
            continue
        stored = sum(_count_numbers(file) for file in files)
        needed = sum(tensor.numel() for tensor in part.state_dict().values())
        if stored < needed:
            raise UserError(
                f"{files[0]}: has {stored:,} numbers, and the {type(part).__name__} of config.json {needed:,}; "
                "one of the two files is damaged or of another network"
            )


def _count_numbers(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


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
