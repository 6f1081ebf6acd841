"""Zip and tar archives of images, and folders inside them; nothing is unpacked to disk."""

import bz2
import contextlib
import gzip
import lzma
import re
import tarfile
import unicodedata
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from hfgen.data.location import IMAGE_SUFFIXES
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.selection import ALL, select
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, count_suffixes, counts, file_identity, lasting_error, notes_on_shards
from hfgen.errors import UserError


# A tar's headers are in memory at once; those of real ones have a few hundred bytes.
MAX_HEADER_BYTES = 1 << 20
HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
END_OF_ARCHIVE = tarfile.EOFHeaderError  # type: ignore[attr-defined]
DAMAGED_HEADER = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
# How a compressed tar starts, and what unpacks it. The modes of `tarfile` for streams would end at the first of
# several compressed parts, and not compare checksums.
COMPRESSED = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00|\x5d\x00\x00\x80"), lzma.open),
)


def zip_source(path: Path, inner: str, settings: DataSettings) -> Source:
    """Open a zip of images.

    Args:
        path: the zip file.
        inner: the folder in it, with "/"; "" for all.
        settings: `dataset_split` is used.

    Raises:
        UserError: if it cannot be read, has no images there, or a member is refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # `zipfile` can raise almost anything on a damaged directory
        raise UserError(f"--dataset {path}: cannot be read as a zip file: {error}") from error
    for member in members:
        _refuse_outside(path, member.filename, f"at byte {member.header_offset} ")
    members = [member for member in members if not _name(member).endswith("/")]
    members.sort(key=lambda member: PurePosixPath(_name(member)))  # same order as for a folder
    chosen = _choose(path, inner, [_name(member) for member in members], settings)
    images = [members[index] for index in chosen.indices]
    for member in images:  # others are not unpacked
        if member.file_size > MAX_ENCODED_BYTES:
            raise _too_large(path, member.filename, f"at byte {member.header_offset} ", member.file_size)
    checksums = [(member.filename, member.CRC, member.file_size) for member in images]

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        try:
            opened = zipfile.ZipFile(path)
        except Exception as error:
            raise UserError(f"--dataset {path}: cannot be read any more: {error}") from error
        with opened as archive:
            for member in images:
                content: bytes | Exception
                try:
                    content = archive.read(member)
                except Exception as error:  # wrong checksum, password, decompression error
                    content = lasting_error(path, error)
                yield _name(member), content

    identity = file_identity([path], path.parent) + checksums
    return Source(f"zip {chosen.where}", identity, read, chosen.skipped, notes=chosen.notes)


def _name(member: zipfile.ZipInfo) -> str:
    """Return the path of a member with "/"; some programs on Windows write backslashes."""
    return member.filename.replace("\\", "/")


def tar_source(files: Sequence[Path], root: Path, inner: str, settings: DataSettings) -> Source:
    """Open tar files of images, plain or compressed; they are read from front to back, so they keep their order.

    Args:
        files: in the order in which they are read.
        root: the folder that names in the report are relative to.
        inner: the folder in the tar, with "/"; "" for all.
        settings: `dataset_split` is used if there is one file.

    Raises:
        UserError: if one cannot be read, has no images there, or a member is refused.
    """
    if len(files) > 1:
        settings = replace(settings, dataset_split=ALL)  # the files are those of the split already
    notes: list[str] = []
    names, sizes = [], array("q")
    for file in files:
        for _, member in _tar_members(file, notes):
            names.append(member.name)
            sizes.append(member.size)
    where = files[0] if len(files) == 1 else root
    chosen = _choose(where, inner, names, settings)
    for index in chosen.indices:  # others are not unpacked
        if sizes[index] > MAX_ENCODED_BYTES:
            raise _too_large(where, names[index], "", sizes[index])
    wanted = set(chosen.indices)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        position = 0
        for file in files:
            for archive, member in _tar_members(file, []):
                if position in wanted:
                    opened = archive.extractfile(member)
                    assert opened is not None  # a regular file
                    with opened, _named_in_errors(file):
                        yield names[position], opened.read()
                position += 1

    what = f"tar {chosen.where}" if len(files) == 1 else f"{len(files)} tar files in {chosen.where}"
    identity = [*file_identity(files, root), inner, chosen.where]
    return Source(what, identity, read, chosen.skipped, files, [*notes_on_shards(files), *notes, *chosen.notes])


def _tar_members(file: Path, notes: list[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the regular files of a tar from front to back, each with the open tar; note what was left out."""
    links = 0
    with _named_in_errors(file), _unpacked(file) as opened:
        # `ignore_zeros`: several tars in one file are read as one.
        with _Tar.open(fileobj=opened, mode="r|", tarinfo=_Member, ignore_zeros=True) as archive:
            for member in archive:
                if member.isfile():
                    _refuse_outside(file, member.name, "")
                    yield archive, member
                links += (member.islnk() or member.issym()) and _is_image(member.name)
            if not archive.ended:
                notes.append(f"{file} has no end-of-archive marker: it may have been cut off between two files")
    if links:
        notes.append(f"{file}: {links} links are not followed; archive the images themselves (tar --hard-dereference)")


