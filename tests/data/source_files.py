"""Files on disk, and the sources that are opened from them."""

import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

from hfgen.data.opening import open_source
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source


def source_of(path: Path | str, **settings) -> Source:
    """Open a dataset with these settings."""
    return open_source(DataSettings(dataset=str(path), **settings))


def names_in(source: Source) -> list[str]:
    """The names of its images, in order."""
    return [name for name, _ in source.images()]


def write(path: Path, content: bytes = b"content") -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a zip of these files, by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def write_parquet_that_lies(path: Path, images: list[bytes]) -> Path:
    """Write a row group whose metadata says that it is small when decompressed; its pages do not."""
    table = pyarrow.table({"image": images})
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    content = path.read_bytes()
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:]
    for size in (group.column(0).total_uncompressed_size, group.total_byte_size):
        said = _varint(size)
        footer = footer.replace(said, bytes([0xA0, *[0x80] * (len(said) - 2), 0]))  # 16, in as many bytes
    path.write_bytes(content[:start] + footer)
    assert pyarrow.parquet.read_metadata(path).row_group(0).total_byte_size == 16
    return path


def _varint(value: int) -> bytes:
    """A positive integer in Thrift's compact protocol."""
    value *= 2
    parts = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])
