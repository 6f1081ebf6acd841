"""Writing files so that a killed process leaves them readable: atomic replacement, and JSON lines."""

import errno
import fnmatch
import glob
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hfgen.errors import UserError
from hfgen.texts import one_line


# Larger files of JSON, and texts that a user has written, are not read.
MAX_JSON_BYTES, MAX_TEXT_BYTES = 1 << 28, 1 << 20
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-\d+")  # see `write_atomically`
# What `torch.save` raises, as a RuntimeError, when a disk is full or has gone.
TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter|inline_container|iostream|unexpected pos|write failed")
# Whatever is being written changes more often than that.
OLD_SECONDS = 3600
LARGER_DISK = "set TMPDIR to a folder on a larger disk"  # remark of `writing` for temporary files


@contextmanager
def writing(target: Path, remark: str = "free space there, or choose another place") -> Iterator[None]:
    """Turn an error of writing to a file or folder into a `UserError` that names it and ends in `remark`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {target}: {error}; {remark}") from error


def write_atomically(
    target: Path,
    write: Callable[[Path], object],
    marker: str | None = None,
    own: Collection[str] = ("*",),
    remark: str = "any previous version is unchanged",
) -> None:
    """Let `write` create a temporary path beside `target`, then rename it to `target`.

    Args:
        target: the file or folder to create or replace. An empty folder that cannot be renamed, such as a mounted
            disk, is filled. If the process dies, the old one stays intact (a folder may be left as `.name.old-PID` if
            the process dies between the two renames). What killed processes have left of earlier writes is removed
            when it is old; see also `remove_leftovers`.
        write: gets the temporary path and creates a file or a folder there.
        marker: a file (or a glob pattern) by which an earlier version of the folder is recognised; only such a
            folder is replaced.
        own: glob patterns of the names, or paths within the folder, that a version may have; anything else there is
            kept.
        remark: the end of the message if writing fails.

    Raises:
        UserError: if writing fails, or the folder is not an earlier version; the old `target` is kept.
    """
    if target.is_symlink() or not target.name:  # the link stays, and what it leads to is replaced; "." has no name
        target = target.resolve()
    with writing(target, remark):
        fills = _is_to_be_filled(target)
        place = target if fills else target.parent
        temporary = place / f".{target.name}.partial-{os.getpid()}"
        place.mkdir(parents=True, exist_ok=True)
        try:
            if not fills:
                require_replaceable(target, marker)
            write(temporary)
            _flush_to_disk(temporary)
            if fills:
                for path in sorted(temporary.iterdir()):
                    os.replace(path, target / path.name)
            elif target.is_dir():
                _replace_folder(target, temporary, own)
            else:
                os.replace(temporary, target)
            _remove_old_leftovers(target, place)
        except RuntimeError as error:
            if not TORCH_WRITE_ERROR.search(str(error)):
                raise
            raise OSError(f"is the disk full? ({one_line(error)})") from error
        finally:
            _remove(temporary)


def is_empty_folder(folder: Path) -> bool:
    """Whether a path is a folder that has nothing but what killed processes left when they were to fill it."""
    folder = folder.resolve()  # "." has no name
    return folder.is_dir() and {*folder.iterdir()} <= {*leftovers_of(folder, ("partial",), folder)}


def _is_to_be_filled(folder: Path) -> bool:
    """Whether a folder is empty and cannot be renamed."""
    if not is_empty_folder(folder):
        return False
    cannot_be_renamed = not os.access(folder.parent, os.W_OK) or os.path.ismount(folder)
    return cannot_be_renamed or os.path.samefile(folder, os.curdir)  # where a shell may stand


def require_replaceable(folder: Path, marker: str | None) -> None:
    """Raise a `UserError` if a folder has content that is not an earlier version of what is to be written there.

    Args:
        folder: may be missing, empty or a file.
        marker: a file by which an earlier version is recognised; None if there can be none.
    """
    if folder.is_dir() and any(folder.iterdir()) and (marker is None or not any(folder.glob(marker))):
        raise UserError(f"{folder} contains files that hfgen did not write: move or rename that folder first")


def _replace_folder(folder: Path, new: Path, own: Collection[str]) -> None:
    """Put a new version in the place of a folder, with what somebody else has added to the old one."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_dir():
            if not any(fnmatch.fnmatch(part, pattern) for part in (str(name), name.parts[0]) for pattern in own):
                if not os.path.lexists(new / name):
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, new / name, follow_symlinks=False)
    replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.replace(folder, replaced)
    os.replace(new, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old_leftovers(target: Path, place: Path) -> None:
    """Delete what killed processes left in a folder when they wrote to a target, unless one may be writing now.

    Ages are by the clock of the disk: that of another machine may differ from the one here.
    """
    for path in leftovers_of(target, ("partial",), place):  # an old version may hold files that a user has added
        with suppress(OSError):  # it is gone, or somebody else's
            if _last_change(target) - _last_change(path) > OLD_SECONDS:
                _remove(path)


def leftovers_of(target: Path, kinds: Collection[str] = ("partial", "old"), place: Path | None = None) -> list[Path]:
    """Return what `write_atomically` in other processes, which may have been killed, has put beside a target.

    Args:
        target: a file or folder, which may be missing.
        kinds: "partial": versions that were being written; "old": folders that were being replaced.
        place: where to look; beside the target if None.
    """
    place = target.parent if place is None else place
    found = [(path, LEFTOVER.fullmatch(path.name)) for path in place.glob(f".{glob.escape(target.name)}.*")]
    return [path for path, match in found if match and match["name"] == target.name and match["kind"] in kinds]


def _last_change(path: Path) -> float:
    """Return when a file or anything in a folder changed last."""
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what `write_atomically` in killed processes left in a folder and in those directly in it.

    A folder whose replacement was interrupted between the two renames gets its old version back. Nobody else may be
    writing there.
    """
    for place in [folder, *(path for path in folder.glob("*") if path.is_dir() and not path.is_symlink())]:
        for path in place.glob(".*"):
            match = LEFTOVER.fullmatch(path.name)
            if match is None:
                continue
            if match["kind"] == "old" and not (place / match["name"]).exists():
                os.replace(path, place / match["name"])
            else:
                _remove(path)


def write_text_atomically(target: Path, text: str) -> None:
    """Replace a text file atomically; see `write_atomically`."""
    write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_regular(file: Path, max_bytes: int) -> bytes:
    """Read a regular file; a pipe or a device could go on for ever.

    Raises:
        OSError: if it is something else, cannot be read, or has more than `max_bytes`.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes >> 20} MiB")
    return file.read_bytes()


