"""Damage every file of a run in every way, and check that each command gives the right result or names the file.

    python tests/endurance/damaged_files.py

Not part of `make test`: it takes about 40 minutes on one CPU core, `--share 0.1` a tenth of that. A toy run of each
family is copied; one of its files is truncated, zeroed, emptied, deleted, made longer, or has a byte flipped; then the
run is resumed, sampled from, drawn, made into a film, published, or scored with stand-in features. Each command, in a
process of its own, must give what it gives for the undamaged run, or end with status 2 and one line that names the
file or the folder of its checkpoint or pipeline. Logs and pictures may lack what was lost.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from damages import DAMAGES  # noqa: E402
from stand_in_features import Colours  # noqa: E402
from toy_runs import METHODS, TINY, script, train  # noqa: E402

from hfgen import cli  # noqa: E402
from hfgen.errors import run_reporting_user_errors  # noqa: E402
from hfgen.metrics import feature_spaces  # noqa: E402


FAMILIES = {"gan": [], "vae": [], "ddpm": ["--unet", "compact", "--formulation", "edm"]}
COMMANDS = ("resume", "sample", "curves", "progress", "publish", "evaluate", "compare")
SCORED = ["--reference", "toy_paintings:24", "--num_images", "12", "--device", "cpu"]
SECONDS = 120
# What a command leaves that must be equal to what it leaves for the undamaged run.
RESULTS = {
    "resume": "run/pipeline/**/*.safetensors",
    "sample": "out/*.png",
    "publish": "out/**/*.safetensors",
    "evaluate": "out/evaluation.md",
    "compare": "out/comparison.json",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--share", type=float, default=1, help="run this share of the cases, chosen at random")
    settings = parser.parse_args()
    counts, faults, chance = collections.Counter(), [], random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HFGEN_CACHE"] = str(Path(temporary) / "cache")
        for family in settings.families:
            undamaged = Path(temporary) / family / "run"
            train(family, undamaged, *FAMILIES[family], "--sample_every", "2", "--checkpoints_total_limit", "2")
            for command in settings.commands:
                expected = run_command(family, command, undamaged, Path(temporary) / "expected" / family / command)
                if expected.fault or expected.status:
                    sys.exit(f"{family}: {command} fails on an undamaged run: {expected}")
                for file in sorted(path for path in undamaged.rglob("*") if path.is_file() and path.stat().st_size):
                    for damage in DAMAGES:
                        if chance.random() > settings.share:
                            continue
                        name = file.relative_to(undamaged)
                        found = run_command(family, command, undamaged, Path(temporary) / "case", name, damage)
                        verdict, fault = judge(found, expected, name)
                        counts[verdict] += 1
                        if fault:
                            faults.append(f"{family}, {command}, {name} {damage}: {fault}")
                            print(faults[-1], flush=True)
    print(f"{counts.total()} cases: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    sys.exit(bool(faults))


class Ended:
    """How a command ended: its status, what it printed, its results by path, and what no command may do."""

    def __init__(self, status: int, printed: str, results: dict[str, bytes], fault: str):
        self.status, self.printed, self.results, self.fault = status, printed, results, fault

    def __str__(self) -> str:
        return f"status {self.status}, {self.fault}, {self.printed[-600:]}"


def run_command(
    family: str, command: str, undamaged: Path, folder: Path, file: Path | None = None, damage: str = ""
) -> Ended:
    """Copy a run to `folder`/run, damage a file of it, and run a command on it in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, printed = folder / "run", folder / "printed"
    shutil.copytree(undamaged, run)
    if file is not None:
        DAMAGES[damage](run / file)
    pid = os.fork()
    if pid == 0:
        with open(printed, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            os._exit(_status_of(family, command, run, folder / "out"))
    deadline = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return Ended(-9, printed.read_text(), {}, "hangs")
        time.sleep(0.01)
    said = printed.read_text()
    status = int(said.rsplit("\nstatus ", 1)[-1]) if "\nstatus " in said else -1
    fault = "traceback" if "Traceback (most recent call last)" in said else "" if status >= 0 else "died"
    results = {str(path.relative_to(folder)): _content(path) for path in folder.glob(RESULTS.get(command, "-"))}
    return Ended(status, said, results, fault)


def _content(path: Path) -> bytes:
    """What must be equal of a result: of a comparison the scores, beside which stand times and names of folders."""
    if path.name != "comparison.json":
        return path.read_bytes()
    return repr([row["scores"] for row in json.loads(path.read_text())["rows"]]).encode()


def _status_of(family: str, command: str, run: Path, output: Path) -> int:
    try:
        if command == "resume":
            arguments = ["--resume", "latest", "--max_train_steps", "8", "--sample_every", "2"]
            settings = [*TINY, *METHODS[family], "--output_dir", str(run), *FAMILIES[family]]
            run_reporting_user_errors(
                lambda: script(family).main([*settings, "--checkpoints_total_limit", "2", *arguments])
            )
            status: object = 0
        else:
            suffix = {"progress": ".gif", "curves": ".png"}.get(command, "")
            more = {"sample": ["--num_images", "2", "--device", "cpu"], "publish": ["tester/toy"]}.get(command, [])
            if command in ("evaluate", "compare"):
                feature_spaces.build_extractor = lambda features, mode, weights, device: Colours()
                more = SCORED
            sys.argv = ["hfgen", command, str(run), *more, "--output", f"{output}{suffix}"]
            cli.main()
            status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        status = 1
    print(f"\nstatus {status if isinstance(status, int) else 2}", flush=True)
    return 0


def judge(found: Ended, expected: Ended, file: Path) -> tuple[str, str]:
    """Return a verdict to count, and what is wrong, empty if nothing."""
    if found.fault:
        return "faults", f"{found.fault}: {found.printed[-500:]}"
    if found.status == 0:
        if found.results == expected.results:
            return "right", ""
        return "faults", "another result, without a word"
    named = any(part in found.printed for part in (file.name, *(str(parent) for parent in file.parents[:-1])))
    if found.status == 2 and named:
        return "refused by name", ""
    return "faults", f"status {found.status}: {found.printed[-400:]}"


if __name__ == "__main__":
    main()
