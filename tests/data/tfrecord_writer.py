"""TFRecord files written by hand from the format's description, apart from the code that reads them."""

import struct

import google_crc32c


def varint(value: int) -> bytes:
    """Encode an unsigned integer in base 128, lowest digits first."""
    digits = []
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return varint(number * 8 + 2) + varint(len(content)) + content


def bytes_feature(*values: bytes) -> bytes:
    return field(1, b"".join(field(1, value) for value in values))


def float_feature(*values: float) -> bytes:
    return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))  # packed, as proto3 writes it


def int64_feature(*values: int) -> bytes:
    return field(3, field(1, b"".join(varint(value % 2**64) for value in values)))


def unpacked_float_feature(*values: float) -> bytes:
    return field(2, b"".join(varint(1 * 8 + 5) + struct.pack("<f", value) for value in values))


def unpacked_int64_feature(*values: int) -> bytes:
    return field(3, b"".join(varint(1 * 8 + 0) + varint(value % 2**64) for value in values))


def example(**features: bytes) -> bytes:
    """A `tf.train.Example`."""
    entries = (field(1, field(1, name.encode()) + field(2, feature)) for name, feature in features.items())
    return field(1, b"".join(entries))


def masked_crc(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    rotated = crc // 2**15 + crc % 2**15 * 2**17
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked_crc(length) + payload + masked_crc(payload)
