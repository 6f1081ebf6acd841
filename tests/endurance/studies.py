"""Disturb three workers of a study at random moments, and check that nothing is lost, doubled or changed by it.

    python tests/endurance/studies.py
    python tests/endurance/studies.py --databases postgresql

Not part of `make test`: 80 disturbances take about 20 minutes on one CPU core. A study of small trainings is run by
one worker that is left alone, and then again and again by three, on SQLite and on PostgreSQL, while at random moments
a worker is killed with -9 or stopped with SIGTERM, the folder of a cell that nobody trains is deleted, or the server
of the database is killed and started again. The clock of one worker is three hours ahead, also where SQLite asks for
it. Whoever ended is started again, as a user would.

In the end each cell must have ended once, with the scores of the study that was left alone; what is left in its folder
must be the same, bit for bit, but for times; its log must have each step once, in order, as the log of two trainings
side by side would not; and the report must have all of it. No worker may end in a traceback.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "studies"), str(ROOT / "tests" / "endurance"), str(ROOT)]

from interruptions import compare, contents  # noqa: E402
from postgresql import Cluster  # noqa: E402
from preloaded import Preloaded, Program  # noqa: E402
from stand_in_features import save_mean_colours  # noqa: E402

from hfgen.studies.cells import Study, expand  # noqa: E402
from hfgen.studies.database import DATABASE_ERRORS  # noqa: E402
from hfgen.studies.scripts import find_scripts  # noqa: E402
from hfgen.studies.storage import DONE, StudyStore, sqlite_url  # noqa: E402
from hfgen.studies.study_file import read_study_file  # noqa: E402


STUDY = """
title: Disturbed
families:
  gan:
    method: gan
    settings: {latent_dim: 4, generator_channels: 4, discriminator_channels: 4, augment: none, watch_every: 0}
    grid: {learning_rate: [1.0e-4, 2.0e-4]}
  vae: {method: vae, settings: {latent_dim: 4, block_out_channels: [4, 8], watch_every: 0, density_components: 2}}
  bad: {method: gan, settings: {learning_rate: 1e+30, generator_channels: 4, discriminator_channels: 4}}
grid: {}
settings: {cpu: true, batch_size: 4, log_every: 1, checkpoint_every: 5, num_sample_images: 2}
data: {sample_size: 16, dataset: "toy_paintings:24"}
budget: {steps: 60}
evaluation: {num_images: 12}
"""
GRACE_SECONDS, WORKERS = 8, 3
SECONDS = 900  # for a study, after its last disturbance
# hfgen's command, whose trainings start without the launcher. Worker 2 lives three hours in the future.
WORKER = """
import os, sys, time
from hfgen.cli import main
from hfgen.studies import launch

launch.LAUNCHER = []
if sys.argv.pop(1) == "2":
    import datetime, sqlite3
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    now = time.time
    time.time = lambda: now() + 3 * 3600

    @event.listens_for(Engine, "connect")
    def set_clock(connection, _):
        if isinstance(connection, sqlite3.Connection):
            text = lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
            connection.create_function("current_timestamp", 0, text)

main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="disturbances on each database")
    parser.add_argument("--count_per_study", type=int, default=10)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    random_numbers, faults = random.Random(settings.seed), []
    with tempfile.TemporaryDirectory() as folder, Preloaded() as programs:
        file = prepare(Path(folder))
        os.environ |= {"OMP_NUM_THREADS": "1", "HFGEN_CACHE": f"{folder}/cache"}
        alone = left_alone(programs, file)
        for name in settings.databases:
            faults += disturb_all(programs, file, name, alone, settings, random_numbers)
    print(f"{len(faults)} faults")
    sys.exit("\n".join(faults) if faults else 0)


def prepare(folder: Path) -> Path:
    """Write the study, its workers and the weights of the stand-in for Inception; return the study file."""
    save_mean_colours(folder / "weights.pt")
    (folder / "worker.py").write_text(WORKER)
    (folder / "disturbed.yaml").write_text(STUDY)
    return folder / "disturbed.yaml"


def start(programs: Preloaded, file: Path, output: Path, url: str, index: int) -> Program:
    given = ("study", "run", file, "--output", output, "--storage", url, "--grace_seconds", GRACE_SECONDS)
    given += ("--feature_weights", file.with_name("weights.pt"))
    return programs.start(file.with_name("worker.py"), index, *given)


def left_alone(programs: Preloaded, file: Path) -> tuple[Path, StudyStore]:
    """Run the study by one worker; return its folder and its results."""
    output = file.with_name("alone")
    output.mkdir()
    ended = start(programs, file, output, sqlite_url(output), 0).ended(SECONDS)
    if ended.returncode:
        sys.exit(f"the study fails without a disturbance: {ended.stderr}")
    return output, StudyStore(sqlite_url(output))


def disturb_all(
    programs: Preloaded,
    file: Path,
    database: str,
    alone: tuple[Path, StudyStore],
    settings: argparse.Namespace,
    random_numbers: random.Random,
) -> list[str]:
    """Disturb studies in one kind of database; return what was wrong."""
    count, faults, cluster = 0, [], None
    if database == "postgresql":
        cluster = Cluster().__enter__()
    try:
        for number in itertools.count():
            output = file.with_name(f"{database}-{number}")
            output.mkdir()
            url = cluster.new_database(f"study_{number}") if cluster else sqlite_url(output)
            study = DisturbedStudy(programs, file, output, url, cluster, random_numbers)
            study.complete(min(settings.count_per_study, settings.count - count))
            found = [*study.faults, *study.differences(*alone)]
            what = ", ".join(f"{what} {times}" for what, times in study.done.items())
            print(f"{output.name}: {what}; {'; '.join(found) or 'equal'}", flush=True)
            faults += [f"{output.name}: {fault}" for fault in found]
            count += sum(study.done.values())
            if not found:
                shutil.rmtree(output)
            if count >= settings.count:
                return faults
    finally:
        if cluster:
            cluster.__exit__()


