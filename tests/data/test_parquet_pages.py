"""The sizes of a parquet file's pages, read from their headers."""

import random

import pyarrow
import pyarrow.parquet
import pytest
from source_files import source_of, write_parquet_that_lies

from hfgen.data import parquet_pages
from hfgen.data.parquet_pages import largest_pages
from hfgen.errors import UserError


def sizes_of(file, columns=None):
    return largest_pages(file, pyarrow.parquet.read_metadata(file), columns)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_largest_page_of_each_row_group_is_found(tmp_path, version, compression):
    table = pyarrow.table({"image": [bytes(1000)] * 7 + [b"12345678"], "label": range(8)})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=7, data_page_version=version, compression=compression
    )
    assert sizes_of(tmp_path / "a.parquet", ["image"]) == [1004, 12]  # a dictionary: each length in four bytes
    assert sizes_of(tmp_path / "a.parquet") == [1004, 12]
    assert sizes_of(tmp_path / "a.parquet", ["label"])[0] == 56


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_shard_without_rows_is_read_as_one(tmp_path, place):
    table = pyarrow.table({"image": [b"a", b"b"]})
    for index in range(3):
        pyarrow.parquet.write_table(table.slice(0, 0 if index == place else 2), tmp_path / f"{index}.parquet")
    with pyarrow.parquet.ParquetWriter(tmp_path / f"{place}.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table.slice(0, 0))
    assert sizes_of(tmp_path / f"{place}.parquet") == [0, 0]
    assert [content for _, content in source_of(tmp_path).images()] == [b"a", b"b"] * 2


def test_all_pages_of_a_column_count(tmp_path):
    table = pyarrow.table({"image": [bytes(100), bytes(3000), bytes(200)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, data_page_size=1)
    assert 3004 <= sizes_of(tmp_path / "a.parquet")[0] <= 3304 + 100
    nested = pyarrow.table({"image": [[{"bytes": bytes(5000)}], []], "label": [1, 2]})
    pyarrow.parquet.write_table(nested, tmp_path / "b.parquet")
    assert sizes_of(tmp_path / "b.parquet", ["image"]) == [5004]


def test_a_large_page_is_refused_by_name_whatever_the_metadata_says(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "MAX_ENCODED_BYTES", 1 << 20)
    file = write_parquet_that_lies(tmp_path / "a.parquet", [bytes(3 << 20)] * 2)
    with pytest.raises(UserError, match=r"a\.parquet.*byte 4 takes 3 MiB of memory; write it with fewer rows"):
        list(source_of(file).images())


def test_a_large_page_of_images_that_do_not_compress_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "MAX_ENCODED_BYTES", 1 << 20)
    images = [random.Random(seed).randbytes(1 << 20) for seed in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "a.parquet", use_dictionary=False)
    assert [content for _, content in source_of(tmp_path / "a.parquet").images()] == images
    monkeypatch.setattr(parquet_pages, "MAX_BYTES", 4 << 20)  # not compressed and decompressed together
    with pytest.raises(UserError, match="takes 2 MiB"):
        list(source_of(tmp_path / "a.parquet").images())


def test_a_page_that_claims_to_be_larger_than_its_file_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [bytes(1000)] * 7}), file, use_dictionary=False)
    content = file.read_bytes()
    claimed = b"\x15" + bytes([128, 128, 128, 128, 6])  # 768 MiB, in Thrift's compact protocol
    header = b"\x15\x00" + 2 * claimed + b"\x00"
    file.write_bytes(content[:4] + header + content[4 + len(header) :])
    with pytest.raises(UserError, match=r"a\.parquet.*the page at byte 4 goes on beyond the end of the file"):
        list(source_of(file).images())


def test_damaged_headers_are_refused_by_name(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [bytes(1000)] * 7}), file)
    content = file.read_bytes()
    refused = 0
    for damage in (b"\xff" * 30, bytes(30), b"\x1b" * 30, b"\x18\xff\xff\xff\xff\xff\x7f" + bytes(23)):
        file.write_bytes(content[:4] + damage + content[34:])
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
            list(source_of(file).images())
        refused += 1
    assert refused == 4
