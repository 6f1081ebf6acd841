"""Interrupt training runs at random moments, and check that each ends exactly like one that was left alone.

    python tests/endurance/interruptions.py --count 200
    python tests/endurance/interruptions.py --count 100 --signals TERM INT

Not part of `make test`: 200 interruptions take about half an hour on a busy CPU core. For each recipe a run is left
alone, and then the same run is killed again and again, and started again by the same command. Every other signal comes
in the middle of a write: as soon as a temporary path of hfgen's appears in the run's folder. In the end all files of
the run must have the content of those of the run that was left alone, except for times, and no others may be there.

After SIGTERM or SIGINT a process must also end within seconds, with the status of that signal and a line that says
where it stopped, and without a traceback.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from preloaded import Preloaded  # noqa: E402
from toy_runs import METHODS, TINY  # noqa: E402


STEPS = 40
SECONDS_TO_END = 20  # after SIGTERM or SIGINT, on a core that is busy with other work
RECIPES = {
    "dcgan": ("gan", []),
    "sngan": ("gan", ["--network", "sngan", "--loss", "hinge", "--n_critic", "2"]),
    "wgan_gp": ("gan", ["--loss", "wasserstein", "--gradient_penalty_weight", "10", "--normalization", "none"]),
    "vae": ("vae", []),
    "vae_flow": ("vae", ["--density", "flow"]),
    "vae_learned": ("vae", ["--feature_weight", "1", "--adversarial_weight", "1", "--learned_term_start", "9"]),
    "ddpm": ("ddpm", []),
    "ddpm_edm": ("ddpm", ["--formulation", "edm", "--unet", "compact", "--dropout", "0.1"]),
    "ddpm_evaluated": ("ddpm", ["--evaluate_every", "12"]),
}
# What is a time, or a count of starts, in the lines and objects that a run writes.
OF_THE_CLOCK = {"time", "seconds", "images_per_second", "minutes", "started", "ended", "updated", "pid", "host"}
# Files about the starts themselves.
ABOUT_STARTS = {"launches.jsonl", "status.json", "events.jsonl", "digests.json", "index.html", ".lock-holder"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="signals in all")
    parser.add_argument("--count_per_run", type=int, default=8)
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "INT"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    random_numbers = random.Random(settings.seed)
    count, in_writes, runs, faults = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder, Preloaded() as programs:
        alone: dict[str, tuple[dict, float]] = {}
        for recipe in itertools.cycle(settings.recipes):
            if recipe not in alone:
                alone[recipe] = left_alone(programs, recipe, Path(folder))
            expected, seconds = alone[recipe]
            run = InterruptedRun(programs, recipe, Path(folder) / f"{runs}-{recipe}", settings.signals, random_numbers)
            run.complete(min(settings.count_per_run, settings.count - count), seconds)
            difference = compare(expected, contents(run.folder))
            found = [*run.faults, *([difference] if difference else [])]
            print(f"{recipe}: interrupted {run.count} times, {'; '.join(found) or 'equal'}", flush=True)
            count, in_writes, runs = count + run.count, in_writes + run.in_writes, runs + 1
            faults += [f"{recipe}: {fault}" for fault in found]
            shutil.rmtree(run.folder)
            if count >= settings.count:
                break
    print(f"{count} signals ({in_writes} in a write), {runs} runs, {len(faults)} faults")
    sys.exit("\n".join(faults) if faults else 0)


def start(programs: Preloaded, recipe: str, folder: Path):
    kind, arguments = RECIPES[recipe]
    settings = [*TINY, *METHODS[kind], "--output_dir", folder, "--resume", "latest", *arguments]
    settings += ["--max_train_steps", STEPS, "--sample_every", "4", "--checkpoints_total_limit", "2"]
    return programs.start(ROOT / "training_scripts" / f"train_{kind}.py", *settings)


def left_alone(programs: Preloaded, recipe: str, folder: Path) -> tuple[dict[str, object], float]:
    """Return what an uninterrupted run leaves, and the seconds that it takes."""
    run, began = folder / recipe, time.monotonic()
    ended = start(programs, recipe, run).ended()
    if ended.returncode:
        sys.exit(f"{recipe} fails without being killed: {ended.stderr}")
    return contents(run), time.monotonic() - began


class InterruptedRun:
    """A run that is interrupted, and started again by the same command.

    `count` is how often it was interrupted, `in_writes` how often of these in the middle of a write; `faults` is what
    was wrong with the way it ended.
    """

    def __init__(
        self, programs: Preloaded, recipe: str, folder: Path, signals: list[str], random_numbers: random.Random
    ):
        self.folder, self.count, self.in_writes, self.faults = folder, 0, 0, []
        self._programs, self._recipe, self._signals, self._random = programs, recipe, signals, random_numbers

    def complete(self, wanted: int, seconds: float) -> None:
        """Start it until it is complete, and interrupt it so many times.

        Args:
            wanted: number of interruptions; fewer if it completes before them.
            seconds: that a whole run takes.
        """
        while self.count < wanted:
            program = start(self._programs, self._recipe, self.folder)
            self._wait_for_moment(program, seconds)
            if program.poll() is not None:  # complete, or it failed
                break
            self.count, self.in_writes = self.count + 1, self.in_writes + is_writing(self.folder)
            self._interrupt(program, self._random.choice(self._signals))
        else:
            program = start(self._programs, self._recipe, self.folder)
        ended = program.ended()
        if ended.returncode:
            sys.exit(f"{self._recipe} cannot be resumed: {ended.stderr}")

    def _wait_for_moment(self, program, seconds: float) -> None:
        awaits_write, skipped = self._random.random() < 0.5, self._random.randrange(12)
        deadline = time.monotonic() + self._random.uniform(0.0, 0.7) * seconds
        while time.monotonic() < deadline and program.poll() is None:
            if awaits_write and is_writing(self.folder):
                if skipped == 0:
                    return
                skipped -= 1
            time.sleep(0.0005)

    def _interrupt(self, program, name: str) -> None:
        number = signal.Signals[f"SIG{name}"]
        program.send_signal(number)
        try:
            status = program.wait(SECONDS_TO_END)
        except AssertionError:
            self.faults.append(f"SIG{name} is not heeded: {program.errors.read_text()[-300:]}")
            program.send_signal(signal.SIGKILL)
            program.wait()
            return
        if name == "KILL" or status == 0:  # 0: it had just become complete
            return
        output, errors = program.output.read_text(), program.errors.read_text()
        if status != 128 + number:
            self.faults.append(f"status {status} after SIG{name}: {output[-200:]} {errors[-300:]}")
        elif "Traceback" in errors:
            self.faults.append(f"traceback after SIG{name}: {errors[-300:]}")
        elif {"TERM": "SIGTERM", "INT": "interrupted"}[name] not in output + errors:
            self.faults.append(f"not a word on SIG{name}: {output[-200:]} {errors[-300:]}")


def is_writing(run: Path) -> bool:
    return any(run.glob(".*.partial-*")) or any(run.glob("*/.*.partial-*"))


def contents(run: Path) -> dict[str, object]:
    """What a run has left: each file's bytes, or its objects without times."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.name in ABOUT_STARTS:
            found[name] = None
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [without_times(json.loads(line), str(run)) for line in lines]
        elif path.name != "state.pt":  # of which the pickled order differs; the next steps show whether it is right
            found[name] = path.read_bytes()
    return found


def without_times(value: object, folder: str) -> object:
    if isinstance(value, dict):
        return {key: without_times(item, folder) for key, item in value.items() if key not in OF_THE_CLOCK}
    if isinstance(value, list):
        return [without_times(item, folder) for item in value]
    return value.replace(folder, "RUN") if isinstance(value, str) else value


def compare(expected: dict[str, object], found: dict[str, object]) -> str:
    """Name the files that are missing, left over or different; empty if there are none."""
    names = {
        "missing": expected.keys() - found.keys(),
        "left over": found.keys() - expected.keys(),
        "different": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(files))}" for what, files in names.items() if files)


if __name__ == "__main__":
    main()
