"""Studies of a few cells whose training and scoring cost nothing, and workers in processes of their own."""

import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest


pytest.importorskip("optuna", reason='needs optuna: pip install "hfgen[study]"')

from sqlalchemy import event
from sqlalchemy.engine import Engine

import hfgen
from hfgen.studies import launch, worker
from hfgen.studies.cells import Cell, Place, Study
from hfgen.studies.launch import Workspace
from hfgen.studies.outcomes import Outcome, Result
from hfgen.studies.storage import StudyStore, sqlite_url
from hfgen.studies.study_file import Budget, Evaluation


DATA = {"dataset_split": "train", "dataset_column": None, "sample_size": 8, "drop_duplicates": False}
DATA |= {"cache_dir": None, "max_image_pixels": 1000}
# Workers of a test are forked, which takes no time: what they need is imported already.
FORK = multiprocessing.get_context("fork")


@event.listens_for(Engine, "connect")
def do_not_wait_for_the_disk(connection, _) -> None:
    """Let SQLite leave it to the system when something gets onto the disk; a test outlives no power cut."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def toy_cell(name: str, act: str = "train", device: str | None = None, **settings) -> Cell:
    """A cell that the script in `stand_in_script.py` trains in no time."""
    return Cell(name, "gan", {**DATA, "act": act, "max_train_steps": 20, **settings}, device)


def toy_study(*cells: Cell | str, name: str = "toy", metric: str = "fid", budget: Budget | None = None) -> Study:
    """A study of these cells, or of plain ones by these names."""
    named = [cell if isinstance(cell, Cell) else toy_cell(cell) for cell in cells]
    places = tuple(Place(cell.name, {}, (cell.name,)) for cell in named)
    return Study(
        name, hfgen.__version__, "Toys", "", "", metric, "toy_paintings:12", budget or Budget(steps=20),
        Evaluation(num_images=10), (0,), {cell.name: cell for cell in named}, places,
    )  # fmt: skip


def toy_result(fid: float | None = 5.0, digest: str = "these images", kid: float | None = 0.5) -> Result:
    """Scores of a cell, as `Scorer.score` returns them."""
    training = {"minutes": 2.0, "images_per_second": 30.0}
    summary = {"scores": {"fid": fid, "kid": kid}, "training": training, "data_digest": digest}
    return Result(summary, [{"step": 1, "loss": 0.25}], "sheet", "strip")


def trained(fid: float = 5.0) -> Outcome:
    """What becomes of a cell that goes well."""
    return Outcome("trained", fid, step=20, result=toy_result(fid))


def open_toys(folder: Path, study: Study, grace_seconds: int = 120) -> StudyStore:
    """Open or make a study in the SQLite file of a folder."""
    store = StudyStore(sqlite_url(folder), grace_seconds)
    store.open_or_create(study)
    return store


def workspace_in(folder: Path, dataset: str = "toy_paintings:12") -> Workspace:
    """A workspace with the script of `stand_in_script.py` as its only one."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("stand_in_script.py"), folder / "scripts" / "train_gan.py")
    return Workspace(folder / "here", folder / "scripts", dataset)


class QuickScorer:
    """Gives each cell the scores in its settings, or none at all; told which cells came."""

    def __init__(self):
        self.scored: list[str] = []

    def score(self, cell: Cell) -> Result:
        self.scored.append(cell.name)
        if error := cell.settings.get("scoring_fails"):
            raise error
        return toy_result(cell.settings.get("fid", 5.0), kid=cell.settings.get("kid", 0.5))


def make_quick(monkeypatch) -> QuickScorer:
    """Launch scripts without the launcher, score by `QuickScorer`, and take all images for the same."""
    scorer = QuickScorer()
    monkeypatch.setattr(launch, "LAUNCHER", [])
    monkeypatch.setattr(worker, "Scorer", lambda evaluation, workspace: scorer)
    monkeypatch.setattr(worker, "reference_digest", lambda cell, workspace: "these images")
    return scorer


def fall_silent(folder: Path) -> None:
    """Let the last heartbeat of every trial be an hour ago."""
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    database.close()


def side_by_side(count: int, act: Callable) -> list:
    """Call `act(index, wait)` in so many processes, `wait()` being a barrier; return what they answer."""
    barrier, answers = FORK.Barrier(count), FORK.SimpleQueue()

    def one(index: int) -> None:
        try:
            answers.put((index, act(index, barrier.wait)))
        except BaseException as error:
            barrier.abort()  # the others need not wait
            answers.put((index, error))

    processes = [FORK.Process(target=one, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    if errors := [answer for answer in found.values() if isinstance(answer, BaseException)]:
        raise errors[0]
    return [found[index] for index in range(count)]


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for something that another process does."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        pause.wait(0.02)
