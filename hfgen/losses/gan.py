"""GAN objectives: pairs of plain functions of logits, and penalties on the discriminator's gradient."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import relu, softplus


class GANLoss(NamedTuple):
    """One objective. Logits are `(batch_size,)`; losses are scalars to minimise.

    Attributes:
        discriminator: `(real_logits, fake_logits, label_smoothing)` -> loss. One-sided label smoothing (Salimans et
            al. 2016, arXiv:1606.03498, section 3.4): the label of real images is 1 - label_smoothing.
        generator: `(real_logits, fake_logits)` -> loss.
        boundary: the logit at which the discriminator is undecided without label smoothing (with it, see
            `decision_boundary`); None if there is no such logit.
        has_labels: whether the loss has labels; if not, label_smoothing is ignored.
        compares_sides: whether the generator's loss depends on `real_logits`; if not, they are ignored.
    """

    discriminator: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    generator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    boundary: float | None
    has_labels: bool = False
    compares_sides: bool = False


GAN_LOSSES = {
    # Goodfellow et al. 2014 (arXiv:1406.2661): equation 1 for the discriminator; the generator maximises log D(G(z)).
    # -a log s(x) - (1 - a) log(1 - s(x)) = softplus(-x) + (1 - a) x for the sigmoid s and the label a.
    "non_saturating": GANLoss(
        discriminator=lambda real, fake, smoothing: (
            (softplus(-real) + smoothing * real).mean() + softplus(fake).mean()
        ),
        generator=lambda real, fake: softplus(-fake).mean(),
        boundary=0.0,
        has_labels=True,
    ),
    # Mao et al. 2017 (arXiv:1611.04076): equation 9, labels 0 and 1.
    "least_squares": GANLoss(
        discriminator=lambda real, fake, smoothing: (
            0.5 * (real - (1 - smoothing)).square().mean() + 0.5 * fake.square().mean()
        ),
        generator=lambda real, fake: 0.5 * (fake - 1).square().mean(),
        boundary=0.5,
        has_labels=True,
    ),
    # Miyato et al. 2018 (arXiv:1802.05957): equations 16 and 17.
    "hinge": GANLoss(
        discriminator=lambda real, fake, smoothing: relu(1 - real).mean() + relu(1 + fake).mean(),
        generator=lambda real, fake: -fake.mean(),
        boundary=0.0,
    ),
    # Arjovsky et al. 2017 (arXiv:1701.07875): equations 2 and 3; a penalty enforces the Lipschitz bound.
    "wasserstein": GANLoss(
        discriminator=lambda real, fake, smoothing: fake.mean() - real.mean(),
        generator=lambda real, fake: -fake.mean(),
        boundary=None,
    ),
    # Huang et al. 2024 (R3GAN, arXiv:2501.05441): equation 2 with f(t) = -softplus(-t), after Jolicoeur-Martineau
    # 2018: each real image is compared with the generated image at the same batch index.
    "relativistic": GANLoss(
        discriminator=lambda real, fake, smoothing: softplus(fake - real).mean(),
        generator=lambda real, fake: softplus(real - fake).mean(),
        boundary=None,
        compares_sides=True,
    ),
    # Relativistic average GANs: RaSGAN, RaLSGAN, RaHingeGAN (Jolicoeur-Martineau 2018, arXiv:1807.00734). Each logit
    # is compared with the mean logit of the other side: is this image more realistic than those are on average? The
    # generator's loss is the discriminator's with real and generated swapped.
    "relativistic_average": GANLoss(
        discriminator=lambda real, fake, smoothing: (
            softplus(fake.mean() - real).mean() + softplus(fake - real.mean()).mean()
        ),
        generator=lambda real, fake: softplus(real.mean() - fake).mean() + softplus(real - fake.mean()).mean(),
        boundary=None,
        compares_sides=True,
    ),
    "relativistic_average_least_squares": GANLoss(
        discriminator=lambda real, fake, smoothing: (
            (real - fake.mean() - 1).square().mean() + (fake - real.mean() + 1).square().mean()
        ),
        generator=lambda real, fake: (
            (fake - real.mean() - 1).square().mean() + (real - fake.mean() + 1).square().mean()
        ),
        boundary=None,
        compares_sides=True,
    ),
    "relativistic_average_hinge": GANLoss(
        discriminator=lambda real, fake, smoothing: (
            relu(1 - (real - fake.mean())).mean() + relu(1 + (fake - real.mean())).mean()
        ),
        generator=lambda real, fake: relu(1 - (fake - real.mean())).mean() + relu(1 + (real - fake.mean())).mean(),
        boundary=None,
        compares_sides=True,
    ),
}


def decision_boundary(name: str, label_smoothing: float) -> float | None:
    """Return the logit of an image that is as likely real as generated, for a discriminator with smoothed labels.

    Where both densities are equal, the loss of the discriminator is lowest at this logit.

    Args:
        name: key of `GAN_LOSSES`.
        label_smoothing: the label of real images is 1 minus this.

    Returns:
        The logit, the same for all of `(batch_size,)`; None if the loss has no such logit.
    """
    loss = GAN_LOSSES[name]
    if not (loss.has_labels and label_smoothing):
        return loss.boundary
    if name == "least_squares":
        return (1 - label_smoothing) / 2
    return math.log((1 - label_smoothing) / (1 + label_smoothing))  # non_saturating


def gradient_penalty(
    discriminator: Callable[[torch.Tensor], torch.Tensor],
    real_images: torch.Tensor,
    fake_images: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Two-sided gradient penalty of WGAN-GP, without its weight lambda.

    Gulrajani et al. 2017 (arXiv:1704.00028), equation 3: the mean over the batch of `(||grad_x D(x)||_2 - 1) ** 2`, at
    one point sampled uniformly on each segment between a real and a generated image.

    Args:
        discriminator: maps images to logits, each image independently (no BatchNorm): otherwise a logit's gradient
            is spread over the batch.
        real_images: `(batch_size, channels, height, width)`, in [-1, 1].
        fake_images: same shape. No gradient flows back to the generator.
        generator: the random number generator, on the images' device.

    Returns:
        A scalar, differentiable with respect to the discriminator's parameters.
    """
    mix = torch.rand(len(real_images), 1, 1, 1, generator=generator, device=real_images.device)
    gradients = _gradients(discriminator, torch.lerp(real_images, fake_images, mix))
    return (gradients.flatten(1).norm(dim=1) - 1).square().mean()


def zero_centred_penalty(discriminator: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Zero-centred gradient penalty, without its weight gamma: R1 on real images, R2 on generated ones.

    Mescheder et al. 2018 (arXiv:1801.04406), equations 9 and 10: half the batch mean of `||grad_x D(x)||_2 ** 2`.

    Args:
        discriminator: maps images to logits, each image independently (no BatchNorm).
        images: `(batch_size, channels, height, width)`, in [-1, 1]. No gradient flows back to the generator.

    Returns:
        A scalar, differentiable with respect to the discriminator's parameters.
    """
    return 0.5 * _gradients(discriminator, images).square().flatten(1).sum(dim=1).mean()


def _gradients(discriminator: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Return the differentiable gradient of each image's logit with respect to the image, in float32."""
    points = images.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return gradients.float()
