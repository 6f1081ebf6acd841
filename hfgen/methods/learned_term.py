"""A VAE's learned term against blur, and the training of its decoder alone (losses: hfgen/losses/learned.py)."""

from typing import Any

import torch
from accelerate import Accelerator

from hfgen.losses.gan import GAN_LOSSES
from hfgen.losses.learned import balanced, feature_distance, judge
from hfgen.methods.matrix_convolution import use_matrix_products
from hfgen.models import ConvVAE, DCGANDiscriminator


class LearnedTerm:
    """A discriminator of reconstructions, and the gradients it adds to them; see hfgen/losses/learned.py.

    Args:
        vae: the network whose reconstructions it judges, on its device.
        weights: of the loss on the discriminator's features and of the adversarial loss, as gradient norms relative to
            the likelihood's.
        base_channels: channels of the discriminator at its finest level.
        learning_rate: Adam learning rate of the discriminator and of `decoder_optimizer`.
        accelerator: prepares networks and optimizers.

    Attributes:
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
        self._weights, self._accelerator = weights, accelerator
        network = DCGANDiscriminator(vae.config.sample_size, 3, base_channels)
        self._network = network.to(accelerator.device, memory_format=torch.channels_last)
        use_matrix_products(self._network)
        # DCGAN's Adam for both: with the usual momentum, two networks that act against each other oscillate.
        adam: dict[str, Any] = {"lr": learning_rate, "betas": (0.5, 0.999)}
        adam["fused"] = accelerator.device.type in ("cpu", "cuda")
        self._discriminator, self._optimizer, self.decoder_optimizer = accelerator.prepare(
            self._network,
            torch.optim.Adam(network.parameters(), **adam),
            torch.optim.Adam(decoder_parameters(vae), **adam),
        )

    def stateful(self, decoder_alone: bool) -> dict[str, Any]:
        """Return the objects whose state a checkpoint contains; `decoder_alone`: with `decoder_optimizer`."""
        state = {"discriminator": self._network, "optimizer_d": self._optimizer}
        return state | ({"optimizer_decoder": self.decoder_optimizer} if decoder_alone else {})

    def learn(
        self, images: torch.Tensor, reconstruction: torch.Tensor, likelihood_loss: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Update the discriminator, and compute its gradient with respect to the reconstructions.

        Args:
            images: `(batch_size, channels, height, width)`, in [-1, 1].
            reconstruction: same shape.
            likelihood_loss: a scalar, from the reconstruction.

        Returns:
            What to add to the loss gradient with respect to the reconstruction, and losses for the log.
        """
        loss, seen = GAN_LOSSES["non_saturating"], reconstruction.detach().float()
        self._network.requires_grad_(True)
        loss_d = loss.discriminator(self._discriminator(images), self._discriminator(seen), 0.0)
        self._optimizer.zero_grad()
        self._accelerator.backward(loss_d)
        self._optimizer.step()

        self._network.requires_grad_(False)
        seen.requires_grad_(True)
        with torch.no_grad():
            _, real_features = judge(self._network, images)
        logits, features = judge(self._network, seen)
        distance, loss_g = feature_distance(features, real_features), loss.generator(logits, logits)
        (beside,) = torch.autograd.grad(likelihood_loss, reconstruction, retain_graph=True)
        pull = torch.zeros_like(seen)
        for one, weight in zip((distance, loss_g), self._weights, strict=True):
            if weight:
                (gradient,) = torch.autograd.grad(one, seen, retain_graph=True)
                pull += balanced(gradient, beside.float(), weight)
        return pull, {"loss_d": loss_d, "loss_g": loss_g, "feature_distance": distance}


def decoder_parameters(vae: ConvVAE) -> list[torch.nn.Parameter]:
    """Return the parameters of a VAE's decoder."""
    parts = [vae.from_latents, vae.up_blocks, vae.conv_out, *([vae.refine] if vae.refine is not None else [])]
    return [weight for part in parts for weight in part.parameters()]


def keep_encoder(vae: ConvVAE, skip_gradients: bool) -> None:
    """Fix a VAE's encoder, including the statistics of its BatchNorm.

    Args:
        vae: the network, in train mode.
        skip_gradients: whether to save the encoder's backward pass. Distributed training waits for the gradients of
            all the weights that it was set up with, used or not.
    """
    for part in (vae.down_blocks, vae.to_posterior):
        part.eval().requires_grad_(not skip_gradients)
