#!/usr/bin/env python
"""Train a generative adversarial network on a folder of images: DCGAN, LSGAN, SNGAN, WGAN-GP, R3GAN's objective.

    accelerate launch training_scripts/train_gan.py --preset sngan --dataset path/to/images --output_dir runs/sngan

Presets: dcgan, dcgan_nearest, dcgan256, lsgan, sngan, wgan_gp. All settings: `--help`. One step is one update of the
generator.
"""

if __name__ == "__main__":
    from hfgen.errors import end_on_signals

    end_on_signals()  # the imports take seconds

import math
from pathlib import Path

import torch
from diffusers import ImagePipelineOutput, ModelMixin

from hfgen.config import parse_settings
from hfgen.data.loading import TrainingData, load_training_data
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError, run_reporting_user_errors
from hfgen.evaluation.during_training import RunEvaluation
from hfgen.inference.figures import batch_sheet, image_sheet
from hfgen.inference.init_from import start_from
from hfgen.losses.gan import GAN_LOSSES, decision_boundary, gradient_penalty, zero_centred_penalty
from hfgen.methods.augmentation import Augmentation, choose_augmentation
from hfgen.methods.collapse import SHEET_SIZE, CollapseWatch
from hfgen.methods.ema import FreshStatistics, averaged_copy
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.models import (
    DCGAN256Discriminator,
    DCGAN256Generator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANConvDiscriminator,
    SNGANConvGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)
from hfgen.pipelines import GANPipeline
from hfgen.publishing.publish import publish_if_asked
from hfgen.randomness import keyed_seed
from hfgen.settings.gan import GANSettings
from hfgen.texts import say
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings


PRESETS = Path(__file__).resolve().parent / "presets" / "gan"
SETTINGS = (RunSettings, DataSettings, GANSettings)  # all command-line options


