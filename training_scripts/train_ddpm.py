#!/usr/bin/env python
"""Train a denoising diffusion model (Ho et al. 2020, arXiv:2006.11239) on a folder of images.

    accelerate launch training_scripts/train_ddpm.py --preset ddpm --dataset path/to/images --output_dir runs/ddpm

Presets: ddpm, ddpm_base, ddpm_attention_linear, ddpm_attention_cosine, ddpm_library, quickstart. All settings:
`--help`.
"""

if __name__ == "__main__":
    from hfgen.errors import end_on_signals

    end_on_signals()  # the imports take seconds

import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.optimization import get_scheduler

from hfgen.config import parse_settings
from hfgen.data.loading import load_training_data
from hfgen.data.settings import DataSettings
from hfgen.errors import StopRequestedError, UserError, run_reporting_user_errors
from hfgen.evaluation.during_training import RunEvaluation
from hfgen.inference.figures import batch_sheet, image_sheet
from hfgen.inference.init_from import start_from
from hfgen.inference.sampling import fast_precision
from hfgen.losses.diffusion import diffusion_loss, match_noise, min_snr_weights, prediction_target
from hfgen.losses.edm import edm_batch, sample_noise_levels
from hfgen.methods.ema import averaged_copy
from hfgen.methods.schedules import edm_schedule, noise_schedule, sampling_scheduler
from hfgen.models import UNetAttention, UNetBase, UNetCompact
from hfgen.pipelines import DDPMPipeline
from hfgen.publishing.publish import publish_if_asked
from hfgen.randomness import keyed_seed
from hfgen.settings.ddpm import DDPMSettings
from hfgen.texts import say
from hfgen.training.duration import WITHOUT_END
from hfgen.training.gradients import GradientAccumulation, clip_gradients
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings
from hfgen.training.warm_up import warn_if_unfinished


PRESETS = Path(__file__).resolve().parent / "presets" / "ddpm"
SETTINGS = (RunSettings, DataSettings, DDPMSettings)  # all command-line options
SHEET_CHUNK = 32  # images of a sheet that are generated at once


