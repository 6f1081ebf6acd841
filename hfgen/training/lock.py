"""The lock on a run's folder: one launch at a time trains in it."""

import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hfgen.errors import UserError
from hfgen.texts import say


LOCK_FILE, HOLDER_FILE = ".lock", ".lock-holder"
# A launch that was just stopped is still writing its checkpoint.
WAIT_SECONDS = 10.0


def lock_folder(folder: Path) -> FileLock:
    """Lock a run's folder; the operating system releases the lock if this process dies.

    On a disk without locks, a file takes their place if it can (see filelock), else the folder stays unlocked.

    Args:
        folder: created if it is missing.

    Raises:
        UserError: if another process keeps the lock; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK_FILE), folder / HOLDER_FILE
    try:
        _acquire(lock, folder, holder)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}")
    except Timeout:
        raise UserError(
            f"--output_dir {folder}: in use by {_named(holder)}; stop that run, wait for it to end, or choose "
            "another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        say(f"note: {folder} cannot be locked ({error}): do not start another run in it")
    return lock


def holder_of(folder: Path) -> str | None:
    """Return who has locked a run's folder; None if it is free, missing, or on a disk without locks."""
    if not (folder / LOCK_FILE).is_file():
        return None
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _named(folder / HOLDER_FILE)
    except (OSError, NotImplementedError):
        return None
    lock.release()
    return None


def _acquire(lock: FileLock, folder: Path, holder: Path) -> None:
    """Acquire the lock; if it is taken, say so and wait a little."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder} is in use by {_named(holder)}; waiting {WAIT_SECONDS:.0f} s for it to end")
        lock.acquire(timeout=WAIT_SECONDS)


def _named(holder: Path) -> str:
    return holder.read_text() if holder.is_file() else "another process"
