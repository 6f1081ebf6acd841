"""Files on disk, and the sources that are opened from them."""

import zipfile
from pathlib import Path

from hfgen.data.settings import DataSettings
from hfgen.data.source import Source
from hfgen.data.sources import open_source


def source_of(path: Path | str, **settings) -> Source:
    """Open a data set with these settings."""
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
