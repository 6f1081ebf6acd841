import contextlib
import errno
import gzip
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from picture_files import encoded, noise
from PIL import Image
from source_files import names_in, source_of, write, write_zip
from stores import load
from tfrecord_writer import bytes_feature, example, record

from hfgen.data import opening
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError
from hfgen.inference.sampling import open_image


def write_parquet(path: Path, columns: dict[str, pyarrow.Array | list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_tfrecord(path: Path, feature: str, values: list[bytes]) -> Path:
    return write(path, b"".join(record(example(**{feature: bytes_feature(value)})) for value in values))


# Folders


def test_a_folder_gives_the_bytes_of_its_images_in_the_order_of_their_paths(tmp_path):
    for name in ["b.png", "a/z.JPG", "a/b/c.webp", "a-b/q.jpeg", "C.bmp", "10.gif", "9.tiff", "d.TIF", "e.jfif"]:
        write(tmp_path / name, name.encode())
    ordered = ["10.gif", "9.tiff", "C.bmp", "a/b/c.webp", "a/z.JPG", "a-b/q.jpeg", "b.png", "d.TIF", "e.jfif"]
    source = source_of(tmp_path)
    assert list(source.images()) == [(name, name.encode()) for name in ordered]
    assert list(source.images()) == [(name, name.encode()) for name in ordered]  # again and again
    assert sum(source.skipped.values()) == 0


def test_hidden_files_and_folders_are_left_out_and_other_files_are_counted(tmp_path):
    for name in ["a.png", ".b.png", ".git/c.png", "sub/.d.jpg", "labels.csv", "sub/notes.txt", ".hidden.txt", "png"]:
        write(tmp_path / name)
    source = source_of(tmp_path)
    assert names_in(source) == ["a.png"]
    assert sum(source.skipped.values()) == 3  # labels.csv, notes.txt and png


def test_sheets_of_runs_and_pipelines_within_the_data_are_not_read(tmp_path):
    """As `hfgen train .` leaves them in a folder of images."""
    write(tmp_path / "photo.png")
    for name in ("training_config.json", "status.json", "samples/step-00000002.png", "training_images/first.png"):
        write(tmp_path / "runs" / "images" / name)
    for name in ("training_config.json", "model_index.json", "samples/sheet.png"):
        write(tmp_path / "published" / name)
    write(tmp_path / "labels" / "status.json")  # of somebody else
    write(tmp_path / "labels" / "second.png")
    source = source_of(tmp_path)
    assert names_in(source) == ["labels/second.png", "photo.png"]
    told = [f"{tmp_path / name} is a run or a pipeline of hfgen" for name in ("published", "runs/images")]
    assert [note.split(":")[0] for note in source.notes[:2]] == told
    for name in ("published", "runs/images"):
        with pytest.raises(UserError, match=f"--dataset {tmp_path / name}: this is a run or a pipeline of hfgen"):
            source_of(tmp_path / name)


def test_every_kind_of_image_that_pillow_writes_and_reads_is_read(tmp_path):
    picture, written = Image.fromarray(noise(16, 16)), set()
    for suffix, file_format in Image.registered_extensions().items():
        if file_format in {*Image.OPEN, "MPO"} - {"EPS", "FITS", "WMF"}:
            for mode in ("RGB", "P", "1"):
                with contextlib.suppress(OSError, KeyError, ValueError):
                    picture.convert(mode).save(tmp_path / f"picture{suffix}")
                    written.add(f"picture{suffix}")
                    break
            else:
                (tmp_path / f"picture{suffix}").unlink(missing_ok=True)  # Pillow reads this kind but cannot write it
    assert written >= {f"picture{suffix}" for suffix in (".ppm", ".pgm", ".tga", ".jp2", ".jpe", ".qoi", ".jpg")}
    assert set(names_in(source_of(tmp_path))) == written
    store = load_images(DataSettings(dataset=str(tmp_path), sample_size=16))
    assert store.report.images == len(written) and store.report.unreadable == []


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_other_files_are_named_by_their_suffix(tmp_path, kind):
    files = dict.fromkeys(["a.png", "b.HEIC", "sub/c.heic", "labels.csv", "LICENSE", "old.parquet"], b"content")
    for name, content in files.items():
        write(tmp_path / "folder" / name, content)
    path = tmp_path / "folder" if kind == "folder" else write_zip(tmp_path / "set.zip", files)
    assert source_of(path).skipped == {".heic": 2, ".csv": 1, ".parquet": 1, "no suffix": 1}
    assert sum(source_of(path).skipped.values()) == 5


def test_a_folder_of_unknown_files_is_refused_with_their_suffixes(tmp_path):
    for name in ["a.heic", "b.heic", "c.csv"]:
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"no image, .*\.heic 2, \.csv 1; give a folder of images"):
        source_of(tmp_path)


@pytest.mark.parametrize("target", [".", "..", "../sub"])
def test_a_loop_of_links_ends_and_gives_each_file_once(tmp_path, target):
    write(tmp_path / "sub" / "a.png")
    (tmp_path / "sub" / "loop").symlink_to(target)
    assert names_in(source_of(tmp_path)) == ["sub/a.png"]


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "a.png", b"a")
    write(tmp_path / "b.png", b"b")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "b.png")
    assert list(source_of(tmp_path / "data").images()) == [("folder/a.png", b"a"), ("link.png", b"b")]


