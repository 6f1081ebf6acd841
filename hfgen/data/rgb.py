"""Converts images of any mode to RGB, for training and the demo.

This file imports only numpy and Pillow: a copy of it is part of each Space.
"""

import numpy as np
from PIL import Image


class UnreadableImageError(Exception):
    """One image cannot be decoded."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        UnreadableImageError: for floating-point pixels or 32-bit pixels beyond 16 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
            raise UnreadableImageError("32-bit pixels outside the 16-bit range")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