def read_written_text(file: Path) -> str:
    """Read a text that a user has written, such as a preset or a study.

    Raises:
        OSError: if it is not a regular file, cannot be read, or has more than `MAX_TEXT_BYTES`.
        ValueError: if it is not UTF-8.
    """
    return read_regular(file, MAX_TEXT_BYTES).decode("utf-8-sig")


def read_json(file: Path, needed: Iterable[str] = (), remedy: str = "restore it from a copy") -> dict[str, Any]:
    """Read a file that holds one JSON object, as hfgen writes them.

    Args:
        file: the file.
        needed: keys that it must have.
        remedy: what the user can do if it is damaged.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        content = json.loads(read_regular(file, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{file} is damaged ({error}); {remedy}") from error
    missing = [key for key in needed if key not in content] if isinstance(content, dict) else ["object"]
    if missing:
        raise UserError(f"{file} is damaged (it has no {', '.join(missing)}); {remedy}")
    return content


def read_json_lines(file: Path, needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Args:
        file: may be missing; damaged lines, such as the last one of a process that was killed, are skipped.
        needed: keys without which a line is damaged.
    """
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and all(key in entry for key in needed):
            entries.append(entry)
    return entries


def json_lines(entries: Iterable[dict[str, Any]]) -> str:
    """Format entries as one line of JSON each."""
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def append_json_line(file: Path, entry: dict[str, Any]) -> None:
    """Append a line; if the file ends in a truncated line, start a new one."""
    with writing(file), file.open("a+b") as lines:
        if lines.tell() > 0:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(f"{json.dumps(entry)}\n".encode())


def _flush_to_disk(path: Path) -> None:
    """Flush a file, or all files in a folder, to disk: the content must be there before the rename."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    access = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is open for writing
    for file in files:
        descriptor = os.open(file, access)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_place_for(path: Path, option: str) -> None:
    """Raise a `UserError` if a file or folder cannot be created, before the work whose result it is to hold."""
    try:
        obstacle = _obstacle_to(path)
    except OSError as error:  # a name that is too long, or a folder that must not be read
        obstacle = str(error.strerror).lower()
    if obstacle is not None:
        raise UserError(f"{option} {path}: cannot be created, because {obstacle}; choose another place")


def require_utf8(path: Path, argument: str) -> None:
    """Raise a `UserError` for a name that is not UTF-8: the libraries that keep weights, graphs and logs refuse it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        problem = "the name is not UTF-8, so weights there cannot be read; rename it"
        raise UserError(f"{argument} {path}: {problem}") from error


def _obstacle_to(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}, which does not exist"
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"
