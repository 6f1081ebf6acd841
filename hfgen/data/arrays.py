"""Images in numpy's .npy and .npz files, each written as a PNG, so that they pass through the same steps as others."""

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from hfgen.data.selection import ALL, NoSplitsError, split_of
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, UnusedColumnError, choose_column, file_identity
from hfgen.errors import UserError


CHANNELS = (1, 3, 4)
# What numpy and zipfile raise on a damaged file; RuntimeError: packed by an unknown method, or with a password.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def array_source(path: Path, settings: DataSettings) -> Source:
    """Open an array of images, `(images, height, width)` or `(images, height, width, channels)`.

    The values must be uint8, or uint16 if grey. Arrays are read image by image, and nothing is unpickled.

    Args:
        path: a .npy or .npz file.
        settings: `dataset_column` chooses the array of an .npz; `dataset_split` does if names tell splits.

    Raises:
        UserError: if it cannot be read, or the array is not unique.
    """
    try:
        headers = _headers(path)
    except DAMAGE as error:
        raise UserError(f"--dataset {path}: cannot be read as a NumPy array: {error}") from error
    candidates = [name for name, header in headers.items() if _problem(header) is None]
    if settings.dataset_column is not None and settings.dataset_split not in ("train", ALL):
        raise UnusedColumnError(
            f"--dataset_column {settings.dataset_column}, --dataset_split {settings.dataset_split}: each selects an "
            f"array of {path}; use only one of them"
        )
    if settings.dataset_column is None:
        candidates = _of_split(candidates, settings.dataset_split)
    if not candidates and settings.dataset_column is None:
        listed = "; ".join(f"{name or 'the array'} {_problem(header)}" for name, header in list(headers.items())[:8])
        raise UserError(f"--dataset {path} has no images (count, height, width, channels) of type uint8: {listed}")
    wanted = settings.dataset_column if path.suffix.lower() == ".npz" else None
    name = choose_column(str(path), wanted, candidates, list(headers))
    header = headers[name]
    height, width = header.shape[1:3]
    if height * width > settings.max_image_pixels:
        raise UserError(
            f"--dataset {path}: rejected as a decompression bomb (images of {width} x {height} pixels); make "
            "them smaller, or, for training, raise --max_image_pixels if you trust them"
        )

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        try:
            with _open_array(path, name) as file:
                _read_header(file)
                size = int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize
                for index in range(header.shape[0]):
                    content = file.read(size)
                    if len(content) < size:
                        raise EOFError(f"it ends within image {index}")
                    yield f"{name or path.name}#{index}", _encode(content, header)
        except DAMAGE as error:
            raise UserError(f"{path}: cannot be read as a NumPy array: {error}") from error

    what = f"array {name} of {path}" if name else f"array {path}"
    return Source(what, [*file_identity([path], path.parent), name], read, files=[path], has_columns=bool(name))


def _headers(path: Path) -> dict[str, _Header]:
    """Return the headers of all arrays of a file, by name; a .npy file has one, without a name."""
    if path.suffix.lower() == ".npy":
        names = [""]
    else:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    headers = {}
    for name in names:
        with _open_array(path, name) as file:
            headers[name] = _read_header(file)
    return headers


def _open_array(path: Path, name: str) -> BinaryIO:
    if not name:
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:  # what is opened in it stays open
        return archive.open(f"{name}.npy")  # type: ignore[return-value]


def _read_header(file: BinaryIO) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return _Header(*read(file))
    except (OSError, EOFError, MemoryError):
        raise
    except Exception as error:  # a header is an expression of Python, and numpy lets its parser's errors through
        raise ValueError(f"its header is damaged ({error})") from error


def _problem(header: _Header) -> str | None:
    """Return why an array cannot be images, as the end of a sentence; None if it can."""
    shape, dtype = header.shape, header.dtype
    is_grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    if not (is_grey or (len(shape) == 4 and shape[3] in CHANNELS)) or not all(shape):
        return f"has shape {shape}"
    if len(shape) == 3 and shape[2] in (3, 4):
        return f"has shape {shape}, as one picture in colour has (save it as .png)"
    if dtype != np.uint8 and not (is_grey and dtype == np.uint16):
        return f"has type {dtype}"
    return "is in Fortran order" if header.fortran_order else None


def _of_split(names: list[str], split: str) -> list[str]:
    """Return the arrays named after the split, such as train_images or x_train; for train, all if none is."""
    if split == ALL:
        return names
    labels = {name: {split_of(word) for word in re.split(r"[\W_]+", name)} for name in names}
    chosen = [name for name in names if split_of(split) is not None and split_of(split) in labels[name]]
    if not chosen and split != "train" and names:
        raise NoSplitsError(
            f"--dataset_split {split}: there is no array of that name; choose one with --dataset_column: {names}"
        )
    return chosen or names


def _encode(content: bytes, header: _Header) -> bytes:
    pixels: np.ndarray = np.frombuffer(content, header.dtype).reshape(header.shape[1:])
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(pixels.dtype.newbyteorder("="))).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
