"""A loss against blur, learned from the training images: a discriminator's features and its logits.

Larsen et al. 2016 (arXiv:1512.09300): a pixel loss tolerates blur and penalises fur that is shifted by a pixel; a loss
on a discriminator's features does the opposite. No pretrained network is needed.
"""

from collections.abc import Sequence

import torch
from torch import nn


def logits_and_features(discriminator: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a discriminator and return its logits and intermediate features.

    Args:
        discriminator: `DCGANDiscriminator`, or one with the same structure.
        images: `(batch_size, channels, height, width)`, in [-1, 1].

    Returns:
        Logits, `(batch_size,)`, and the outputs of its activations, each `(batch_size, channels, height, width)`,
        from fine to coarse.
    """
    features: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: features.append(output))
        for module in discriminator.modules()
        # The first convolution's output is activated in place, so it also holds the activation.
        if isinstance(module, nn.LeakyReLU) or module is discriminator.conv_in
    ]
    try:
        logits = discriminator(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, features


def feature_distance(fake: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared distance between features, each level relative to the scale of the real ones.

    The Gaussian likelihood of equation 7 of the paper, without its constants, averaged over several levels.

    Args:
        fake: features of the reconstructions, from `logits_and_features`, each
            `(batch_size, channels, height, width)`.
        real: features of the original images; they get no gradient.

    Returns:
        A scalar in float32: 0 for equal features, about 1 for grey images.
    """
    distances = []
    for one, other in zip(fake, real, strict=True):
        aim = other.detach().float()
        distances.append((one.float() - aim).square().mean() / aim.square().mean().clamp(min=1e-8))
    return torch.stack(distances).mean()


def scaled_to_norm_of(gradient: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    """Scale a gradient to `weight` times the norm of another one, so that a weight has the same effect for all losses.

    Like the adaptive weight of Esser et al. 2021 (arXiv:2012.09841), equation 7, but computed at the images instead of
    the decoder's last layer.

    Args:
        gradient: gradient of one loss with respect to the images, `(batch_size, channels, height, width)`.
        other: gradient of the other loss, same shape.
        weight: weight of the first loss.
    """
    return gradient * (weight * other.norm() / gradient.norm().clamp(min=1e-12))
