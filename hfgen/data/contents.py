"""Detects whether the contents of files have changed since they were read.

Name, size and modification time are not enough: archives with fixed times, and programs that set them, hide it.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


CHUNK_BYTES = 1 << 20
FILES_AT_ONCE = 1024


def last_changes(files: Sequence[Path]) -> str:
    """Return a digest of when the files were last changed, in any way: no program can set this time."""
    times = [os.stat(file).st_ctime_ns if os.path.exists(file) else None for file in files]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()


def contents_digest(files: Sequence[Path]) -> str:
    """Return a digest of the contents of all files; it reads them in threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Some at a time: what waits in a pool takes two kilobytes a file.
        parts = (files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE))
        digests = [digest for part in parts for digest in pool.map(_file_digest, part)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return "not a regular file"  # a pipe can be read only once
        with open(file, "rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:  # reported when the images are read
        return type(error).__name__
    return digest.hexdigest()
