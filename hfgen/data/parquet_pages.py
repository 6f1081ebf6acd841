"""What the pages of a parquet file take in memory, read from their headers: a page is decompressed as a whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hfgen.data.memory import MAX_BYTES, MAX_ENCODED_BYTES


if TYPE_CHECKING:  # slow to import
    from pyarrow.parquet import ColumnChunkMetaData, FileMetaData


MAX_HEADER_BYTES = 1 << 24  # as in Arrow
DICTIONARY_PAGE = 2
TRUE, FALSE, BYTE, DOUBLE, BINARY, STRUCT = 1, 2, 3, 7, 8, 12
INTEGERS = (4, 5, 6)


def largest_pages(file: Path, metadata: "FileMetaData", columns: list[str] | None) -> list[int]:
    """Return the bytes of the largest page of each row group, when decompressed.

    What the metadata says of a column's size is not trusted, as only the pages decide what is allocated.

    Args:
        file: a parquet file.
        metadata: of this file.
        columns: the columns that will be read; None: all.

    Raises:
        LookupError: if a page takes too much memory, or a header is damaged.
    """
    largest = []
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if group.num_rows == 0:  # then a column may have no page, not even an empty one
                largest.append(0)
                continue
            chunks = [group.column(column) for column in range(group.num_columns)]
            sizes = [
                size
                for chunk in chunks
                if columns is None or chunk.path_in_schema.split(".")[0] in columns
                for size in _page_sizes(stream, num_bytes, chunk)
            ]
            largest.append(max(sizes, default=0))
    return largest


def _page_sizes(stream: BinaryIO, num_bytes: int, chunk: "ColumnChunkMetaData") -> Iterator[int]:
    """Yield the decompressed size of each page of a column in a row group; the file has `num_bytes`."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    end = at + chunk.total_compressed_size
    while at < end:
        stream.seek(at)
        header = _read_struct(stream, at)
        kind, uncompressed, compressed = (header.get(field, -1) for field in (1, 2, 3))
        if min(kind, uncompressed, compressed) < 0:
            raise LookupError(f"the header of the page at byte {at} is damaged")
        if stream.tell() + compressed > num_bytes:  # memory for it would be taken before the end is noticed
            raise LookupError(f"the page at byte {at} goes on beyond the end of the file")
        # Encoded images hardly become smaller, and a dictionary, of which a copy is made, has a few MB at most.
        is_bomb = uncompressed > MAX_ENCODED_BYTES and (kind == DICTIONARY_PAGE or uncompressed > 2 * compressed)
        if is_bomb or compressed + uncompressed > MAX_BYTES:
            raise LookupError(
                f"the page at byte {at} takes {uncompressed >> 20} MiB of memory; write it with fewer rows in a page"
            )
        yield uncompressed
        at = stream.tell() + compressed


def _read_struct(stream: BinaryIO, start: int) -> dict[int, int]:
    """Read a struct in Thrift's compact protocol, to its end; return its integers, by the number of the field.

    Page headers: https://parquet.apache.org/docs/file-format/metadata/; the protocol:
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
    """
    integers: dict[int, int] = {}
    open_structs: list[int] = []  # of the structs around, the number of the field
    field = 0
    while True:
        if stream.tell() - start > MAX_HEADER_BYTES:
            raise LookupError(f"the header of the page at byte {start} is damaged")
        (head,) = _read(stream, 1)
        if head == 0:
            if not open_structs:
                return integers
            field = open_structs.pop()
            continue
        kind, step = head & 15, head >> 4
        field = field + step if step else _zigzag(_read_varint(stream))
        if kind in INTEGERS:
            value = _zigzag(_read_varint(stream))
            if not open_structs:
                integers[field] = value
        elif kind == STRUCT:
            open_structs.append(field)
            field = 0
        elif kind == BINARY:
            stream.seek(_read_varint(stream), 1)
        elif kind in (BYTE, DOUBLE):
            _read(stream, 1 if kind == BYTE else 8)
        elif kind not in (TRUE, FALSE):  # page headers have no lists, sets or maps
            raise LookupError(f"the header of the page at byte {start} is damaged")


def _read(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise LookupError("it ends within the header of a page")
    return content


def _read_varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = _read(stream, 1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise LookupError("the header of a page is damaged")


def _zigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)
