"""Progress of a study: the state of each cell, its worker, and an estimate of the remaining time."""

import datetime
import statistics
from collections.abc import Collection

from optuna.trial import FrozenTrial, TrialState

from hfgen.studies.cells import Study
from hfgen.studies.outcomes import BROKEN, TRAINED, Outcome
from hfgen.studies.storage import DONE, RUNNING, WORKER, outcome_of, state_of
from hfgen.texts import printable
from hfgen.training.duration import format_duration


SILENT = "silent"  # state of a cell whose worker gives no sign of life


def describe_progress(
    study: Study, trials: dict[str, list[FrozenTrial]], now: datetime.datetime, silent: Collection[int] = ()
) -> str:
    """Describe a study's progress: a summary line, a line per cell, and an estimate of the remaining time.

    Args:
        study: the stored study.
        trials: trials of each cell that has any, oldest first; see `StudyStore.trials`.
        now: the workers' local time without a time zone, as Optuna stores trial times.
        silent: numbers of running trials whose workers give no sign of life; these cells are to do.
    """
    found = {name: trials.get(name, []) for name in study.cells}
    states = {name: _state(of_cell, silent) for name, of_cell in found.items()}
    counts = {label: list(states.values()).count(state) for state, label in ((DONE, "done"), (RUNNING, "running"))}
    if broken := list(states.values()).count(BROKEN):
        counts["broken"] = broken
    counts["to do"] = len(states) - sum(counts.values())
    cells = f"{len(states)} cell{'s' if len(states) > 1 else ''}"
    lines = [f"{study.name}: {cells}, " + ", ".join(f"{count} {label}" for label, count in counts.items())]
    lines += [f"  {name}: {_cell_status(study, states[name], of_cell, now)}" for name, of_cell in found.items()]
    if counts["running"] + counts["to do"]:
        lines.append(_rest(found, counts["running"], counts["to do"]))
    return "\n".join(map(printable, lines))  # names and reasons come from a shared database


def _state(trials: list[FrozenTrial], silent: Collection[int]) -> str:
    state, running = state_of(trials), [trial for trial in trials if trial.state == TrialState.RUNNING]
    return SILENT if state == RUNNING and all(trial.number in silent for trial in running) else state


def _cell_status(study: Study, state: str, trials: list[FrozenTrial], now: datetime.datetime) -> str:
    if state in (RUNNING, SILENT):
        running = next(trial for trial in trials if trial.state == TrialState.RUNNING)
        where = running.user_attrs.get(WORKER)
        if state == SILENT:
            return f"to do: its worker {where or 'elsewhere'} has stopped sending heartbeats"
        since = f" for {format_duration(_seconds(running.datetime_start, now))}" if running.datetime_start else ""
        return f"running{since}" + (f", worker {where}" if where else "")
    outcome: Outcome | None = outcome_of(trials)
    if state not in (DONE, BROKEN) or outcome is None:
        return "to do"
    if outcome.kind == TRAINED:
        return f"{study.metric} {outcome.value:.4g}"
    at = f" at step {outcome.step:,}" if outcome.step is not None else ""
    return f"{outcome.kind}{at}: {outcome.reason}"


def _rest(trials: dict[str, list[FrozenTrial]], running: int, to_do: int) -> str:
    """Estimate the remaining time from the cells that have ended; running cells count as half done."""
    if not running:
        return "no worker is running: continue with hfgen study run or hfgen study work"
    ended = [one for of_cell in trials.values() for one in of_cell if one.state == TrialState.COMPLETE]
    taken = [_seconds(one.datetime_start, one.datetime_complete) for one in ended]
    if not taken:
        return "no cell has ended yet, so the remaining time is unknown"
    mean = statistics.fmean(taken)
    left = mean * (to_do + running / 2) / running
    workers = f"{running} worker{'s' if running > 1 else ''}"
    each = f"a cell takes {format_duration(mean)} (mean of {len(taken)})"
    return f"about {format_duration(left)} left for {workers}: {each}"


def _seconds(start: datetime.datetime | None, end: datetime.datetime | None) -> float:
    """Return the seconds between two times; 0 if the clocks of two machines disagree."""
    return max(0.0, (end - start).total_seconds()) if start and end else 0.0