class DisturbedStudy:
    """A study with three workers, which are disturbed, and started again when they end.

    `done` counts the disturbances by kind; `faults` is what was wrong with the way in which workers ended.
    """

    def __init__(
        self,
        programs: Preloaded,
        file: Path,
        output: Path,
        url: str,
        cluster: Cluster | None,
        random_numbers: random.Random,
    ):
        self.output, self.url, self.faults = output, url, []
        self._programs, self._file, self._cluster, self._random = programs, file, cluster, random_numbers
        self.done = {"killed": 0, "stopped": 0, "folder deleted": 0} | ({"server killed": 0} if cluster else {})
        self._workers: dict[int, Program] = {}
        self._asked: set[int] = set()  # process ids of workers that were killed or stopped
        self.study: Study = expand(read_study_file(file), find_scripts(), "toy_paintings:24")
        self._folders = [output / "cells" / cell.folder_name for cell in self.study.cells.values()]

    def complete(self, wanted: int) -> None:
        """Keep three workers going until all cells have ended, and disturb so many times before."""
        deadline, moment = time.monotonic() + SECONDS, time.monotonic() + 5
        while not self._is_done():
            self._start_workers()
            time.sleep(0.5)
            if sum(self.done.values()) < wanted and time.monotonic() > moment:
                self._disturb()
                deadline, moment = time.monotonic() + SECONDS, time.monotonic() + self._random.uniform(0.5, 12)
            if time.monotonic() > deadline:
                self.faults.append("the study does not end")
                break
        for index, worker in self._workers.items():
            try:
                self._check_end(worker, worker.wait(120))
            except AssertionError:
                self.faults.append(f"worker {index} does not end after the last cell")
                worker.send_signal(signal.SIGKILL)

    def _is_done(self) -> bool:
        try:
            store = StudyStore(self.url, GRACE_SECONDS)
            study = store.stored("disturbed")
            return study is not None and set(store.states(study).values()) == {DONE}
        except DATABASE_ERRORS:  # being killed
            return False

    def _start_workers(self) -> None:
        for index in range(WORKERS):
            worker = self._workers.get(index)
            if worker is not None and worker.poll() is None:
                continue
            if worker is not None:
                self._check_end(worker, worker.poll())
            self._workers[index] = start(self._programs, self._file, self.output, self.url, index)

    def _disturb(self) -> None:
        what = self._random.choices(list(self.done), (5, 5, 2, 3)[: len(self.done)])[0]
        worker = self._random.choice([one for one in self._workers.values() if one.poll() is None] or [None])
        if what == "server killed":
            self._cluster.stop()
            time.sleep(self._random.uniform(0, 3))
            self._cluster.start()
        elif what == "folder deleted":
            idle = [folder for folder in self._folders if folder.is_dir() and not trains_in(folder)]
            if not idle:
                return
            shutil.rmtree(self._random.choice(idle), ignore_errors=True)
        elif worker is None:
            return
        else:
            self._asked.add(worker.pid)
            worker.send_signal(signal.SIGKILL if what == "killed" else signal.SIGTERM)
            if self._random.random() < 0.3:  # two Ctrl-C of an impatient user, or a scheduler that does not wait
                time.sleep(self._random.uniform(0.1, 2))
                worker.send_signal(signal.SIGKILL)
            worker.wait()
        self.done[what] += 1

    def _check_end(self, worker: Program, status: int) -> None:
        told = worker.errors.read_text()
        if "Traceback" in told:
            self.faults.append(f"traceback: {told[-1500:]}")
        lost_server = self._cluster is not None and status == 2 and "the database" in told
        if status != 0 and worker.pid not in self._asked and not lost_server:
            self.faults.append(f"a worker ends with status {status}: {told[-500:]}")

    def differences(self, output: Path, alone: StudyStore) -> list[str]:
        """Return what differs from the study that was left alone."""
        store = StudyStore(self.url)
        study = store.open("disturbed")
        expected, found, trials = alone.outcomes(alone.open(None)), store.outcomes(study), store.trials()
        faults = []
        for name, cell in study.cells.items():
            outcome, other = found[name], expected[name]
            if outcome is None or outcome.kind != other.kind:
                faults.append(f"{name} is {outcome and (outcome.kind, outcome.reason)} instead of {other.kind}")
                continue
            ended = [one for one in trials[name] if one.state.name == "COMPLETE"]
            if len(ended) > 1:
                faults.append(f"{name} has ended {len(ended)} times")
            if outcome.kind == "trained" and scores(outcome) != scores(other):
                faults.append(f"{name} has the scores {scores(outcome)} instead of {scores(other)}")
            folder = self.output / "cells" / cell.folder_name
            if outcome.kind == "trained" and folder.is_dir():  # else it was deleted after it had ended
                if difference := compare(contents(output / "cells" / cell.folder_name), contents(folder)):
                    faults.append(f"{name}: {difference}")
                steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
                if steps != list(range(1, study.budget.steps + 1)):
                    faults.append(f"{name}: the steps of its log are {steps}")
        rows = list(csv.reader((self.output / "report" / "cells.csv").open()))
        if len(rows) != 1 + len(study.cells):
            faults.append(f"the report has {len(rows) - 1} cells instead of {len(study.cells)}")
        return faults


def scores(outcome) -> tuple:
    return outcome.value, outcome.step, outcome.result.summary["scores"], outcome.result.sheet


def trains_in(folder: Path) -> bool:
    """Whether a process trains in a folder."""
    return any(str(folder) in (one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))


if __name__ == "__main__":
    main()
