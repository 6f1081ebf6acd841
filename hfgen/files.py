"""Writing files so that a killed process leaves them readable: atomic replacement, and JSON lines."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfgen.errors import UserError


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a temporary path beside `target`, then rename it to `target`.

    Args:
        target: the file or folder to create or replace. If the process dies, the old one stays intact (a folder
            may be left as `.name.old` if the process dies between the two renames).
        write: gets the temporary path and creates a file or a folder there.

    Raises:
        UserError: if writing fails; the old `target` is kept.
    """
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        _flush_to_disk(temporary)
        if target.is_dir():
            replaced = target.with_name(f".{target.name}.old")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
            os.replace(temporary, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"could not write {target}: {error}; any previous version is unchanged") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text_atomically(target: Path, text: str) -> None:
    """Replace a text file atomically; see `write_atomically`."""
    write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Args:
        file: may be missing; truncated lines are skipped.
    """
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def append_json_line(file: Path, entry: dict[str, Any]) -> None:
    """Append a line; if the file ends in a truncated line, start a new one."""
    with file.open("a+b") as lines:
        if lines.tell() > 0:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(f"{json.dumps(entry)}\n".encode())


def _flush_to_disk(path: Path) -> None:
    """Flush a file, or all files in a folder, to disk: the content must be there before the rename."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_place_for(path: Path, option: str) -> None:
    """Raise a `UserError` if a file or folder cannot be created, before the work whose result it is to hold."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "is not a folder" if not above.is_dir() else "is not writable"
        raise UserError(f"{option} {path}: cannot be created, because {above} {reason}; choose another place")
