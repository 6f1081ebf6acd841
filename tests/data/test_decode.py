import contextlib
import io
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from picture_files import encoded, noise, png, smooth
from PIL import Image

from hfgen.data.decode import DecodedImage, UnreadableImageError, decode_image
from hfgen.data.rgb import to_rgb, upright
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError


WHITE = 255

# pytest shows the remarks of Pillow about damaged files; in a run they are ignored.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def decode(content: bytes, **settings) -> DecodedImage:
    return decode_image("the picture", content, DataSettings(**{"sample_size": 16, **settings}))


def pixels_of(content: bytes, **settings) -> np.ndarray:
    (pixels,) = decode(content, **settings).pixels
    return pixels


def flat(mode: str, color, **options) -> Image.Image:
    image = Image.new(mode, (16, 16), color)
    image.info.update(options)
    return image


# The EXIF standard says where the stored picture's row 0 and column 0 belong; here as numpy sees it.
DISPLAYED = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("number", DISPLAYED)
def test_a_picture_is_turned_as_its_exif_orientation_says(number):
    stored = noise(16, 24)
    decoded = decode(encoded(stored, exif=orientation(number)), crop="random")
    assert np.array_equal(decoded.pixels[0], DISPLAYED[number](stored))
    assert decoded.size == (24, 16)  # of the file, as it is stored


@pytest.mark.parametrize("number", DISPLAYED)
def test_a_jpeg_decoded_at_a_part_of_its_size_is_still_turned(number):
    stored = smooth(256, 384)  # more than four times 16: decoded at an eighth
    content = encoded(stored, "jpeg", quality=95, exif=orientation(number))
    small = np.asarray(Image.fromarray(stored).resize((24, 16), Image.Resampling.BICUBIC))
    wanted = DISPLAYED[number](small).astype(int)
    pixels = pixels_of(content, crop="random")
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= 4


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_damaged_exif_does_not_make_a_picture_unreadable(exif):
    picture = smooth(16, 16)
    assert np.abs(pixels_of(encoded(picture, "jpeg", quality=100, exif=exif)) - picture.astype(int)).max() < 30


# (file, its mode, the RGB of each of its pixels): worked out by hand. Alpha 51 is a fifth: 0.2 * 10 + 0.8 * 255 = 206.
EXACT_MODES = {
    "grey": (encoded(flat("L", 77)), "L", (77, 77, 77)),
    "grey with alpha": (encoded(flat("LA", (10, 51))), "LA", (206, 206, 206)),
    "palette": (encoded(flat("RGB", (12, 200, 99)).quantize(4)), "P", (12, 200, 99)),
    "RGBA": (encoded(flat("RGBA", (10, 20, 30, 51))), "RGBA", (206, 208, 210)),
    "RGBA, clear": (encoded(flat("RGBA", (10, 20, 30, 0))), "RGBA", (255, 255, 255)),
    "RGBA, opaque": (encoded(flat("RGBA", (10, 20, 30, 255))), "RGBA", (10, 20, 30)),
    "RGBA webp": (encoded(flat("RGBA", (10, 20, 30, 51)), "webp", lossless=True, exact=True), "RGBA", (206, 208, 210)),
    "white bits": (encoded(flat("1", 1)), "1", (255, 255, 255)),
    "black bits": (encoded(flat("1", 0)), "1", (0, 0, 0)),
    "CMYK, cyan": (encoded(flat("CMYK", (255, 0, 0, 0)), "tiff"), "CMYK", (0, 255, 255)),
    "CMYK, black": (encoded(flat("CMYK", (0, 0, 0, 255)), "tiff"), "CMYK", (0, 0, 0)),
    "CMYK, half inked": (encoded(flat("CMYK", (51, 0, 102, 102)), "tiff"), "CMYK", (122, 153, 92)),
    "16-bit white": (encoded(Image.fromarray(np.full((16, 16), 65535, np.uint16))), "I;16", (255, 255, 255)),
    "transparent grey": (encoded(flat("L", 9), transparency=9), "L", (255, 255, 255)),
    "transparent RGB": (encoded(flat("RGB", (9, 8, 7)), transparency=(9, 8, 7)), "RGB", (255, 255, 255)),
}


