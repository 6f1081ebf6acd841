"""A study's worker: take a cell, train it, score it, until none are left."""

import math
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from hfgen.errors import UserError
from hfgen.studies.cells import Cell, Study
from hfgen.studies.database import DATABASE_ERRORS, reason_of, shown
from hfgen.studies.launch import Workspace, check_data, missing_device, train_cell
from hfgen.studies.outcomes import BROKEN, DIVERGED, IN_USE, TRAINED, Outcome, Result
from hfgen.studies.results import Scorer, data_settings, reference_digest
from hfgen.studies.scripts import require_same_scripts, script_digests
from hfgen.studies.storage import MISSING, NEW_PLACE, RUNNING, WAITING, StudyStore
from hfgen.texts import say
from hfgen.training.checkpoints import PIPELINE_FOLDER


WAIT_SECONDS = 5.0
STOPPING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
# After this many broken cells in a row, the problem is assumed to be this machine, not the cells.
MAX_BROKEN = 3


def work(store: StudyStore, study: Study, workspace: Workspace, wait_seconds: float = WAIT_SECONDS) -> None:
    """Work on a study's cells until all have ended, here or on other workers.

    Args:
        store: the study's database.
        study: the stored study.
        workspace: this worker's folders.
        wait_seconds: seconds between checks on other workers.

    Raises:
        UserError: if the dataset is missing or differs from that of other cells, if cells keep failing here, or if
            the database does not answer.
        KeyboardInterrupt: on Ctrl-C, SIGTERM and SIGHUP, after the training was stopped and the cell given back.
    """
    # Preemption on a cluster, or a closed terminal: handle like Ctrl-C.
    before = {number: signal.getsignal(number) for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        check_data(workspace)
        _work(store, study, workspace, wait_seconds)
    except DATABASE_ERRORS as error:
        raise UserError(
            f"--storage {shown(store.url)}: the database does not answer: {reason_of(error)}. Trained cells are "
            "kept: start this worker again when it answers"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(store: StudyStore, study: Study, workspace: Workspace, wait_seconds: float) -> None:
    scorer = Scorer(study.evaluation, workspace)
    digests: dict[str, str] = {}
    broken: list[str] = []
    unfit = {name: reason for name, cell in study.cells.items() if (reason := missing_device(cell))}

    def run_cell(name: str) -> Outcome | None:
        if name in unfit:
            return Outcome(BROKEN, reason=unfit[name]) if only_unfit else None
        cell = study.cells[name]
        # Checked again, as somebody may have edited them since the study began.
        require_same_scripts(study.scripts, script_digests(workspace.scripts, [cell.method]))
        store.note_images(_digest_of(cell, workspace, digests))
        _check_same_data(store, study, workspace, digests)  # another worker may have begun meanwhile
        of_all = f"cell {list(study.cells).index(name) + 1} of {len(study.cells)}"
        say(f"{name}: training, {of_all}; log: {workspace.log_file(cell)}")
        outcome = _train_and_score(cell, study, workspace, scorer, store)
        _print_outcome(name, outcome, study.metric)
        if outcome.kind == IN_USE:  # back to the end of the queue
            return None
        broken.append(outcome.reason) if outcome.kind == BROKEN else broken.clear()
        return outcome

    states = store.states(study)
    store.enqueue([name for name, state in states.items() if state == BROKEN and name not in unfit])  # retry
    for name, reason in unfit.items():
        say(f"{name}: left out: {reason}")
    waited = False
    while True:
        states = store.states(study)
        for_us = {state for name, state in states.items() if name not in unfit}
        # Cells that need another device are left to other workers; if none are running, they are marked as broken.
        only_unfit = not for_us & {WAITING, RUNNING} and RUNNING not in states.values()
        if missing := [name for name, state in states.items() if state == MISSING]:
            store.enqueue(missing)
        elif WAITING in for_us or (only_unfit and WAITING in states.values()):
            _check_same_data(store, study, workspace, digests)
            if (ended := store.run_next(run_cell)) is not None and ended not in unfit:
                _remove_checkpoints(workspace.run_folder(study.cells[ended]))
            waited = False
            if len(broken) >= MAX_BROKEN:
                raise UserError(f"{MAX_BROKEN} cells in a row could not be trained here; the last: {broken[-1]}")
        elif RUNNING in for_us:
            if not waited:
                say(f"waiting for {Counter(states.values())[RUNNING]} cells of other workers")
            waited = True
            time.sleep(wait_seconds)
        else:
            return


def _train_and_score(cell: Cell, study: Study, workspace: Workspace, scorer: Scorer, store: StudyStore) -> Outcome:
    try:
        ending = train_cell(cell, study.budget, workspace, store.has_lost_its_cell)
    except (UserError, OSError) as error:  # OSError: disk full
        return Outcome(BROKEN, reason=f"its training could not be started: {error}")
    if ending.kind != TRAINED:
        return Outcome(ending.kind, reason=ending.reason, step=ending.step)
    say(f"{cell.name}: scoring {study.evaluation.num_images:,} images")
    try:
        result = scorer.score(cell)
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: PyTorch, out of memory
        return Outcome(BROKEN, reason=f"it could not be scored: {error}", step=ending.step)
    value = value_of(result, study.metric)
    if not result.is_finite or not math.isfinite(value):
        return Outcome(DIVERGED, reason="its images cannot be scored", step=ending.step, result=result)
    return Outcome(TRAINED, value, step=ending.step, result=result)


def _remove_checkpoints(folder: Path) -> None:
    """Remove those of a trained cell once its outcome is stored: to be scored again, it might need them.

    Of a training that has diverged, there is nothing else.
    """
    if (folder / PIPELINE_FOLDER / "model_index.json").is_file():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def value_of(result: Result, metric: str) -> float:
    """Return the metric that a study compares."""
    source = result.summary["scores"] if metric in ("fid", "kid") else result.summary["training"]
    value = source[metric]
    return math.nan if value is None else float(value)


def _print_outcome(name: str, outcome: Outcome, metric: str) -> None:
    if outcome.kind == TRAINED:
        say(f"{name}: {metric} {outcome.value:.4g}")
    else:
        at = f" at step {outcome.step}" if outcome.step is not None else ""
        say(f"{name}: {outcome.kind}{at}: {outcome.reason}")


def _check_same_data(store: StudyStore, study: Study, workspace: Workspace, digests: dict[str, str]) -> None:
    """Raise if the images differ from those of cells that have ended or are being trained."""
    for name, digest in store.images_of(study).items():
        if digest != _digest_of(study.cells[name], workspace, digests):
            raise UserError(
                f"--dataset {workspace.dataset}: these are not the images that {name} was trained on; use the same "
                f"images, or start a new study with {NEW_PLACE}; if that cell is still being trained "
                "on the wrong images, stop its worker"
            )


def _digest_of(cell: Cell, workspace: Workspace, digests: dict[str, str]) -> str:
    """Return the digest of a cell's images; `digests` caches them by data settings."""
    read = repr(data_settings(cell, workspace))
    if read not in digests:
        digests[read] = reference_digest(cell, workspace)
    return digests[read]
