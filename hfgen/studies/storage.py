"""The database of a study: cells are Optuna trials, which any number of workers take from a queue.

The queue, and not `optuna.samplers.GridSampler`, hands the cells out: when workers run side by side the sampler gives
one point of the grid to two of them now and then, as its documentation says. A queued trial changes from WAITING to
RUNNING in one transaction of the database, for which Optuna asks every database but SQLite: that is done here.
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

from hfgen.errors import UserError
from hfgen.studies.cells import Study, differences
from hfgen.studies.database import DATABASE_ERRORS, open_database, shown, told, with_driver
from hfgen.studies.launch import BROKEN, DIVERGED
from hfgen.studies.results import Result


DEFINITION, CELL, WORKER = "hfgen_study", "cell", "worker"
OUTCOME, REASON, STEP = "outcome", "reason", "step"
SUMMARY, CURVE, SHEET, STRIP = "summary", "curve", "sheet", "strip"
# States of a cell.
DONE, RUNNING, WAITING, MISSING = "done", "running", "waiting", "missing"
# An outcome of a trial, not of a cell: its worker was told to stop.
GIVEN_BACK = "given back"
# A cell whose worker was lost so often, one after another, takes its workers down with it.
MAX_LOST = 3
# The one that makes a study says what it is a moment later.
DEFINITION_SECONDS, LOOK_EVERY = 10.0, 0.2


class StudyStore:
    """One study in a database.

    Args:
        url: of the database, as SQLAlchemy writes it.
        grace_seconds: a worker that has been silent for so long has lost its cell.

    Raises:
        UserError: if the database cannot be reached.
    """

    def __init__(self, url: str, grace_seconds: int = 120):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats are called so since Optuna 2
        self.url, self._grace_seconds = with_driver(url), grace_seconds
        self._unstarted: dict[int, float] = {}  # trial -> when it was first seen so
        self._taken: int | None = None  # the trial of the cell that is worked on here
        self._sampler = optuna.samplers.RandomSampler()  # has nothing to do: all that is in a trial was queued
        try:
            self._storage = open_database(self.url, grace_seconds)
        except (*DATABASE_ERRORS, ImportError, RuntimeError) as error:
            raise UserError(f"--storage {shown(self.url)}: the database cannot be opened: {told(error)}") from error

    def open(self, name: str | None) -> Study:
        """Open a study that is there already.

        Args:
            name: of the study; the only one if None.

        Raises:
            UserError: if there is none, or more than one to choose from.
        """
        names = self._names()
        if name is None and len(names) != 1:
            told = f"choose one with --study: {', '.join(names)}" if names else "start one with hfgen study run"
            raise UserError(f"the database holds {len(names)} studies; {told}")
        if name is not None and name not in names:
            raise UserError(f"--study {name}: the database holds {', '.join(names) or 'none'}")
        self._load(name or names[0])
        return self._definition()

    def open_or_create(self, study: Study) -> Study:
        """Open the study, or make it; return it, its data set being where it was when the study was made.

        Raises:
            UserError: if it is there already and was another one, with the differences, or if the database cannot keep
                it.
        """
        try:
            self._study = optuna.create_study(study_name=study.name, storage=self._storage, sampler=self._sampler)
        except DuplicatedStudyError:
            self._load(study.name)
        else:
            self._define(study)
            return study
        stored = self._definition()
        if changes := differences(stored, study):
            raise UserError(
                f"the study {study.name} in this database is another one (stored -> now):\n  "
                + "\n  ".join(changes)
                + "\nGive the study file another name, or the study another --output or --storage"
            )
        # What alters no figure, such as the title or a published one, may be corrected.
        study = replace(study, dataset=stored.dataset)
        if study.to_dict() != stored.to_dict():
            self._study.set_user_attr(DEFINITION, packed(study))
        return study

    def _define(self, study: Study) -> None:
        try:
            self._study.set_user_attr(DEFINITION, packed(study))
        except DATABASE_ERRORS as error:
            with contextlib.suppress(*DATABASE_ERRORS):  # if it has gone away altogether
                optuna.delete_study(study_name=study.name, storage=self._storage)  # else it is there, and nobody's
            raise UserError(
                f"--storage {shown(self.url)}: the database does not keep the study: {told(error)}"
            ) from error

    def stored(self, name: str) -> Study | None:
        """Return the study of that name if the database has it, else None."""
        return self.open(name) if name in self._names() else None

    def _names(self) -> list[str]:
        """Return the names of hfgen's studies: others may keep theirs in the same database."""
        summaries = optuna.get_all_study_summaries(self._storage, include_best_trial=False)
        return [summary.study_name for summary in summaries if DEFINITION in summary.user_attrs]

    def _load(self, name: str) -> None:
        self._study = optuna.load_study(study_name=name, storage=self._storage, sampler=self._sampler)

    def _definition(self) -> Study:
        deadline = time.monotonic() + DEFINITION_SECONDS
        while DEFINITION not in (attributes := self._study.user_attrs):
            if time.monotonic() > deadline or self._study.get_trials(deepcopy=False):
                raise UserError(
                    f"{self._study.study_name} in this database is no study of hfgen's; give the study file another "
                    "name"
                )
            time.sleep(LOOK_EVERY)
        return unpacked(attributes[DEFINITION])

    def trials(self) -> dict[str, list[FrozenTrial]]:
        """Return the trials of each cell that has some, oldest first."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if CELL in trial.user_attrs:
                found.setdefault(trial.user_attrs[CELL], []).append(trial)
        return found

    def states(self, study: Study) -> dict[str, str]:
        """Return the state of each cell; cells whose worker fell silent are taken from it first."""
        optuna.storages.fail_stale_trials(self._study)
        self._fail_unstarted()
        trials = self.trials()
        return {name: state_of(trials.get(name, [])) for name in study.cells}

    def enqueue(self, names: list[str]) -> None:
        """Put cells into the queue, in this order."""
        for name in names:
            self._study.enqueue_trial({CELL: name}, user_attrs={CELL: name})

    def run_next(self, work: Callable[[str], "Outcome | None"]) -> None:
        """Take the next cell from the queue, if there is one, and keep what becomes of it.

        Args:
            work: is given the name of the cell. If it raises, or has no outcome, the cell goes back.
        """
        taken: list[int] = []
        raised: list[BaseException] = []

        def objective(trial: Trial) -> float:
            try:
                name = trial.user_attrs.get(CELL)
                if name is None or self._is_taken(name, trial.number):  # the queue has run empty, or held it twice
                    raise TrialPruned
                taken.append(trial.number)
                self._taken = trial._trial_id
                self._storage.record_heartbeat(trial._trial_id)  # the thread that does so is just starting
                trial.set_user_attr(WORKER, f"{socket.gethostname()} {os.getpid()}")
                outcome = work(name)
                if outcome is None:
                    self.enqueue([name])
                    raise TrialPruned
                for key, value in outcome.attributes():
                    trial.set_user_attr(key, value)
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
            # Silent for too long, as on a laptop that slept: the cell was given to another worker.

    def has_lost_its_cell(self) -> bool:
        """Whether the cell that is worked on here was taken away, this worker having been silent for too long."""
        try:
            return self._taken is not None and self._storage.get_trial(self._taken).state.is_finished()
        except DATABASE_ERRORS:  # it may answer again before there is something to keep
            return False

    def _fail_unstarted(self) -> None:
        """Take cells from workers that were lost before their first heartbeat, which Optuna does not look for."""
        now = time.monotonic()
        running = [one for one in self._study.get_trials(deepcopy=False) if one.state == TrialState.RUNNING]
        silent = [one.number for one in running if WORKER not in one.user_attrs]
        self._unstarted = {number: self._unstarted.get(number, now) for number in silent}
        for number, since in self._unstarted.items():
            if now - since > self._grace_seconds:
                try:
                    self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
                except UpdateFinishedTrialError:
                    pass  # another worker was quicker

    def _is_taken(self, name: str, number: int) -> bool:
        others = [trial for trial in self.trials()[name] if trial.number != number]
        running = [trial for trial in others if trial.state == TrialState.RUNNING and trial.number < number]
        return bool(running) or state_of(others) == DONE

    def outcomes(self, study: Study) -> dict[str, "Outcome | None"]:
        """Return what became of each cell; None if that is not known yet."""
        trials = self.trials()
        return {name: outcome_of(trials.get(name, [])) for name in study.cells}


class Outcome:
    """What became of a cell.

    Attributes:
        kind: "trained", "diverged" or "broken".
        value: that the study compares; NaN unless trained.
        reason: why it has no value.
        step: at which the training went wrong.
        result: scores, curve and pictures.
    """

    def __init__(
        self, kind: str, value: float = float("nan"), reason: str = "", step: int | None = None,
        result: Result | None = None,
    ):  # fmt: skip
        self.kind, self.value, self.reason, self.step, self.result = kind, value, reason, step, result

    def attributes(self) -> Iterator[tuple[str, Any]]:
        """Yield what is kept with the trial; the outcome last, as what says that the rest is there."""
        if self.result is not None:
            yield SUMMARY, self.result.summary
            yield CURVE, json.dumps(self.result.curve)
            yield SHEET, self.result.sheet
            yield STRIP, self.result.strip
        yield REASON, self.reason
        yield STEP, self.step
        yield OUTCOME, self.kind


def outcome_of(trials: list[FrozenTrial]) -> Outcome | None:
    """Return what the trials of a cell have come to: the good one, or the newest that has ended badly."""
    lost = num_lost(trials)
    broken = [trial for trial in trials if trial.user_attrs.get(OUTCOME) == BROKEN and trial.state.is_finished()]
    best = [trial for trial in trials if _has_ended_well(trial)] or broken[-1:]
    if lost >= MAX_LOST and not any(_has_ended_well(trial) for trial in trials):
        return Outcome(BROKEN, reason=f"the workers that trained it were lost, {lost} of them one after another")
    if not best:
        return None
    trial, attributes = best[0], best[0].user_attrs
    result = None
    if SUMMARY in attributes:
        result = Result(attributes[SUMMARY], json.loads(attributes[CURVE]), attributes[SHEET], attributes[STRIP])
    value = float("nan") if trial.value is None else trial.value
    return Outcome(attributes[OUTCOME], value, attributes[REASON], attributes[STEP], result)


def state_of(trials: list[FrozenTrial]) -> str:
    """Return the state of a cell by its trials."""
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
    """Whether there is a figure, or training itself has shown that there is none (Optuna keeps NaN as a failure)."""
    diverged = trial.state == TrialState.FAIL and trial.user_attrs.get(OUTCOME) == DIVERGED
    return trial.state == TrialState.COMPLETE or diverged


def num_lost(trials: list[FrozenTrial]) -> int:
    """Return how many workers were lost at a cell, one after another, up to now."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    told = [index for index, trial in enumerate(failed) if OUTCOME in trial.user_attrs]
    return len(failed) - (told[-1] + 1 if told else 0)


def packed(study: Study) -> str:
    """Return a study as a short text: MySQL keeps 65,535 bytes in a field, which 50 cells would exceed as they are."""
    return base64.b64encode(zlib.compress(json.dumps(study.to_dict()).encode())).decode()


def unpacked(kept: Any) -> Study:
    """Return the study that was packed; at first studies were kept as they are.

    Raises:
        UserError: if it is of another version of hfgen, and this one cannot read it.
    """
    try:
        values = kept if isinstance(kept, dict) else json.loads(zlib.decompress(base64.b64decode(kept)))
    except (TypeError, ValueError, zlib.error):
        values = {}
    return Study.from_dict(values)


def sqlite_url(folder: Path) -> str:
    """Return the URL of the database file in the folder of a study."""
    return f"sqlite:///{(folder / 'study.db').resolve()}"
