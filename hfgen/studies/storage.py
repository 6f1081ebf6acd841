"""The database of a study: cells are Optuna trials, which any number of workers take from a queue.

The queue, and not `optuna.samplers.GridSampler`, hands the cells out: when workers run side by side the sampler gives
one point of the grid to two of them now and then, as its documentation says. A queued trial changes from WAITING to
RUNNING in one transaction of the database.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from hfgen.errors import UserError
from hfgen.studies.cells import Study, differences
from hfgen.studies.launch import BROKEN, DIVERGED
from hfgen.studies.results import Result


DEFINITION, CELL = "hfgen_study", "cell"
OUTCOME, REASON, STEP = "outcome", "reason", "step"
SUMMARY, CURVE, SHEET, STRIP = "summary", "curve", "sheet", "strip"
# States of a cell.
DONE, RUNNING, WAITING, MISSING = "done", "running", "waiting", "missing"
# A cell whose worker was lost so often takes its workers down with it.
MAX_LOST = 3
LOCK_SECONDS = 60


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
        self.url = with_driver(url)
        shown = make_url(self.url).render_as_string(hide_password=True)
        sqlite = make_url(self.url).get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if sqlite else {"pool_pre_ping": True}
        try:
            self._storage = RDBStorage(
                self.url,
                engine_kwargs=options,
                heartbeat_interval=max(1, grace_seconds // 4),
                grace_period=grace_seconds,
            )
        except (SQLAlchemyError, ImportError) as error:
            told = " ".join(str(getattr(error, "orig", None) or error).split())
            raise UserError(f"--storage {shown}: the database cannot be opened: {told}") from error

    def open(self, name: str | None) -> Study:
        """Open a study that is there already.

        Args:
            name: of the study; the only one if None.

        Raises:
            UserError: if there is none, or more than one to choose from.
        """
        names = optuna.get_all_study_names(self._storage)
        if name is None and len(names) != 1:
            told = f"choose one with --study: {', '.join(names)}" if names else "start one with hfgen study run"
            raise UserError(f"the database holds {len(names)} studies; {told}")
        if name is not None and name not in names:
            raise UserError(f"--study {name}: the database holds {', '.join(names) or 'none'}")
        self._study = optuna.load_study(study_name=name or names[0], storage=self._storage)
        return self._definition()

    def open_or_create(self, study: Study) -> Study:
        """Open the study, or make it; return it as it is stored.

        Raises:
            UserError: if it is there already and was another one, with the differences.
        """
        self._study = optuna.create_study(study_name=study.name, storage=self._storage, load_if_exists=True)
        if DEFINITION not in self._study.user_attrs:
            self._study.set_user_attr(DEFINITION, study.to_dict())
            return study
        stored = self._definition()
        if changes := differences(stored, study):
            raise UserError(
                f"the study {study.name} in this database is another one (stored -> now):\n  "
                + "\n  ".join(changes)
                + "\nGive the study file another name, or the study another --output or --storage"
            )
        return stored

    def stored(self, name: str) -> Study | None:
        """Return the study of that name if the database has it, else None."""
        return self.open(name) if name in optuna.get_all_study_names(self._storage) else None

    def _definition(self) -> Study:
        if DEFINITION not in self._study.user_attrs:
            raise UserError(f"{self._study.study_name} is no study of hfgen's")
        return Study.from_dict(self._study.user_attrs[DEFINITION])

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
        trials = self.trials()
        return {name: state_of(trials.get(name, [])) for name in study.cells}

    def enqueue(self, names: list[str]) -> None:
        """Put cells into the queue, in this order."""
        for name in names:
            self._study.enqueue_trial({CELL: name}, user_attrs={CELL: name})

    def run_next(self, work: Callable[[str], "Outcome"]) -> None:
        """Take the next cell from the queue, if there is one, and keep what becomes of it.

        Args:
            work: is given the name of the cell. If it raises, the cell goes back.
        """

        def objective(trial: Trial) -> float:
            name = trial.user_attrs.get(CELL)
            if name is None or self._is_taken(name, trial.number):  # the queue has run empty, or held it twice
                raise optuna.TrialPruned
            outcome = work(name)
            for key, value in outcome.attributes():
                trial.set_user_attr(key, value)
            return outcome.value

        try:
            self._study.optimize(objective, n_trials=1)
        except UpdateFinishedTrialError:
            pass  # silent for too long, as on a laptop that slept: the cell was given to another worker

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
    ended = [trial for trial in trials if trial.user_attrs.get(OUTCOME) == BROKEN and trial.state.is_finished()]
    best = [trial for trial in trials if _has_ended_well(trial)] or ended[-1:]
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
    if any(trial.user_attrs.get(OUTCOME) == BROKEN for trial in trials):
        return BROKEN
    return BROKEN if num_lost(trials) >= MAX_LOST else MISSING


def _has_ended_well(trial: FrozenTrial) -> bool:
    """Whether there is a figure, or training itself has shown that there is none (Optuna keeps NaN as a failure)."""
    diverged = trial.state == TrialState.FAIL and trial.user_attrs.get(OUTCOME) == DIVERGED
    return trial.state == TrialState.COMPLETE or diverged


def num_lost(trials: list[FrozenTrial]) -> int:
    """Return how many workers were lost at a cell."""
    return sum(trial.state == TrialState.FAIL and OUTCOME not in trial.user_attrs for trial in trials)


def with_driver(url: str) -> str:
    """Return a database's URL with a driver that is installed.

    Raises:
        UserError: if it is no URL of a database.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql" and importlib.util.find_spec("psycopg2") is None:
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UserError(
            f"--storage: not the URL of a database such as sqlite:///study.db or postgresql://user@host/name: {error}"
        ) from error
    return parsed.render_as_string(hide_password=False)


def sqlite_url(folder: Path) -> str:
    """Return the URL of the database file in the folder of a study."""
    return f"sqlite:///{(folder / 'study.db').resolve()}"
