"""A VAE's learned term against blur, and the training of its decoder alone (losses: hfgen/losses/learned.py)."""

from typing import Any

import torch
from accelerate import Accelerator

from hfgen.losses.gan import GAN_LOSSES
from hfgen.losses.learned import feature_distance, logits_and_features, scaled_to_norm_of
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.models import ConvVAE, DCGANDiscriminator


class LearnedTerm:
    """A discriminator of decoded images, and the gradients it adds to them; see hfgen/losses/learned.py.

    Args:
        vae: the network whose images it judges, on its device.
        weights: of the loss on the discriminator's features and of the adversarial loss, as gradient norms relative to
            the likelihood's.
        base_channels: channels of the discriminator at its finest level.
        learning_rate: Adam learning rate of the discriminator and of `decoder_optimizer`.
        accelerator: prepares networks and optimizers.

    Attributes:
        network: the discriminator.
        decoder_optimizer: trains the decoder alone against the discriminator.

    Raises:
        ValueError: if the image size is not a power of two.
    """

    def __init__(
        self,
        vae: ConvVAE,
        weights: tuple[float, float],
        base_channels: int,
        learning_rate: float,
        accelerator: Accelerator,
    ):
        self._vae, self._weights, self._accelerator = vae, weights, accelerator
        network = DCGANDiscriminator(vae.config.sample_size, 3, base_channels)
        self.network = network.to(accelerator.device, memory_format=torch.channels_last)
        use_matrix_products(self.network)
        # DCGAN's Adam for both: with the usual momentum, two networks that act against each other oscillate.
        adam: dict[str, Any] = {"lr": learning_rate, "betas": (0.5, 0.999)}
        adam["fused"] = accelerator.device.type in ("cpu", "cuda")
        self._discriminator, self._optimizer, self.decoder_optimizer = accelerator.prepare(
            self.network,
            torch.optim.Adam(network.parameters(), **adam),
            torch.optim.Adam(decoder_parameters(vae), **adam),
        )

    def stateful(self, decoder_alone: bool) -> dict[str, Any]:
        """Return the objects whose state a checkpoint contains; `decoder_alone`: with `decoder_optimizer`."""
        state = {"discriminator": self.network, "optimizer_d": self._optimizer}
        return state | ({"optimizer_decoder": self.decoder_optimizer} if decoder_alone else {})

    def learn(
        self,
        images: torch.Tensor,
        reconstruction: torch.Tensor,
        likelihood_loss: torch.Tensor,
        latents: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Update the discriminator, and compute what is added to the objective.

        With an adversarial loss, the discriminator also sees images decoded from mixtures of the latents, so that the
        decoder learns the latents that will be sampled. These get the adversarial loss alone.

        Args:
            images: `(batch_size, channels, height, width)`, in [-1, 1].
            reconstruction: same shape.
            likelihood_loss: a scalar, from the reconstruction.
            latents: samples from the posteriors of the images, without gradients, `(batch_size, latent_dim)`.

        Returns:
            A scalar to add to the objective, which is there for its gradient alone, and losses for the log.
        """
        decoded = [reconstruction]
        if self._weights[1]:
            with self._accelerator.autocast():
                decoded.append(self._vae.decode(mixed_latents(latents), return_dict=False)[0])
        loss, seen = GAN_LOSSES["non_saturating"], torch.cat(decoded).detach().float()
        self.network.requires_grad_(True)
        loss_d = loss.discriminator(self._discriminator(images), self._discriminator(seen), 0.0)
        self._optimizer.zero_grad()
        self._accelerator.backward(loss_d)
        self._optimizer.step()

        self.network.requires_grad_(False)
        seen.requires_grad_(True)
        with torch.no_grad():
            _, real_features = logits_and_features(self.network, images)
        logits, features = logits_and_features(self.network, seen)
        distance = feature_distance([feature[: len(images)] for feature in features], real_features)
        loss_g = loss.generator(logits, logits)
        (likelihood_gradient,) = torch.autograd.grad(likelihood_loss, reconstruction, retain_graph=True)
        addition = torch.zeros((), device=seen.device)
        for one, weight, acts_on in zip((distance, loss_g), self._weights, (decoded[:1], decoded), strict=True):
            if weight:
                # Half precision would round the gradients of single pixels to 0. `scaled_to_norm_of` undoes the scale.
                scaled = one if self._accelerator.scaler is None else self._accelerator.scaler.scale(one)
                (gradient,) = torch.autograd.grad(scaled, seen, retain_graph=True)
                for part, own in zip(acts_on, gradient.split(len(images)), strict=False):
                    pull = scaled_to_norm_of(own, likelihood_gradient.float(), weight)
                    addition = addition + (part * pull).sum()  # its gradient: the pull
        return addition, {"loss_d": loss_d, "loss_g": loss_g, "feature_distance": distance}


def check_size(sample_size: int) -> None:
    """Raise a `ValueError` that names the options if the discriminator of a `LearnedTerm` does not support a size."""
    try:
        with torch.device("meta"):  # without its weights, and without random numbers for them
            DCGANDiscriminator(sample_size)
    except ValueError as error:
        raise ValueError(f"--feature_weight, --adversarial_weight: {error}") from error


def mixed_latents(latents: torch.Tensor) -> torch.Tensor:
    """Mix the latents of different images: half way between two of them on the sphere.

    The mixtures have the covariance of the latents, whose mean the KL term keeps near 0, but belong to no image: they
    stand for samples from a density that is fitted only after the training.

    Args:
        latents: samples from the posteriors of different images, `(batch_size, latent_dim)`.
    """
    return (latents + latents.roll(1, dims=0)) / 2**0.5


def decoder_parameters(vae: ConvVAE) -> list[torch.nn.Parameter]:
    """Return the parameters of a VAE's decoder."""
    parts = [vae.from_latents, vae.up_blocks, vae.conv_out, *([vae.refine] if vae.refine is not None else [])]
    return [weight for part in parts for weight in part.parameters()]


def choose_trained_parts(vae: ConvVAE, decoder_only: bool, skip_gradients: bool) -> None:
    """Let all of a VAE be trained, or fix its encoder, including the statistics of its BatchNorm.

    Args:
        vae: the network.
        decoder_only: whether the encoder is fixed.
        skip_gradients: whether to save the backward pass of a fixed encoder. Distributed training waits for the
            gradients of all the weights that it was set up with, used or not.
    """
    vae.train().requires_grad_(True)
    if decoder_only:
        for part in (vae.down_blocks, vae.to_posterior):
            part.eval().requires_grad_(not skip_gradients)
