"""Run odd command lines, and check that each gives a result or a message: no traceback, no hang.

    python tests/endurance/odd_commands.py
    python tests/endurance/odd_commands.py --only "hfgen publish"

Not part of `make test`: it takes about half an hour on one CPU core. The lines stand in `odd_commands.txt`, written as
for a shell; `real` before a line takes the real features of `hfgen evaluate` instead of a stand-in. Each runs in a
process of its own and must end with status 0, or 2 and a last line that says what is wrong.
"""

import argparse
import collections
import contextlib
import importlib
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

from preloaded import LIBRARIES  # noqa: E402
from published_toys import FAMILIES, train_toys  # noqa: E402
from stand_in_features import Colours  # noqa: E402

from hfgen import cli  # noqa: E402
from hfgen.metrics import feature_spaces  # noqa: E402


SECONDS = 120
MEMORY = 8 << 30  # of a process; a size that is odd enough takes all there is
TINY = (
    "--dataset toy_paintings:14 --sample_size 16 --batch_size 4 --max_train_steps 2 --cpu --report_to none "
    "--num_sample_images 2"
).split()
# What ends a program that a user called wrongly: the message of hfgen, of typer, or of argparse.
SAYS_SO = re.compile(r"(^|\n)(error: |╭─ Error|Error: |Try '|usage: | Usage: |.*: error: )")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the lines that contain this")
    parser.add_argument("--printed", type=Path, help="file to write the status and the output of each line to")
    settings = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    counts, faults = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HFGEN_CACHE"] = f"{temporary}/cache"
        toys = train_in_a_process(Path(temporary) / "toys")
        place = make_odd_files(Path(temporary) / "place", toys["gan"])
        for number, line in enumerate(Path(__file__).with_suffix(".txt").read_text().splitlines()):
            if settings.only not in line:
                continue
            names = {name: str(folder) for name, folder in toys.items()} | {"new": f"new{number}"}
            status, printed = run(arguments_of(line, names), place, line.startswith("real "))
            problem = judge(status, printed)
            if settings.printed:
                with settings.printed.open("a", errors="backslashreplace") as file:
                    file.write(f"=== {line}\nstatus {status}\n{printed}\n")
            counts[problem.split(":")[0] or f"status {status}"] += 1
            if problem:
                faults += 1
                print(f"{line}\n    {problem}", flush=True)
    print(f"{counts.total()} command lines: {', '.join(f'{count} {how}' for how, count in counts.items())}")
    sys.exit(bool(faults))


def train_in_a_process(folder: Path) -> dict[str, Path]:
    """Train the toy runs; accelerate keeps settings of a process's first run, which the lines must not get."""
    if (pid := os.fork()) == 0:
        try:
            train_toys(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the toy runs cannot be trained")
    return {name: folder / name for name in FAMILIES}


def make_odd_files(place: Path, run_folder: Path) -> Path:
    """Make the folder in which the commands run, with the odd files that they name."""
    for folder in ("emptydir", "badrun", "garbagestudy", "emptystudy", "sqlstudy"):
        (place / folder).mkdir(parents=True)
    (place / "file").write_text("hi\n")
    (place / "bad.yaml").write_text("a: [b")
    (place / "badrun" / "model_index.json").write_text("{")
    (place / "noise.png").write_bytes(os.urandom(3000))
    (place / "garbagestudy" / "study.db").write_bytes(os.urandom(5000))
    (place / "emptystudy" / "study.db").touch()
    with contextlib.closing(sqlite3.connect(place / "sqlstudy" / "study.db")) as database:
        database.execute("create table studies(x)")
        database.commit()
    for name in ("run" + os.fsdecode(b"\xff"), "$x_{run"):
        shutil.copytree(run_folder, place / name)
    for name in ("im" + os.fsdecode(b"\xff") + ".png", "nl\nx.png"):
        shutil.copy(run_folder / "samples" / "step-00000006.png", place / name)
    return place


def arguments_of(line: str, names: dict[str, str]) -> list[str]:
    """Split a line as a shell does, and put in what stands in braces."""
    words = {"image": f"{names['gan']}/samples/step-00000006.png", "ff": os.fsdecode(b"\xff"), "newline": "\n"}
    words |= {"x*300": "x" * 300, "x*200": "x" * 200, "x*5000": "x" * 5000, "9*400": "9" * 400}
    words |= {"0..299": ",".join(map(str, range(300))), **names}
    arguments: list[str] = []
    for argument in shlex.split(line.removeprefix("real ")):
        filled = re.sub(r"\{([^{}]+)\}", lambda match: words.get(match[1], match[0]), argument)
        arguments += TINY if argument == "{tiny}" else [filled]
    return arguments


def run(arguments: list[str], place: Path, real_features: bool) -> tuple[int | str, str]:
    """Run a command in a process of its own; return its status, or "hangs", and what it printed."""
    output, began = place.parent / "printed", time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        with output.open("w") as stream, open(os.devnull) as nothing:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            os.dup2(nothing.fileno(), 0)
            os._exit(_status_of(arguments, real_features))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it may have left
            return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")
        if time.monotonic() - began > SECONDS:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs", output.read_text(errors="replace")
        time.sleep(0.01)


def _status_of(arguments: list[str], real_features: bool) -> int:
    if not real_features:
        feature_spaces.build_extractor = lambda features, mode, weights, device: Colours()
    sys.argv = arguments
    try:
        if arguments[0] == "hfgen":
            cli.main()
        else:
            script = ROOT / "training_scripts" / f"{arguments[0]}.py"
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def judge(status: int | str, printed: str) -> str:
    """Return what is wrong, empty if nothing."""
    if status == "hangs":
        return f"hangs: {printed[-300:]}"
    if "Traceback (most recent call last)" in printed:
        return f"traceback: {printed[-900:]}"
    if status == 0 or (status == 2 and SAYS_SO.search(printed.replace("\r", "\n"))):
        return ""
    return f"status {status} without a message: {printed[-500:]}"


if __name__ == "__main__":
    main()