@pytest.mark.parametrize("link", ["a link", "z link"])
def test_a_folder_and_a_link_to_it_are_read_once_and_under_the_name_of_the_folder(tmp_path, link):
    for name in ("train/deep/a.png", "test/b.png"):
        write(tmp_path / name)
    (tmp_path / link).symlink_to(tmp_path / "train")
    assert names_in(source_of(tmp_path)) == ["train/deep/a.png"]  # not what is to be tested on, either


@pytest.mark.parametrize(
    ("links", "found"),
    [
        ({"train": "versions/2", "test": "versions/held"}, ["train/b.png", "train/deep/c.png"]),
        ({"newest": "versions/2"}, ["1/a.png", "2/b.png", "2/deep/c.png", "held/d.png"]),
    ],
)
def test_a_link_that_alone_names_a_split_names_the_files(tmp_path, links, found):
    for name in ("1/a.png", "2/b.png", "2/deep/c.png", "held/d.png"):
        write(tmp_path / "versions" / name)
    for link, target in links.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(target)
    assert sorted(name.removeprefix("versions/") for name in names_in(source_of(tmp_path))) == found


def test_a_link_between_splits_takes_nothing_from_a_folder(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        write(tmp_path / name)
    (tmp_path / "val").symlink_to("train")
    assert names_in(source_of(tmp_path)) == ["train/a.png"]


def test_an_image_that_cannot_be_read_is_told_and_the_others_are_read(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    write(tmp_path / "c.png")
    (_, first), (name, error), (_, last) = source_of(tmp_path).images()
    assert first == last == b"content"
    assert name == "b.png" and isinstance(error, FileNotFoundError)


def test_an_image_that_may_be_readable_next_time_is_not_left_out_for_ever(tmp_path, monkeypatch):
    for name in "abc":
        write(tmp_path / "images" / f"{name}.png", encoded(noise(16, 16)))
    read, failing = opening.read_regular, ["b.png"]

    def read_once(file, max_bytes):
        if file.name in failing:
            failing.remove(file.name)
            raise OSError(errno.EIO, "Input/output error")
        return read(file, max_bytes)

    monkeypatch.setattr(opening, "read_regular", read_once)
    with pytest.raises(UserError, match=r"images/b.png: cannot be read now \(Input/output error\); run the same"):
        load(tmp_path / "images")
    assert len(load(tmp_path / "images")) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_told_and_a_folder_without_it_is_an_error(tmp_path):
    write(tmp_path / "a.png").chmod(0)
    ((_, error),) = source_of(tmp_path).images()
    assert isinstance(error, PermissionError)
    write(tmp_path / "sub" / "b.png").parent.chmod(0)
    try:
        with pytest.raises(UserError, match="sub.*Permission denied"):
            source_of(tmp_path)
    finally:
        (tmp_path / "sub").chmod(0o700)


def test_names_that_are_no_text_are_kept(tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    write(tmp_path / odd)
    write(tmp_path / "日本 \n'\".png")
    assert sorted(names_in(source_of(tmp_path))) == sorted([odd, "日本 \n'\".png"])


@pytest.mark.parametrize("files", [[], ["a.txt"], [".a.png"], ["sub/a.txt", "b.csv"]])
def test_a_folder_without_images_is_an_error_that_names_it(tmp_path, files):
    for name in files:
        write(tmp_path / name)
    with pytest.raises(UserError, match=f"{tmp_path}: no image, TFRecord or parquet file"):
        source_of(tmp_path)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pictures" / "a.png")
    assert names_in(source_of("~/pictures")) == ["a.png"]


def test_the_identity_changes_with_a_files_name_size_or_time_and_with_nothing_else(tmp_path):
    file = write(tmp_path / "a.png")
    os.utime(file, ns=(0, 10**18))
    identity = source_of(tmp_path).identity
    os.utime(file, ns=(5, 10**18))  # read, not written
    assert source_of(tmp_path).identity == identity
    write(tmp_path / "readme.txt")
    assert source_of(tmp_path).identity == identity
    os.utime(file, ns=(0, 10**18 + 1))
    assert source_of(tmp_path).identity != identity
    os.utime(write(file, b"longer content"), ns=(0, 10**18))
    assert source_of(tmp_path).identity != identity
    os.utime(write(file), ns=(0, 10**18))
    assert source_of(tmp_path).identity == identity
    file.rename(tmp_path / "b.png")
    assert source_of(tmp_path).identity != identity


# What is not there


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "missing.zip", "missing.PARQUET", "data/x.tfrec", "./pictures", "pictures/", "/nowhere", "~/no such one",
     "~nosuchuser/pictures", "two words", "", " ", "x" * 300 + ".zip", "a/b.png", "toy_paintings:",
     "toy_paintings:-3", "nul\0byte"],
)  # fmt: skip
def test_what_is_no_name_of_a_hub_data_set_must_be_a_file_or_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.png")  # the current folder is never taken by mistake
    with pytest.raises(UserError, match="no such file or folder"):
        source_of(name)


@pytest.mark.parametrize("name", ["picture.png", "notes.txt", "archive.rar", "no_suffix"])
def test_a_file_of_another_kind_is_refused_and_the_kinds_are_told(tmp_path, name):
    kinds = r"give a folder of images or a \.zip, \.parquet or \.tfrec file"
    with pytest.raises(UserError, match=f"unknown file type; {kinds}"):
        source_of(write(tmp_path / name))


# Parquet


def images_column(*contents: bytes | None) -> pyarrow.Array:
    """A column as `datasets` writes its images: a struct of the encoded file and its path."""
    rows = [None if content is None else {"bytes": content, "path": "x.png"} for content in contents]
    return pyarrow.array(rows, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(images_column(b"one", b"two", b"three"), id="struct"),
        pytest.param(pyarrow.array([b"one", b"two", b"three"], pyarrow.binary()), id="binary"),
        pytest.param(pyarrow.array([b"one", b"two", b"three"], pyarrow.large_binary()), id="large binary"),
    ],
)
def test_the_only_column_of_images_of_a_parquet_file_is_found(tmp_path, column):
    path = write_parquet(tmp_path / "set.parquet", {"label": [1, 2, 3], "photo": column, "text": ["a", "b", "c"]})
    assert list(source_of(path).images()) == [
        ("set.parquet#0", b"one"),
        ("set.parquet#1", b"two"),
        ("set.parquet#2", b"three"),
    ]


