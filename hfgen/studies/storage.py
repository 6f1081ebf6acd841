"""The database of a study: cells are Optuna trials, which any number of workers take from a queue.

Cells are assigned by the queue instead of `optuna.samplers.GridSampler`, which, according to its documentation, can
give one grid point to two parallel workers. A queued trial changes from WAITING to RUNNING in one database
transaction; Optuna ensures that for every database except SQLite, for which it is done here.
"""

import base64
import contextlib
import json
import os
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL

from hfgen.errors import UserError
from hfgen.studies.cells import Study, differences
from hfgen.studies.database import DATABASE_ERRORS, open_database, reading_from, reason_of, shown, with_driver
from hfgen.studies.outcomes import BROKEN, DIVERGED, TRAINED, Outcome, Result
from hfgen.studies.scripts import require_same_scripts


DEFINITION, CELL, WORKER = "hfgen_study", "cell", "worker"
OUTCOME, REASON, STEP, IMAGES = "outcome", "reason", "step", "images"
SUMMARY, CURVE, SHEET, STRIP = "summary", "curve", "sheet", "strip"
# States of a cell.
DONE, RUNNING, WAITING, MISSING = "done", "running", "waiting", "missing"
# Where a study can start anew: the folder of the one before has trainings of cells with the same names.
NEW_PLACE = "another --output (and another --storage, if you gave one)"
# Outcome of a trial, not of a cell: its worker was asked to stop.
GIVEN_BACK = "given back"
# A cell that lost this many workers in a row is assumed to crash them.
MAX_LOST = 3
# The creator of a study stores its definition shortly after creating it.
DEFINITION_SECONDS, POLL_SECONDS = 10.0, 0.2


