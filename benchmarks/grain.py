#!/usr/bin/env python
"""Where the grain of a diffusion model's samples comes from: FID and fine noise of one checkpoint, altered in turn.

    python benchmarks/grain.py RUN --dataset path/to/images [--checkpoint step-00001564] [--num_images 250]

Each row alters one thing in drawing: the number of steps, the weights (averaged or as the last step left them),
BatchNorm's statistics, the last timestep, the order of the solver, or the size of the predicted noise. A second table
has the error of the predicted images by noise level. All rows start from the same noise.
"""

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from hfgen.data.settings import DataSettings
from hfgen.evaluation.reference import open_reference
from hfgen.hardware import choose_mixed_precision
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images, image_size
from hfgen.losses.edm import edm_batch, edm_denoised
from hfgen.methods.ema import recomputed_statistics
from hfgen.methods.schedules import is_edm
from hfgen.metrics.frechet import frechet_distance
from hfgen.training.checkpoints import list_checkpoints, load_state


LEVELS = (0.02, 0.04, 0.07, 0.17, 0.4, 1.0, 3.0)
STATISTICS_BATCHES, ERROR_IMAGES = 16, 128


class ScaledNoise(nn.Module):
    """A U-Net that predicts velocities, whose noise is multiplied by a factor (Ning et al. 2024, arXiv:2308.15321)."""

    def __init__(self, unet: Any, alphas_cumprod: torch.Tensor, factor: float):
        super().__init__()
        self.unet, self.alphas_cumprod, self.factor = unet, alphas_cumprod, factor
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> UNet2DOutput:
        """Predict the velocity of `(batch_size, channels, height, width)`."""
        alpha = self.alphas_cumprod[int(timestep)].sqrt()
        sigma = (1 - alpha**2).sqrt()
        velocity = self.unet(sample, timestep).sample.float()
        noise = self.factor * (sigma * sample + alpha * velocity)
        clean_images = (sample - sigma * noise) / alpha
        return UNet2DOutput(sample=alpha * noise - sigma * clean_images)


def fine_noise(images: np.ndarray) -> float:
    """Return the standard deviation of what a 3 x 3 median of each channel takes away, in grey levels.

    Args:
        images: uint8 `(num_images, height, width, 3)`.
    """
    pixels = images.astype(np.float32)
    shifts = [np.roll(pixels, (row, column), axis=(1, 2)) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    rest = pixels - np.median(np.stack(shifts), axis=0)
    return float(rest[:, 1:-1, 1:-1].std())


def noisy_inputs(pipeline: Any, images: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise batches of images as the training does: inputs of the U-Net for BatchNorm's statistics."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=random)
    schedule = pipeline.scheduler
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(images),), generator=random)
    return list(zip(schedule.add_noise(images, noise, timesteps).split(64), timesteps.split(64), strict=True))


