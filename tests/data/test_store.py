import dataclasses
import errno
import json
import os
import shutil
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from damages import DAMAGES
from picture_files import encoded, noise, png, smooth
from PIL import Image
from stores import entries, load, pictures_in, same, settings_of
from tfrecord_writer import bytes_feature, example, record

from hfgen.data.contents import contents_digest
from hfgen.data.settings import DataSettings
from hfgen.data.store import ImageStore
from hfgen.demo.drawing import open_upload
from hfgen.errors import UserError
from hfgen.files import read_regular
from hfgen.inference.sampling import open_image


# pytest shows the remarks of Pillow about large pictures; in a run they are ignored.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def test_a_full_disk_of_the_cache_is_told_with_how_to_choose_another(image_folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hfgen.data.store._decode_into", fail)
    told = r"No space left on device; free space there, or set HFGEN_CACHE \(or, for training, --cache_dir\) to "
    with pytest.raises(UserError, match=told):
        load(image_folder)


def test_the_store_holds_the_pictures_in_the_order_of_the_source(image_folder):
    store = load(image_folder)
    assert same(pictures_in(store), [noise(16, 16, seed) for seed in range(7)])
    assert np.array_equal(store.as_array(), np.stack([noise(16, 16, seed) for seed in range(7)]))
    assert store.as_array().dtype == np.uint8


def test_pictures_of_different_sizes_are_kept_one_behind_the_other(tmp_path):
    pictures = [noise(16, 20), noise(31, 16), noise(16, 16), noise(16, 40)]
    for index, picture in enumerate(pictures):
        save(tmp_path / f"{index}.png", picture)
    store = load(tmp_path, crop="random")
    assert same(pictures_in(store), pictures)
    assert store.as_array() is None


