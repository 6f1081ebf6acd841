"""Converts images of any mode to RGB, for training and the demo.

This file imports only numpy and Pillow: a copy of it is part of each Space.
"""

from collections.abc import Callable, Iterator

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


# Pillow leaves the transparent colour of a PNG as the file has it; how to scale it as the pixels are, by their coding.
SCALED_AS_PIXELS: dict[str, Callable[[int], int]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}
# What a 16- or 32-bit grey image may hold: the narrowest of these that holds its values gives its white.
GREY_BITS = (8, 10, 12, 14, 16)
# Images are converted a few rows at a time, about this many pixels.
STRIP_PIXELS = 1 << 20


def upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; if that cannot be read, leave it as it is.

    Unlike `ImageOps.exif_transpose`, it does not write the metadata again, which fails for damaged ones.
    """
    tiles = getattr(image, "tile", [])  # emptied when the pixels are read
    coding = tiles[0].args if tiles else None
    image.load()  # a PNG may have its EXIF after its pixels
    _scale_transparent_colour(image, coding)
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata make Pillow raise almost anything
        return image
    return image if turn is None else image.transpose(turn)


def _scale_transparent_colour(image: Image.Image, coding: object) -> None:
    colour = image.info.get("transparency")
    if image.format == "PNG" and isinstance(coding, str) and coding in SCALED_AS_PIXELS and colour is not None:
        scale = SCALED_AS_PIXELS[coding]
        image.info["transparency"] = tuple(map(scale, colour)) if isinstance(colour, tuple) else scale(colour)


def grey_bits(image: Image.Image) -> int | None:
    """Return how many bits the values of a 16- or 32-bit grey image use: 8, 10, 12, 14 or 16; None for other modes.

    Scanners, cameras and medical devices often store 12-bit values in 16-bit files.
    """
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    highest = max((int(np.asarray(strip).max(initial=0)) for _, strip in _strips(image)), default=0)
    return next((bits for bits in GREY_BITS if highest < 2**bits), GREY_BITS[-1])


def to_rgb(image: Image.Image, bits: int | None = None) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, wide grey scaled to 8 bits.

    It takes the memory of the image and of its RGB, and little more.

    Args:
        image: any image.
        bits: `2**bits - 1` is the white of a 16- or 32-bit grey image; by default what `grey_bits` says of this one.

    Raises:
        UnreadableImageError: for floating-point pixels or 32-bit pixels beyond 16 bits, whose range is unknown.
    """
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels of unknown range: convert them to 8 or 16 bits")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        bits = bits or grey_bits(image)
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(_strip_to_rgb(strip, bits), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the rows of an image a few at a time, with the number of the first."""
    image.load()
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(image: Image.Image, bits: int | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        white = 2 ** (bits or 16) - 1
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
            raise UnreadableImageError("32-bit pixels outside the 16-bit range: convert them to 16 bits")
        pixels = np.round(grey * (255 / white)).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            pixels[grey == transparent] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
