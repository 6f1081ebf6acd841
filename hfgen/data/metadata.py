"""Removes damaged metadata from an encoded image, so that only damaged pixels cost a picture.

This file imports only the standard library: a copy of it is part of each Space.
"""

import struct
from collections.abc import Callable, Iterator
from typing import TypeVar


Picture = TypeVar("Picture")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START, JPEG_SCAN, JPEG_APP0, JPEG_ADOBE, JPEG_APP15, JPEG_COMMENT = 0xD8, 0xDA, 0xE0, 0xEE, 0xEF, 0xFE
# Valid lengths of the transparency of a PNG by its colour type: grey, RGB, palette.
PNG_TRANSPARENCY = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}


def read_despite_metadata(content: bytes, read: Callable[[bytes], Picture]) -> Picture:
    """Call `read` with an encoded image; if it fails, call it without the metadata, which may be what is damaged."""
    try:
        return read(content)
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        bare = without_metadata(content)
        if bare is None or len(bare) == len(content):
            raise
        try:
            return read(bare)
        except Exception:  # so the pixels are damaged: the first error says how
            raise error from None


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG or JPEG file without what its pixels do not need; None for other files and damaged structures.

    What decides about colours stays: the palette and transparency of a PNG, the Adobe marker of a JPEG. An animated
    PNG becomes its first picture.
    """
    try:
        if content.startswith(PNG_SIGNATURE):
            return PNG_SIGNATURE + b"".join(_needed_chunks(content))
        if content[:2] == bytes([0xFF, JPEG_START]):
            return b"".join(_needed_segments(content))
    except (struct.error, IndexError):
        pass
    return None


def _needed_chunks(content: bytes) -> Iterator[bytes]:
    position, color_type = len(PNG_SIGNATURE), content[25]
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        is_critical = not kind[0] & 0x20  # the name begins with a capital
        if is_critical or (kind == b"tRNS" and length in PNG_TRANSPARENCY.get(color_type, ())):
            yield content[position : position + length + 12]
        position += length + 12


def _needed_segments(content: bytes) -> Iterator[bytes]:
    position = 2
    yield content[:position]
    while content[position + 1] != JPEG_SCAN:
        start, marker, length = struct.unpack_from(">BBH", content, position)
        if start != 0xFF or length < 2:
            raise IndexError
        is_adobe = marker == JPEG_ADOBE and content[position + 4 : position + 9] == b"Adobe" and length >= 14
        if is_adobe or not (JPEG_APP0 <= marker <= JPEG_APP15 or marker == JPEG_COMMENT):
            yield content[position : position + length + 2]
        position += length + 2
    yield content[position:]
