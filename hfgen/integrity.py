"""Detects damage to what hfgen keeps for later, such as checkpoints and caches, when it is read again.

Beside the files of a folder stands `digests.json`, with the size, the times and the digest of each. XXH3 finds
accidents, not attacks, at the speed of memory.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from hfgen.errors import UserError
from hfgen.files import leftovers_of, read_json, write_atomically, write_text_atomically
from hfgen.texts import say


DIGESTS_FILE = "digests.json"
CHUNK_BYTES = 1 << 20


def record_digests(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write `digests.json`: what some files of a folder, by default all in and below it, look like undamaged."""
    everything = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = sorted(name for name in everything if name != DIGESTS_FILE) if names is None else list(names)
    found = {name: [*_size_and_times(folder / name), _digest(folder / name)] for name in chosen}
    write_text_atomically(folder / DIGESTS_FILE, json.dumps(found, indent=1) + "\n")


def find_damage(folder: Path, trust_times: bool = False) -> str | None:
    """Compare the files of a folder with its `digests.json`.

    Args:
        folder: with a `digests.json`.
        trust_times: do not read a file whose size and times are those recorded; otherwise all are read.

    Returns:
        Which file is damaged and how, as a clause; None if all are as they were written.
    """
    try:
        recorded = read_json(folder / DIGESTS_FILE)
        moved = False
        for name, (size, *times, digest) in recorded.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            now = _size_and_times(file)
            if now[0] != size:
                return f"{name} has {now[0]} bytes instead of {size}"
            moved = moved or now[1:] != times
            if (now[1:] != times or not trust_times) and _digest(file) != digest:
                return f"the contents of {name} have changed"
    except (UserError, OSError, ValueError, TypeError) as error:
        return f"{DIGESTS_FILE} is missing or damaged" if isinstance(error, UserError) else str(error)
    if moved and trust_times:  # a copy, say; next time its times will do
        with contextlib.suppress(UserError):
            record_digests(folder, recorded)
    return None


def save_with_digests(save: Callable[[Path], object], folder: Path) -> None:
    """Let `save` create a folder, such as that of a pipeline, and write `digests.json` into it."""
    save(folder)
    record_digests(folder)


def recorded_names(folder: Path) -> list[str]:
    """Return the names of the files that hfgen put into a folder, as its `digests.json` says; if it does not, "*"."""
    try:
        return [*read_json(folder / DIGESTS_FILE), DIGESTS_FILE]
    except UserError:
        return ["*"]


def write_if_needed(folder: Path, write: Callable[[Path], object], remark: str = "free space there") -> None:
    """Let `write` create a folder, unless it is there and undamaged; see `find_damage`.

    Processes that may do so at once need a lock.

    Args:
        folder: the folder to be there in the end.
        write: gets a temporary path and creates the folder there.
        remark: the end of the message if writing fails.

    Raises:
        UserError: if writing fails.
    """
    if folder.is_dir():
        damage = find_damage(folder, trust_times=True)
        if damage is None:
            return
        say(f"{folder} is damaged and will be rebuilt: {damage}")
    for leftover in leftovers_of(folder):  # from a killed process
        shutil.rmtree(leftover, ignore_errors=True)

    def write_with_digests(temporary: Path) -> None:
        write(temporary)
        record_digests(temporary)

    # Its name, a digest, says whose it is, whatever is left in it.
    write_atomically(folder, write_with_digests, "*", remark=remark)


def _size_and_times(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
