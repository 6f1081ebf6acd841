"""Decodes images to RGB pixels at the training size."""

import contextlib
import io
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from hfgen.data.memory import BYTES_PER_PIXEL
from hfgen.data.metadata import read_despite_metadata
from hfgen.data.rgb import UnreadableImageError, grey_bits, to_rgb, upright
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError


# Five-crop: side of a crop, as a fraction of the image's short side.
FIVE_CROP_PART = 4 / 5

# Formats for which Pillow calls another program, or the system's drawing functions, on a file that nobody has checked.
OTHER_PROGRAMS = {"EPS", "WMF"}

# Ignore Pillow's warnings about odd metadata and sizes; both are checked here. `warnings.catch_warnings` is not
# thread-safe: in the decoding threads it could leave the filters of the whole process changed.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's size limit is global too: one thread at a time changes and restores it.
_pillow_limit = threading.Lock()


# In the report of a dataset, behind the format of such files.
OF_SEVERAL = " (several frames)"


class DecodedImage(NamedTuple):
    """One decoded image.

    Attributes:
        pixels: uint8 arrays `(height, width, 3)`: the image, then its five crops if enabled. Height and width are
            `sample_size`, or at least that if crops are taken during training.
        format: file format, such as "JPEG", with `OF_SEVERAL` behind it if only the first of several frames is used.
        mode: Pillow mode of the file, such as "RGB", "L", "CMYK".
        size: (width, height) of the file, in pixels, before its EXIF orientation is applied.
        grey_bits: bits that the values of a 16- or 32-bit grey file use, see `rgb.grey_bits`; None for other files.
    """

    pixels: list[np.ndarray]
    format: str
    mode: str
    size: tuple[int, int]
    grey_bits: int | None = None


def decode_image(name: str, content: bytes, settings: DataSettings, bits: int | None = None) -> DecodedImage:
    """Decode one image, resize its short side to `sample_size` (bicubic, antialiased) and crop it.

    Args:
        name: name of the image, for error messages.
        content: the encoded file.
        settings: `sample_size`, `crop`, `five_crop` and `max_image_pixels` are used.
        bits: `2**bits - 1` is the white of 16- and 32-bit grey images; by default what each one's values use.

    Raises:
        UnreadableImageError: if this is not an image, or is damaged.
        UserError: if the image has more than `max_image_pixels` pixels, in the file or after resizing.
    """
    return read_despite_metadata(content, lambda encoded: _decode(name, encoded, settings, bits))


def memory_needed(content: bytes | Exception, settings: DataSettings) -> int:
    """Return the bytes that decoding an encoded image takes, judged by its header."""
    if isinstance(content, Exception):
        return 0
    try:
        with _open(content, settings.max_image_pixels) as image:
            _use_draft(image, settings.sample_size)
            width, height = image.size
    except Exception:  # as in `_decode`; without its metadata it may yet be readable
        return len(content) + BYTES_PER_PIXEL * settings.max_image_pixels
    scaled = settings.sample_size**2 * max(width, height) // max(1, min(width, height))
    pixels = min(width * height + scaled, settings.max_image_pixels)  # more are refused
    return len(content) + BYTES_PER_PIXEL * pixels


def _use_draft(image: Image.Image, sample_size: int) -> None:
    """Decode a JPEG that is far larger than needed at 1/2, 1/4 or 1/8 of its size.

    Twice the target size still has all the detail that the resize can use.
    """
    if min(image.size) >= 4 * sample_size:
        image.draft(image.mode, (2 * sample_size, 2 * sample_size))


def _decode(name: str, content: bytes, settings: DataSettings, bits: int | None) -> DecodedImage:
    try:
        with _open(content, settings.max_image_pixels) as image:
            _refuse_bomb(name, image.size, settings.max_image_pixels)
            file_format, mode, size = image.format or "?", image.mode, image.size
            _use_draft(image, settings.sample_size)
            turned = upright(image)
            used_bits, rgb = grey_bits(turned), to_rgb(turned, bits)
            file_format += OF_SEVERAL if _has_more_frames(image) else ""
    except Image.DecompressionBombError as error:
        raise _bomb(name, str(error)) from error
    except MemoryError as error:
        raise out_of_memory(name) from error
    except (UserError, UnreadableImageError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image format that Pillow can read") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    return DecodedImage(_crops(name, rgb, settings), file_format, mode, size, used_bits)


def _has_more_frames(image: Image.Image) -> bool:
    """Whether a file has more frames or pages; those of an MPO are previews, and the layers of a PSD are merged."""
    with contextlib.suppress(Exception):  # a damaged second frame does not matter
        return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    return False


def _open(content: bytes, limit: int) -> Image.Image:
    """Read the header of an image, with `limit` instead of Pillow's own limit, which could be lower."""
    with _pillow_limit:
        of_the_process = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = limit
        try:
            return Image.open(io.BytesIO(content), formats=safe_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = of_the_process


def safe_formats() -> list[str]:
    """Return the formats that Pillow decodes by itself, in its order; for EPS it would run Ghostscript."""
    Image.init()
    return [name for name in Image.ID if name not in OTHER_PROGRAMS]


def _crops(name: str, image: Image.Image, settings: DataSettings) -> list[np.ndarray]:
    size, (width, height) = settings.sample_size, image.size
    short = min(width, height)
    if settings.crop == "center":
        left, top = (width - short) // 2, (height - short) // 2
        pictures = [_resize(image, (size, size), (left, top, left + short, top + short))]
    else:
        scaled = (max(size, round(width * size / short)), max(size, round(height * size / short)))
        _refuse_bomb(name, scaled, settings.max_image_pixels)  # a long thin strip can become huge
        pictures = [_resize(image, scaled, (0, 0, width, height))]
    if settings.five_crop:
        side = max(1, round(short * FIVE_CROP_PART))
        right, bottom = width - side, height - side
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
        pictures += [_resize(image, (size, size), (x, y, x + side, y + side)) for x, y in corners]
    return pictures


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _refuse_bomb(name: str, size: tuple[int, int], limit: int) -> None:
    if size[0] * size[1] > limit:
        raise _bomb(name, f"{size[0]} x {size[1]} pixels")


def out_of_memory(name: str) -> UserError:
    """Return the error for an image that memory does not suffice for: without it, the dataset would be another."""
    return UserError(f"{name}: not enough memory to read it; free some, or remove the image")


def _bomb(name: str, what: str) -> UserError:
    return UserError(
        f"{name}: rejected as a decompression bomb ({what}); remove it or make it smaller, or, for training, raise "
        "--max_image_pixels if you trust it"
    )
