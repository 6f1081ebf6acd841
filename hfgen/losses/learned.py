"""A term against blur that is learnt from the training images: a discriminator's features and its verdict.

Larsen et al. 2016 (arXiv:1512.09300): pixels forgive blur and punish fur that is a pixel out of place; the features of
a discriminator do the reverse. Nothing is downloaded for it.
"""

from collections.abc import Sequence

import torch
from torch import nn


def judge(discriminator: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a discriminator and keep what it sees on the way.

    Args:
        discriminator: `DCGANDiscriminator`, or one that is made like it.
        images: `(batch_size, channels, height, width)`, in [-1, 1].

    Returns:
        Logits, `(batch_size,)`, and the outputs of its activations, `(batch_size, channels, height, width)` each, from
        fine to coarse.
    """
    features: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: features.append(output))
        for module in discriminator.modules()
        # The first convolution's output is activated in place, and is thus what its activation gives as well.
        if isinstance(module, nn.LeakyReLU) or module is discriminator.conv_in
    ]
    try:
        logits = discriminator(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, features


def feature_distance(fake: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared distance of features, each level on the scale of the real ones.

    The Gaussian likelihood of equation 7 of the paper, without its constants, averaged over several levels.

    Args:
        fake: features of reconstructions from `judge`, `(batch_size, channels, height, width)` each.
        real: of the images that were reconstructed; they get no gradient.

    Returns:
        A scalar in float32: 0 for equal features, about 1 for grey images.
    """
    distances = []
    for one, other in zip(fake, real, strict=True):
        aim = other.detach().float()
        distances.append((one.float() - aim).square().mean() / aim.square().mean().clamp(min=1e-8))
    return torch.stack(distances).mean()


def balanced(gradient: torch.Tensor, beside: torch.Tensor, weight: float) -> torch.Tensor:
    """Scale a gradient to `weight` times the norm of another, so that a weight means the same for all losses.

    As the adaptive weight of Esser et al. 2021 (arXiv:2012.09841), equation 7, but taken at the images instead of at
    the decoder's last layer.

    Args:
        gradient: of one loss by the images, `(batch_size, channels, height, width)`.
        beside: of the other, of the same shape.
        weight: of the first.
    """
    return gradient * (weight * beside.norm() / gradient.norm().clamp(min=1e-12))