def main(arguments: list[str] | None = None) -> Path:
    """Train and return the pipeline's folder."""
    run_settings, data_settings, settings = parse_settings(SETTINGS, PRESETS, arguments)
    with Run(run_settings, data_settings, settings, allows_fp16=True) as run:
        accelerator = run.accelerator

        # 1. Network and noise schedule, which refuse sizes before the images are read
        try:
            network = build_unet(settings, data_settings.sample_size)
            schedule = build_schedule(settings)
        except ValueError as error:
            raise UserError(str(error)) from error

        wants_attention = settings.unet == "compact" and settings.attention_size > 0
        if run.is_main and wants_attention and not network.unet.config.add_attention:
            size = data_settings.sample_size
            say(f"note: at --sample_size {size} no level of the U-Net has self-attention; raise --attention_size")

        # 2. Data
        order = (settings.batch_size, run_settings.seed)
        data = load_training_data(data_settings, *order, accelerator, run.output_dir, run.commit)
        evaluation = RunEvaluation(run, data_settings, settings.num_inference_steps)
        max_train_steps = run.plan(settings.batch_size * accelerator.num_processes, data.images_per_epoch)

        # 3. The network's average, pipeline, optimizer
        memory_format = memory_format_for(network, run.device)
        network = network.to(run.device, memory_format=memory_format)
        ema = averaged_copy(network, settings.ema_decay)
        start_from(run, {"unet": network}, ema, schedule)
        pipeline = DDPMPipeline(
            ema.module,
            sampling_scheduler(schedule, settings.sampler),
            num_inference_steps=settings.num_inference_steps,
        )
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=run.device.type in ("cpu", "cuda"),
        )
        # Not passed to prepare(): accelerate would step it once per process.
        lr_scheduler = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=max_train_steps,
        )
        unet = torch.compile(network) if settings.compile else network
        unet, optimizer = accelerator.prepare(unet, optimizer)
        parts, smallest = settings.gradient_accumulation_steps, settings.smallest_batch
        accumulation = GradientAccumulation(run, settings.batch_size, parts, smallest=smallest)
        stateful = {"unet": network, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        stateful["accumulation"] = accumulation
        may_lack = {"accumulation": WITHOUT_END}  # those of earlier versions do
        run.restore(stateful, data.batches, pipeline, data.digest, may_lack=may_lack)
        if settings.lr_scheduler != "constant":
            warn_if_unfinished(run, "lr_warmup_steps", settings.lr_warmup_steps, max_train_steps, "the learning rate")
        if run.first_sheet_due:
            save_sheet(pipeline, run, settings.num_inference_steps)

        # 4. One update per step
        for _ in run.steps():
            clean_images = next(data.batches)  # (B, 3, H, W), in [-1, 1]
            noise = torch.randn(clean_images.shape, generator=run.generator("noise"), device=run.device)
            noise = match_noise(clean_images, noise) if settings.match_noise else noise
            inputs, timesteps, target, weights = noised(clean_images, noise, schedule, settings, run)
            inputs = inputs.contiguous(memory_format=memory_format)

            batch = inputs, timesteps, target, weights
            losses = accumulation.backward(unet, partial(part_loss, unet, settings.loss, batch))
            grad_norm = clip_gradients(accelerator, optimizer, network.parameters(), settings.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.update_parameters(network)
            means = {"loss": torch.stack(losses).mean(), "grad_norm": grad_norm}
            run.log(means, {"learning_rate": lr_scheduler.get_last_lr()[0]})
            if run.sample_due:
                run.save_sheet(batch_sheet(clean_images), "training_images")
                save_sheet(pipeline, run, settings.num_inference_steps)
            if run.evaluation_due:
                evaluation.evaluate(pipeline)

        if run.last_sheet_due:
            save_sheet(pipeline, run, settings.num_inference_steps)
        pipeline_folder = run.finish()
        publish_if_asked(run)
        return pipeline_folder


def build_schedule(settings: DDPMSettings) -> SchedulerMixin:
    """Build the training schedule chosen by the settings.

    Raises:
        ValueError: if the schedule cannot be built; the message gives the reason.
    """
    if settings.formulation == "edm":
        return edm_schedule()
    return noise_schedule(settings.beta_schedule, settings.num_train_timesteps, settings.prediction_type)


def noised(
    clean_images: torch.Tensor, noise: torch.Tensor, schedule: SchedulerMixin, settings: DDPMSettings, run: Run
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Add noise to a batch.

    Returns:
        The network's input, `(batch_size, channels, height, width)`; its timesteps, `(batch_size,)`; the prediction
        target, same shape as the images; and the weight of each image, `(batch_size,)`, or None.
    """
    batch_size, numbers = len(clean_images), run.generator("timesteps")
    if settings.formulation == "edm":
        noise_levels = sample_noise_levels(batch_size, numbers, settings.noise_scale)
        return *edm_batch(clean_images, noise, noise_levels, schedule.config.sigma_data), None
    timesteps = torch.randint(settings.num_train_timesteps, (batch_size,), generator=numbers, device=run.device)
    target = prediction_target(schedule, clean_images, noise, timesteps)
    weights = min_snr_weights(schedule, timesteps, settings.snr_gamma) if settings.snr_gamma else None
    return schedule.add_noise(clean_images, noise, timesteps), timesteps, target, weights


def part_loss(
    unet: torch.nn.Module,
    kind: str,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    part: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a part of a batch, a scalar: for its gradients, and without them for the log.

    Args:
        unet: the network.
        kind: see `diffusion_loss`.
        batch: what `noised` returns.
        part: of the batch.
    """
    inputs, timesteps, target, weights = batch
    prediction = unet(inputs[part], timesteps[part]).sample
    loss = diffusion_loss(prediction, target[part], kind, None if weights is None else weights[part])
    return loss, loss.detach()


def build_unet(settings: DDPMSettings, sample_size: int) -> ModelMixin:
    """Build the network chosen by the settings.

    Raises:
        ValueError: if the architecture does not support `sample_size`; the message lists the sizes it does.
    """
    if settings.unet == "base":
        return UNetBase(sample_size, block_out_channels=settings.block_out_channels or (64, 128, 256, 512, 1024))
    if settings.unet == "attention":
        return UNetAttention(sample_size, block_out_channels=settings.block_out_channels or (64, 128, 256, 512, 1024))
    if settings.unet == "compact":
        return UNetCompact(
            sample_size,
            block_out_channels=settings.block_out_channels or (64, 128, 256, 256),
            layers_per_block=settings.layers_per_block,
            patch_size=settings.patch_size,
            attention_size=settings.attention_size,
            dropout=settings.dropout,
            time_scale=1000.0 if settings.formulation == "edm" else 1.0,
        )
    channels = tuple(settings.block_out_channels or (64, 128, 256, 512))
    if min(channels) < 1:
        raise ValueError(f"block_out_channels={channels} must be positive")
    if channels[-1] < 8:
        raise ValueError(f"block_out_channels={channels}: the last must be at least 8, the width of an attention head")
    factor = 2 ** (len(channels) - 1)
    if sample_size % factor:
        raise ValueError(f"sample_size={sample_size} must be a multiple of {factor} for block_out_channels={channels}")
    plain, common = len(channels) - 1, math.gcd(*channels)
    return UNet2DModel(
        sample_size=sample_size,
        block_out_channels=channels,
        layers_per_block=settings.layers_per_block,
        norm_num_groups=max(groups for groups in range(1, 33) if common % groups == 0),  # must divide every width
        # Attention at the coarsest level only: its cost grows with the fourth power of the side length.
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )


def memory_format_for(network: ModelMixin, device: torch.device) -> torch.memory_format:
    """Choose the memory format: channels last, except for networks with GroupNorm on a CPU.

    PyTorch's GroupNorm backward on a CPU takes five times as long in channels-last format.
    """
    normalises_groups = any(isinstance(module, torch.nn.GroupNorm) for module in network.modules())
    return torch.contiguous_format if device.type == "cpu" and normalises_groups else torch.channels_last


def save_sheet(pipeline: DDPMPipeline, run: Run, num_inference_steps: int) -> None:
    """Save a sheet of samples, from the same noise throughout the run, unless the run is asked to stop."""
    config = pipeline.unet.config
    shape = (run.settings.num_sample_images, config.in_channels, config.sample_size, config.sample_size)
    numbers = torch.Generator().manual_seed(keyed_seed(run.settings.seed, "samples"))
    latents = torch.randn(shape, generator=numbers)

    def give_up_if_asked(*_: object) -> None:
        if run.stop_requested or (run.step == 0 and run.is_time_up):
            raise StopRequestedError

    pipeline.set_progress_bar_config(disable=True)
    images = []
    with run.generating(), suppress(StopRequestedError):
        for chunk in latents.split(SHEET_CHUNK):  # bounds the memory
            with fast_precision(pipeline):  # as `hfgen sample` generates them
                images += pipeline(
                    len(chunk),
                    latents=chunk,
                    generator=numbers,
                    num_inference_steps=num_inference_steps,
                    callback_on_step_end=give_up_if_asked,
                    return_dict=False,
                )[0]
        run.save_sheet(image_sheet(images))


if __name__ == "__main__":
    run_reporting_user_errors(main)
