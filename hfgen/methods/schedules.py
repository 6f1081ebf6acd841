"""Noise schedules: for training, and the samplers derived from them.

This file imports only torch and diffusers: a copy of it is part of each Space.
"""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)


SAMPLERS = ("ddim", "dpm", "unipc", "ddpm")
DEFAULT_STEPS = 50  # denoising steps of a pipeline saved without a number
EDM_SAMPLERS = ("ddim", "dpm")  # for networks trained with EDM
# Settings of training that EDM does not have: it has noise levels and a target of its own.
NOT_OF_EDM = ("beta_schedule", "num_train_timesteps", "prediction_type", "snr_gamma")
# Keys of a scheduler's config that are fixed by training; the others belong to the sampler.
TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
EDM_TRAINED_KEYS = ("sigma_min", "sigma_max", "sigma_data", "rho", "sigma_schedule", "num_train_timesteps")


def noise_schedule(kind: str, num_train_timesteps: int, prediction_type: str = "epsilon") -> DDPMScheduler:
    """Build the training schedule.

    "linear": Ho et al. 2020, section 4: betas from 0.0001 to 0.02 over 1000 steps. For other numbers of steps they
    are scaled by `1000 / num_train_timesteps`, so that the last step is always nearly pure noise.
    "cosine": Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17, betas at most 0.999.

    Args:
        kind: "linear" or "cosine".
        num_train_timesteps: diffusion steps T, at least 2.
        prediction_type: "epsilon", "sample" or "v_prediction".

    Raises:
        ValueError: if `num_train_timesteps` is below 2.
    """
    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps={num_train_timesteps} must be at least 2")
    scale = 1000 / num_train_timesteps
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[kind],
        beta_start=min(1e-4 * scale, 0.999),
        beta_end=min(0.02 * scale, 0.999),
        prediction_type=prediction_type,
        clip_sample=True,
    )


def edm_schedule(sigma_data: float = 0.5) -> EDMEulerScheduler:
    """Build the noise levels of EDM (Karras et al. 2022, arXiv:2206.00364): from 80 to 0.002, with rho = 7.

    The network is trained at continuous noise levels. `num_train_timesteps` only gives the scale on which timesteps
    are reported, 0 to 999, and the maximum number of sampling steps.

    Args:
        sigma_data: standard deviation of the images' pixels in [-1, 1]; 0.5 in the paper.

    Raises:
        ValueError: if `sigma_data` is not positive.
    """
    if sigma_data <= 0:
        raise ValueError(f"sigma_data={sigma_data} must be positive")
    return EDMEulerScheduler(sigma_data=sigma_data)


def is_edm(scheduler: SchedulerMixin) -> bool:
    """Whether this scheduler's network was trained with EDM."""
    return set(EDM_TRAINED_KEYS) <= scheduler.config.keys()


def scaled_for_display(scheduler: SchedulerMixin, index: int, sample: torch.Tensor) -> torch.Tensor:
    """Scale an intermediate sample for display: EDM's noise is up to 80 times the range of the images.

    Args:
        scheduler: has done step `index`.
        index: number of the step, from 0.
        sample: `(batch_size, channels, height, width)`. With EDM it is `image + level * noise` and is divided by
            `sqrt(1 + level^2)`, so that pure noise is standard normal.
    """
    return sample / (1 + scheduler.sigmas[index + 1] ** 2) ** 0.5 if is_edm(scheduler) else sample


def drop_extra_timesteps(scheduler: SchedulerMixin) -> None:
    """Undo a rounding error: for some numbers of steps, such as 61 of 1000, "trailing" spacing adds a timestep -1.

    A solver would stop at its noise level before the clean image. pipelines/pipeline_ddpm.py has the same
    function: it is published on its own.
    """
    extra = int((scheduler.timesteps < 0).sum())
    if extra:
        scheduler.timesteps = scheduler.timesteps[:-extra]
        scheduler.num_inference_steps = len(scheduler.timesteps)
        if hasattr(scheduler, "sigmas"):  # one more than timesteps: the last is that of the clean image
            scheduler.sigmas = torch.cat([scheduler.sigmas[: -1 - extra], scheduler.sigmas[-1:]])


def default_num_inference_steps(pipeline: DiffusionPipeline) -> int:
    """Return the default number of denoising steps of a diffusion pipeline."""
    trained = pipeline.scheduler.config.num_train_timesteps
    return min(pipeline.config.get("num_inference_steps", DEFAULT_STEPS), trained)


def samplers_of(scheduler: SchedulerMixin) -> tuple[str, ...]:
    """Return the names that `sampling_scheduler` accepts with this scheduler."""
    return EDM_SAMPLERS if is_edm(scheduler) else SAMPLERS


def sampling_scheduler(training_schedule: SchedulerMixin, sampler: str) -> SchedulerMixin:
    """Build the scheduler that a pipeline is saved with; it keeps the betas, or EDM's noise levels, of training.

    "ddim": Song et al. 2020 (arXiv:2010.02502), deterministic. "dpm": DPM-Solver++ of order 2, Lu et al. 2022
    (arXiv:2211.01095). "unipc": Zhao et al. 2023 (arXiv:2302.04867). "ddpm": the ancestral sampler of DDPM.

    For a network trained with EDM: "ddim" is Euler's method, which is equivalent to DDIM there; "dpm" as above.

    Args:
        training_schedule: from `noise_schedule` or `edm_schedule`, or any sampler derived from it; the result is the
            same.
        sampler: "ddim", "dpm", "unipc" or "ddpm".

    Raises:
        ValueError: if EDM does not support the sampler, or the schedule is of another kind than DDPM's and EDM's.
    """
    if is_edm(training_schedule):
        if sampler not in EDM_SAMPLERS:
            raise ValueError(f"a network trained with EDM has only {' and '.join(EDM_SAMPLERS)}, not {sampler}")
        config = {key: training_schedule.config[key] for key in EDM_TRAINED_KEYS}
        return EDMEulerScheduler(**config) if sampler == "ddim" else EDMDPMSolverMultistepScheduler(**config)
    # Not all schedulers have all keys; a missing one has its usual value.
    config = {key: training_schedule.config[key] for key in TRAINED_KEYS if key in training_schedule.config}
    predicts = config.get("prediction_type", "epsilon")
    if not {"num_train_timesteps", "beta_schedule", "beta_start"} <= config.keys() or predicts not in PREDICTION_TYPES:
        name = type(training_schedule).__name__
        raise ValueError(f"the saved {name} is not a DDPM or EDM schedule, so no other sampler can use it")
    # Always start from the noisiest timestep, even with few steps, as in Lin et al. 2023 (arXiv:2305.08891).
    config["timestep_spacing"] = "trailing"
    if sampler == "ddim":
        return DDIMScheduler(**config)
    if sampler == "ddpm":
        return DDPMScheduler(**config)
    # Predicted images are kept in range, as clip_sample does for the other two. A cosine schedule ends in nearly pure
    # noise, where an error in the predicted noise becomes a 20,000 times larger error in the image. DPM-Solver++
    # therefore starts at a log-SNR of -5.1, as its authors do.
    config |= {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
    if sampler == "unipc":
        return UniPCMultistepScheduler(**config)
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    return DPMSolverMultistepScheduler(**config, lambda_min_clipped=-5.1 if cosine else -float("inf"))
