import datetime
import os
import re
import subprocess
import sys

import pytest
from optuna.trial import TrialState, create_trial
from toy_studies import fall_silent, open_toys, toy_study, trained

from hfgen.studies.outcomes import Outcome
from hfgen.studies.progress import describe_progress
from hfgen.studies.storage import sqlite_url


NOW = datetime.datetime(2026, 11, 22, 12, 0)


def trial(state, started=None, ended=None, **attributes):
    """A trial that began and ended so many minutes ago."""
    made = create_trial(state=state, value=7.25 if state == TrialState.COMPLETE else None, user_attrs=attributes)
    made.datetime_start = None if started is None else NOW - datetime.timedelta(minutes=started)
    made.datetime_complete = None if ended is None else NOW - datetime.timedelta(minutes=ended)
    return made


def done(started, ended):
    return trial(TrialState.COMPLETE, started, ended, outcome="trained", reason="", step=20)


def running(started, worker="host 12"):
    return trial(TrialState.RUNNING, started, **({"worker": worker} if worker else {}))


def test_each_cell_stands_with_what_became_of_it_or_who_works_on_it():
    bad = {"outcome": "diverged", "reason": "a loss is not finite", "step": 1200}
    out = {"outcome": "broken", "reason": "no space left", "step": None}
    lost = trial(TrialState.FAIL, 90, 80)
    trials = {
        "good": [lost, done(60, 50)],
        "bad": [trial(TrialState.FAIL, 50, 45, **bad)],
        "out": [trial(TrialState.FAIL, 45, 44, **out)],
        "now": [lost, running(7)],
        "just": [running(0, worker=None)],
        "next": [trial(TrialState.WAITING)],
        "again": [lost],
    }
    told = describe_progress(toy_study(*trials, "new"), trials, NOW).splitlines()
    assert told == [
        "toy: 8 cells, 2 done, 2 running, 1 broken, 3 to do",
        "  good: fid 7.25",
        "  bad: diverged at step 1,200: a loss is not finite",
        "  out: broken: no space left",
        "  now: running for 7 min, worker host 12",
        "  just: running for 0 s",
        "  next: to do",
        "  again: to do",
        "  new: to do",
        "about 20 min left for 2 workers: a cell takes 10 min (mean of 1)",
    ]


def test_a_cell_whose_worker_gives_no_sign_of_life_is_to_do(tmp_path):
    study = toy_study("a", "b")
    store = open_toys(tmp_path, study)
    store.enqueue(["a", "b"])
    told = []

    def one(name):
        fall_silent(tmp_path)
        told.append(describe_progress(study, store.trials(), datetime.datetime.now(), store.silent()).splitlines())

    store.run_next(one)
    assert told[0][0] == "toy: 2 cells, 0 done, 0 running, 2 to do"
    assert re.fullmatch("  a: to do: its worker .* has stopped sending heartbeats", told[0][1])
    assert told[0][2:] == ["  b: to do", "no worker is running: continue with hfgen study run or hfgen study work"]
    assert store.silent() == set()


def test_names_and_reasons_of_others_forge_no_line():
    reason = {"outcome": "broken", "reason": "disk\n  a: fid 0.1", "step": None}
    trials = {"a": [trial(TrialState.FAIL, 45, 44, **reason)], "b": [running(7, worker="x\nc: fid 0.2\x1b[2J")]}
    told = describe_progress(toy_study(*trials, name="toy\n  d: fid 0.3"), trials, NOW).splitlines()
    assert len(told) == 4 and told[0].startswith(r"toy\n  d: fid 0.3: 2 cells")
    assert told[1:3] == [r"  a: broken: disk\n  a: fid 0.1", r"  b: running for 7 min, worker x\nc: fid 0.2\x1b[2J"]


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        (
            {"a": [done(50, 40)], "b": [done(40, 20)], "c": [running(5)]},
            "about 7.5 min left for 1 worker: a cell takes",
        ),
        ({"a": [done(50, 40)], "c": [running(5)]}, "about 15 min left for 1 worker: a cell takes 10"),
        ({"a": [running(5)]}, "no cell has ended yet"),
        ({"a": [done(50, 40)]}, "no worker is running: continue with hfgen study run or hfgen study work"),
        # The clock of another machine may be ahead.
        ({"a": [done(50, 40)], "b": [running(-90)]}, "about 15 min left for 1 worker"),
    ],
)
def test_the_time_that_is_left_is_that_of_the_cells_that_have_ended(trials, told):
    said = describe_progress(toy_study("a", "b", "c"), trials, NOW)
    assert said.splitlines()[-1].startswith(told)
    assert "for -" not in said


def test_nothing_is_left_of_a_study_that_has_ended():
    told = describe_progress(toy_study("a"), {"a": [done(50, 40)]}, NOW)
    assert told == "toy: 1 cell, 1 done, 0 running, 0 to do\n  a: fid 7.25"


def test_what_stands_in_the_database_is_told(tmp_path, hfgen, refusal):
    study = toy_study("a", "b", "c")
    store, said = open_toys(tmp_path, study), []
    store.enqueue(["a", "b"])
    store.run_next(lambda name: trained(5.5))

    def look(name):
        for where in (tmp_path, sqlite_url(tmp_path)):
            status, out, _ = hfgen("study", "status", where)
            said.append((status, out.splitlines()))
        return Outcome("broken", reason="no space left")

    store.run_next(look)
    (status, lines), (_, by_url) = said
    assert status == 0 and len(lines) == len(by_url) == 5
    assert lines[:2] == ["toy: 3 cells, 1 done, 1 running, 1 to do", "  a: fid 5.5"]
    assert lines[2].startswith("  b: running for ") and f" {os.getpid()}" in lines[2]
    assert lines[3:] == ["  c: to do", lines[4]] and lines[4].startswith("about ")
    assert "nowhere: not a study" in refusal("study", "status", "nowhere")


def test_the_progress_of_a_study_is_told_without_the_slow_imports(tmp_path):
    store = open_toys(tmp_path, toy_study("a", "b"))
    store.enqueue(["a", "b"])
    store.run_next(lambda name: trained(5.5))
    code = (
        "import sys; from hfgen.cli import main; sys.argv = ['hfgen', 'study', 'status', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'accelerate', 'transformers'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert told.returncode == 0 and "  a: fid 5.5" in told.stdout.splitlines(), told.stderr
    assert told.stdout.splitlines()[-1] == "set()"