@pytest.mark.parametrize("kind", EXACT_MODES)
def test_every_mode_becomes_its_rgb(kind):
    content, mode, color = EXACT_MODES[kind]
    decoded = decode(content)
    assert decoded.mode == mode
    assert decoded.pixels[0].dtype == np.uint8 and decoded.pixels[0].shape == (16, 16, 3)
    assert np.abs(decoded.pixels[0].astype(int) - color).max() <= (1 if mode == "CMYK" else 0)


def test_a_transparent_entry_of_a_palette_is_laid_over_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([200, 10, 60, 3, 90, 160])
    image.paste(1, (8, 0, 16, 16))
    pixels = pixels_of(encoded(image, transparency=0))
    assert (pixels[:, :8] == WHITE).all()
    assert (pixels[:, 8:] == (3, 90, 160)).all()


# (bits, colour type, the two pixels of a row, the transparent colour, the level of the other pixel)
KEYED = {
    "1-bit grey": (1, 0, b"\x40", b"\0\0", 255),
    "2-bit grey": (2, 0, b"\x60", b"\0\x01", 170),
    "4-bit grey": (4, 0, b"\x1a", b"\0\x01", 170),
    "8-bit grey": (8, 0, b"\x10\xaa", b"\0\x10", 170),
    "16-bit grey": (16, 0, b"\x10\x11\xaa\xaa", b"\x10\x11", 170),
    "RGB": (8, 2, b"\x10\x20\x30" + b"\xaa" * 3, b"\0\x10\0\x20\0\x30", 170),
    "16-bit RGB": (16, 2, b"\x10\0\x20\0\x30\0" + b"\xaa" * 6, b"\x10\0\x20\0\x30\0", 170),
}


@pytest.mark.parametrize("kind", KEYED)
def test_the_transparent_colour_of_a_png_becomes_white_whatever_its_depth(kind):
    bit_depth, color_type, row, transparent, other = KEYED[kind]
    content = png(2, 1, bit_depth, color_type, b"\0" + row, transparent)
    image = np.asarray(to_rgb(upright(Image.open(io.BytesIO(content))), 16))
    assert image.tolist() == [[[255] * 3, [other] * 3]]