def test_images_of_one_size_need_no_table_in_memory(image_folder):
    count, shapes = 1_000_000, load(image_folder).folder / "shapes.npy"
    np.save(shapes, np.full((count, 2), 16, np.int64))
    with (shapes.parent / "pixels.bin").open("r+b") as file:
        file.truncate(count * 16 * 16 * 3)  # sparse
    tracemalloc.start()
    try:
        store = ImageStore(shapes.parent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / count < 8, peak / count  # sizes and offsets would take 24 bytes each, in every process
    assert np.array_equal(store[6], noise(16, 16, 6)) and store[count - 1].shape == (16, 16, 3)
    assert store.as_array().shape == (count, 16, 16, 3)
    with pytest.raises(IndexError):
        store[count]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
@pytest.mark.parametrize(("memory", "at_random"), [(1e4, False), (5e3, True)])
def test_pixels_that_do_not_fit_in_memory_are_not_read_ahead(image_folder, monkeypatch, memory, at_random):
    monkeypatch.setattr("hfgen.data.store.physical_memory", lambda: memory)
    monkeypatch.setattr("hfgen.data.store.MEMORY_PART", 1)
    store = load(image_folder)  # 5,376 bytes
    (_, mapping) = Path("/proc/self/smaps").read_text().split(f"{store.folder.resolve()}/pixels.bin\n")
    flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags")).split()
    assert ("rr" in flags) == at_random
    assert same(pictures_in(store), [noise(16, 16, seed) for seed in range(7)])


def test_five_crops_follow_their_picture(tmp_path):
    pictures = [noise(20, 20, 1), noise(20, 20, 2)]
    for index, picture in enumerate(pictures):
        save(tmp_path / f"{index}.png", picture)
    store = load(tmp_path, five_crop=True)
    assert len(store) == 12
    for index, picture in enumerate(pictures):
        assert np.array_equal(store[6 * index + 1], picture[:16, :16])
        assert np.array_equal(store[6 * index + 4], picture[4:, 4:])
    assert store.report.images == 2 and store.report.training_images == 12


def test_more_pictures_than_are_decoded_at_once_keep_their_order(tmp_path):
    count = 20 * (os.cpu_count() or 1)
    for index in range(count):
        # Large ones among small ones: they finish out of order.
        save(tmp_path / f"{index:05d}.png", np.full((600, 600, 3) if index % 7 == 0 else (16, 16, 3), index, np.uint8))
    assert [picture[0, 0, 0] for picture in pictures_in(load(tmp_path))] == [index % 256 for index in range(count)]


def test_a_second_call_opens_what_the_first_one_decoded(image_folder, monkeypatch):
    first = load(image_folder)
    monkeypatch.setattr("hfgen.data.store.decode_image", None)  # decoding again would fail
    monkeypatch.setattr("hfgen.data.store.contents_digest", None)  # and so would reading the files
    second = load(image_folder)
    assert same(pictures_in(second), [noise(16, 16, seed) for seed in range(7)])
    assert second.digest == first.digest and second.report == first.report


def test_an_edited_file_is_decoded_anew(image_folder):
    first = load(image_folder)
    save(image_folder / "3.png", noise(16, 16, 99))
    second = load(image_folder)
    assert np.array_equal(second[3], noise(16, 16, 99))
    assert second.digest != first.digest


def replace_unnoticed(file: Path, content: bytes) -> None:
    """Write other contents of the same size, and set the modification time to what it was."""
    before = file.stat()
    assert len(content) == before.st_size
    file.unlink()  # as archives do
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


KINDS = ["folder", "zip", "parquet", "TFRecord"]


def write_uncompressed(path: Path, kind: str, seed: int) -> Path:
    """Write one picture of `seed`; the size is the same for all seeds. Return the file that holds it."""
    content, file = (
        encoded(noise(16, 16, seed), "bmp"),
        path / {"parquet": "a.parquet", "TFRecord": "a.tfrec"}.get(kind, "a.bmp"),
    )
    if kind == "zip":
        with zipfile.ZipFile(file := path / "set.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("a.bmp"), content)
    elif kind == "parquet":
        table = pyarrow.table({"image": [content]})
        pyarrow.parquet.write_table(table, file, compression="none", write_statistics=False, use_dictionary=False)
    else:
        file.write_bytes(record(example(image=bytes_feature(content))) if kind == "TFRecord" else content)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_replaced_by_one_of_the_same_size_and_time_is_decoded_anew(tmp_path, kind):
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    file = write_uncompressed(tmp_path / "data", kind, seed=1)
    dataset = file if kind == "zip" else tmp_path / "data"
    first = load(dataset)
    replace_unnoticed(file, write_uncompressed(tmp_path / "other", kind, seed=2).read_bytes())
    second = load(dataset)
    assert np.array_equal(first[0], noise(16, 16, 1)) and np.array_equal(second[0], noise(16, 16, 2))
    assert first.digest != second.digest


def test_files_extracted_again_with_the_same_contents_are_not_decoded_anew(image_folder, monkeypatch):
    first = load(image_folder)
    for file in image_folder.iterdir():
        replace_unnoticed(file, file.read_bytes())
    monkeypatch.setattr("hfgen.data.store.decode_image", None)
    assert load(image_folder).folder == first.folder
    monkeypatch.setattr("hfgen.data.store.contents_digest", None)  # their contents are compared only once
    assert load(image_folder).folder == first.folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_could_not_be_read_is_read_once_it_can_be(image_folder):
    (image_folder / "3.png").chmod(0)
    assert len(load(image_folder)) == 6
    (image_folder / "3.png").chmod(0o600)
    assert len(load(image_folder)) == 7


def test_a_touched_file_is_decoded_anew_with_the_same_digest(image_folder):
    first = load(image_folder)
    os.utime(image_folder / "3.png", ns=(0, 0))
    second = load(image_folder)
    assert second.folder != first.folder
    assert second.digest == first.digest


def test_a_new_file_and_a_removed_file_are_noticed(image_folder):
    first = load(image_folder)
    save(image_folder / "7.png", noise(16, 16, 7))
    assert len(load(image_folder)) == 8
    (image_folder / "7.png").unlink()
    assert len(load(image_folder)) == 7
    assert load(image_folder).digest == first.digest


# Another value of each setting of the data: does it change what is in the cache?
OTHER_VALUES = {
    "dataset_split": ("all", False),
    "streaming": (True, False),
    "sample_size": (17, True),
    "crop": ("random", True),
    "horizontal_flip": (True, False),
    "five_crop": (True, True),
    "random_rotation": (10.0, False),
    "random_erasing": (0.5, False),
    "drop_duplicates": (True, True),
    "max_image_pixels": (10_000, False),
}


def test_every_setting_is_known_to_change_the_cache_or_not():
    refused_for_a_folder = {"dataset_config", "dataset_column", "shuffle_buffer_size"}
    known = OTHER_VALUES.keys() | {"dataset", "cache_dir"} | refused_for_a_folder
    assert known == {field.name for field in dataclasses.fields(DataSettings)}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_that_changes_the_pixels_and_no_other_makes_a_new_cache(image_folder, name):
    value, is_new = OTHER_VALUES[name]
    assert value != getattr(settings_of(image_folder), name)
    first, second = load(image_folder), load(image_folder, **{name: value})
    assert (second.folder != first.folder) == is_new


def test_another_data_set_makes_a_new_cache(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "copy")  # with the same names, sizes and times
    assert load(image_folder).folder != load(tmp_path / "copy").folder


def test_the_digest_is_that_of_the_pixels_whatever_they_come_from(image_folder, tmp_path):
    files = sorted(image_folder.iterdir())
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in reversed(files):
            archive.writestr(f"inner/{file.name}", file.read_bytes())
    for file in files:
        Image.open(file).save(tmp_path / "set.bmp")
        (tmp_path / "bitmaps").mkdir(exist_ok=True)
        (tmp_path / "set.bmp").rename(tmp_path / "bitmaps" / f"{file.stem}.bmp")
    digest = load(image_folder).digest
    assert load(tmp_path / "set.zip").digest == digest
    assert load(tmp_path / "bitmaps").digest == digest


def test_a_nested_folder_and_a_zip_of_it_are_one_data_set(tmp_path):
    names = ["z.png", "a/1.png", "a-b/2.png", "a/c/3.png", "B.png"]
    for seed, name in enumerate(names):
        save(tmp_path / "folder" / name, noise(16, 16, seed))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "folder" / name, name)
    folder, archive = load(tmp_path / "folder"), load(tmp_path / "set.zip")
    assert folder.digest == archive.digest
    assert same(pictures_in(folder), pictures_in(archive))


def test_the_digest_changes_with_the_order_the_shape_and_a_single_pixel(tmp_path):
    def digest_of(*pictures: np.ndarray) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for index, picture in enumerate(pictures):
            save(folder / f"{index}.png", picture)
        return load(folder, crop="random").digest

    one, other = noise(16, 24, 1), noise(16, 24, 2)
    altered = one.copy()
    altered[3, 4, 1] ^= 1
    lying = one.reshape(24, 16, 3)  # the same bytes
    digests = [digest_of(one, other), digest_of(other, one), digest_of(altered, other), digest_of(lying, other)]
    assert len(set(digests)) == 4
    assert digest_of(one, other) == digests[0]


def save_grey(path: Path, highest: int, seed: int) -> np.ndarray:
    """Save 16-bit grey values from 0 to `highest`; return them."""
    values = np.random.default_rng(seed).integers(0, highest + 1, (16, 16)).astype(np.uint16)
    values.flat[:2] = 0, highest
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


@pytest.mark.parametrize(("highest", "white"), [(255, 255), (4095, 4095), (10_000, 16_383), (60_000, 65_535)])
def test_wide_grey_images_are_scaled_by_the_bits_that_the_whole_data_set_uses(tmp_path, highest, white):
    bright, dark = save_grey(tmp_path / "0.png", highest, 0), save_grey(tmp_path / "1.png", highest // 9, 1)
    save(tmp_path / "2.png", noise(16, 16))
    store = load(tmp_path)
    for index, values in enumerate((bright, dark)):
        assert np.array_equal(store[index][..., 0], np.round(values * (255 / white)))
    assert np.array_equal(store[2], noise(16, 16))
    noted = [warning for warning in store.report.warnings if "grey files" in warning]
    assert len(noted) == (white < 65_535) and all(f"{white} is white" in warning for warning in noted)


def test_copies_among_wide_grey_images_are_those_with_the_same_values(tmp_path):
    for index in range(4):  # 0 and 1 differ by less than 16-bit files can show in 8 bits
        values = np.arange(256, dtype=np.uint16).reshape(16, 16) + 3000
        values[0, 0] += (0, 100, 200, 0)[index]
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    store = load(tmp_path, drop_duplicates=True)
    assert store.report.exact_duplicates == [["0.png", "3.png"]] and len(store) == 3


def test_an_uploaded_and_a_reconstructed_picture_of_twelve_bits_are_not_black(tmp_path):
    values = save_grey(tmp_path / "0.png", 4095, 0)
    wanted = np.round(values * (255 / 4095))
    assert np.array_equal(np.asarray(open_upload(str(tmp_path / "0.png"), (16, 16)))[..., 0], wanted)
    assert np.array_equal(np.asarray(open_image(tmp_path / "0.png", 16))[..., 0], wanted)


# Unreadable and doubled images


def test_unreadable_images_are_left_out_and_listed(image_folder):
    (image_folder / "2.png").write_bytes(b"this is text")
    (image_folder / "5.png").write_bytes(encoded(noise(16, 16))[:100])
    (image_folder / "8.png").symlink_to("gone.png")
    store = load(image_folder)
    assert same(pictures_in(store), [noise(16, 16, seed) for seed in (0, 1, 3, 4, 6)])
    assert [name for name, _ in store.report.unreadable] == ["2.png", "5.png", "8.png"]
    assert "FileNotFoundError" in store.report.unreadable[2][1]
    assert store.report.images == store.report.training_images == 5


def test_damaged_members_of_a_zip_are_left_out_and_listed(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for seed in range(3):
            archive.writestr(f"{seed}.png", encoded(noise(16, 16, seed)))
        offset = archive.getinfo("1.png").header_offset
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[offset + 60] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(content)
    store = load(tmp_path / "set.zip")
    assert same(pictures_in(store), [noise(16, 16, 0), noise(16, 16, 2)])
    assert [name for name, _ in store.report.unreadable] == ["1.png"]


def test_a_data_set_without_a_readable_image_is_an_error_that_tells_why(tmp_path, cache_of_this_test):
    (tmp_path / "a.png").write_bytes(b"this is text")
    (tmp_path / "b.png").symlink_to("gone.png")
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    for told in (str(tmp_path), "none of its 2 images", "a.png: not an image", "b.png: FileNotFoundError"):
        assert told in str(raised.value)
    assert entries(cache_of_this_test) == []


def test_a_bomb_in_a_data_set_is_an_error_that_names_it(image_folder, cache_of_this_test):
    bomb = png(20_000, 20_000, bit_depth=1, color_type=0, rows=bytes(2501 * 20_000))
    (image_folder / "4.png").write_bytes(bomb)
    with pytest.raises(UserError, match="4.png: .*bomb.*--max_image_pixels"):
        load(image_folder)
    assert entries(cache_of_this_test) == []


@pytest.mark.parametrize("crop", ["center", "random"])
def test_of_identical_images_only_the_first_is_kept_if_asked_for(tmp_path, crop):
    for index, seed in enumerate([1, 2, 1, 3, 2, 1]):
        save(tmp_path / f"{index}.{'bmp' if index % 2 else 'png'}", noise(16, 24, seed))
    everything, distinct = load(tmp_path, crop=crop), load(tmp_path, crop=crop, drop_duplicates=True)
    assert len(everything) == 6 and everything.report.dropped == 0
    assert len(distinct) == 3 and distinct.report.dropped == 3
    assert same(pictures_in(distinct), [everything[0], everything[1], everything[3]])
    assert distinct.report.images == 6 and distinct.report.training_images == 3
    groups = [["0.png", "2.png", "5.bmp"], ["1.bmp", "4.png"]]
    assert distinct.report.exact_duplicates == everything.report.exact_duplicates == groups


def test_the_five_crops_of_a_dropped_image_are_dropped_too(tmp_path):
    for index in range(2):
        save(tmp_path / f"{index}.png", noise(20, 20))
    assert len(load(tmp_path, five_crop=True, drop_duplicates=True)) == 6


# Interruption and several processes


def test_a_failed_decoding_leaves_nothing_and_the_next_call_decodes_all(image_folder, cache_of_this_test):
    whole = (image_folder / "6.png").read_bytes()
    (image_folder / "6.png").write_bytes(encoded(noise(300, 300)))
    before = (image_folder / "6.png").stat()
    with pytest.raises(UserError, match="6.png"):
        load(image_folder, max_image_pixels=80_000)
    assert entries(cache_of_this_test) == []
    (image_folder / "6.png").write_bytes(whole + bytes(before.st_size - len(whole)))
    os.utime(image_folder / "6.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # the same dataset, as far as seen
    assert same(pictures_in(load(image_folder)), [noise(16, 16, seed) for seed in range(7)])


def test_files_that_go_while_they_are_read_are_not_missing_for_good(image_folder, cache_of_this_test, monkeypatch):
    def read(file, limit):  # the disk goes after three files
        if file.name == "3.png":
            os.rename(image_folder, image_folder.with_name("elsewhere"))
        return read_regular(file, limit)

    monkeypatch.setattr("hfgen.data.opening.read_regular", read)
    with pytest.raises(
        UserError, match=r"3.png: disappeared while the dataset was being read; run the same command again"
    ):
        load(image_folder)
    assert entries(cache_of_this_test) == []
    monkeypatch.undo()
    monkeypatch.setenv("HFGEN_CACHE", str(cache_of_this_test))
    os.rename(image_folder.with_name("elsewhere"), image_folder)
    assert same(pictures_in(load(image_folder)), [noise(16, 16, seed) for seed in range(7)])


def test_files_that_are_only_touched_while_they_are_read_are_the_same(image_folder, monkeypatch):
    def read(file, limit):
        (image_folder / "2.png").chmod(0o600)
        os.utime(image_folder / "5.png", (0, 0))
        return read_regular(file, limit)

    monkeypatch.setattr("hfgen.data.opening.read_regular", read)
    assert same(pictures_in(load(image_folder)), [noise(16, 16, seed) for seed in range(7)])


def test_files_named_in_a_table_that_change_while_they_are_read_are_read_again(
    image_folder, cache_of_this_test, monkeypatch
):
    table = pyarrow.table({"image": [f"{index}.png" for index in range(7)]})
    pyarrow.parquet.write_table(table, path := image_folder / "set.parquet")

    def read(file, limit):
        if file.name == "3.png":
            (image_folder / "2.png").write_bytes(encoded(noise(16, 16, 99)))
            (image_folder / "5.png").unlink()
        return read_regular(file, limit)

    monkeypatch.setattr("hfgen.data.columns.read_regular", read)
    with pytest.raises(
        UserError, match="set.parquet: some of its files changed or disappeared while they were being read; run"
    ):
        load(path)
    assert entries(cache_of_this_test) == []


def test_decoding_leaves_the_filters_of_warnings_as_they_are(image_folder):
    for index in range(60):  # enough for threads to overlap
        save(image_folder / f"large{index}.png", smooth(200, 200, phase=index))
    with warnings.catch_warnings():
        before = list(warnings.filters)
        load(image_folder)
        assert list(warnings.filters) == before


# The cache


def test_the_cache_is_where_the_setting_says_else_the_environment(image_folder, cache_of_this_test, tmp_path):
    assert load(image_folder).folder.parent == cache_of_this_test
    elsewhere = tmp_path / "not" / "there" / "yet"
    assert load(image_folder, cache_dir=str(elsewhere)).folder.parent == elsewhere


def test_without_setting_and_environment_the_cache_lies_in_that_of_hugging_face(image_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HFGEN_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert load(image_folder).folder.parent == tmp_path / "home" / "hfgen"


def test_a_cache_that_cannot_be_written_is_an_error_that_tells_the_setting(image_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{cache}: .*--cache_dir"):
            load(image_folder, cache_dir=str(cache))


def test_the_cache_tells_the_report_in_plain_json(image_folder):
    store = load(image_folder)
    assert json.loads((store.folder / "report.json").read_text()) == json.loads(json.dumps(store.report.to_dict()))
    assert store.report.source == f"folder {image_folder}"


def test_the_pixels_of_a_store_cannot_be_altered_by_mistake(image_folder):
    with pytest.raises(ValueError, match="read-only"):
        load(image_folder)[0][:] = 0


def test_real_photos_become_squares_of_the_training_size(shared_data):
    folder = shared_data / "cats_dogs_original"
    store = load(folder, sample_size=32)
    assert len(store) == store.report.images == 60
    assert store.as_array().shape == (60, 32, 32, 3)
    assert store.report.formats == {"JPEG": 60} and store.report.unreadable == []


@pytest.mark.parametrize(
    "file", ["pixels.bin", "shapes.npy", "report.json", "digest.txt", "digests.json", "changes.txt"]
)
def test_a_damaged_cache_is_decoded_again(file, image_folder, cache_of_this_test, capsys):
    first = load(image_folder)
    report = first.report
    for damage in DAMAGES.values():
        damage(first.folder / file)
        again = load(image_folder)
        assert same(pictures_in(again), [noise(16, 16, seed) for seed in range(7)])
        assert again.digest == first.digest and again.report == report and len(entries(cache_of_this_test)) == 1
        assert ("is damaged and will be rebuilt" in capsys.readouterr().out) == (file != "changes.txt")


def test_comparing_the_contents_of_many_files_takes_little_memory(tmp_path):
    files = [tmp_path / "one"] * 20_000
    files[0].write_bytes(b"content")
    tracemalloc.start()
    try:
        digest = contents_digest(files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / len(files) < 500, peak / len(files)  # 2,000 if all wait at once
    assert contents_digest(files[:-1]) != digest == contents_digest(list(files))