def main(arguments: list[str] | None = None) -> Path:
    """Train and return the pipeline's folder."""
    run_settings, data_settings, settings = parse_settings(SETTINGS, PRESETS, arguments)
    with Run(run_settings, data_settings, settings, allows_fp16=not settings.is_penalised) as run:
        accelerator, loss = run.accelerator, GAN_LOSSES[settings.loss]
        if settings.is_penalised and accelerator.mixed_precision == "fp16":
            raise UserError("--mixed_precision fp16 scales gradients, which breaks a gradient penalty: use bf16 or no")

        # 1. Networks, which refuse sizes before the images are read
        try:
            generator_network, discriminator_network = build_networks(settings, data_settings.sample_size)
        except ValueError as error:
            raise UserError(str(error)) from error

        # 2. Data
        order = (settings.batch_size, run_settings.seed)
        data = load_training_data(data_settings, *order, accelerator, run.output_dir, run.commit)
        evaluation = RunEvaluation(run, data_settings)
        images_per_update = settings.batch_size * accelerator.num_processes
        run.plan(images_per_update * settings.n_critic, data.images_per_epoch)

        # 3. The generator's average, weights to start from, optimizers
        generator_network.to(run.device, memory_format=torch.channels_last)
        discriminator_network.to(run.device, memory_format=torch.channels_last)
        ema = averaged_copy(generator_network, settings.ema_decay)
        loaded = start_from(run, {"generator": generator_network, "discriminator": discriminator_network}, ema)
        pipeline = FreshStatistics(
            GANPipeline(ema.module), ema.module, statistics_latents(settings, run, data_settings.sample_size)
        )
        for network in (generator_network, discriminator_network):
            use_matrix_products(network)  # faster on a CPU, same results
        optimizer_g = build_optimizer(generator_network, settings.learning_rate, settings)
        optimizer_d = build_optimizer(
            discriminator_network, settings.learning_rate_d or settings.learning_rate, settings
        )
        generator, discriminator, optimizer_g, optimizer_d = accelerator.prepare(
            generator_network, discriminator_network, optimizer_g, optimizer_d
        )

        # 4. The discriminator's augmentation, the collapse watch, and what a checkpoint contains
        boundary = decision_boundary(settings.loss, settings.label_smoothing)
        # A resumed run does not load them again, and keeps its augmentation in any case.
        is_trained = "discriminator" in loaded or (run_settings.init_from is not None and not run.is_new)
        choice = choose_augmentation(settings.augment, data.images_per_epoch, boundary is not None, is_trained)
        requested = settings.augment != "auto"
        augmentation = Augmentation(choice.kind, boundary, images_per_update, accelerator, requested)
        run.choices["augment"] = lambda: augmentation.described(choice)
        if run.is_main:
            say(f"augmentation: {augmentation.described(choice)}")
        watch = build_watch(data, settings, accelerator.num_processes)
        stateful = {"generator": generator_network, "discriminator": discriminator_network, "ema": ema}
        stateful |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
        stateful |= {"augmentation": augmentation, "watch": watch}
        run.restore(stateful, data.batches, pipeline, data.digest, settings.on_collapse, settings.max_rollbacks)
        if run.is_main and augmentation.kind != choice.kind:
            say(f"augmentation: {augmentation.described(choice)}")

        # 5. One generator update per step
        if run.first_sheet_due:
            save_sheet(pipeline, run)
        for step in run.steps():
            # Discriminator: n_critic updates, each on new images. The generator gets no gradient.
            discriminator_network.requires_grad_(True)
            for update in range(settings.n_critic):
                real_images = next(data.batches)  # (B, 3, H, W), in [-1, 1]
                latents = sample_latents(settings.batch_size, settings.latent_dim, run.generator(f"latents {update}"))
                with torch.set_grad_enabled(update == settings.n_critic - 1):  # the generator's update reuses the last
                    fake_images = generator(latents)
                real_seen = augmentation.apply(real_images, run.generator(f"augment real {update}"))
                fake_seen = augmentation.apply(fake_images.detach(), run.generator(f"augment fake {update}"))
                if settings.normalizes_batches:
                    real_logits, fake_logits = discriminator(real_seen), discriminator(fake_seen)
                else:  # in one pass: logits do not depend on the rest of the batch
                    real_logits, fake_logits = discriminator(torch.cat([real_seen, fake_seen])).chunk(2)
                loss_d = loss.discriminator(real_logits, fake_logits, settings.label_smoothing)
                penalty = penalties(settings, discriminator, real_seen, fake_seen, run.generator(f"penalty {update}"))
                optimizer_d.zero_grad()
                accelerator.backward(loss_d + penalty)
                optimizer_d.step()
                augmentation.adapt(real_logits)
                watch.observe(real_logits, fake_logits)

            # Generator: one update against the updated discriminator, which gets no gradient.
            discriminator_network.requires_grad_(False)
            fake_logits = discriminator_network(augmentation.apply(fake_images, run.generator("augment generated")))
            real_logits = discriminator_network(real_seen) if loss.compares_sides else real_logits.detach()
            loss_g = loss.generator(real_logits, fake_logits)
            optimizer_g.zero_grad()
            accelerator.backward(loss_g)
            optimizer_g.step()
            ema.update_parameters(generator_network)

            losses = {"loss_d": loss_d, "loss_g": loss_g, "d_real": real_logits.mean(), "d_fake": fake_logits.mean()}
            losses |= {"penalty": penalty, "augment_probability": augmentation.probability}
            due = settings.watch_every and step % settings.watch_every == 0
            run.log(losses, check_collapse(watch, pipeline, run) if due else {})
            if run.sample_due:
                run.save_sheet(batch_sheet(real_seen), "training_images")
                save_sheet(pipeline, run)
            if run.evaluation_due:
                with pipeline.use() as fresh:
                    evaluation.evaluate(fresh)

        if run.last_sheet_due:
            save_sheet(pipeline, run)
        pipeline_folder = run.finish()
        publish_if_asked(run)
        return pipeline_folder


def build_networks(settings: GANSettings, sample_size: int) -> tuple[ModelMixin, ModelMixin]:
    """Build the generator and the discriminator chosen by the settings.

    Raises:
        ValueError: if the architecture does not support `sample_size` or a width; the message says what it does.
    """
    return build_generator(settings, sample_size), build_discriminator(settings, sample_size)


def build_generator(settings: GANSettings, sample_size: int) -> ModelMixin:
    """Build the generator; raises as `build_networks` does."""
    size, width = (sample_size, settings.latent_dim), settings.generator_channels
    if settings.network == "dcgan256":
        return DCGAN256Generator(*size, stem_channels=16 * (width or 32))  # halved four times after the stem
    if settings.network == "sngan":
        return SNGANConvGenerator(*size, base_channels=width or 64, upsampling=settings.upsampling)
    if settings.network == "resnet":
        return SNGANGenerator(*size, base_channels=width or 64)
    return DCGANGenerator(*size, base_channels=width or 64)


