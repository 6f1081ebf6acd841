#!/usr/bin/env python
"""Seconds that `import hfgen` and `hfgen --help` take in fresh processes.

    python benchmarks/startup.py [--quick]

All are timed in turn; medians are compared, also as differences to an interpreter that does nothing.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from script_steps import verdict


BARE = "python -c pass"
# The command, and the seconds that it must stay below.
LIMITS = {"import hfgen": 0.2, "hfgen --help": 1.0}


def commands() -> dict[str, list[str]]:
    """Return what is timed, by name."""
    executable = Path(sys.executable).with_name("hfgen")
    if not executable.is_file():
        raise SystemExit(f"{executable.name} is not installed next to this Python: pip install -e .")
    return {
        BARE: [sys.executable, "-c", "pass"],
        "import hfgen": [sys.executable, "-c", "import hfgen"],
        "hfgen --help": [str(executable), "--help"],
    }


def seconds_of(command: list[str], folder: str) -> float:
    """Return the wall-clock seconds of one run, from an empty folder, so that the installed package is imported."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Time all commands in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="fresh processes of each command")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds

    timed: dict[str, list[float]] = {name: [] for name in commands()}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands().values():
            seconds_of(command, folder)  # not timed: reads the files from disk and writes the bytecode
        for _ in range(rounds):
            for name, command in commands().items():
                timed[name].append(seconds_of(command, folder))

    medians = {name: statistics.median(seconds) for name, seconds in timed.items()}
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, typer {version('typer')}; ", end="")
    print(f"median of {rounds} fresh processes each\n")
    print("| command | s | s over a bare Python | below | |\n|---|---|---|---|---|")
    for name, seconds in medians.items():
        limit = LIMITS.get(name)
        judged = f"{limit} | {verdict(limit, seconds)}" if limit else "|"
        print(f"| `{name}` | {seconds:.3f} | {seconds - medians[BARE]:.3f} | {judged} |")


if __name__ == "__main__":
    main()
