"""Images in the columns of tables: parquet files and datasets of the `datasets` library.

A value may be the encoded bytes, a struct of bytes and path, a path, base64 text, or a list of these.
"""

import base64
import binascii
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image

from hfgen.data.decode import safe_formats
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.source import choose_column, lasting_error
from hfgen.files import read_regular


# Rows have to be read to tell whether a column of text holds images; longer text than a path is taken as base64.
MAX_PATH_LENGTH = 4096
MAX_ROWS_TRIED = 100
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.+-]+)*;base64,")
ADDRESS = re.compile(r"\w+://")

Content = bytes | Exception


def find_column(
    where: str,
    wanted: str | None,
    schema: pyarrow.Schema,
    rows: Callable[[list[str]], Iterable[dict[str, Any]]],
    read_path: "ReadPath",
) -> str:
    """Return the image column: the wanted one, or the only one that holds images.

    Args:
        where: the dataset, for messages.
        wanted: the column that the user has chosen; None if it is to be found.
        schema: names and types of all columns.
        rows: reads some columns row by row, as values by column; called only if no type says which one holds images.
        read_path: reads the image file that a value names.

    Raises:
        UserError: if the wanted column cannot hold images, or if there is not exactly one that does.
    """
    bytes_columns = [field.name for field in schema if _holds_bytes(field.type)]
    text_columns = [field.name for field in schema if _is_text(_item_type(field.type))]
    if wanted is not None:
        return choose_column(where, wanted, bytes_columns + text_columns, schema.names)
    if not bytes_columns and text_columns:
        values = _first_values(rows(text_columns), len(text_columns))
        bytes_columns = [name for name in text_columns if _is_image(values.get(name), read_path)]
    return choose_column(where, wanted, bytes_columns, schema.names)


ReadPath = Callable[[str], Content]


def _first_values(rows: Iterable[dict[str, Any]], num_columns: int) -> dict[str, Any]:
    """Return the first value of each column that is not empty, if it is in one of the first rows."""
    found: dict[str, Any] = {}
    for row in islice(rows, MAX_ROWS_TRIED):
        found = {name: value for name, value in row.items() if not _is_empty(value)} | found
        if len(found) == num_columns:
            break
    return found


def images_in(name: str, value: Any, read_path: ReadPath) -> Iterator[tuple[str, Content]]:
    """Yield `(name, encoded image)` for each image of a value; an exception takes the place of what cannot be read."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from images_in(f"{name}.{index}", item, read_path)
    else:
        yield name, _content(value, read_path)


def read_path_below(folder: Path) -> ReadPath:
    """Return a function that reads local image files, relative paths below `folder`."""

    def read(path: str) -> Content:
        if ADDRESS.match(path):
            return ValueError(
                f"the row names a file elsewhere: {path[:100]}; download it, and put its path into the table"
            )
        try:
            return read_regular(folder / path, MAX_ENCODED_BYTES)
        except (OSError, ValueError) as error:
            return lasting_error(folder / path, error)

    return read


def named_files(values: Callable[[], Iterable[Any]], folder: Path) -> list[Path]:
    """Return the existing local files that the values of a column name instead of holding images.

    Args:
        values: returns an iterator over the column. Only if its first value that is not empty may be a name are all
            looked at.
        folder: the folder that relative paths are below.
    """
    if not next((_paths_in(value) for value in values() if not _is_empty(value)), []):
        return []
    paths = (folder / path for value in values() for path in _paths_in(value))
    return [path for path in paths if os.path.isfile(path)]


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_empty(item) for item in value)
    return not (any(value.values()) if isinstance(value, dict) else value)


def _paths_in(value: Any) -> list[str]:
    """Return the texts in a value that may be paths."""
    if isinstance(value, list):
        return [path for item in value for path in _paths_in(item)]
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else None
    is_path = isinstance(value, str) and 0 < len(value) <= MAX_PATH_LENGTH and not DATA_URI.match(value)
    return [value] if is_path else []


def _content(value: Any, read_path: ReadPath) -> Content:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return _decode_text(value, read_path)
    if isinstance(value, bytes) and len(value) > MAX_ENCODED_BYTES:
        return ValueError(f"larger than {MAX_ENCODED_BYTES >> 20} MiB")
    return value if isinstance(value, bytes) and value else ValueError("the row contains no image")


def _decode_text(text: str, read_path: ReadPath) -> Content:
    if match := DATA_URI.match(text):
        text = text[match.end() :]
    elif len(text) <= MAX_PATH_LENGTH:
        content = read_path(text)
        if isinstance(content, bytes):
            return content
        decoded = _decode_base64(text)
        return decoded if isinstance(decoded, bytes) and _is_encoded_image(decoded) else content
    return _decode_base64(text)


def _decode_base64(text: str) -> Content:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return ValueError("the row contains text that is neither a path nor base64")


def _is_image(value: Any, read_path: ReadPath) -> bool:
    contents = [content for _, content in images_in("", value, read_path)]
    return bool(contents) and isinstance(contents[0], bytes) and _is_encoded_image(contents[0])


def _is_encoded_image(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=safe_formats()):
            return True
    except Exception:  # damaged files make Pillow raise almost anything
        return False


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether values of a type may contain encoded images."""
    kind = _item_type(kind)
    if pyarrow.types.is_struct(kind):
        names = {kind.field(index).name for index in range(kind.num_fields)}
        return "bytes" in names or names == {"path"}
    return any(
        is_kind(kind)
        for is_kind in (
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
            pyarrow.types.is_binary_view,
            pyarrow.types.is_fixed_size_binary,
        )
    )


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _item_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of the items of a list and of the entries of a dictionary."""
    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _item_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _item_type(kind.value_type)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return _item_type(kind.value_type) if is_list else kind
