"""Random numbers that depend only on their purpose, never on earlier draws.

A killed and resumed run therefore uses exactly the same random numbers as an uninterrupted one. This file imports only
the standard library: a copy of it is part of each Space.
"""

import hashlib


def keyed_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends only on `key`; similar keys give unrelated seeds.

    Args:
        key: purpose of the numbers, such as (seed, step, process, "noise").
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
