"""Denoising diffusion (Ho et al. 2020, arXiv:2006.11239): from noise to images with any diffusers scheduler.

This file imports only torch and diffusers: a copy of it is published with each checkpoint.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

LIBRARIES = ("diffusers", "transformers")  # their classes need no code next to the weights
HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")
OF_TIMESTEPS = ("UNetBase", "UNetAttention")  # hfgen's networks that do not scale them
OF_OTHER_NETWORKS = (
    *("CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CosineDPMSolverMultistepScheduler"),
    *("DDPMWuerstchenScheduler", "IPNDMScheduler"),
)
EDM_SCHEDULERS = (EDMDPMSolverMultistepScheduler, EDMEulerScheduler)


class DDPMPipeline(DiffusionPipeline):
    """Generates images by denoising Gaussian noise.

    Args:
        unet: predicts the noise, the clean images or the velocity, according to the scheduler's prediction type. Its
            config has `sample_size`, one number or height and width, and `in_channels`.
        scheduler: any diffusers scheduler: the DDPMScheduler used in training samples ancestrally; DDIM, DPM-Solver++
            or UniPC (`SchedulerClass.from_config(pipeline.scheduler.config)`) need only a few dozen steps. A network
            trained with EDM takes only diffusers' EDM schedulers.
        num_inference_steps: default number of denoising steps, saved with the weights, unless diffusers' own pipeline
            can load them: it has no such setting. `hfgen steps` measures when more steps stop improving the images.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, num_inference_steps: int = 50):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(num_inference_steps=num_inference_steps)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)  # [-1, 1] -> PIL, numpy or torch

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images.
            generator: the random number generator, or one per image, which makes each image independent of its batch.
            num_inference_steps: denoising steps, up to the number of training timesteps; None: the saved default.
            output_type: "pil", "np" (float `(batch_size, height, width, channels)` in [0, 1]), or "pt" (float
                `(batch_size, channels, height, width)` in [0, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a plain tuple.
            latents: the initial noise, standard normal, `(batch_size, channels, height, width)`; sampled if None.
            callback_on_step_end: called after each step, as in diffusers: `callback(pipeline, index, timestep,
                tensors)`, where `tensors["latents"]` are the images so far, and sampling continues with the "latents"
                that it returns, if any. The timestep is from 0 to `num_train_timesteps - 1`, even with noise levels.

        Returns:
            The generated images, as `images` of the output.

        Raises:
            ValueError: if `batch_size` is not positive, `latents` have the wrong shape, the numbers of generators and
                images differ, `num_inference_steps` is not from 1 to the number of training timesteps or does not suit
                the scheduler, or the scheduler does not suit the network.
        """
        config, size = self.unet.config, self.unet.config.sample_size
        shape = (batch_size, config.in_channels, *((size, size) if isinstance(size, int) else size))
        _check_generators(generator, batch_size)
        timesteps, counted = self._set_timesteps(num_inference_steps)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)  # rounding errors of many steps would add up
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")

        # 1. noise, at the level of the scheduler's first timestep
        sample = latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        random_numbers = {"generator": generator} if takes_generator else {}

        # 2. denoise
        for index, timestep in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(sample, timestep).to(self.unet.dtype)
            model_output = self.unet(model_input, timestep).sample.to(dtype)  # lower under autocast, too
            sample = self.scheduler.step(model_output, timestep, sample, **random_numbers).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, index, counted[index], {"latents": sample})
                sample = (changed or {}).get("latents", sample).to(dtype)

        # 3. [-1, 1] -> images
        images = self.image_processor.postprocess(sample.clamp(-1, 1), output_type=output_type)
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
        _save_code(self, DDPMPipeline, Path(save_directory))
        if push_to_hub:  # diffusers would upload before the code is in the folder
            repo_id = hub_arguments.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=kwargs.get("variant"), **hub_arguments)

    def _set_timesteps(self, num_inference_steps: int | None) -> tuple[torch.Tensor, list[int]]:
        """Return the scheduler's timesteps, and the integers passed to the callback for them."""
        if (problem := mismatch(self.unet, self.scheduler)) is not None:
            raise ValueError(problem)
        num_inference_steps = self._check_steps(num_inference_steps)
        try:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        except ValueError as error:  # PNDM, for example, needs at least 4
            name = type(self.scheduler).__name__
            raise ValueError(
                f"num_inference_steps={num_inference_steps} does not work with its {name} ({error}); try more steps"
            ) from error
        if "sigma_data" in self.scheduler.config:  # EDM's timesteps are a quarter of the log noise level
            timesteps = self.scheduler.timesteps
            last, steps = self.scheduler.config.num_train_timesteps - 1, max(len(timesteps) - 1, 1)
            return timesteps, [round(last * (1 - index / steps)) for index in range(len(timesteps))]
        _drop_extra_timesteps(self.scheduler)
        return self.scheduler.timesteps, self.scheduler.timesteps.int().tolist()

    def _check_steps(self, num_inference_steps: int | None) -> int:
        trained_steps = self.scheduler.config.num_train_timesteps
        if num_inference_steps is None:
            num_inference_steps = min(self.config.num_inference_steps, trained_steps)
        if not 1 <= num_inference_steps <= trained_steps:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be from 1 to {trained_steps}")
        if isinstance(self.scheduler, DDIMScheduler) and trained_steps % num_inference_steps:
            logger.warning(
                f"num_inference_steps={num_inference_steps} does not divide {trained_steps}, so diffusers' DDIM, in "
                f"steps of {trained_steps // num_inference_steps} timesteps, leaves noise behind; choose a divisor"
            )
        return num_inference_steps


def _drop_extra_timesteps(scheduler: SchedulerMixin) -> None:
    """Undo a rounding error: for some numbers of steps, such as 61 of 1000, "trailing" spacing adds a timestep -1.

    A solver would stop at its noise level before the clean image. methods/schedules.py has the same function for the
    demo: a pipeline's file is published on its own.
    """
    extra = int((scheduler.timesteps < 0).sum())
    if extra:
        scheduler.timesteps = scheduler.timesteps[:-extra]
        scheduler.num_inference_steps = len(scheduler.timesteps)
        if hasattr(scheduler, "sigmas"):  # one more than timesteps: the last is that of the clean image
            scheduler.sigmas = torch.cat([scheduler.sigmas[: -1 - extra], scheduler.sigmas[-1:]])


def mismatch(unet: Any, scheduler: SchedulerMixin) -> str | None:
    """Return why a scheduler does not suit the network, or None.

    A network trained with EDM takes noise levels, others take timesteps: with the wrong one, images are pure noise.
    """
    name, has_levels = type(scheduler).__name__, isinstance(scheduler, EDM_SCHEDULERS)
    step = inspect.signature(getattr(scheduler, "step", lambda: None))
    given = list(step.parameters.values())[3:]  # beside output, timestep and sample
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs_more = any(one.default is one.empty and one.kind not in optional for one in given)
    lacks = not (hasattr(scheduler, "step") and hasattr(scheduler, "init_noise_sigma"))
    # Inverse ones go from images to noise; the others are for consistency models, and for times from 0 to 1.
    if needs_more or lacks or "Inverse" in name or name in OF_OTHER_NETWORKS:
        return f"{name} is not for diffusion models like this; use DDIMScheduler, for example"
    # How hfgen's networks scale what they are given, if they can; of others, betas beside noise levels tell what they
    # came from.
    kind = type(getattr(unet, "_orig_mod", unet))  # of a compiled network, that of the one inside
    scale = unet.config.get("time_scale", 1 if kind.__name__ in OF_TIMESTEPS else None)
    takes_levels = "beta_start" not in scheduler.config if scale is None else scale != 1
    if has_levels and not takes_levels:
        return f"its network was trained on timesteps, for which {name} is unsuitable; use DDIMScheduler, for example"
    if scale is not None and takes_levels and not has_levels:
        suitable = " or ".join(kind.__name__ for kind in EDM_SCHEDULERS)
        return f"its network was trained with EDM, for which {name} is unsuitable; use {suitable}"
    return None


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
