"""Files of JSON lines, which a process that is killed may leave with a torn last line."""

import json
from pathlib import Path
from typing import Any


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
