import math
import os
import signal
import threading

import optuna
import pytest
import toy_studies as toys
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from toy_studies import fall_silent, open_toys, side_by_side, toy_result, toy_study, trained

from hfgen.errors import UserError
from hfgen.studies import storage
from hfgen.studies.outcomes import Outcome
from hfgen.studies.storage import num_lost, outcome_of, sqlite_url, state_of


def history(*states):
    """The trials of a cell, oldest first: a `TrialState`, or the kind of an outcome that a trial has ended with."""
    made = []
    for number, state in enumerate(states):
        attributes = {"cell": "a"}
        if isinstance(state, str) and state != "lost":
            attributes |= {"outcome": state, "reason": f"reason {number}", "step": number}
        value = float(number) if state == "trained" else None
        end = state if isinstance(state, TrialState) else TrialState.COMPLETE if value is not None else TrialState.FAIL
        made.append(create_trial(state=end, value=value, user_attrs=attributes))
    return made


# ------------------------------------------------------------------------------------------------------------ queue


@pytest.mark.slow
def test_each_cell_is_given_to_one_of_several_workers_alone(tmp_path):
    names = [f"cell {index:02d}" for index in range(24)]
    study = toy_study(*names)
    open_toys(tmp_path, study).enqueue(names)

    def take(index, wait):
        store, taken = open_toys(tmp_path, study), []
        wait()
        for _ in range(8):
            store.run_next(lambda name: taken.append(name) or trained())
        return taken

    taken = side_by_side(3, take)
    assert sorted(sum(taken, [])) == names
    assert [len(own) for own in taken] == [8, 8, 8]


def test_cells_that_two_stores_have_queued_at_once_are_worked_on_once(tmp_path):
    study, taken = toy_study("a", "b"), []
    one, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    assert [store.states(study) for store in (one, other)] == [{"a": "missing", "b": "missing"}] * 2
    one.enqueue(["a", "b"])
    other.enqueue(["a", "b"])

    def work(name):
        if not taken:  # another worker comes while the first cell is trained
            taken.append(name)
            for _ in range(3):
                other.run_next(lambda name: taken.append(name) or trained(7.0))
        else:
            taken.append(name)
        return trained()

    for _ in range(4):
        one.run_next(work)
    assert sorted(taken) == ["a", "b"]
    assert set(one.states(study).values()) == {"done"}
    assert [one.outcomes(study)[name].value for name in "ab"] == [5.0, 7.0]


def test_a_cell_without_an_outcome_goes_to_the_end_of_the_queue(tmp_path):
    study, taken = toy_study("a", "b"), []
    store = open_toys(tmp_path, study)
    store.enqueue(["a", "b"])
    for _ in range(3):
        store.run_next(lambda name: taken.append(name) or (trained() if len(taken) > 1 else None))
    assert taken == ["a", "b", "a"]
    assert num_lost(store.trials()["a"]) == 0


def test_an_empty_queue_is_no_error(tmp_path):
    store = open_toys(tmp_path, toy_study("a"))
    store.run_next(lambda name: pytest.fail(f"{name} was not queued"))


# ----------------------------------------------------------------------------------------------------- lost workers


def test_the_cell_of_a_killed_worker_is_missing_again_and_broken_after_three(tmp_path):
    study = toy_study("a", "b")
    store = open_toys(tmp_path, study)
    store.enqueue(["b"])
    store.run_next(lambda name: trained())
    for killed in range(1, 4):
        store.enqueue(["a"])

        def take_and_die():
            open_toys(tmp_path, study).run_next(lambda name: os.kill(os.getpid(), signal.SIGKILL))

        process = toys.FORK.Process(target=take_and_die)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert store.states(study) == {"a": "running", "b": "done"}
        fall_silent(tmp_path)
        assert store.states(study) == {"a": "broken" if killed == 3 else "missing", "b": "done"}
        assert num_lost(store.trials()["a"]) == killed
    outcome = store.outcomes(study)["a"]
    assert (outcome.kind, outcome.result) == ("broken", None)
    assert outcome.reason == "the workers that trained it were lost, 3 in a row"


def test_a_worker_that_slept_past_its_grace_period_drops_its_result_and_goes_on(tmp_path, monkeypatch):
    beat, sleeper = RDBStorage.record_heartbeat, threading.main_thread()

    def beat_of_the_awake(storage, trial_id):  # Optuna's own thread, which sleeps with its process, gives none
        if threading.current_thread() is sleeper:
            beat(storage, trial_id)

    monkeypatch.setattr(RDBStorage, "record_heartbeat", beat_of_the_awake)
    study, taken = toy_study("a", "b"), []
    one, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    one.enqueue(["a", "b"])

    def sleep(name):
        taken.append(name)
        assert not one.has_lost_its_cell()
        if name == "a":
            fall_silent(tmp_path)
            assert not one.has_lost_its_cell()  # as long as nobody has looked
            assert other.states(study) == {"a": "missing", "b": "waiting"}
            other.enqueue(["a"])
            for _ in range(2):
                other.run_next(lambda name: taken.append(f"{name} elsewhere") or trained(9.0))
            assert one.has_lost_its_cell()
        return trained(1.0)

    one.run_next(sleep)
    one.run_next(sleep)
    assert taken == ["a", "b elsewhere", "a elsewhere"]
    assert [one.outcomes(study)[name].value for name in "ab"] == [9.0, 9.0]


