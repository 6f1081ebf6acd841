"""Random numbers as a function of what they are for, never of what was drawn before.

A run that is killed and resumed then draws exactly what an uninterrupted one would have drawn. This file imports the
standard library alone: a copy of it is part of each Space.
"""

import hashlib


def keyed_seed(*key: int | str) -> int:
    """Return a 63-bit seed that is a function of `key` alone; neighbouring keys give unrelated seeds.

    Args:
        key: what the numbers are for, such as (seed, step, process, "noise").
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
