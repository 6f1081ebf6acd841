"""Pictures with known pixels, as encoded files: what the tests of the data part are made of."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 `(height, width, 3)`: a wrong place, turn or order never looks right."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, waves: float = 1.0, phase: float = 0.0) -> np.ndarray:
    """A picture without sharp edges, uint8 `(height, width, 3)`; no two of its corners are alike."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    turns = 2 * np.pi * waves
    channels = [np.sin(turns * (x + 0.4 * y) + phase), np.cos(turns * (y - 0.3 * x) + phase), x - y + 0 * x]
    return np.uint8(np.round(127.5 + 100 * np.stack(channels, axis=-1)))


def encoded(picture: np.ndarray | Image.Image, file_format: str = "png", **options) -> bytes:
    """Encode with Pillow; `options` are those of `Image.save`."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, bit_depth: int, color_type: int, rows: bytes, transparent: bytes | None = None
) -> bytes:
    """Write a PNG by hand, of kinds that Pillow cannot write.

    Args:
        width: in pixels.
        height: in pixels.
        bit_depth: bits per channel.
        color_type: 0 grey, 2 RGB.
        rows: the packed pixels, each row with a leading filter byte 0.
        transparent: the transparent colour, two bytes per channel; None: none.
    """
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    pixels = zlib.compress(rows, 1)
    colour = b"" if transparent is None else png_chunk(b"tRNS", transparent)
    body = colour + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