def test_rows_without_bytes_are_told_and_the_others_are_read(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", {"image": images_column(b"one", None, b"", b"four")})
    (_, first), (second_name, second), (_, third), fourth = source_of(path).images()
    assert first == b"one" and fourth == ("set.parquet#3", b"four")
    assert second_name == "set.parquet#1"
    assert isinstance(second, ValueError) and isinstance(third, ValueError)


def test_many_rows_are_numbered_through(tmp_path):
    contents = [str(number).encode() for number in range(200)]  # more than a batch of pyarrow's
    path = write_parquet(tmp_path / "set.parquet", {"image": images_column(*contents)})
    assert list(source_of(path).images()) == [(f"set.parquet#{row}", contents[row]) for row in range(200)]


def test_of_two_columns_of_images_one_must_be_chosen(tmp_path):
    columns = {"left": images_column(b"l"), "right": pyarrow.array([b"r"]), "label": [1]}
    path = write_parquet(tmp_path / "set.parquet", columns)
    with pytest.raises(UserError, match=r"set.parquet.*\['left', 'right'\].*--dataset_column"):
        source_of(path)
    assert list(source_of(path, dataset_column="left").images()) == [("set.parquet#0", b"l")]
    assert list(source_of(path, dataset_column="right").images()) == [("set.parquet#0", b"r")]
    left, right = (source_of(path, dataset_column=column).identity for column in ("left", "right"))
    assert left != right


@pytest.mark.parametrize("column", ["label", "missing", ""])
def test_a_chosen_column_without_images_is_an_error_that_names_the_columns(tmp_path, column):
    path = write_parquet(tmp_path / "set.parquet", {"image": images_column(b"x"), "label": [1]})
    with pytest.raises(UserError, match=rf"--dataset_column {column}: .*set.parquet.*\['image', 'label'\]"):
        source_of(path, dataset_column=column)


@pytest.mark.parametrize("name", ["folder", "set.zip", "set.tar", "set.npy", "toy_paintings:3"])
def test_a_column_is_refused_where_there_are_none(tmp_path, name):
    picture = write(tmp_path / "folder" / "1.png", encoded(noise(8, 8)))
    write_zip(tmp_path / "set.zip", {"1.png": picture.read_bytes()})
    np.save(tmp_path / "set.npy", np.zeros((2, 8, 8), np.uint8))
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(picture, "1.png")
    dataset = name if name.startswith("toy") else tmp_path / name
    assert len(names_in(source_of(dataset))) > 0
    with pytest.raises(UserError, match=r"--dataset_column zzz: .* has no columns to choose from; leave it out"):
        source_of(dataset, dataset_column="zzz")


def test_a_parquet_file_without_images_is_an_error_that_names_its_columns(tmp_path):
    with pytest.raises(UserError, match=r"no image column, only \['label', 'path'\]"):
        source_of(write_parquet(tmp_path / "set.parquet", {"label": [1], "path": ["a.png"]}))


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path):
    for name in ["b/train-1.parquet", "b/train-0.parquet", "a.parquet"]:
        write_parquet(tmp_path / name, {"image": images_column(name.encode(), b"second")})
    write(tmp_path / "README.md")
    source = source_of(tmp_path)
    assert list(source.images()) == [
        ("a.parquet#0", b"a.parquet"),
        ("a.parquet#1", b"second"),
        ("train-0.parquet#0", b"b/train-0.parquet"),
        ("train-0.parquet#1", b"second"),
        ("train-1.parquet#0", b"b/train-1.parquet"),
        ("train-1.parquet#1", b"second"),
    ]
    assert sum(source.skipped.values()) == 1


