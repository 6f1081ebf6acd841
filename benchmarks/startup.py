"""How long `import hfgen` and `hfgen --help` take, in fresh processes beside a bare Python, alternately.

python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path


PROGRAM = str(Path(sys.executable).with_name("hfgen"))
COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "python -c 'import hfgen'": ([sys.executable, "-c", "import hfgen"], 0.2),
    "hfgen --help": ([PROGRAM, "--help"], 1.0),
}


def main() -> None:
    """Measure alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):  # the first round fills the system's caches and is dropped
        for name, (command, _) in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    print(f"median of {rounds}\n\n| command | seconds | at most |\n| --- | --- | --- |")
    for name, (_, limit) in COMMANDS.items():
        median = statistics.median(seconds[name][1:])
        verdict = "" if limit is None else f"{limit}" if median <= limit else f"{limit} MISSED"
        print(f"| `{name}` | {median:.3f} | {verdict} |")


if __name__ == "__main__":
    main()
