"""Files that a process may be killed while it writes: replaced as a whole, or one JSON object a line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfgen.errors import UserError


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary path beside `target`, then put it in the place of `target`.

    Args:
        target: the file or folder to make or replace. If the process dies meanwhile, the old one is still whole
            (a folder being replaced may be left under `target` + ".old" in the instant between two renames).
        write: is given the temporary path and creates a file or a folder there.

    Raises:
        UserError: if the disk refuses; what was at `target` stays.
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
        raise UserError(f"could not write {target}: {error}; nothing that was there before is lost") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text_atomically(target: Path, text: str) -> None:
    """Replace a text file as a whole; see `write_atomically`."""
    write_atomically(target, lambda temporary: temporary.write_text(text))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line.

    Args:
        file: may be missing, and may hold lines that were cut off in the middle, which are left out.
    """
    entries = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def append_json_line(file: Path, entry: dict[str, Any]) -> None:
    """Add a line, below a torn one if that is how the file ends."""
    with file.open("a+b") as lines:
        if lines.tell() > 0:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(f"{json.dumps(entry)}\n".encode())


def _flush_to_disk(path: Path) -> None:
    """Force a file, or all files of a folder, out of the system's cache: a rename must not overtake its content."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
