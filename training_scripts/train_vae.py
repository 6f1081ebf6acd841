#!/usr/bin/env python
"""Train a variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114) on a folder of images.

    accelerate launch training_scripts/train_vae.py --preset vae --dataset path/to/images --output_dir runs/vae

Presets: vae, vae_200, vae_learned. All settings: `--help`.
"""

if __name__ == "__main__":
    from hfgen.errors import end_on_signals

    end_on_signals()  # the imports take seconds

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler

from hfgen.config import parse_settings
from hfgen.data.loading import TrainingData, load_training_data
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError, run_reporting_user_errors
from hfgen.evaluation.during_training import RunEvaluation
from hfgen.files import write_text_atomically
from hfgen.inference.figures import batch_sheet, image_sheet, reconstruction_sheet
from hfgen.inference.init_from import start_from
from hfgen.losses.vae import kl_loss, kl_per_dimension, reconstruction_loss, warmed_up
from hfgen.methods.density import FittedDensity, fit_density
from hfgen.methods.ema import averaged_copy
from hfgen.methods.learned_term import LearnedTerm, check_size, choose_trained_parts, decoder_parameters
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.methods.posterior import EncodedImages, PosteriorWatch, encode_images
from hfgen.methods.recent_latents import RecentLatents
from hfgen.models import ConvVAE
from hfgen.pipelines import VAEPipeline
from hfgen.publishing.publish import publish_if_asked
from hfgen.randomness import keyed_seed
from hfgen.settings.vae import VAESettings, check_length
from hfgen.texts import say
from hfgen.training.duration import WITHOUT_END
from hfgen.training.gradients import GradientAccumulation, clip_gradients
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings
from hfgen.training.warm_up import warn_if_unfinished


PRESETS = Path(__file__).resolve().parent / "presets" / "vae"

# Training images on the sheet of reconstructions.
NUM_RECONSTRUCTIONS = 16
# Maximum number of training images encoded for the ex-post density and the report on the posteriors.
MAX_ENCODED = 20_000
SETTINGS = (RunSettings, DataSettings, VAESettings)  # all command-line options


