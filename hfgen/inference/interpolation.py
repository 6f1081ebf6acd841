"""Interpolation between latents.

This file imports only torch: a copy of it is part of each Space.
"""

import torch


def interpolate_latents(start: torch.Tensor, end: torch.Tensor, parts: torch.Tensor, spherical: bool) -> torch.Tensor:
    """Interpolate between two latents.

    Args:
        start: `(latent_dim,)`.
        end: `(latent_dim,)`.
        parts: fractions of the way, `(count,)`, from 0 at the start to 1 at the end.
        spherical: follow the great circle through both and interpolate their lengths (Shoemake 1985; White 2016,
            arXiv:1609.04468): normal latents lie near a sphere, which a straight line leaves. Otherwise
            `(1 - part) * start + part * end`.

    Returns:
        `(count, latent_dim)`.
    """
    parts = parts[:, None]
    straight = (1 - parts) * start + parts * end
    if not spherical:
        return straight
    lengths = start.double().norm(), end.double().norm()
    if not (lengths[0] > 0 and lengths[1] > 0):  # a latent of zeros has no direction
        return straight
    directions = start.double() / lengths[0], end.double() / lengths[1]
    angle = torch.acos((directions[0] * directions[1]).sum().clamp(-1, 1))
    if torch.sin(angle) < 1e-6:  # collinear: no unique great circle
        return straight
    way = ((1 - parts) * angle).sin() * directions[0] + (parts * angle).sin() * directions[1]
    return (way / torch.sin(angle) * ((1 - parts) * lengths[0] + parts * lengths[1])).to(start.dtype)