@pytest.mark.parametrize("file_format", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_to_eight_bits(file_format):
    levels = np.arange(256).reshape(16, 16)
    pixels = pixels_of(encoded(Image.fromarray((levels * 257).astype(np.uint16)), file_format))
    assert np.array_equal(pixels, np.repeat(levels[..., None], 3, axis=2))


def test_sixteen_bit_rgb_is_scaled_to_eight_bits():
    picture = noise(16, 16)
    rows = b"".join(b"\0" + row.tobytes() for row in (picture * np.uint16(257)).astype(">u2"))
    assert np.array_equal(pixels_of(png(16, 16, bit_depth=16, color_type=2, rows=rows)), picture)


def test_thirty_two_bit_pixels_are_read_if_sixteen_bits_hold_them():
    levels = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(pixels_of(encoded(Image.fromarray(levels * 257), "tiff"))[..., 0], levels)


@pytest.mark.parametrize(("highest", "bits"), [(255, 8), (256, 10), (1024, 12), (4095, 12), (4096, 14), (16384, 16)])
def test_a_single_wide_grey_picture_is_scaled_by_the_bits_that_its_values_use(highest, bits):
    values = np.linspace(0, highest, 256).astype(np.int32).reshape(16, 16)
    wanted = np.round(values * 255 / (2**bits - 1))
    for content in (encoded(Image.fromarray(values.astype(np.uint16))), encoded(Image.fromarray(values), "tiff")):
        assert decode(content).grey_bits == bits
        assert np.array_equal(pixels_of(content)[..., 0], wanted)


def test_a_tiff_of_twelve_bits_a_pixel_is_not_dark():
    values = np.arange(256).reshape(-1, 2) * 16  # two values in three bytes
    packed = b"".join(int(pair[0] << 12 | pair[1]).to_bytes(3, "big") for pair in values)
    entries = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(packed)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    pixels = pixels_of(header + packed + struct.pack("<H", len(entries)) + directory + bytes(4))
    assert np.array_equal(pixels[..., 0], np.round(np.arange(256).reshape(16, 16) * 16 * 255 / 4095))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((16, 16), 0.5, np.float32), "floating-point pixels of unknown range: convert them to 8 or 16 bits"),
        (np.full((16, 16), 65536, np.int32), "32-bit pixels outside the 16-bit range: convert them to 16 bits"),
        (np.full((16, 16), -1, np.int32), "32-bit pixels outside the 16-bit range: convert them to 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_unreadable_and_the_reason_is_told(pixels, reason):
    with pytest.raises(UnreadableImageError) as raised:
        decode(encoded(Image.fromarray(pixels), "tiff"))
    assert str(raised.value) == reason


@pytest.mark.parametrize(
    ("file_format", "options"), [("png", {}), ("bmp", {}), ("tiff", {}), ("webp", {"lossless": True})]
)
def test_a_lossless_file_of_the_training_size_keeps_its_pixels(file_format, options):
    picture = noise(16, 16)
    decoded = decode(encoded(picture, file_format, **options))
    assert np.array_equal(decoded.pixels[0], picture)
    assert decoded.format == file_format.upper()


@pytest.mark.parametrize("file_format", ["gif", "tiff", "webp", "png"])
def test_the_first_frame_or_page_is_taken(file_format):
    frames = [Image.new("RGB", (16, 16), color) for color in [(200, 30, 10), (0, 250, 0), (0, 0, 250)]]
    options = {"lossless": True} if file_format == "webp" else {}
    content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert (pixels_of(content) == (200, 30, 10)).all()


PHOTO = encoded(smooth(64, 64, waves=3), "jpeg")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"this is a text\n" * 40, id="text"),
        pytest.param(PHOTO[: len(PHOTO) // 2], id="truncated JPEG"),
        pytest.param(PHOTO[:30], id="truncated JPEG header"),
        pytest.param(encoded(noise(16, 16))[:-200], id="truncated PNG"),
        pytest.param(encoded(noise(16, 16), "webp")[:-200], id="truncated webp"),
        pytest.param(encoded(noise(16, 16), "tiff")[:-200], id="truncated TIFF"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="vector graphics"),
    ],
)
def test_what_is_no_whole_image_is_unreadable_and_a_reason_is_told(content):
    with pytest.raises(UnreadableImageError) as raised:
        decode(content)
    assert str(raised.value)


def test_a_truncated_jpeg_is_unreadable_when_decoded_at_a_part_of_its_size_too():
    content = encoded(smooth(256, 256, waves=5), "jpeg")
    with pytest.raises(UnreadableImageError):
        decode(content[: len(content) * 3 // 4], sample_size=8)


@pytest.mark.parametrize("cut", range(0, 700, 23))
def test_a_file_with_a_flipped_byte_is_an_image_or_unreadable_but_nothing_else(cut):
    for file_format in ("png", "jpeg", "gif", "tiff", "webp", "bmp"):
        content = bytearray(encoded(noise(12, 12), file_format))
        content[cut % len(content)] ^= 0xFF
        try:
            assert pixels_of(bytes(content)).shape == (16, 16, 3)
        except (UnreadableImageError, UserError):  # a UserError where the flipped byte claims a huge size
            pass


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (16, 24, slice(0, 16), slice(4, 20)),
        (16, 27, slice(0, 16), slice(5, 21)),
        (30, 16, slice(7, 23), slice(0, 16)),
        (16, 16, slice(0, 16), slice(0, 16)),
    ],
)
def test_the_center_crop_takes_the_middle_of_the_long_side(height, width, rows, columns):
    picture = noise(height, width)
    assert np.array_equal(pixels_of(encoded(picture)), picture[rows, columns])


