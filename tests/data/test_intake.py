import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.csgraph
from picture_files import encoded, noise
from PIL import Image

from hfgen.data import intake
from hfgen.data.decode import DecodedImage
from hfgen.data.intake import (
    FactsTable,
    ImageFacts,
    IntakeReport,
    brightness_range,
    image_facts,
    make_report,
    perceptual_hash,
)
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images


def scene(seed: int, side: int = 64) -> np.ndarray:
    """A picture of soft shapes, uint8 `(side, side, 3)`; each seed gives quite another one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def reencoded(picture: np.ndarray, file_format: str, **options) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(picture, file_format, **options))).convert("RGB"))


def facts_of(**pictures: np.ndarray) -> list[ImageFacts]:
    return [
        image_facts(name, DecodedImage([picture], "PNG", "RGB", picture.shape[1::-1]))
        for name, picture in pictures.items()
    ]


def fact(number: int, **values) -> ImageFacts:
    """The facts of a picture like no other."""
    spread = int.from_bytes(np.random.default_rng(number).bytes(8), "big")
    unlike = {"format": "PNG", "mode": "RGB", "size": (64, 64), "digest": b"%d" % number, "perceptual_hash": spread}
    return ImageFacts(name=f"{number}.png", **(unlike | values))


def report_on(facts: list[ImageFacts], **values) -> IntakeReport:
    given = {"source": "folder /data", "unreadable": [], "skipped": {}, "sample_size": 64, "dropped": 0}
    return make_report(facts=facts, training_images=len(facts), **(given | values))


# Many images


def test_a_table_of_facts_gives_back_what_was_added():
    facts = [
        fact(1, digest=bytes(range(16)), grey_bits=12, darkest=7, brightest=250),
        fact(2, digest=bytes(16), format="JPEG", mode="L", size=(70_000, 3)),
        fact(3, digest=bytes(16))._replace(name="caf\u00e9/\udcff.png"),  # a file name that is not UTF-8
        fact(4, digest=bytes(range(16)))._replace(name=""),
    ]
    table = FactsTable()
    for one in facts:
        table.append(one)
    assert len(table) == 4 and list(table) == facts
    assert report_on(table) == report_on(facts)


def test_a_report_on_many_images_takes_few_bytes_of_memory_for_each(monkeypatch):
    monkeypatch.setattr(intake, "MAX_COMPARED_IMAGES", 0)
    count, table = 20_000, FactsTable()
    tracemalloc.start()
    try:
        for index in range(count):
            digest = (index + 2**120).to_bytes(16, "little")
            table.append(ImageFacts(f"shard-00001.parquet#{index}", "PNG", "RGB", (640, 480), digest, 2**63 + index))
        kept, _ = tracemalloc.get_traced_memory()
        report_on(table)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept / count < 150, kept / count  # with a list: 290, and more if sizes differ
    assert peak / count < 250, peak / count


# Duplicates


def test_pictures_with_the_same_pixels_are_exact_duplicates_and_no_near_ones():
    picture = scene(1)
    report = report_on(facts_of(a=picture, b=scene(2), c=picture.copy(), d=scene(3), e=scene(2), f=picture))
    assert report.exact_duplicates == [["a", "c", "f"], ["b", "e"]]
    assert report.near_duplicates == []


def test_a_single_other_pixel_makes_a_near_duplicate_of_an_exact_one():
    altered = scene(1).copy()
    altered[5, 6, 0] ^= 1
    report = report_on(facts_of(a=scene(1), b=altered))
    assert report.exact_duplicates == []
    assert report.near_duplicates == [["a", "b"]]


def test_the_same_bytes_in_another_shape_are_another_picture():
    picture = noise(64, 16)
    assert report_on(facts_of(a=picture, b=picture.reshape(16, 64, 3))).exact_duplicates == []


def brighter(picture: np.ndarray) -> np.ndarray:
    return np.uint8(20 + picture * 0.8)


def resized(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((100, 100)).resize((64, 64)))


EDITS = {
    "JPEG": lambda picture: reencoded(picture, "jpeg", quality=50),
    "webp": lambda picture: reencoded(picture, "webp", quality=50),
    "brighter": brighter,
    "resized": resized,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_is_found_among_other_pictures(edit):
    pictures = {f"scene{seed}": scene(seed) for seed in range(30)} | {"copy": EDITS[edit](scene(17))}
    report = report_on(facts_of(**pictures))
    assert report.near_duplicates == [["scene17", "copy"]]
    assert report.exact_duplicates == []


def test_different_pictures_are_no_near_duplicates():
    assert report_on(facts_of(**{str(seed): scene(seed) for seed in range(200)})).near_duplicates == []


def test_a_mirrored_or_turned_picture_is_another_one():
    picture = scene(4)
    report = report_on(facts_of(a=picture, b=picture[:, ::-1], c=picture[::-1], d=np.rot90(picture)))
    assert report.near_duplicates == []


@pytest.mark.parametrize(
    ("bits", "near"), [(0b1111, True), (0b11111, False), (0x8000_8000_0800_0001, True), (0, True)]
)
def test_hashes_that_differ_in_at_most_four_bits_are_near(bits, near):
    pair = [fact(1, perceptual_hash=0x0123_4567_89AB_CDEF), fact(2, perceptual_hash=0x0123_4567_89AB_CDEF ^ bits)]
    assert report_on(pair).near_duplicates == ([["1.png", "2.png"]] if near else [])


def test_each_near_duplicate_is_in_one_group_and_copies_only_by_their_first():
    same = {"perceptual_hash": 5}
    facts = [fact(1, **same), fact(2, **same), fact(3, digest=b"1", **same), fact(4), fact(5, **same)]
    report = report_on(facts)
    assert report.exact_duplicates == [["1.png", "3.png"]]
    assert report.near_duplicates == [["1.png", "2.png", "5.png"]]


def test_near_duplicates_of_near_duplicates_are_in_one_group():
    chain = [fact(number, perceptual_hash=(1 << 4 * number) - 1) for number in (3, 0, 9, 2, 1, 5)]  # 4 bits a step
    report = report_on([*chain, fact(20), fact(21)])
    assert report.near_duplicates == [["3.png", "0.png", "2.png", "1.png"]]


def test_groups_of_near_duplicates_are_those_that_all_pairs_of_them_join():
    random = np.random.default_rng(0)
    facts = [
        fact(
            number,
            perceptual_hash=(0xFFFF << 16 * int(random.integers(4)))
            ^ sum(1 << int(bit) for bit in random.integers(0, 63, 3)),
        )
        for number in range(60)
    ]
    hashes = np.array([each.perceptual_hash for each in facts], np.uint64)
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= 4
    count, labels = scipy.sparse.csgraph.connected_components(near)
    wanted = [[f"{n}.png" for n in np.flatnonzero(labels == label)] for label in range(count)]
    assert 1 < sum(len(group) > 1 for group in wanted)
    assert report_on(facts).near_duplicates == [group for group in wanted if len(group) > 1]


def test_the_report_on_the_frames_of_one_scene_is_short():
    frames = [
        fact(number, perceptual_hash=0xFFFF ^ (1 << number % 16) ^ (1 << 40 + number % 3)) for number in range(4000)
    ]
    report = report_on(frames)
    assert len(report.near_duplicates) == 1 and len(report.near_duplicates[0]) == 4000
    assert len(json.dumps(report.to_dict(), indent=1)) < 100_000
    assert "near duplicates: 3999;" in str(report) and "4.png and 3995 more" in str(report)


def test_of_the_64_bits_of_a_perceptual_hash_half_are_set():
    # 31 of 63 frequencies lie above their median; the mean brightness makes 32.
    hashes = [perceptual_hash(scene(seed, side)) for seed, side in enumerate([8, 31, 32, 64, 200])]
    assert [value.bit_count() for value in hashes] == [32] * 5
    assert all(0 <= value < 2**64 for value in hashes)


def test_beyond_the_limit_near_duplicates_are_not_searched_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(intake, "MAX_COMPARED_IMAGES", 3)
    same = [fact(number, perceptual_hash=5) for number in range(4)]
    assert len(report_on(same[:3]).near_duplicates[0]) == 3
    report = report_on(same)
    assert report.near_duplicates is None
    assert "near duplicates: not searched" in str(report)
    assert any("not searched for: there are more than 3 images" in warning for warning in report.warnings)


# Counts


def test_the_report_counts_what_a_folder_holds(tmp_path):
    Image.fromarray(noise(30, 40, 1)).save(tmp_path / "a.png")
    Image.fromarray(noise(30, 40, 2)).save(tmp_path / "b.jpg")
    Image.fromarray(noise(90, 64, 3)).save(tmp_path / "c.png")
    Image.fromarray(noise(70, 64, 4)).convert("L").save(tmp_path / "d.png")
    Image.fromarray(noise(63, 200, 5)).convert("CMYK").save(tmp_path / "e.jpg")
    (tmp_path / "f.png").write_bytes(b"this is text")
    (tmp_path / "labels.csv").write_text("a,b")
    report = load_images(DataSettings(dataset=str(tmp_path), sample_size=64, five_crop=True)).report
    assert report.source == f"folder {tmp_path}"
    assert report.images == 5
    assert report.training_images == 30
    assert report.sample_size == 64
    assert report.formats == {"PNG": 3, "JPEG": 2}
    assert report.modes == {"RGB": 3, "L": 1, "CMYK": 1}
    assert report.sizes == {"40 x 30": 2, "64 x 90": 1, "64 x 70": 1, "200 x 63": 1}
    assert report.short_side == [30, 63, 64]
    assert report.upsampled == 3  # 30, 30 and 63 pixels; 64 is just enough
    assert [name for name, _ in report.unreadable] == ["f.png"]
    assert report.not_read == 1
    assert report.exact_duplicates == [] and report.dropped == 0


def test_only_the_five_most_frequent_sizes_are_told_most_frequent_first():
    sides = [10, 20, 20, 30, 30, 30, 40, 40, 40, 40, *[50] * 5, *[60] * 6]
    report = report_on([fact(number, size=(side, 7)) for number, side in enumerate(sides)])
    assert list(report.sizes.items()) == [("60 x 7", 6), ("50 x 7", 5), ("40 x 7", 4), ("30 x 7", 3), ("20 x 7", 2)]


# Warnings


def test_few_images_are_warned_of():
    few, enough = (report_on([fact(number) for number in range(count)]) for count in (999, 1000))
    assert len(few.warnings) == 1 and few.warnings[0].startswith("only 999 images: a generator may memorise them")
    assert enough.warnings == []
    assert report_on([fact(1)]).warnings[0].startswith("only 1 image: a generator may memorise it;")


def test_enlarged_images_are_warned_of():
    facts = [fact(number, size=(64, 200)) for number in range(1000)] + [fact(1001, size=(63, 200))]
    (warning,) = report_on(facts).warnings
    assert warning.startswith("1 image is smaller than 64 pixels and was enlarged")


def test_identical_images_are_warned_of_unless_they_are_dropped():
    facts = [fact(number) for number in range(1000)] + [fact(1)]
    (warning,) = report_on(facts).warnings
    assert "--drop_duplicates" in warning
    assert report_on(facts, dropped=1).warnings == []


@pytest.mark.parametrize(
    ("suffix", "noted"),
    [
        (".heic", "unsupported formats: .heic 2; convert them"),
        (".parquet", "may contain more images: .parquet 2;"),
        (".csv", None),
    ],
)
def test_skipped_files_that_probably_hold_images_are_warned_of(suffix, noted):
    warnings = report_on([fact(number) for number in range(1000)], skipped={suffix: 2}).warnings
    assert (not warnings) if noted is None else (len(warnings) == 1 and noted in warnings[0])


def test_the_report_of_a_cached_data_set_counts_the_files_that_are_there_now(image_folder):
    settings = DataSettings(dataset=str(image_folder), sample_size=16)
    assert load_images(settings).report.not_read == 0
    (image_folder / "new.heic").write_bytes(b"content")
    report = load_images(settings).report
    assert report.not_read == 1 and report.skipped == {".heic": 1}
    assert "other files: 1 (.heic 1)" in str(report) and any(".heic" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("darkest", "brightest", "noted"),
    [(0, 15, "dark: hardly any"), (0, 63, "dark: "), (0, 64, None), (200, 231, "low contrast: "), (200, 232, None)],
)
def test_dark_and_low_contrast_data_sets_are_warned_of(darkest, brightest, noted):
    same = [fact(number, darkest=darkest, brightest=brightest) for number in range(900)]
    report = report_on(same + [fact(number) for number in range(900, 1000)])  # a few other images change nothing
    assert report.brightness == [darkest, brightest]
    assert (not report.warnings) if noted is None else (len(report.warnings) == 1 and noted in report.warnings[0])


def test_the_range_of_brightness_leaves_out_a_hundredth_at_each_end():
    pixels = np.full((10, 100, 3), 50, np.uint8)
    pixels[:5, :] = 180
    pixels[0, :5], pixels[9, :5] = 255, 0  # 5 of 1000 pixels each
    assert brightness_range(pixels) == (50, 180)
    assert brightness_range(np.full((4, 4, 3), 7, np.uint8)) == (7, 7)


# Printed and kept


def full_report() -> IntakeReport:
    unreadable = [
        ("bad.png", "not an image format that Pillow can read"),
        ("ünknown.jpg", "OSError: image file is truncated"),
    ]
    facts = [fact(1), fact(2, digest=b"1"), fact(3, perceptual_hash=9), fact(4, perceptual_hash=8, size=(10, 20))]
    return report_on(facts, unreadable=unreadable, skipped={".heic": 2, ".csv": 1}, dropped=1)


def test_the_report_survives_json():
    report = full_report()
    again = IntakeReport(**json.loads(json.dumps(report.to_dict())))
    assert str(again) == str(report)
    assert json.dumps(again.to_dict()) == json.dumps(report.to_dict())
    assert again.near_duplicates == report.near_duplicates == [["3.png", "4.png"]]


@pytest.mark.parametrize(
    "told",
    [
        "folder /data: 4 images",
        "formats PNG 4; modes RGB 4",
        "sizes 64 x 64 3, 10 x 20 1; short side 10 to 64, median 64 pixels",
        "used for training: 4 images of 64 x 64 pixels",
        "unreadable: 2; exact duplicates: 1 (1 dropped); near duplicates: 1; other files: 3",
        "other files: 3 (.heic 2, .csv 1)",
        "note: images or videos in unsupported formats: .heic 2; convert them to PNG or JPEG",
        "skipped bad.png: not an image format that Pillow can read",
        "skipped ünknown.jpg: OSError: image file is truncated",
        "identical: 1.png, 2.png",
        "nearly identical: 3.png, 4.png",
        "note: only 4 images: a generator may memorise them",
        "note: 1 image is smaller than 64 pixels",
    ],
)
def test_the_printed_report_tells(told):
    assert told in str(full_report())


def test_of_many_unreadable_files_all_are_counted_and_kept_and_five_are_printed():
    unreadable = [(f"{number}.jpg", f"reason {number}") for number in range(40)]
    report = report_on([fact(1)], unreadable=unreadable)
    assert report.to_dict()["unreadable"] == unreadable
    assert "unreadable: 40" in str(report)
    assert str(report).count("skipped") == 5
    assert all(f"skipped {number}.jpg: reason {number}" in str(report) for number in range(5))


@pytest.mark.skipif(os.name == "nt", reason="there, names are text")
def test_a_name_that_is_no_text_can_be_printed_and_kept(image_folder):
    odd = Path(os.fsdecode(bytes(image_folder) + b"/caf\xe9.png"))
    odd.write_bytes(b"this is text")
    report = load_images(DataSettings(dataset=str(image_folder), sample_size=16)).report
    assert report.unreadable[0][0] == odd.name
    assert r"skipped caf\udce9.png" in str(report).encode("utf-8").decode()


def test_files_of_several_frames_are_told(tmp_path):
    frames = [Image.new("RGB", (16, 16), (80 * index, 0, 0)) for index in range(3)]
    for name in ("a.gif", "b.tiff", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "d.gif")
    frames[0].save(tmp_path / "e.png")
    report = load_images(DataSettings(dataset=str(tmp_path), sample_size=16)).report
    assert report.images == 5 and report.formats["GIF (several frames)"] == report.formats["GIF"] == 1
    told = "3 files with several frames or pages: only the first of each is used"
    assert any(note.startswith(told) for note in report.warnings) and told in str(report)


def test_packed_files_beside_the_images_are_pointed_out(image_folder):
    for name in ("rest.tar.gz", "more.7z"):
        (image_folder / name).write_bytes(b"")
    (note,) = [one for one in load_images(DataSettings(dataset=str(image_folder))).report.warnings if "next to" in one]
    assert ".gz 1" in note and ".7z 1" in note and note.endswith("(zip, tar, ...)")