def main(arguments: list[str] | None = None) -> Path:
    """Train and return the pipeline's folder."""
    run_settings, data_settings, settings = parse_settings(SETTINGS, PRESETS, arguments)
    with Run(run_settings, data_settings, settings, allows_fp16=True) as run:
        accelerator = run.accelerator

        # 1. Network, which refuses sizes before the images are read
        try:
            network = build_vae(settings, data_settings.sample_size)
        except ValueError as error:
            raise UserError(str(error)) from error

        # 2. Data
        order = (settings.batch_size, run_settings.seed)
        data = load_training_data(data_settings, *order, accelerator, run.output_dir, run.commit)
        evaluation = RunEvaluation(run, data_settings)
        max_train_steps = run.plan(settings.batch_size * accelerator.num_processes, data.images_per_epoch)
        check_length(settings.learned_term_start, max_train_steps)

        # 3. The network's average, the learned term, optimizer
        network = network.to(run.device, memory_format=torch.channels_last)
        ema = averaged_copy(network, settings.ema_decay)
        term = build_learned_term(settings, network, accelerator) if settings.learns_a_term else None
        start_from(run, {"vae": network} | ({"discriminator": term.network} if term else {}), ema)
        pipeline = VAEPipeline(ema.module)
        use_matrix_products(network)  # faster on a CPU, same results
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=run.device.type in ("cpu", "cuda"),
        )
        steps_of_encoder = settings.learned_term_start or max_train_steps
        # Not passed to prepare(): accelerate would step it once per process.
        lr_scheduler = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=steps_of_encoder,
        )
        vae, optimizer = accelerator.prepare(network, optimizer)
        watch = PosteriorWatch(settings.latent_dim, run.device, data.images_per_epoch)
        recent = RecentLatents(settings.latent_dim, run.device)
        # A discriminator that has learned from a part of the batch cannot start it again.
        smallest = 2 if settings.normalization == "batch" else 1
        accumulation = GradientAccumulation(run, settings.batch_size, may_split=term is None, smallest=smallest)
        stateful = {"vae": network, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "watch": watch}
        learned = term.stateful(settings.learned_term_start > 0) if term else {}
        # A VAE that was trained without the learned term can be continued with it.
        may_lack = dict.fromkeys(learned, settings.learned_term_start)
        may_lack |= {"accumulation": WITHOUT_END, "recent": WITHOUT_END}  # those of earlier versions do
        stateful |= {"accumulation": accumulation, "recent": recent}
        saved = SavedWithRecentDensity(pipeline, recent if settings.density_components else None)
        restored = (stateful | learned, data.batches, saved, data.digest)
        run.restore(*restored, settings.on_collapse, settings.max_rollbacks, may_lack)
        if settings.lr_scheduler != "constant":
            warn_if_unfinished(run, "lr_warmup_steps", settings.lr_warmup_steps, steps_of_encoder, "the learning rate")
        warn_if_unfinished(run, "kl_warmup_steps", settings.kl_warmup_steps, steps_of_encoder, "the KL weight")
        with data.from_the_start() as batches:  # shown with their reconstructions
            shown_images = next(batches)[:NUM_RECONSTRUCTIONS]
        if run.first_sheet_due:
            save_sheets(pipeline, shown_images, recent, settings, run)

        # 4. One update per step
        for step in run.steps():
            decoder_only = 0 < settings.learned_term_start < step
            if settings.learned_term_start:  # at each step, since a rollback may lead back to before it
                choose_trained_parts(network, decoder_only, skip_gradients=accelerator.num_processes == 1)
                if step == settings.learned_term_start + 1:
                    # The average is the better start. BatchNorm's statistics differ between processes: take one's.
                    network.load_state_dict(broadcast(ema.module.state_dict()))
            images = next(data.batches)  # (B, 3, H, W), in [-1, 1]
            kl_weight = warmed_up(settings.kl_weight, step, settings.kl_warmup_steps)
            learning = term if decoder_only or not settings.learned_term_start else None
            parts = accumulation.backward(vae, partial(losses_of, vae, images, settings, kl_weight, learning, run))
            if term and decoder_only:
                trained, weights = term.decoder_optimizer, decoder_parameters(network)
                grad_norm = clip_gradients(accelerator, trained, weights, settings.max_grad_norm)
                trained.step()
            else:
                trained = optimizer
                grad_norm = clip_gradients(accelerator, trained, network.parameters(), settings.max_grad_norm)
                trained.step()
                lr_scheduler.step()
            network.zero_grad()
            ema.update_parameters(network)

            for _, mean, logvar, kl_dimensions in parts:
                watch.observe(mean, kl_dimensions)
                recent.observe(mean, logvar)
            losses = {name: torch.stack([part[0][name] for part in parts]).mean() for name in parts[0][0]}
            losses["grad_norm"] = grad_norm
            notes = {"learning_rate": trained.param_groups[0]["lr"], "kl_weight": kl_weight}
            if settings.watch_every and step % settings.watch_every == 0:
                result = watch.check()
                run.report(result.good, result.trouble, result.warning)
                notes |= result.signals
            run.log(losses, notes)
            if run.sample_due:
                run.save_sheet(batch_sheet(images), "training_images")
                save_sheets(pipeline, shown_images, recent, settings, run)
            if run.evaluation_due:
                evaluate_with_density(evaluation, pipeline, data, settings, run)

        if run.last_sheet_due:
            save_sheets(pipeline, shown_images, recent, settings, run)
        if run.step <= settings.learned_term_start > 0:
            run.report(
                True,
                warning=f"the learned term begins after update {settings.learned_term_start:,}: so far this "
                "is a plain VAE",
            )
        # 5. Describe the latents of the data once the encoder is final; a run is not complete without this
        if run.is_complete or not run.is_interrupted:
            describe_latents(pipeline, data, settings, run)
        pipeline_folder = run.finish()
        publish_if_asked(run)
        return pipeline_folder