@pytest.mark.parametrize(("height", "width"), [(64, 192), (128, 64)])
def test_a_center_crop_equals_the_middle_of_the_whole_picture_resized(height, width):
    picture = noise(height, width)
    whole = np.asarray(Image.fromarray(picture).resize((width // 4, height // 4), Image.Resampling.BICUBIC))
    top, left = (height // 4 - 16) // 2, (width // 4 - 16) // 2
    wanted = whole[top : top + 16, left : left + 16].astype(int)
    assert np.abs(pixels_of(encoded(picture)) - wanted).max() <= 1


def test_shrinking_averages_instead_of_leaving_pixels_out():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = pixels_of(encoded(stripes)).astype(int)
    assert np.abs(pixels[:, 2:-2] - 127.5).max() < 8


@pytest.mark.parametrize(("height", "width", "shape"), [(32, 48, (16, 24)), (50, 32, (25, 16)), (8, 11, (16, 22))])
def test_for_random_crops_the_short_side_is_resized_and_the_long_side_kept_whole(height, width, shape):
    picture = smooth(height, width)
    pixels = pixels_of(encoded(picture), crop="random")
    assert pixels.shape == (*shape, 3)
    whole = Image.fromarray(picture).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels, np.asarray(whole))


def test_no_side_of_a_random_crop_is_rounded_below_the_training_size():
    for width in range(100, 117):
        assert min(pixels_of(encoded(noise(101, width)), crop="random").shape[:2]) == 16


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 31), (33, 20)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_five_crop_adds_the_four_corners_and_the_middle(height, width, crop):
    picture = noise(height, width)  # 4/5 of the short side of 20 is 16: the corners keep their pixels
    first, *corners = decode(encoded(picture), five_crop=True, crop=crop).pixels
    middle_row, middle_column = (height - 16) // 2, (width - 16) // 2
    wanted = [
        picture[:16, :16],
        picture[:16, -16:],
        picture[-16:, :16],
        picture[-16:, -16:],
        picture[middle_row : middle_row + 16, middle_column : middle_column + 16],
    ]
    assert len(corners) == 5
    for corner, expected in zip(corners, wanted, strict=True):
        assert np.array_equal(corner, expected)
    (alone,) = decode(encoded(picture), crop=crop).pixels
    assert np.array_equal(first, alone)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (15, 9)])
