"""Damaged metadata never cost a picture; what its colours need is kept."""

import zlib

import numpy as np
import pytest
from picture_files import encoded, noise, png_chunk, smooth
from PIL import Image

from hfgen.data.decode import UnreadableImageError, decode_image
from hfgen.data.metadata import without_metadata
from hfgen.data.settings import DataSettings
from hfgen.demo.drawing import open_upload


# pytest shows the remarks of Pillow about damaged files; in a run they are ignored.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SIDE = 16
PICTURE = noise(SIDE, SIDE)
PNG = encoded(PICTURE)
HEADER, BODY, END = PNG[:33], PNG[33:-12], PNG[-12:]
# Chunks that Pillow refuses: damaged ones, a wrong checksum, texts that unpack to far more than a text.
DAMAGED_CHUNKS = {
    "EXIF that is no TIFF": png_chunk(b"eXIf", b"garbage"),
    "EXIF cut off": png_chunk(b"eXIf", b"x"),
    "empty profile": png_chunk(b"iCCP", b""),
    "profile of unknown packing": png_chunk(b"iCCP", b"name\0\x07packed"),
    "text of unknown packing": png_chunk(b"zTXt", b"key\0\x07packed"),
    "text that unpacks to 80 MB": png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(80_000_000))),
    "resolution cut off": png_chunk(b"pHYs", b"x"),
    "gamma cut off": png_chunk(b"gAMA", b"x"),
    "primaries cut off": png_chunk(b"cHRM", b"x"),
    "animation cut off": png_chunk(b"acTL", b"x"),
    "transparency cut off": png_chunk(b"tRNS", b"x"),
    "wrong checksum": png_chunk(b"tEXt", b"key\0text")[:-4] + b"1234",
}


def pixels_of(content: bytes) -> np.ndarray:
    return decode_image("the picture", content, DataSettings(sample_size=SIDE)).pixels[0]


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


@pytest.mark.parametrize("kind", DAMAGED_CHUNKS)
@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
def test_a_damaged_chunk_does_not_make_a_png_unreadable(kind, place, tmp_path):
    chunk = DAMAGED_CHUNKS[kind]
    content = HEADER + chunk + BODY + END if place == "before the pixels" else HEADER + BODY + chunk + END
    assert np.array_equal(pixels_of(content), PICTURE)
    (tmp_path / "upload.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_upload(str(tmp_path / "upload.png"), (SIDE, SIDE))), PICTURE)


@pytest.mark.parametrize("file_format", ["png", "webp", "jpeg", "tiff"])
@pytest.mark.parametrize("exif", [b"garbage", b"x", b"Exif\0\0garbage"])
def test_exif_that_is_no_tiff_does_not_make_a_picture_unreadable(file_format, exif):
    options = {"exif": exif} if file_format != "tiff" else {"tiffinfo": {0x8769: 0x7FFFFFFF}}
    picture = smooth(SIDE, SIDE)
    assert np.abs(pixels_of(encoded(picture, file_format, quality=100, **options)) - picture.astype(int)).max() < 40


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "body", [b"", b"JFIF\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0008BIM\x03", b"Adobe", b"Exif\0\0x"]
)
def test_a_damaged_segment_does_not_make_a_jpeg_unreadable(marker, body):
    content = encoded(smooth(SIDE, SIDE), "jpeg")
    wanted = pixels_of(content)
    for start in (2, 20):  # before and after the JFIF segment
        assert np.array_equal(pixels_of(content[:start] + segment(marker, body) + content[start:]), wanted)


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "CMYK", "RGBA"])
def test_without_metadata_a_picture_keeps_its_colours(mode):
    image = Image.fromarray(smooth(SIDE, SIDE)).convert(mode)
    if mode == "CMYK":  # inverted, as its Adobe segment says
        content = encoded(image, "jpeg", comment="text", quality=100)
    else:
        transparent = {"P": 0, "L": 9, "RGB": (9, 9, 9)}.get(mode)
        content = encoded(image, "png", dpi=(72, 72), **({} if transparent is None else {"transparency": transparent}))
    bare = without_metadata(content)
    assert len(bare) < len(content)
    assert np.array_equal(pixels_of(bare), pixels_of(content))


@pytest.mark.parametrize(
    "content", [b"", b"text", encoded(PICTURE, "webp"), PNG[:20], PNG[:8] + b"\0", b"\xff\xd8\xff"]
)
def test_other_files_and_damaged_structures_have_no_metadata_to_leave_out(content):
    assert without_metadata(content) is None


@pytest.mark.parametrize(
    "content", [HEADER + DAMAGED_CHUNKS["EXIF cut off"] + BODY[:100], encoded(PICTURE, "jpeg")[:-200]]
)
def test_damaged_pixels_are_unreadable_with_or_without_metadata(content):
    with pytest.raises(UnreadableImageError):
        pixels_of(content)
