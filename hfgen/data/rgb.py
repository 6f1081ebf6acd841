"""Converts images of any mode to RGB, for training and the demo.

This file imports only numpy and Pillow: a copy of it is part of each Space.
"""

import numpy as np
from PIL import ExifTags, Image


# How to turn an image by its EXIF orientation; 1 and unknown values: not at all.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(Exception):
    """One image cannot be decoded."""


def upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; if that cannot be read, leave it as it is.

    Unlike `ImageOps.exif_transpose`, it does not write the metadata again, which fails for damaged ones.
    """
    image.load()  # a PNG may have its EXIF after its pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata make Pillow raise almost anything
        return image
    return image if turn is None else image.transpose(turn)


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