def test_a_database_that_does_not_answer_takes_no_cell_away(tmp_path, monkeypatch):
    store = open_toys(tmp_path, toy_study("a"))
    store.enqueue(["a"])
    answers = []

    def fail(_):
        raise StorageInternalError("gone")

    def work(name):
        with monkeypatch.context() as patch:
            patch.setattr(store._storage, "get_trial", fail)
            answers.append(store.has_lost_its_cell())
        return trained()

    store.run_next(work)
    assert answers == [False]


@pytest.mark.slow
def test_a_worker_that_was_lost_before_its_first_heartbeat_loses_its_cell_too(tmp_path, monkeypatch):
    study, clock = toy_study("a"), [1000.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    store = open_toys(tmp_path, study, grace_seconds=30)
    store.enqueue(["a"])
    with pytest.warns(UserWarning, match="Heartbeat"):
        optuna.load_study(study_name="toy", storage=sqlite_url(tmp_path)).ask()
        optuna.load_study(study_name="toy", storage=store._storage).ask()  # of the queue that has run empty
    assert store.states(study) == {"a": "running"}
    clock[0] += 29
    assert store.states(study) == {"a": "running"}
    clock[0] += 2
    assert store.states(study) == {"a": "missing"}


def test_a_worker_at_work_keeps_its_cell_however_long_it_takes(tmp_path, monkeypatch):
    study, clock = toy_study("a"), [1000.0]
    store, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    store.enqueue(["a"])
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])

    def work(name):
        for _ in range(3):
            assert other.states(study) == {"a": "running"}
            clock[0] += 10_000
        return trained()

    store.run_next(work)
    assert store.states(study) == {"a": "done"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), UserError("other images")])
def test_a_stopped_worker_gives_its_cell_back_at_once_and_is_not_counted_as_lost(tmp_path, stop):
    study = toy_study("a")
    store = open_toys(tmp_path, study)

    def work(name):
        raise stop

    for _ in range(3):
        store.enqueue(["a"])
        with pytest.raises(type(stop)):
            store.run_next(work)
        assert store.states(study) == {"a": "missing"}
    assert store.outcomes(study) == {"a": None}


@pytest.mark.parametrize(
    ("trials", "state", "lost"),
    [
        ([], "missing", 0),
        ([TrialState.WAITING], "waiting", 0),
        (["lost", TrialState.WAITING], "waiting", 1),
        ([TrialState.RUNNING, TrialState.WAITING], "running", 0),
        (["trained", TrialState.RUNNING], "done", 0),
        (["diverged"], "done", 0),
        (["broken", "diverged"], "done", 0),
        (["broken"], "broken", 0),
        (["broken", TrialState.PRUNED], "broken", 0),
        (["broken", "lost"], "missing", 1),  # taken up again as any other
        (["lost", "lost", TrialState.PRUNED], "missing", 2),
        (["lost", "lost", "lost"], "broken", 3),
        (["lost", "lost", "given back", "lost"], "missing", 1),
        (["broken", "lost", "lost", "lost"], "broken", 3),
        ([TrialState.PRUNED], "missing", 0),
    ],
)
def test_the_state_of_a_cell_is_that_of_its_newest_trial_unless_one_has_ended_well(trials, state, lost):
    assert state_of(history(*trials)) == state
    assert num_lost(history(*trials)) == lost


# ---------------------------------------------------------------------------------------------------------- outcomes


def test_what_became_of_a_cell_is_read_as_it_was_kept(tmp_path):
    study = toy_study("good", "bad", "blank", "broken", "new")
    store = open_toys(tmp_path, study)
    kept = {
        "good": Outcome("trained", 5.25, step=20, result=toy_result(5.25)),
        "bad": Outcome("diverged", reason="a loss is not finite", step=3),
        "blank": Outcome("diverged", reason="it draws nothing", step=20, result=toy_result(None)),
        "broken": Outcome("broken", reason="no space left"),
    }
    store.enqueue(list(kept))
    for _ in kept:
        store.run_next(lambda name: kept[name])
    found = open_toys(tmp_path, study).outcomes(study)
    assert found.pop("new") is None
    for name, outcome in found.items():
        assert (outcome.kind, outcome.reason, outcome.step) == (kept[name].kind, kept[name].reason, kept[name].step)
        assert outcome.result == kept[name].result
    assert found["good"].value == 5.25
    assert all(math.isnan(found[name].value) for name in ("bad", "blank", "broken"))
    states = {"good": "done", "bad": "done", "blank": "done", "broken": "broken", "new": "missing"}
    assert store.states(study) == states


@pytest.mark.parametrize(
    ("trials", "kind", "step"),
    [
        (["broken", "lost", "broken"], "broken", 2),
        (["broken", "diverged", "broken"], "diverged", 1),
        (["broken", "lost"], "broken", 0),
        (["diverged", "lost", "lost", "lost"], "diverged", 0),
        (["lost", "lost", "lost", "given back", "broken"], "broken", 4),
    ],
)
def test_an_outcome_is_the_good_one_or_else_the_newest(trials, kind, step):
    outcome = outcome_of(history(*trials))
    assert (outcome.kind, outcome.step, outcome.reason) == (kind, step, f"reason {step}")


def test_an_outcome_of_a_trial_that_still_runs_is_none_yet():
    running = create_trial(state=TrialState.RUNNING, user_attrs={"cell": "a", "outcome": "broken", "reason": "why"})
    assert outcome_of([running]) is None
    assert outcome_of(history("given back", "lost", TrialState.PRUNED)) is None