def build_discriminator(settings: GANSettings, sample_size: int) -> ModelMixin:
    """Build the discriminator; raises as `build_networks` does."""
    width, norm = settings.discriminator_channels, settings.normalization
    if settings.discriminator_architecture == "dcgan256":
        return DCGAN256Discriminator(sample_size, base_channels=width or 32)
    if settings.discriminator_architecture == "resnet":
        return SNGANDiscriminator(sample_size, base_channels=width or 64)
    kind = SNGANConvDiscriminator if settings.discriminator_architecture == "sngan" else DCGANDiscriminator
    return kind(sample_size, 3, width or 64, norm, settings.spectral_scale)


def build_optimizer(network: torch.nn.Module, learning_rate: float, settings: GANSettings) -> torch.optim.Adam:
    """Build Adam for one network, fused where the device supports it."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=betas, fused=fused)


def sample_latents(count: int, latent_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Sample standard normal latents, `(count, latent_dim)`, on the generator's device."""
    return torch.randn(count, latent_dim, generator=generator, device=generator.device)


def penalties(
    settings: GANSettings,
    discriminator: torch.nn.Module,
    real_images: torch.Tensor,
    fake_images: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the weighted sum of the enabled penalties; zero if there are none."""
    total = torch.zeros((), device=real_images.device)
    if settings.gradient_penalty_weight:
        penalty = gradient_penalty(discriminator, real_images, fake_images, generator)
        total = total + settings.gradient_penalty_weight * penalty
    if settings.r1_weight:
        total = total + settings.r1_weight * zero_centred_penalty(discriminator, real_images)
    if settings.r2_weight:
        total = total + settings.r2_weight * zero_centred_penalty(discriminator, fake_images)
    return total


def build_watch(data: TrainingData, settings: GANSettings, num_processes: int) -> CollapseWatch:
    """Build the watch from this process's first training images."""
    count = SHEET_SIZE if data.images_per_epoch is None else min(SHEET_SIZE, data.images_per_epoch // num_processes)
    images: list[torch.Tensor] = []
    with data.from_the_start() as batches:
        while sum(map(len, images)) < max(count, 2):
            images.append(next(batches))
    boundary = decision_boundary(settings.loss, settings.label_smoothing)
    return CollapseWatch(torch.cat(images)[: max(count, 2)], boundary)


def check_collapse(watch: CollapseWatch, pipeline: FreshStatistics, run: Run) -> dict[str, float]:
    """Let the watch check images of the EMA generator, from the same latents throughout the run."""
    images = sample_fixed(pipeline, run, watch.num_images, "pt", "watch").images
    result = watch.check(images * 2 - 1)
    run.report(result.good, result.trouble, result.warning)
    return result.signals


def save_sheet(pipeline: FreshStatistics, run: Run) -> None:
    """Save a sheet of samples, from the same latents throughout the run."""
    with run.generating():
        run.save_sheet(
            image_sheet(sample_fixed(pipeline, run, run.settings.num_sample_images, "pil", "samples").images)
        )


def sample_fixed(
    pipeline: FreshStatistics, run: Run, count: int, output_type: str, purpose: str
) -> ImagePipelineOutput:
    """Generate images from latents that depend only on the seed and the purpose."""
    numbers = torch.Generator().manual_seed(keyed_seed(run.settings.seed, purpose))
    with pipeline.use() as fresh, run.accelerator.autocast():
        latents = sample_latents(count, fresh.generator.config.latent_dim, numbers)
        at_once = images_at_once(fresh.generator.config.sample_size)
        return fresh(latents=latents, output_type=output_type, chunk_size=at_once)


def images_at_once(sample_size: int) -> int:
    """Return how many images to generate at once: fewer if they are large, as no option limits the memory for it."""
    return 64 if sample_size <= 64 else 16


def statistics_latents(settings: GANSettings, run: Run, sample_size: int) -> list[torch.Tensor]:
    """Sample latents for the EMA generator's statistics, in batches, the same throughout the run."""
    if not settings.statistics_images:
        return []
    numbers = torch.Generator().manual_seed(keyed_seed(run.settings.seed, "statistics"))
    latents = sample_latents(settings.statistics_images, settings.latent_dim, numbers).to(run.device)
    # Of similar size, as each counts equally.
    return list(latents.tensor_split(math.ceil(len(latents) / images_at_once(sample_size))))


if __name__ == "__main__":
    run_reporting_user_errors(main)