@contextlib.contextmanager
def _unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a tar, which may be compressed, whatever its name says."""
    with file.open("rb") as packed:
        start = packed.read(16)
        packed.seek(0)
        unpack = next((unpack for pattern, unpack in COMPRESSED if pattern.match(start)), None)
        if unpack is None:
            yield packed
        else:
            with unpack(packed) as unpacked:
                yield cast(IO[bytes], unpacked)


class _Tar(tarfile.TarFile):
    """A tar.

    Attributes:
        ended: whether an end-of-archive marker has been read since the last member.
    """

    ended = False


class _Member(tarfile.TarInfo):
    """A member of a tar; `tarfile` itself takes a damaged header for the end of the tar."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        assert isinstance(archive, _Tar)
        try:
            member = super().fromtarfile(archive)
        except END_OF_ARCHIVE:
            archive.ended = True
            raise
        except DAMAGED_HEADER as error:
            if archive.ended:  # whatever lies behind the end is no tar
                raise
            raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset} ({error})") from error
        archive.ended = False
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # Names and attributes, which may be packed, are not read into memory without a limit.
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


@contextlib.contextmanager
def _named_in_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # `tarfile` can raise almost anything on a damaged header
        raise UserError(f"--dataset {file}: cannot be read as a tar file: {error}") from error


class _Chosen(NamedTuple):
    indices: list[int]
    where: str
    skipped: dict[str, int]
    notes: list[str]


def _choose(path: Path, inner: str, names: Sequence[str], settings: DataSettings) -> _Chosen:
    """Choose the images in a folder of an archive, by the names of its files."""
    names, inner = [_plain(name) for name in names], _plain(inner) if inner else ""
    start = inner.strip("/") + "/" if inner else ""
    below = [index for index, name in enumerate(names) if name.startswith(start) and not _is_hidden(name)]
    if inner and not below:
        folders = sorted({name.rpartition("/")[0] for name in names if "/" in name})
        listed = ", ".join(folders[:8]) or "none"
        raise UserError(f"--dataset {path}/{inner}: no such folder in the archive; it has {listed}")
    images = [index for index in below if _is_image(names[index])]
    others = set(below).difference(images)
    skipped = count_suffixes(PurePosixPath(names[index]) for index in sorted(others))
    if not images:
        kind = "zip" if path.suffix.lower() == ".zip" else "tar"
        raise UserError(
            f"--dataset {path}: no images in this {kind}; other files: {counts(skipped)}; unpack it if these hold any"
        )
    where = f"{path}/{inner}" if inner else str(path)
    selection = select(where, [names[index] for index in images], settings.dataset_split)
    return _Chosen([images[index] for index in selection.indices], where + selection.suffix, skipped, selection.notes)


def _plain(name: str) -> str:
    """Return a path without "./", in the form of accents that keyboards give; zips made by macOS have another."""
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _refuse_outside(path: Path, name: str, place: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name):
        raise UserError(
            f"{path}: rejected: the name {name!r} {place}points outside the archive; repack it without such names"
        )


def _too_large(path: Path, name: str, place: str, size: int) -> UserError:
    return UserError(f"{path}: rejected: {name!r} {place}unpacks to {size} bytes; remove it from the archive")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
