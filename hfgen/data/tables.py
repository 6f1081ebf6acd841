"""Parquet files whose rows hold images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, file_identity
from hfgen.errors import UserError


ROWS_AT_ONCE = 64


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

    def rows(columns: list[str] | None = None, at_once: int = ROWS_AT_ONCE) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in files:
            row = 0
            try:
                with parquet.ParquetFile(file) as table:
                    if missing := set(columns or ()) - set(table.schema_arrow.names):
                        raise LookupError(f"it has no column {missing.pop()}")
                    for batch in table.iter_batches(batch_size=at_once, columns=columns):
                        for values in batch.to_pylist():
                            yield f"{file.name}#{row}", values
                            row += 1
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError, LookupError) as error:
                raise UserError(f"{file}: cannot be read as parquet after row {row}: {error}") from error

    try:
        schema = parquet.read_schema(files[0])
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset {files[0]}: cannot be read as parquet: {error}") from error
    read_path = read_path_below(root)

    def first_row(columns: list[str]) -> dict[str, Any]:
        return next(rows(columns, at_once=1), ("", {}))[1]

    column = find_column(str(files[0]), settings.dataset_column, schema, first_row, read_path)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for name, values in rows([column]):
            yield from images_in(name, values[column], read_path)

    named: list[Path] = []
    if named_files(first_row([column]).get(column), root):
        named = [file for _, values in rows([column]) for file in named_files(values[column], root)]
    identity = [*file_identity(files, root), *file_identity(named, root), column]
    what = f"{len(files)} parquet file(s) in {root}"
    return Source(what, identity, read, files=[*files, *named], has_columns=True)
