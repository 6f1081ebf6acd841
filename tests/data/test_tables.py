"""Parquet files and datasets saved by the `datasets` library, of all kinds of columns."""

import base64
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from picture_files import encoded, noise
from source_files import source_of

from hfgen.data.opening import open_source
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError


CONTENTS = [encoded(noise(16, 16, seed)) for seed in range(4)]
LONG = encoded(noise(64, 64))  # as base64 longer than any path
STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def as_text(content: bytes, start: str = "") -> str:
    return start + base64.b64encode(content).decode()


def contents_of(path: Path, **settings) -> list[bytes | Exception]:
    return [content for _, content in source_of(path, **settings).images()]


def write_parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# (the column, the images in it)
COLUMNS = {
    "dictionary": (pyarrow.array([*CONTENTS, CONTENTS[0]]).dictionary_encode(), [*CONTENTS, CONTENTS[0]]),
    "lists": (pyarrow.array([CONTENTS[:3], [], CONTENTS[3:]], pyarrow.list_(pyarrow.binary())), CONTENTS),
    "large lists": (pyarrow.array([CONTENTS], pyarrow.large_list(pyarrow.binary())), CONTENTS),
    "fixed lists": (pyarrow.array([CONTENTS[:2], CONTENTS[2:]], pyarrow.list_(pyarrow.binary(), 2)), CONTENTS),
    "lists of structs": (
        pyarrow.array([[{"bytes": c, "path": None}] for c in CONTENTS], pyarrow.list_(STRUCT)),
        CONTENTS,
    ),
    "view": (pyarrow.array(CONTENTS, pyarrow.binary_view()), CONTENTS),
    "fixed size": (pyarrow.array(CONTENTS[:1], pyarrow.binary(len(CONTENTS[0]))), CONTENTS[:1]),
    "base64": (pyarrow.array([as_text(content) for content in [*CONTENTS, LONG]]), [*CONTENTS, LONG]),
    "data URI": (
        pyarrow.array([as_text(c, "data:image/png;base64,") for c in CONTENTS], pyarrow.large_string()),
        CONTENTS,
    ),
    "paths": (pyarrow.array(["a.png", "sub/b.png"]), CONTENTS[:2]),
    "structs of paths": (pyarrow.array([{"bytes": None, "path": "a.png"}], STRUCT), CONTENTS[:1]),
    "structs of paths alone": (pyarrow.array([{"path": "sub/b.png"}]), CONTENTS[1:2]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_only_column_of_images_is_found_whatever_its_type(tmp_path, kind):
    column, contents = COLUMNS[kind]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(CONTENTS[0])
    (tmp_path / "sub" / "b.png").write_bytes(CONTENTS[1])
    others = {"label": list(range(len(column))), "text": ["a picture"] * len(column)}
    path = write_parquet(tmp_path / "set.parquet", **others, photo=column)
    assert contents_of(path) == contents
    assert contents_of(path, dataset_column="photo") == contents


@pytest.mark.parametrize("kind", ["base64", "data URI", "paths"])
def test_a_column_of_text_whose_first_rows_are_empty_is_found(tmp_path, kind):
    column, contents = COLUMNS[kind]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(CONTENTS[0])
    (tmp_path / "sub" / "b.png").write_bytes(CONTENTS[1])
    values = [None, "", *column.to_pylist()]
    path = write_parquet(tmp_path / "set.parquet", text=["a picture"] * len(values), photo=values)
    assert contents_of(path)[2:] == contents
    datasets.Dataset.from_dict({"text": ["a picture"] * len(values), "photo": values}).save_to_disk(tmp_path / "saved")
    if kind != "paths":
        assert contents_of(tmp_path / "saved")[2:] == contents


def test_the_images_of_a_list_are_named_by_row_and_place(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", photo=[CONTENTS[:1], CONTENTS[1:3]])
    assert [name for name, _ in source_of(path).images()] == ["set.parquet#0.0", "set.parquet#1.0", "set.parquet#1.1"]


def test_of_bytes_and_a_path_the_bytes_are_taken(tmp_path):
    (tmp_path / "a.png").write_bytes(CONTENTS[1])
    path = write_parquet(
        tmp_path / "set.parquet", image=pyarrow.array([{"bytes": CONTENTS[0], "path": "a.png"}], STRUCT)
    )
    assert contents_of(path) == CONTENTS[:1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gone.png", "No such file"),
        ("https://example.org/a.png", "names a file elsewhere: https://example.org/a.png; download it"),
        ("data:image/png;base64,####", "neither a path nor base64"),
        ("", "contains no image"),
        (None, "contains no image"),
    ],
)
def test_text_that_leads_to_no_image_is_told_and_other_rows_are_read(tmp_path, text, reason):
    path = write_parquet(tmp_path / "set.parquet", image=[as_text(CONTENTS[0]), text])
    first, second = contents_of(path)
    assert first == CONTENTS[0] and reason in str(second)


def test_a_table_without_images_is_refused_with_what_is_read(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", text=["a.png", "bGFiZWw="], label=[1, 2])
    with pytest.raises(UserError, match=r"no image column, only \['text', 'label'\]; encoded images, .* are read"):
        source_of(path)


def test_an_image_that_a_table_names_is_decoded_anew_when_it_changes(tmp_path):
    (tmp_path / "a.png").write_bytes(CONTENTS[0])
    settings = DataSettings(dataset=str(write_parquet(tmp_path / "set.parquet", image=["a.png"])), sample_size=16)
    first, before = load_images(settings), os.stat(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(CONTENTS[1])
    os.utime(tmp_path / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_images(settings).digest != first.digest


@pytest.mark.parametrize("first", [None, "gone.png"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "arrow"])
def test_files_named_by_later_rows_count_too(tmp_path, kind, first):
    (tmp_path / "a.png").write_bytes(CONTENTS[0])
    (tmp_path / "b.png").write_bytes(CONTENTS[2])
    table = datasets.Dataset.from_dict({"image": ["b.png" if kind == "arrow" else first, "a.png"]})
    if kind == "parquet":
        table.to_parquet(tmp_path / "set.parquet")
        dataset = tmp_path / "set.parquet"
    else:
        table.save_to_disk(tmp_path / "saved")
        dataset = tmp_path / "saved"
        for name in ("a.png", "b.png"):  # relative to the dataset, as for parquet
            (dataset / name).write_bytes((tmp_path / name).read_bytes())
        if kind == "arrow":
            dataset = dataset / "data-00000-of-00001.arrow"
    picture = (tmp_path if kind == "parquet" else tmp_path / "saved") / "a.png"
    settings = DataSettings(dataset=str(dataset), dataset_column="image", sample_size=16)
    before, stat = load_images(settings), os.stat(picture)
    assert len(before) == (2 if kind == "arrow" else 1)
    picture.write_bytes(CONTENTS[1])
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_images(settings).digest != before.digest


# Saved by `datasets`


def dataset_of(*contents: bytes) -> datasets.Dataset:
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    rows = {"label": [0] * len(contents), "image": [{"bytes": content, "path": None} for content in contents]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    dataset_of(*CONTENTS).select([2, 0]).save_to_disk(tmp_path / "saved")
    source = source_of(tmp_path / "saved")
    assert list(source.images()) == [("saved#0", CONTENTS[2]), ("saved#1", CONTENTS[0])]
    assert [file.suffix for file in source.files] == [".arrow"]


def test_of_several_saved_splits_one_is_chosen(tmp_path):
    splits = {"train": dataset_of(*CONTENTS[:2]), "test": dataset_of(*CONTENTS[2:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert contents_of(tmp_path / "saved") == CONTENTS[:2]
    assert contents_of(tmp_path / "saved", dataset_split="test") == CONTENTS[2:]
    assert contents_of(tmp_path / "saved", dataset_split="test+train") == CONTENTS[2:] + CONTENTS[:2]
    with pytest.raises(
        UserError, match=r"has no split dev; choose one with --dataset_split: \['train', 'test', 'all'\]"
    ):
        source_of(tmp_path / "saved", dataset_split="dev")


def test_all_splits_are_read_though_their_other_columns_differ(tmp_path):
    other = dataset_of(*CONTENTS[2:]).cast_column("label", datasets.Value("string"))
    datasets.DatasetDict({"train": dataset_of(*CONTENTS[:2]), "test": other}).save_to_disk(tmp_path / "saved")
    assert contents_of(tmp_path / "saved", dataset_split="all") == CONTENTS
    paths = datasets.Dataset.from_dict({"image": [as_text(content) for content in CONTENTS]})
    datasets.DatasetDict({"train": dataset_of(*CONTENTS[:2]), "test": paths}).save_to_disk(tmp_path / "mixed")
    with pytest.raises(UserError, match="hold images in different ways .*; choose one --dataset_split"):
        contents_of(tmp_path / "mixed", dataset_split="all")


def test_arrow_files_of_the_cache_of_datasets_are_read(tmp_path):
    dataset_of(*CONTENTS).save_to_disk(tmp_path / "saved", num_shards=2)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).unlink()
    filtered = pyarrow.table({"indices": pyarrow.array([0], pyarrow.uint64())})  # as `datasets` keeps it
    with pyarrow.ipc.new_stream(tmp_path / "saved" / "cache-0123456789abcdef.arrow", filtered.schema) as writer:
        writer.write_table(filtered)
    assert contents_of(tmp_path / "saved") == CONTENTS
    assert contents_of(tmp_path / "saved" / "data-00001-of-00002.arrow") == CONTENTS[2:]


@pytest.mark.parametrize("damage", ["cut off", "not JSON"])
def test_a_damaged_saved_data_set_is_an_error_that_names_it(tmp_path, damage):
    dataset_of(*CONTENTS).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / ("state.json" if damage == "not JSON" else "data-00000-of-00001.arrow")
    file.write_bytes(b"" if damage == "not JSON" else file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{tmp_path / 'saved'}: cannot be read as a saved dataset"):
        contents_of(tmp_path / "saved")


@pytest.mark.parametrize("dataset", ["toy_paintings:3", "folder", "nowhere/at/all"])
def test_a_configuration_of_a_local_data_set_is_refused(tmp_path, dataset):
    name = str(tmp_path) if dataset == "folder" else dataset
    with pytest.raises(UserError, match="--dataset_config cats: only Hub datasets have configurations"):
        open_source(DataSettings(dataset=name, dataset_config="cats"))
