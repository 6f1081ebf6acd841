"""Parquet files whose rows hold images."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.parquet_pages import largest_pages
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, file_identity
from hfgen.errors import UserError


if TYPE_CHECKING:  # slow to import
    from pyarrow.parquet import ParquetFile


MAX_ROWS_AT_ONCE = 64
BUFFER_BYTES = 1 << 20


def _rows(file: Path, table: "ParquetFile", columns: list[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of some columns, a few at a time, in bounded memory."""
    for group, largest_page in enumerate(largest_pages(file, table.metadata, columns)):
        # Any number of equal images may be stored as one, so that each row can be as large as a whole page.
        at_once = max(1, min(MAX_ROWS_AT_ONCE, MAX_ENCODED_BYTES // max(1, largest_page)))
        for batch in table.iter_batches(at_once, row_groups=[group], columns=columns):
            if batch.nbytes > MAX_ENCODED_BYTES:
                raise LookupError(f"one of the next {len(batch)} has more than {MAX_ENCODED_BYTES >> 20} MiB")
            yield from batch.to_pylist()


def parquet_source(files: list[Path], root: Path, settings: DataSettings) -> Source:
    """Open parquet files of the same columns.

    Args:
        files: in the order in which they are read.
        root: the folder that paths in the table, and names in the report, are relative to.
        settings: `dataset_column` is used.

    Raises:
        UserError: if a file cannot be read, or the image column is not unique.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    from hfgen.data.columns import find_column, images_in, named_files, read_path_below

    def rows(columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in files:
            row = 0
            try:
                # So a row group is read page by page, not as a whole.
                with parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
                    if missing := set(columns or ()) - set(table.schema_arrow.names):
                        raise LookupError(f"it has no column {missing.pop()}")
                    for values in _rows(file, table, columns):
                        yield f"{file.name}#{row}", values
                        row += 1
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError, LookupError) as error:
                raise UserError(f"{file}: cannot be read as parquet after row {row}: {error}") from error

    try:
        schema = parquet.read_schema(files[0])
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset {files[0]}: cannot be read as parquet: {error}") from error
    read_path = read_path_below(root)

    def values_of(columns: list[str]) -> Iterator[dict[str, Any]]:
        return (values for _, values in rows(columns))

    column = find_column(str(files[0]), settings.dataset_column, schema, values_of, read_path)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for name, values in rows([column]):
            yield from images_in(name, values[column], read_path)

    named = named_files(lambda: (values[column] for _, values in rows([column])), root)
    identity = [*file_identity(files, root), *file_identity(named, root), column]
    what = f"{len(files)} parquet file(s) in {root}"
    return Source(what, identity, read, files=[*files, *named], has_columns=True)