class Statistics(nn.Module):
    """Lets `recomputed_statistics`, which passes one tensor, call a U-Net: the timesteps lie in a list beside it."""

    def __init__(self, unet: nn.Module, inputs: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.unet, self.inputs = unet, inputs

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Run the batch of this number."""
        return self.unet(*self.inputs[int(index)]).sample  # type: ignore[misc]


def moved_end(scheduler: DPMSolverMultistepScheduler, level: float) -> None:
    """Let the scheduler's last evaluation be at a noise level, with as many steps as it is asked for."""
    alphas_cumprod = scheduler.alphas_cumprod
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    last = int((levels < level).sum())
    original = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
        spread = torch.linspace(scheduler.config.num_train_timesteps - 1, last, num_inference_steps)
        original(device=device, timesteps=spread.round().int().tolist())

    scheduler.set_timesteps = set_timesteps  # type: ignore[method-assign]


def error_by_level(pipeline: Any, images: torch.Tensor, level: float) -> float:
    """Return the root mean squared error of the predicted images, divided by the noise level: 1 is no denoising."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = torch.full((len(images),), level)
    schedule = pipeline.scheduler
    if is_edm(schedule):
        inputs, timesteps, _ = edm_batch(images, noise, levels, schedule.config.sigma_data)
        output = pipeline.unet(inputs, timesteps).sample.float()
        predicted = edm_denoised(images + level * noise, output, levels, schedule.config.sigma_data)
    else:
        alphas_cumprod = schedule.alphas_cumprod
        timestep = int((((1 - alphas_cumprod) / alphas_cumprod).sqrt() - level).abs().argmin())
        timesteps = torch.full((len(images),), timestep)
        alpha, sigma = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
        noisy_images = alpha * images + sigma * noise
        output = pipeline.unet(noisy_images, timesteps).sample.float()
        kind = schedule.config.prediction_type
        predicted = alpha * noisy_images - sigma * output if kind == "v_prediction" else output
        predicted = (noisy_images - sigma * output) / alpha if kind == "epsilon" else predicted
        level = float(sigma / alpha)
    return float((predicted - images).square().mean().sqrt()) / level


def variants(pipeline: Any, raw: dict[str, torch.Tensor], images: torch.Tensor, steps: int) -> dict[str, tuple]:
    """Return for each row its name, a pipeline, a number of steps and a context to draw in."""
    with_raw = copy.deepcopy(pipeline)
    with_raw.unet.load_state_dict(raw)
    rows = {f"{number} steps": (pipeline, number, nullcontext) for number in sorted({5, 10, steps, 50})}
    rows[f"{steps} steps, weights of the last step"] = (with_raw, steps, nullcontext)
    if any(isinstance(module, nn.BatchNorm2d) for module in pipeline.unet.modules()):
        fresh = copy.deepcopy(pipeline)
        inputs = noisy_inputs(pipeline, images, seed=1)
        numbers = [torch.tensor([index]) for index in range(min(STATISTICS_BATCHES, len(inputs)))]
        statistics = Statistics(fresh.unet, inputs).eval()  # as it is to draw
        rows[f"{steps} steps, BatchNorm statistics recomputed"] = (
            fresh, steps, lambda: recomputed_statistics(statistics, numbers)
        )  # fmt: skip
    if not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        return rows
    for level in (0.1, 0.17, 0.3):
        ended = copy.deepcopy(pipeline)
        moved_end(ended.scheduler, level)
        rows[f"{steps} steps, the last one from noise level {level}"] = (ended, steps, nullcontext)
    first = copy.deepcopy(pipeline)
    first.scheduler = DPMSolverMultistepScheduler.from_config(first.scheduler.config, solver_order=1)
    rows[f"{steps} steps, solver of order 1"] = (first, steps, nullcontext)
    if pipeline.scheduler.config.prediction_type != "v_prediction":
        return rows
    for factor in (1.01, 1.03, 0.99):
        scaled = copy.copy(pipeline)
        network = ScaledNoise(pipeline.unet, pipeline.scheduler.alphas_cumprod, factor)
        object.__setattr__(scaled, "unet", network)
        rows[f"{steps} steps, predicted noise times {factor}"] = (scaled, steps, nullcontext)
    return rows


def main() -> None:
    """Draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--checkpoint", help="its folder's name; the newest if not given")
    parser.add_argument("--num_images", type=int, default=250)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", help="only rows with this in their name")
    arguments = parser.parse_args()
    checkpoints = list_checkpoints(arguments.run / "checkpoints")
    named = [folder for folder in checkpoints if arguments.checkpoint in (None, folder.name)]
    if not named:
        parser.error(f"--checkpoint {arguments.checkpoint}: {arguments.run} has {[f.name for f in checkpoints]}")
    pipeline: DiffusionPipeline = open_pipeline(str(named[-1]), "cpu")
    pipeline.set_progress_bar_config(disable=True)
    raw = load_state(named[-1])["unet"]
    data = DataSettings(arguments.dataset, sample_size=image_size(pipeline))
    real = open_reference(data, torch.device("cpu"), argument="--dataset")
    chosen = np.random.default_rng(0).permutation(len(real.images))[: 64 * STATISTICS_BATCHES]
    pixels = np.stack([real.images[int(index)] for index in chosen])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    bf16 = choose_mixed_precision("auto", cpu=True) == "bf16"
    autocast: Callable = lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()  # noqa: E731

    print(f"{named[-1].name}, {arguments.num_images} images against {len(real.images)}, {'bf16' if bf16 else 'fp32'}")
    print(f"fine noise of the real images: {fine_noise(pixels):.2f} grey levels\n")
    print("| | FID | fine noise |\n| --- | --- | --- |")
    for name, (altered, steps, context) in variants(pipeline, raw, images, arguments.steps).items():
        if arguments.only and arguments.only not in name:
            continue
        with torch.no_grad(), context(), autocast():
            options = SamplingOptions(arguments.num_images, 0, steps, 50)
            drawn = np.stack([*map(np.asarray, generate_images(altered, options))])
        fid = frechet_distance(real.features, real.extractor(drawn, len(drawn)))
        print(f"| {name} | {fid:.1f} | {fine_noise(drawn):.2f} |", flush=True)
    print("\n| noise level | error of the predicted images, as a fraction of it |\n| --- | --- |")
    for level in LEVELS:
        with torch.no_grad(), autocast():
            print(f"| {level} | {error_by_level(pipeline, images[:ERROR_IMAGES], level):.3f} |", flush=True)


if __name__ == "__main__":
    main()