class StudyStore:
    """One study in a database.

    Args:
        url: database URL in SQLAlchemy's format.
        grace_seconds: seconds without a heartbeat after which a worker loses its cell.

    Raises:
        UserError: if the database cannot be reached.
    """

    def __init__(self, url: str, grace_seconds: int = 120):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats have been "experimental" since Optuna 2
        self.url, self._grace_seconds = with_driver(url), grace_seconds
        self._unstarted: dict[int, float] = {}  # trial -> when it was first seen unstarted
        self._taken: int | None = None  # trial of the cell being trained here
        self._sampler = optuna.samplers.RandomSampler()  # unused: all parameters are queued
        try:
            self._storage = open_database(self.url, grace_seconds)
        except (*DATABASE_ERRORS, ImportError, RuntimeError) as error:
            raise UserError(
                f"--storage {shown(self.url)}: the database cannot be opened: {reason_of(error)}"
            ) from error

    def open(self, name: str | None) -> Study:
        """Open an existing study.

        Args:
            name: name of the study; the only one if None.

        Raises:
            UserError: if there is none, or several and no name is given.
        """
        names = self._names()
        if name is None and len(names) != 1:
            remedy = f"choose one with --study: {', '.join(names)}" if names else "start one with hfgen study run"
            raise UserError(f"the database contains {len(names)} studies; {remedy}")
        if name is not None and name not in names:
            raise UserError(f"--study {name}: not in the database, which contains {', '.join(names) or 'none'}")
        with reading_from(self.url):
            self._load(name or names[0])
            return self._definition()

    def open_or_create(self, study: Study) -> Study:
        """Open or create the study; return it with the dataset location from its creation.

        Raises:
            UserError: if a different study of this name exists (the message lists the differences), if it trains with
                other scripts, or the database cannot store it.
        """
        try:
            self._study = optuna.create_study(study_name=study.name, storage=self._storage, sampler=self._sampler)
        except DuplicatedStudyError:
            self._load(study.name)
        else:
            self._define(study)
            return study
        stored = self._definition()
        anew = f"use {NEW_PLACE}"
        require_same_scripts(stored.scripts, study.scripts, f"; or, for a study with those here, {anew}")
        if changes := differences(stored, study):
            if stored.asked is not None and stored.asked != study.asked:
                anew = f"to continue it, give --budget {stored.asked}, as when it was begun; for another, {anew}"
            raise UserError(
                f"the study {study.name} in this database is a different one (stored -> now):\n  "
                + "\n  ".join(changes)
                + f"\n{anew[0].upper()}{anew[1:]}"
            )
        # Changes that do not affect results, such as a new title or published figure, are stored.
        if any(self.outcomes(stored).values()):
            study = replace(study, dataset=stored.dataset)
        if study.to_dict() != stored.to_dict():
            self._study.set_user_attr(DEFINITION, packed(study))
        return study

    def _define(self, study: Study) -> None:
        try:
            self._study.set_user_attr(DEFINITION, packed(study))
        except DATABASE_ERRORS as error:
            with contextlib.suppress(*DATABASE_ERRORS):  # if the database is gone altogether
                optuna.delete_study(study_name=study.name, storage=self._storage)  # leave no study without definition
            raise UserError(
                f"--storage {shown(self.url)}: the database cannot store the study: {reason_of(error)}"
            ) from error

    def stored(self, name: str) -> Study | None:
        """Return the study of this name, or None if the database does not have it."""
        return self.open(name) if name in self._names() else None

    def _names(self) -> list[str]:
        """Return the names of hfgen's studies; the database may contain others."""
        with reading_from(self.url):
            summaries = optuna.get_all_study_summaries(self._storage, include_best_trial=False)
        return [summary.study_name for summary in summaries if DEFINITION in summary.user_attrs]

    def _load(self, name: str) -> None:
        self._study = optuna.load_study(study_name=name, storage=self._storage, sampler=self._sampler)

    def _definition(self) -> Study:
        deadline = time.monotonic() + DEFINITION_SECONDS
        while DEFINITION not in (attributes := self._study.user_attrs):
            if time.monotonic() > deadline or self._study.get_trials(deepcopy=False):
                raise UserError(
                    f"{self._study.study_name} in this database was not created by hfgen; rename the study file"
                )
            time.sleep(POLL_SECONDS)
        return unpacked(attributes[DEFINITION])

    def trials(self) -> dict[str, list[FrozenTrial]]:
        """Return the trials of each cell that has any, oldest first."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if CELL in trial.user_attrs:
                found.setdefault(trial.user_attrs[CELL], []).append(trial)
        return found

    def states(self, study: Study) -> dict[str, str]:
        """Return the state of each cell, after releasing the cells of workers without a heartbeat."""
        optuna.storages.fail_stale_trials(self._study)
        self._fail_unstarted()
        trials = self.trials()
        return {name: state_of(trials.get(name, [])) for name in study.cells}

    def enqueue(self, names: list[str]) -> None:
        """Add cells to the queue, in this order."""
        for name in names:
            self._study.enqueue_trial({CELL: name}, user_attrs={CELL: name})

    def run_next(self, work: Callable[[str], Outcome | None]) -> str | None:
        """Take the next cell from the queue, if there is one, and store its outcome.

        Args:
            work: called with the cell's name. If it raises or returns None, the cell goes back to the queue.

        Returns:
            The cell whose outcome was stored, if it has ended for good.
        """
        taken: list[int] = []
        ended: list[str] = []
        raised: list[BaseException] = []

        def objective(trial: Trial) -> float:
            try:
                name = trial.user_attrs.get(CELL)
                if name is None or self._is_taken(name, trial.number):  # the queue is empty, or had the cell twice
                    raise TrialPruned
                taken.append(trial.number)
                self._taken = trial._trial_id
                self._storage.record_heartbeat(trial._trial_id)  # Optuna's heartbeat thread is just starting
                trial.set_user_attr(WORKER, f"{socket.gethostname()} {os.getpid()}")
                outcome = work(name)
                if outcome is None:
                    self.enqueue([name])
                    raise TrialPruned
                for key, value in _attributes_of(outcome):
                    trial.set_user_attr(key, value)
                ended.extend([name] if outcome.kind in (TRAINED, DIVERGED) else [])
                return outcome.value
            except (TrialPruned, UpdateFinishedTrialError):
                raise
            except BaseException as error:
                raised.append(error)
                if isinstance(error, KeyboardInterrupt | UserError):  # else it counts as lost
                    trial.set_user_attr(OUTCOME, GIVEN_BACK)
                raise

        try:
            self._study.optimize(objective, n_trials=1)
        except Exception as error:
            if raised:
                raise raised[0] from None
            of_optuna = isinstance(error, UpdateFinishedTrialError | ValueError)
            if not (of_optuna and taken and self._study.get_trials(deepcopy=False)[taken[0]].state.is_finished()):
                raise
            # No heartbeat for too long, as on a suspended laptop: the cell was given to another worker.
            return None
        return ended[0] if ended else None

    def note_images(self, digest: str) -> None:
        """Note the digest of the images of the cell being trained here, for workers that take another one."""
        assert self._taken is not None
        self._storage.set_trial_user_attr(self._taken, IMAGES, digest)

    def images_of(self, study: Study) -> dict[str, str]:
        """Return the digest of the images of each cell that was scored or is being trained, where it is known."""
        found, silent = {}, self.silent()
        for name, trials in self.trials().items():
            for trial in trials:
                is_running = trial.state == TrialState.RUNNING and trial.number not in silent
                digest = trial.user_attrs.get(SUMMARY, {}).get("data_digest", trial.user_attrs.get(IMAGES))
                if name in study.cells and (is_running or SUMMARY in trial.user_attrs) and digest is not None:
                    found[name] = digest
        return found

    def silent(self) -> set[int]:
        """Return the numbers of the running trials whose workers have given no sign of life for too long."""
        stale = set(self._storage._get_stale_trial_ids(self._study._study_id))
        return {trial.number for trial in self._study.get_trials(deepcopy=False) if trial._trial_id in stale}

    def has_lost_its_cell(self) -> bool:
        """Whether the cell being trained here was given to another worker for lack of a heartbeat."""
        try:
            return self._taken is not None and self._storage.get_trial(self._taken).state.is_finished()
        except DATABASE_ERRORS:  # the database may recover before there is a result to store
            return False

    def _fail_unstarted(self) -> None:
        """Release cells of workers lost before their first heartbeat, which Optuna does not detect."""
        now = time.monotonic()
        running = [one for one in self._study.get_trials(deepcopy=False) if one.state == TrialState.RUNNING]
        silent = [one.number for one in running if WORKER not in one.user_attrs]
        self._unstarted = {number: self._unstarted.get(number, now) for number in silent}
        for number, since in self._unstarted.items():
            if now - since > self._grace_seconds:
                try:
                    self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
                except UpdateFinishedTrialError:
                    pass  # another worker was faster

    def _is_taken(self, name: str, number: int) -> bool:
        others = [trial for trial in self.trials()[name] if trial.number != number]
        running = [trial for trial in others if trial.state == TrialState.RUNNING and trial.number < number]
        return bool(running) or state_of(others) == DONE

    def outcomes(self, study: Study) -> dict[str, Outcome | None]:
        """Return the outcome of each cell; None if there is none yet."""
        trials = self.trials()
        return {name: outcome_of(trials.get(name, [])) for name in study.cells}


def _attributes_of(outcome: Outcome) -> Iterator[tuple[str, Any]]:
    """Yield the attributes stored with the trial; the outcome comes last, to mark the rest as complete."""
    if outcome.result is not None:
        yield SUMMARY, outcome.result.summary
        yield CURVE, json.dumps(outcome.result.curve)
        yield SHEET, outcome.result.sheet
        yield STRIP, outcome.result.strip
    yield REASON, outcome.reason
    yield STEP, outcome.step
    yield OUTCOME, outcome.kind


def outcome_of(trials: list[FrozenTrial]) -> Outcome | None:
    """Return the outcome of a cell from its trials: the successful one, or the newest failure."""
    lost = num_lost(trials)
    broken = [trial for trial in trials if trial.user_attrs.get(OUTCOME) == BROKEN and trial.state.is_finished()]
    best = [trial for trial in trials if _has_ended_well(trial)] or broken[-1:]
    if lost >= MAX_LOST and not any(_has_ended_well(trial) for trial in trials):
        return Outcome(BROKEN, reason=f"the workers that trained it were lost, {lost} in a row")
    if not best:
        return None
    trial, attributes = best[0], best[0].user_attrs
    result = None
    if SUMMARY in attributes:
        result = Result(attributes[SUMMARY], json.loads(attributes[CURVE]), attributes[SHEET], attributes[STRIP])
    value = float("nan") if trial.value is None else trial.value
    return Outcome(attributes[OUTCOME], value, attributes[REASON], attributes[STEP], result)


def state_of(trials: list[FrozenTrial]) -> str:
    """Return the state of a cell from its trials."""
    if any(_has_ended_well(trial) for trial in trials):
        return DONE
    states = {trial.state for trial in trials}
    if TrialState.RUNNING in states:
        return RUNNING
    if TrialState.WAITING in states:
        return WAITING
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    if failed and failed[-1].user_attrs.get(OUTCOME) == BROKEN:
        return BROKEN
    return BROKEN if num_lost(trials) >= MAX_LOST else MISSING


def _has_ended_well(trial: FrozenTrial) -> bool:
    """Whether the trial has a value or has diverged (Optuna stores NaN as a failure)."""
    diverged = trial.state == TrialState.FAIL and trial.user_attrs.get(OUTCOME) == DIVERGED
    return trial.state == TrialState.COMPLETE or diverged


def num_lost(trials: list[FrozenTrial]) -> int:
    """Return how many workers in a row were lost on a cell, up to now."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    ended = [index for index, trial in enumerate(failed) if OUTCOME in trial.user_attrs]
    return len(failed) - (ended[-1] + 1 if ended else 0)


def packed(study: Study) -> str:
    """Return a study as compressed text: MySQL fields hold 65,535 bytes, which 50 uncompressed cells would exceed."""
    return base64.b64encode(zlib.compress(json.dumps(study.to_dict()).encode())).decode()


def unpacked(kept: Any) -> Study:
    """Return the study stored by `packed`; early versions stored it uncompressed.

    Raises:
        UserError: if it was written by another hfgen version and this one cannot read it.
    """
    try:
        values = kept if isinstance(kept, dict) else json.loads(zlib.decompress(base64.b64decode(kept)))
    except (TypeError, ValueError, zlib.error):
        values = {}
    return Study.from_dict(values)


def sqlite_url(folder: Path) -> str:
    """Return the URL of the database file in a study's folder, whose name may have characters of a URL's own."""
    return URL.create("sqlite", database=str((folder / "study.db").resolve())).render_as_string()