def build_vae(settings: VAESettings, sample_size: int) -> ConvVAE:
    """Build the network chosen by the settings.

    Raises:
        ValueError: if the levels do not divide `sample_size`, or the learned term does not support it; the message
            says what they do.
    """
    if settings.learns_a_term:
        check_size(sample_size)
    channels = settings.block_out_channels
    if channels is None:  # down to 4 pixels or slightly more
        levels = max(1, (sample_size // 4).bit_length() - 1)
        channels = [64 * min(2**level, 8) for level in range(levels)]
    return ConvVAE(
        sample_size,
        latent_dim=settings.latent_dim,
        block_out_channels=tuple(channels),
        layers_per_block=settings.layers_per_block,
        normalization=settings.normalization,
        upsampling=settings.upsampling,
        refine_channels=settings.refine_channels,
    )


def losses_of(
    vae: torch.nn.Module,
    images: torch.Tensor,
    settings: VAESettings,
    kl_weight: float,
    term: LearnedTerm | None,
    run: Run,
    part: slice,
) -> tuple[torch.Tensor, tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the objective of a part of a batch, and without gradients what is logged and watched.

    Args:
        vae: the network.
        images: the batch, `(batch_size, channels, height, width)`, in [-1, 1].
        settings: the method's.
        kl_weight: of this update.
        term: the learned term, if it is part of this update's objective.
        run: gives random numbers.
        part: of the batch.

    Returns:
        The objective, a scalar, per dimension of an image: so one clipping norm works for all image sizes, and Adam's
        update is the same. Beside it losses by name, in nats per image; the means of the posteriors and the logarithms
        of their variances, `(images, latent_dim, 1, 1)`; and the KL divergence by latent dimension, `(latent_dim,)`.
    """
    chosen, purpose = images[part], "posterior" if part.start == 0 else f"posterior {part.start}"
    reconstruction, posterior = vae(chosen, sample_posterior=True, return_dict=False, generator=run.generator(purpose))
    likelihood_loss = reconstruction_loss(reconstruction, chosen, settings.reconstruction)
    kl_dimensions = kl_per_dimension(posterior.mean, posterior.logvar)
    loss = likelihood_loss + kl_weight * kl_loss(kl_dimensions, settings.free_bits)
    objective = loss / chosen[0].numel()
    learned_losses: dict[str, torch.Tensor] = {}
    if term is not None:
        latents = posterior.sample(run.generator("latents")).detach().flatten(1)
        addition, learned_losses = term.learn(chosen, reconstruction, likelihood_loss / chosen[0].numel(), latents)
        objective = objective + addition
    losses = {"loss": loss, "reconstruction_loss": likelihood_loss, "kl_loss": kl_dimensions.sum()}
    losses |= {"rmse": (reconstruction.detach() - chosen).square().mean().sqrt(), **learned_losses}
    detached = {name: value.detach() for name, value in losses.items()}
    return objective, (detached, posterior.mean.detach(), posterior.logvar.detach(), kl_dimensions.detach())


def build_learned_term(settings: VAESettings, vae: ConvVAE, accelerator: Accelerator) -> LearnedTerm:
    """Build the loss of `--feature_weight` and `--adversarial_weight`."""
    return LearnedTerm(
        vae,
        (settings.feature_weight, settings.adversarial_weight),
        settings.discriminator_channels,
        settings.learning_rate_d,
        accelerator,
    )


def save_sheets(
    pipeline: VAEPipeline, shown_images: torch.Tensor, recent: RecentLatents, settings: VAESettings, run: Run
) -> None:
    """Save a sheet of samples, from the same random numbers throughout the run, and one of reconstructions.

    The samples' latents come from the Gaussian of recent ones, or from the prior if no density is to be fitted.
    """
    numbers = torch.Generator().manual_seed(keyed_seed(run.settings.seed, "samples"))
    latents = torch.randn(run.settings.num_sample_images, settings.latent_dim, generator=numbers)
    if settings.density_components:
        latents = recent.to_latents(latents)
    originals = ((shown_images + 1) / 2).clamp(0, 1)  # rotation rounds
    with run.generating():
        with run.accelerator.autocast():
            samples = pipeline(latents=latents, return_dict=False)[0]
            reconstructions = pipeline.reconstruct(originals, return_dict=False)[0]
        run.save_sheet(image_sheet(samples))
        run.save_sheet(reconstruction_sheet(pipeline.to_pil(originals), reconstructions), "reconstructions")


class SavedWithRecentDensity:
    """Saves a VAE's pipeline; while it has no ex-post density, with the Gaussian of recent latents in its place.

    A checkpoint, or a run that was stopped, would otherwise generate from the prior.

    Args:
        pipeline: the pipeline that is trained; unchanged by saving.
        recent: the latents of recent images; None if the pipeline is to have no density.
    """

    def __init__(self, pipeline: VAEPipeline, recent: RecentLatents | None):
        self._pipeline, self._recent = pipeline, recent

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save like diffusers."""
        density = self._recent.density() if self._recent and self._pipeline.density is None else None
        saved = self._pipeline if density is None else VAEPipeline(self._pipeline.vae, density)
        saved.save_pretrained(save_directory)


def add_density(
    pipeline: VAEPipeline, data: TrainingData, settings: VAESettings, run: Run
) -> tuple[EncodedImages, FittedDensity | None]:
    """Encode the first training images, and fit the pipeline's density to them.

    All processes must call this; the main one fits. No density is fitted if it is disabled or there is only one image.

    Raises:
        NotFiniteError: on all processes alike, if a latent is not finite.
    """
    count = min(MAX_ENCODED, data.images_per_epoch or MAX_ENCODED)
    with run.accelerator.autocast(), data.from_the_start() as batches:
        encoded = encode_images(pipeline.vae, batches, count, run.generator("encode"), run.accelerator)
    encoded.require_finite()
    if not (run.is_main and settings.density_components and count > 1):
        return encoded, None
    density = fit_density(
        encoded.mean, encoded.logvar, settings.density_components, run.settings.seed, settings.density
    )
    pipeline.register_modules(density=density.model.to(run.device))
    return encoded, density


def evaluate_with_density(
    evaluation: RunEvaluation,
    pipeline: VAEPipeline,
    data: TrainingData,
    settings: VAESettings,
    run: Run,
) -> None:
    """Score the pipeline as it would be saved now, then remove its density."""
    has_latents = False
    with run.generating(), np.errstate(invalid="warn"):  # fitting may try what is not finite
        add_density(pipeline, data, settings, run)
        has_latents = True
    if has_latents:
        evaluation.evaluate(pipeline)
    pipeline.register_modules(density=None)


def describe_latents(pipeline: VAEPipeline, data: TrainingData, settings: VAESettings, run: Run) -> None:
    """Measure the posteriors of the training images, fit the pipeline's density, and save a sheet of samples from it.

    Writes `latents.json`. All processes must call this.
    """
    encoded, density = add_density(pipeline, data, settings, run)
    if not run.is_main:
        return
    report = encoded.report()
    if density is not None:
        report["density"] = density.report()
        with run.generating(), run.accelerator.autocast():
            numbers = run.generator("ex-post samples")
            samples = pipeline(run.settings.num_sample_images, generator=numbers, return_dict=False)[0]
            say(f"sample sheet from the ex-post density: {run.save_sheet(image_sheet(samples), 'ex_post')}")
    write_text_atomically(file := run.output_dir / "latents.json", json.dumps(report, indent=2) + "\n")
    say(f"{report['active_units']} of {settings.latent_dim} latent units are active; {file}")


if __name__ == "__main__":
    run_reporting_user_errors(main)