def test_a_small_picture_is_enlarged(height, width):
    picture = smooth(height, width)
    pixels = pixels_of(encoded(picture))
    assert pixels.shape == (16, 16, 3)
    assert len(decode(encoded(picture), five_crop=True).pixels) == 6
    assert np.abs(pixels.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 60


def test_a_flat_picture_keeps_its_color_when_enlarged():
    assert (pixels_of(encoded(np.full((3, 3, 3), 201, np.uint8))) == 201).all()


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_bomb_is_refused_by_name_and_the_remedy_is_told(side):
    rows = bytes((side // 8 + 1) * side)  # 1-bit grey, all black: a small file of a great many pixels
    content = png(side, side, bit_depth=1, color_type=0, rows=rows)
    assert len(content) < side * side / 500
    with pytest.raises(UserError, match="the picture: .*bomb.*--max_image_pixels"):
        decode(content, max_image_pixels=80_000_000)


def test_exactly_max_image_pixels_are_allowed_and_one_more_is_refused():
    content = encoded(noise(20, 30))
    assert decode(content, max_image_pixels=600)
    with pytest.raises(UserError, match="30 x 20 pixels"):
        decode(content, max_image_pixels=599)


def test_a_limit_above_that_of_pillow_is_heeded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(noise(20, 30)), max_image_pixels=600)


@pytest.mark.parametrize("of_the_process", [100, None])
def test_the_limit_of_the_process_is_left_as_it_was(monkeypatch, of_the_process):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", of_the_process)
    allowed, bomb, broken = encoded(noise(20, 30)), encoded(noise(60, 60)), b"no image"

    def each(content):
        with contextlib.suppress(UserError, UnreadableImageError):
            decode(content, max_image_pixels=600)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(each, [allowed, bomb, broken] * 200))
    finally:
        sys.setswitchinterval(interval)
    assert of_the_process == Image.MAX_IMAGE_PIXELS


def test_a_thin_strip_that_would_be_resized_to_a_huge_one_is_refused():
    strip = encoded(Image.new("L", (5000, 1)))
    assert pixels_of(strip).shape == (16, 16, 3)
    with pytest.raises(UserError, match="80000 x 16 pixels.*--max_image_pixels"):
        decode(strip, crop="random", max_image_pixels=1_000_000)


def full_decode(content: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("side", [63, 64, 128, 200, 512, 1000])
def test_a_large_jpeg_decoded_at_a_part_of_its_size_looks_as_decoded_in_full(side):
    content = encoded(smooth(side, side, waves=2), "jpeg", quality=95)
    assert np.abs(pixels_of(content) - full_decode(content, 16)).max() <= 4


@pytest.mark.parametrize("side", [65, 67, 201, 257])
def test_a_large_jpeg_of_an_odd_side_is_stretched_by_less_than_a_pixel(side):
    content = encoded(smooth(side, side, waves=1), "jpeg", quality=95)  # 65 pixels, halved, become 33
    wanted = full_decode(content, 16)
    steepest = np.abs(np.diff(wanted, axis=1)).max() + np.abs(np.diff(wanted, axis=0)).max()
    assert np.abs(pixels_of(content) - wanted).max() < 0.5 * steepest


def test_a_large_jpeg_loses_no_detail_that_the_training_size_can_show():
    # Waves of 3 pixels at the training size: decoding at less than that size would blur them.
    content = encoded(smooth(256, 256, waves=32 / 3), "jpeg", quality=95)
    wanted = full_decode(content, 32)
    assert np.abs(pixels_of(content, sample_size=32) - wanted).mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_large_jpeg_of_another_mode_is_decoded_too(mode):
    picture = Image.fromarray(smooth(256, 256)).convert(mode)
    decoded = decode(encoded(picture, "jpeg", quality=95))
    wanted = np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert decoded.mode == mode and decoded.size == (256, 256)
    assert np.abs(decoded.pixels[0] - wanted).max() <= 8


def test_the_facts_of_the_file_are_told():
    decoded = decode(encoded(smooth(300, 200), "jpeg"))
    assert (decoded.format, decoded.mode, decoded.size) == ("JPEG", "RGB", (200, 300))


def test_a_png_of_a_huge_claimed_size_and_no_pixels_is_refused():
    header = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    content = encoded(noise(4, 4))
    with pytest.raises((UserError, UnreadableImageError)):
        decode(content[:16] + header + content[24:])


@pytest.mark.parametrize("kind", ["EPS", "WMF"])
def test_a_format_for_which_pillow_runs_another_program_is_no_image(monkeypatch, kind):
    def run(*arguments, **options):
        raise AssertionError("another program is run")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    eps = encoded(noise(16, 16), "eps")
    wmf = (
        b"\xd7\xcd\xc6\x9a\x00\x00" + struct.pack("<4hH", 0, 0, 16, 16, 96) + bytes(6) + b"\x01\x00\t\x00" + bytes(40)
    )
    with pytest.raises(UnreadableImageError, match="not an image format that Pillow can read"):
        decode({"EPS": eps, "WMF": wmf + bytes(40)}[kind])
