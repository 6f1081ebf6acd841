"""Reads images from TFRecord files, as distributed on Kaggle, without TensorFlow; all checksums are verified.

The framing (https://www.tensorflow.org/tutorials/load_data/tfrecord): a little-endian uint64 length, its masked
CRC-32C, the payload, the payload's masked CRC-32C. The payload is a `tf.train.Example` in protobuf's wire format.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c

from hfgen.data.location import SHARD, names_tfrecord
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.errors import UserError


GZIP_MAGIC = b"\x1f\x8b"


def read_tfrecord_images(path: Path, column: str = "image") -> Iterator[tuple[str, bytes]]:
    """Yield `(name, encoded image)` of each record.

    Args:
        path: a TFRecord file, uncompressed or compressed by gzip or zlib.
        column: the bytes feature with the encoded image. Its name is taken from the feature `image_name`, if present.

    Raises:
        UserError: with file and offset, if a checksum is wrong, the file is truncated, or a record lacks the feature.
    """
    for offset, payload in read_records(path):
        try:
            features = _bytes_features(payload)
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: the record at byte {offset} is not a tf.train.Example ({error})") from error
        if column not in features:
            raise UserError(
                f"{path}: the record at byte {offset} has no bytes feature {column!r}, only "
                f"{sorted(features)}; choose one with --dataset_column"
            )
        name = features.get("image_name", b"").decode("utf-8", "replace") or f"byte {offset}"
        yield f"{path.name}#{name}", features[column]


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset in the file, payload)` of each record, verifying both checksums.

    Raises:
        UserError: with file and offset, if a checksum is wrong or the file is truncated.
    """
    offset = 0
    with open_unpacked(path) as file:
        while True:
            header = _read(file, path, offset, 12)
            if not header:
                return
            if len(header) < 12:
                raise _damaged(path, offset, "the file is truncated inside a record's length")
            (length,) = struct.unpack("<Q", header[:8])
            if not _is_header(header):
                raise _damaged(path, offset, "the checksum of the record's length is wrong")
            if length > MAX_ENCODED_BYTES:
                raise _damaged(path, offset, f"the record claims a length of {length} bytes")
            payload = _read_payload(file, path, offset, length)
            yield offset, payload
            offset += 16 + length


def is_tfrecord(path: Path) -> bool:
    """Whether a file is named as a TFRecord, or is a shard without a suffix that begins as one."""
    if names_tfrecord(path.name):
        return True
    if path.suffix or not SHARD.search(path.name):
        return False
    try:
        with open_unpacked(path) as file:
            return _is_header(file.read(12))
    except (OSError, EOFError, zlib.error):
        return False


def open_unpacked(path: Path) -> BinaryIO:
    """Open a TFRecord file for reading; its compression, gzip or zlib, is detected."""
    with path.open("rb") as file:
        start = file.read(12)
    if not _is_header(start):
        if start.startswith(GZIP_MAGIC):
            return cast(BinaryIO, gzip.open(path))
        if _is_zlib(start):
            return cast(BinaryIO, io.BufferedReader(_ZlibFile(path)))
    return path.open("rb")


class _ZlibFile(io.RawIOBase):
    """Reads a file that is compressed by zlib, a little at a time."""

    def __init__(self, path: Path):
        self._file, self._unpacker = path.open("rb"), zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer at least in part; return 0 at the end."""
        while not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._file.read(1 << 16)
            content = self._unpacker.decompress(packed, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
            if not packed:
                raise EOFError("the compressed file ends too early")
        return 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_header(start: bytes) -> bool:
    """Whether 12 bytes are the length of a record with its checksum."""
    return len(start) == 12 and _masked_crc(start[:8]) == struct.unpack("<I", start[8:])[0]


def _is_zlib(start: bytes) -> bool:
    return len(start) > 2 and start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0


def _read_payload(file: BinaryIO, path: Path, offset: int, length: int) -> bytes:
    body = _read(file, path, offset, length + 4)
    if len(body) < length + 4:
        raise _damaged(path, offset, "the file is truncated inside the record")
    payload = body[:length]
    if _masked_crc(payload) != struct.unpack("<I", body[length:])[0]:
        raise _damaged(path, offset, "the checksum of the record's content is wrong")
    return payload


def _read(file: BinaryIO, path: Path, offset: int, count: int) -> bytes:
    try:
        return file.read(count)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, offset, f"it cannot be unpacked from here on ({error})") from error


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(f"{path}: damaged TFRecord at byte {offset}: {what}; download the file again")


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TensorFlow does, so that a checksum of checksums is not zero."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _bytes_features(example: bytes) -> dict[str, bytes]:
    """Parse a `tf.train.Example` and return the first value of each feature that is a list of bytes.

    Wire format: `Example{features=1}`, `Features{map<string, Feature> feature=1}`, `Feature{bytes_list=1}`,
    `BytesList{repeated bytes value=1}`; a map's entry is `{key=1, value=2}`.
    """
    found = {}
    for features in _length_delimited(example, field=1):
        for entry in _length_delimited(features, field=1):
            (key,) = _length_delimited(entry, field=1)
            for feature in _length_delimited(entry, field=2):
                for bytes_list in _length_delimited(feature, field=1):
                    values = _length_delimited(bytes_list, field=1)
                    if values:
                        found[key.decode()] = values[0]
    return found


def _length_delimited(message: bytes, field: int) -> list[bytes]:
    """Return the values of one length-delimited field of a protobuf message, in order."""
    values, position = [], 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _varint(message, position)
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("a field runs past the end of its message")
            if tag >> 3 == field:
                values.append(message[position : position + length])
            position += length
        else:
            raise ValueError(f"wire type {wire_type}")
    return values


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Read a base-128 integer of at most ten bytes at `position`; return it and the next position."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if shift > 70:
            raise ValueError("an integer of more than 64 bits")
        if not byte & 0x80:
            return value, position
