import gzip
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tfrecord_writer import (
    bytes_feature,
    example,
    field,
    float_feature,
    int64_feature,
    masked_crc,
    record,
    unpacked_float_feature,
    unpacked_int64_feature,
    varint,
)

from hfgen.data.tfrecord import read_records, read_tfrecord_images
from hfgen.errors import UserError


def written(tmp_path, *payloads: bytes):
    path = tmp_path / "set.tfrec"
    path.write_bytes(b"".join(record(payload) for payload in payloads))
    return path


def images_in(path, column: str = "image") -> list[tuple[str, bytes]]:
    return list(read_tfrecord_images(path, column))


def test_the_writer_of_these_tests_masks_checksums_as_the_format_says():
    # The CRC-32C of "123456789" is 0xE3069283 (its published check value); rotated right by 15 bits it is 0x2507C60D.
    assert masked_crc(b"123456789") == struct.pack("<I", 0x2507C60D + 0xA282EAD8)


@pytest.mark.parametrize("size", [1, 127, 128, 300, 20_000])
def test_images_are_read_as_they_were_written_and_named_by_their_feature(tmp_path, size):
    contents = [np.random.default_rng(seed).bytes(size) for seed in range(3)]
    payloads = [
        example(image=bytes_feature(content), image_name=bytes_feature(name), target=bytes_feature(b"monet"))
        for content, name in zip(contents, [b"a", "é".encode(), b"\xff"], strict=True)
    ]
    names = ["set.tfrec#a", "set.tfrec#é", "set.tfrec#\ufffd"]
    assert images_in(written(tmp_path, *payloads)) == list(zip(names, contents, strict=True))


def test_images_without_a_name_are_named_by_their_offset(tmp_path):
    payloads = [example(image=bytes_feature(b"one")), example(image=bytes_feature(b"three"))]
    path = written(tmp_path, *payloads)
    offset = len(record(payloads[0]))
    assert images_in(path) == [("set.tfrec#byte 0", b"one"), (f"set.tfrec#byte {offset}", b"three")]


def test_records_come_with_their_offset(tmp_path):
    path = written(tmp_path, b"", b"abc", b"x" * 1000)
    assert list(read_records(path)) == [(0, b""), (16, b"abc"), (35, b"x" * 1000)]


PACKED = {
    "gzip": gzip.compress,
    "gzip in two parts": lambda content: gzip.compress(content[:33]) + gzip.compress(content[33:]),
    "zlib": zlib.compress,
    "zlib, stored": lambda content: zlib.compress(content, 0),
}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_files_give_the_same_images_whatever_they_are_called(tmp_path, packing):
    contents = [np.random.default_rng(seed).bytes(100_000 * seed + 1) for seed in range(3)]  # more than a read at once
    path = written(tmp_path, *(example(image=bytes_feature(content)) for content in contents))
    wanted = images_in(path)
    path.write_bytes(PACKED[packing](path.read_bytes()))
    assert images_in(path) == wanted and [content for _, content in wanted] == contents


@pytest.mark.parametrize("packing", ["gzip", "zlib"])
def test_a_packed_file_that_is_damaged_or_cut_off_is_an_error_that_names_it(tmp_path, packing):
    content = PACKED[packing](record(example(image=bytes_feature(np.random.default_rng(0).bytes(500)))))
    path = tmp_path / "set.tfrec"
    for position in range(14, len(content), 23):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        for broken in (content[:position], bytes(damaged)):
            path.write_bytes(broken)
            with pytest.raises(UserError, match=r"set\.tfrec: damaged TFRecord at byte \d+: "):
                images_in(path)


def test_an_empty_file_has_no_records(tmp_path):
    assert images_in(written(tmp_path)) == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(int64_feature(1, 300, -1, 2**63 - 1), id="packed integers"),
        pytest.param(unpacked_int64_feature(7, 300, -1), id="integers"),
        pytest.param(float_feature(1.5, -2.25, 1e30), id="packed floats"),
        pytest.param(unpacked_float_feature(1.5, -2.25), id="floats"),
        pytest.param(bytes_feature(b"other", b"more"), id="bytes"),
        pytest.param(bytes_feature(), id="no values"),
        pytest.param(b"", id="nothing"),
    ],
)
@pytest.mark.parametrize("order", [("image", "other"), ("other", "image")])
def test_features_of_other_kinds_are_passed_over(tmp_path, other, order):
    features = {"image": bytes_feature(b"the image"), "other": other}
    path = written(tmp_path, example(**{name: features[name] for name in order}))
    assert [content for _, content in images_in(path)] == [b"the image"]


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(varint(9 * 8 + 0) + varint(2**64 - 1), id="an integer"),
        pytest.param(varint(9 * 8 + 1) + b"\x0a\x01\x0a\x01\x0a\x01\x0a\x01", id="64 bits"),
        pytest.param(varint(9 * 8 + 5) + b"\x0a\x01\x0a\x01", id="32 bits"),
        pytest.param(field(9, b"\x0a\x01x"), id="bytes"),
        pytest.param(field(2**28, b"\x0a\x01x"), id="a large field number"),
    ],
)
def test_fields_that_a_later_version_of_the_format_might_add_are_passed_over(tmp_path, unknown):
    feature = unknown + field(1, unknown + field(1, b"the image") + unknown) + unknown
    entry = unknown + field(1, b"image") + unknown + field(2, feature) + unknown
    path = written(tmp_path, unknown + field(1, unknown + field(1, entry) + unknown) + unknown)
    assert images_in(path) == [("set.tfrec#byte 0", b"the image")]