def test_a_later_parquet_file_without_the_column_is_an_error_that_names_it(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": images_column(b"x")})
    write_parquet(tmp_path / "b.parquet", {"label": [1]})
    with pytest.raises(UserError, match="b.parquet: .*image"):
        names_in(source_of(tmp_path))


def test_a_damaged_or_truncated_parquet_file_is_read_or_named_in_the_error(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", {"image": images_column(b"one" * 9, None, b"three")})
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        for content in (damaged, whole[:position]):
            path.write_bytes(content)
            try:
                names_in(source_of(path))
            except UserError as error:
                assert "set.parquet" in str(error)
            else:
                assert content is damaged, f"cut off at {position}, it was read all the same"


# TFRecords


def test_a_folder_of_tfrecord_files_is_read_in_order_and_named_by_file_and_offset(tmp_path):
    write_tfrecord(tmp_path / "sub" / "b.tfrecord", "image", [b"three"])
    write_tfrecord(tmp_path / "a.tfrec", "image", [b"one", b"two"])
    write(tmp_path / "labels.csv")
    source = source_of(tmp_path)
    first_length = (tmp_path / "a.tfrec").stat().st_size // 2
    assert list(source.images()) == [
        ("a.tfrec#byte 0", b"one"),
        (f"a.tfrec#byte {first_length}", b"two"),
        ("b.tfrecord#byte 0", b"three"),
    ]
    assert sum(source.skipped.values()) == 1


def test_a_single_tfrecord_file_is_read_and_its_feature_may_be_chosen(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrec", "photo", [b"one"])
    assert list(source_of(path, dataset_column="photo").images()) == [("a.tfrec#byte 0", b"one")]
    assert source_of(path, dataset_column="photo").identity != source_of(path).identity
    with pytest.raises(UserError, match="a.tfrec.*'image'.*'photo'.*--dataset_column"):
        names_in(source_of(path))


def test_a_tfrecord_file_that_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.tfrec").symlink_to(tmp_path / "gone.tfrec")
    with pytest.raises(UserError, match="a.tfrec: cannot be read: .*No such file"):
        names_in(source_of(tmp_path))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tfrecord-00000-of-00001", bytes),
        ("x.TFRecord-00000-of-00001", bytes),
        ("x.tfrecords-0", bytes),
        ("x.tfrecord.gz", gzip.compress),
        ("x.tfrec", gzip.compress),
        ("x.tfrecord-00000-of-00001.gz", gzip.compress),
        ("train-00000-of-00001", bytes),
        ("train-00000-of-00001", zlib.compress),
    ],
)
def test_shards_and_packed_tfrecord_files_are_found(tmp_path, name, pack):
    content = pack(record(example(image=bytes_feature(b"one"))))
    path = write(tmp_path / name, content)
    for source in (source_of(path), source_of(tmp_path)):
        assert list(source.images()) == [(f"{name}#byte 0", b"one")]


def test_a_shard_without_a_suffix_that_is_no_tfrecord_is_another_file(tmp_path):
    write_tfrecord(tmp_path / "train-00000-of-00001", "image", [b"one"])
    write(tmp_path / "index-00000-of-00001", b"text that is longer than a header")
    source = source_of(tmp_path)
    assert [content for _, content in source.images()] == [b"one"] and source.skipped == {"no suffix": 1}


@pytest.mark.parametrize("kind", ["tfrecord", "parquet"])
def test_missing_shards_are_noted(tmp_path, kind):
    name = "x.tfrecord-0000{}-of-00003" if kind == "tfrecord" else "x-0000{}-of-00003.parquet"
    for number in (0, 2, 1):
        path = tmp_path / name.format(number)
        if kind == "tfrecord":
            write_tfrecord(path, "image", [encoded(noise(8, 8, number))])
        else:
            write_parquet(path, {"image": [encoded(noise(8, 8, number))]})
        settings = DataSettings(dataset=str(tmp_path), sample_size=8)
        noted = [warning for warning in load_images(settings).report.notes if "are missing" in warning]
        assert len(noted) == (number != 1) and all(
            ": only " in note and "of 3 files are there" in note for note in noted
        )


# Toy paintings


def test_toy_paintings_are_as_many_as_asked_for_and_as_large_as_trained_on():
    source = source_of("toy_paintings:3", sample_size=8)
    assert names_in(source) == ["toy_painting_000000", "toy_painting_000001", "toy_painting_000002"]
    assert source.identity != source_of("toy_paintings:4", sample_size=8).identity
    assert source.identity != source_of("toy_paintings:3", sample_size=9).identity


@pytest.mark.parametrize("count", [0, 1_000_001])
def test_a_senseless_number_of_toy_paintings_is_refused(count):
    with pytest.raises(UserError, match=f"toy_paintings:{count}"):
        source_of(f"toy_paintings:{count}")


SPECIAL = ["9.png", "set.tfrecord", "set-00000-of-00002", "set.parquet", "set.tar", "set.arrow"]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_pipe_or_a_device_is_not_read(name, image_folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for folder in (image_folder, alone):
        os.mkfifo(folder / name)
        (folder / f"zero-{name}").symlink_to("/dev/zero")
    store = load(image_folder)
    assert len(store) == 7 and len(store.report.unreadable) == (2 if name == "9.png" else 0)
    with pytest.raises(UserError, match="not a regular file" if name == "9.png" else "no image, TFRecord or parquet"):
        load(alone)
    with pytest.raises(UserError, match="no such file or folder|not a regular file"):
        load(alone / name)
    with pytest.raises(UserError, match="--image .*: .*not a regular file"):
        open_image(alone / name, 16)
