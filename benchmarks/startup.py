"""Seconds that commands take in fresh processes before they have done anything."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from tables import Goal, Table


BARE = "python -c pass"
# By command: the seconds that it must stay below.
LIMITS = {"import hfgen": 0.2, "hfgen --help": 1.0}


def compare_startup(folder: Path, rounds: int) -> tuple[list[Table], list[Goal]]:
    """Time the commands in turn, from a folder without a checkout, so that the installed package is imported."""
    executable = Path(sys.executable).with_name("hfgen")
    if not executable.is_file():
        raise SystemExit(f"{executable.name} is not installed next to this Python: pip install -e .")
    commands = {
        BARE: [sys.executable, "-c", "pass"],
        "import hfgen": [sys.executable, "-c", "import hfgen"],
        "hfgen --help": [str(executable), "--help"],
        "hfgen train --help": [str(executable), "train", "--help"],
        "import hfgen.pipelines": [sys.executable, "-c", "import hfgen.pipelines"],
    }
    timed: dict[str, list[float]] = {name: [] for name in commands}
    for index in range(1 + rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            if index:  # the first reads the files from disk and writes the bytecode
                timed[name].append(time.perf_counter() - started)
    table = Table("Start-up", f"Median of {rounds} fresh processes.", ["command", "s", "s over a bare Python"])
    medians = {name: statistics.median(seconds) for name, seconds in timed.items()}
    table.rows = [[name, seconds, seconds - medians[BARE]] for name, seconds in medians.items()]
    goals = [
        Goal(f"{name}: limit of {limit} s over its time", limit / medians[name], 1) for name, limit in LIMITS.items()
    ]
    return [table], goals