def test_bytes_that_look_like_an_image_in_a_list_of_numbers_are_none(tmp_path):
    inner = bytes_feature(b"x")  # a valid list of bytes, but filed under the numbers
    path = written(tmp_path, example(image=field(3, inner), other=bytes_feature(b"y")))
    with pytest.raises(UserError, match=r"no bytes feature 'image', only \['other'\]"):
        images_in(path)


def test_of_several_values_the_first_is_the_image(tmp_path):
    assert images_in(written(tmp_path, example(image=bytes_feature(b"first", b"second"))))[0][1] == b"first"


def test_another_feature_may_be_chosen(tmp_path):
    path = written(tmp_path, example(image=bytes_feature(b"x"), photo=bytes_feature(b"y")))
    assert images_in(path, "photo") == [("set.tfrec#byte 0", b"y")]


def test_a_record_without_the_feature_is_an_error_naming_file_offset_and_features(tmp_path):
    good, bad = example(image=bytes_feature(b"x")), example(photo=bytes_feature(b"x"), size=int64_feature(3))
    path = written(tmp_path, good, bad)
    with pytest.raises(UserError) as raised:
        images_in(path)
    for told in (str(path), f"at byte {len(record(good))} ", "'image'", "['photo']", "--dataset_column"):
        assert told in str(raised.value)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x0a\xff", id="a length that is cut off"),
        pytest.param(b"\x0a\x05abc", id="a field that runs past the end"),
        pytest.param(b"\x0b", id="a group"),
        pytest.param(field(1, field(1, field(2, bytes_feature(b"x")))), id="an entry without a name"),
        pytest.param(field(1, field(1, field(1, b"\xff\xfe") + field(2, bytes_feature(b"x")))), id="a name no text"),
        pytest.param(varint(9 * 8 + 0) + b"\xff" * 10 + b"\x01", id="an integer of more than 64 bits"),
        pytest.param(b"\xff" * 100_000, id="an endless integer"),
    ],
)
def test_a_record_that_is_no_example_is_an_error_that_names_file_and_offset(tmp_path, payload):
    good = example(image=bytes_feature(b"x"))
    path = written(tmp_path, good, payload)
    with pytest.raises(UserError) as raised:
        images_in(path)
    assert str(path) in str(raised.value)
    assert f"at byte {len(record(good))} is not a tf.train.Example" in str(raised.value)


PAYLOADS = [example(image=bytes_feature(content), label=int64_feature(4)) for content in (b"one", b"three", b"seven")]
OFFSETS = [sum(len(record(payload)) for payload in PAYLOADS[:count]) for count in range(4)]


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_is_an_error_that_names_the_file_and_the_record_s_offset(tmp_path, flip):
    path = written(tmp_path, *PAYLOADS)
    whole = path.read_bytes()
    assert len(whole) == OFFSETS[3]
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        offset = max(offset for offset in OFFSETS if offset <= position)
        read = []
        with pytest.raises(UserError) as raised:
            for _, content in read_tfrecord_images(path):
                read.append(content)
        assert f"{path}: damaged TFRecord at byte {offset}: " in str(raised.value)
        what = "length" if position - offset < 12 else "content"
        assert f"the checksum of the record's {what} is wrong" in str(raised.value)
        assert read == [b"one", b"three", b"seven"][: OFFSETS.index(offset)]


def test_a_file_cut_off_within_a_record_is_an_error_that_names_file_and_offset(tmp_path):
    path = written(tmp_path, *PAYLOADS)
    whole = path.read_bytes()
    for length in set(range(len(whole))) - set(OFFSETS):
        path.write_bytes(whole[:length])
        offset = max(offset for offset in OFFSETS if offset <= length)
        with pytest.raises(UserError) as raised:
            images_in(path)
        assert f"{path}: damaged TFRecord at byte {offset}: the file is truncated" in str(raised.value)


@pytest.mark.parametrize("claimed", [2**30 + 1, 2**40, 2**63, 2**64 - 1, 2**64 - 4])
def test_a_huge_length_with_a_right_checksum_is_an_error_without_reading_it(tmp_path, claimed):
    path = tmp_path / "set.tfrec"
    length = struct.pack("<Q", claimed)
    path.write_bytes(length + masked_crc(length) + b"a little content")
    message = f"set.tfrec: damaged TFRecord at byte 0: the record claims a length of {claimed} bytes"
    with pytest.raises(UserError, match=message):
        images_in(path)


def test_a_length_beyond_the_end_with_a_right_checksum_is_an_error(tmp_path):
    path = tmp_path / "set.tfrec"
    length = struct.pack("<Q", 10**6)
    path.write_bytes(length + masked_crc(length) + b"a little content")
    with pytest.raises(UserError, match="set.tfrec: damaged TFRecord at byte 0: the file is truncated"):
        images_in(path)


def test_the_file_from_kaggle_holds_the_paintings_that_also_lie_beside_it(shared_data):
    path = shared_data / "monet" / "tfrec" / "monet00-60.tfrec"
    images = images_in(path)
    assert len(images) == len({name for name, _ in images}) == 60
    assert [content for _, content in images_in(path, "target")] == [b"monet"] * 60
    for _, content in images:
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.size) == ("JPEG", (256, 256))
    # Kaggle's JPEG files of the same names are the same paintings, encoded anew.
    name, content = images[17]
    recorded = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
    file = shared_data / "monet" / "jpg" / f"{name.removeprefix('monet00-60.tfrec#')}.jpg"
    assert np.abs(recorded - np.asarray(Image.open(file), dtype=float)).mean() < 12
