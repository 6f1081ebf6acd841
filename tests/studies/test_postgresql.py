"""Workers of several machines share a study in PostgreSQL: here on one machine, with a folder that all of them see."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import toy_studies as toys
from postgresql import Cluster, NoPostgreSQLError
from stand_in_features import save_mean_colours
from toy_studies import side_by_side, toy_study, trained, wait_until, workspace_in

from hfgen.errors import UserError
from hfgen.studies.cells import expand
from hfgen.studies.launch import read_status
from hfgen.studies.scripts import find_scripts
from hfgen.studies.storage import StudyStore
from hfgen.studies.study_file import read_study_file
from hfgen.studies.worker import work


pytest.importorskip("psycopg", reason='needs psycopg: pip install "hfgen[study]"')

# The first cell takes seconds of training, and so is the one that is interrupted; the others are quick.
STUDY = """
title: Three workers
families:
  slow: {method: gan, settings: {batch_size: 64, generator_channels: 16, discriminator_channels: 16}, grid: {}}
  quick: {method: gan, grid: {learning_rate: [1e-4, 2e-4]}}
  bad: {method: gan, settings: {learning_rate: 1e+30}, grid: {}}
settings:
  cpu: true
  batch_size: 4
  latent_dim: 4
  generator_channels: 4
  discriminator_channels: 4
  augment: none
  watch_every: 0
  statistics_images: 16
  log_every: 5
  checkpoint_every: 20
  num_sample_images: 2
data: {sample_size: 16, dataset: "toy_paintings:24"}
budget: {steps: 100}
evaluation: {num_images: 12}
"""
# A worker on a core of its own: trainings with the threads of each on every core would wait for each other. It starts
# its scripts without the launcher, and by what stands in for Python: each would import torch.
WORKER = """
import os, sys
from hfgen.cli import main
from hfgen.studies import launch

if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(sys.argv.pop(1)) % len(cores)]})
launch.LAUNCHER = []
command_of = launch.launch_command
python = sys.argv.pop(1)
launch.launch_command = lambda *of: [python, *command_of(*of)[1:]]
main()
"""
GRACE_SECONDS = 10
PATIENCE = 300  # seconds, on a machine that is busy with other tests


@pytest.fixture(scope="module")
def cluster():
    """A PostgreSQL of this module's own."""
    try:
        with Cluster() as cluster:
            yield cluster
    except NoPostgreSQLError as error:
        pytest.skip(str(error))


def start_worker(programs, url, folder, index):
    """Start `hfgen study work URL` as on a machine of its own that sees the folder."""
    (folder / "worker.py").write_text(WORKER)
    options = ("--output", folder / "runs", "--grace_seconds", GRACE_SECONDS)
    features = ("--feature_weights", folder / "weights.pt")
    return programs.start(folder / "worker.py", index, programs.python, "study", "work", url, *options, *features)


def start_study(url, folder):
    """Begin the study that `STUDY` describes, and write the weights of the stand-in for Inception."""
    save_mean_colours(folder / "weights.pt")
    (folder / "three_workers.yaml").write_text(STUDY)
    study = expand(read_study_file(folder / "three_workers.yaml"), find_scripts(), "toy_paintings:24")
    store = StudyStore(url, GRACE_SECONDS)
    return store, store.open_or_create(study)


def step_of(folder: Path) -> int:
    """The step of the newest checkpoint of a run."""
    found = sorted(folder.glob("checkpoints/step-*/progress.json"))
    return json.loads(found[-1].read_text())["step"] if found else 0


def in_folder(folder: Path) -> list[psutil.Process]:
    """The processes that train in a folder."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]


def test_three_workers_finish_a_study_although_one_is_killed_during_a_training(cluster, programs, tmp_path):
    url = cluster.new_database("three_workers")
    store, study = start_study(url, tmp_path)
    slow = next(iter(study.cells))
    runs = {name: tmp_path / "runs" / "cells" / cell.folder_name for name, cell in study.cells.items()}
    workers = {(worker := start_worker(programs, url, tmp_path, index)).pid: worker for index in range(3)}
    try:
        wait_until(lambda: step_of(runs[slow]) >= 20, PATIENCE)
        (trial,) = [one for one in store.trials()[slow] if one.state.name == "RUNNING"]
        killed = workers.pop(int(trial.user_attrs["worker"].split()[1]))
        assert in_folder(runs[slow])
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        wait_until(lambda: in_folder(runs[slow]) == [], PATIENCE)
        assert read_status(runs[slow])["reason"] == "stopped by SIGTERM"  # in the middle, with a checkpoint
        interrupted_at = step_of(runs[slow])
        assert [worker.wait(PATIENCE) for worker in workers.values()] == [0, 0]
    finally:
        for worker in workers.values():
            worker.send_signal(signal.SIGKILL)
            worker.wait()

    outcomes, trials = store.outcomes(study), store.trials()
    bad = [name for name in study.cells if name.startswith("bad")]
    assert {name: outcome.kind for name, outcome in outcomes.items()} == {
        name: "diverged" if name in bad else "trained" for name in study.cells
    }
    for name in bad:
        assert outcomes[name].value != outcomes[name].value  # NaN
        assert outcomes[name].step == 1
        assert "not finite" in outcomes[name].reason
    # Each cell has ended once; the killed worker's has a second trial, of another worker, and no other has.
    # A second one that was queued by both of the others at once is pruned, or still waiting when all have ended.
    unused = ("PRUNED", "WAITING")
    ended = {name: [one.state.name for one in trials[name] if one.state.name not in unused] for name in study.cells}
    assert ended.pop(slow) == ["FAIL", "COMPLETE"]
    assert ended == {name: ["FAIL" if name in bad else "COMPLETE"] for name in ended}
    assert len({one.user_attrs["worker"] for one in trials[slow] if "worker" in one.user_attrs}) == 2
    launched = {
        name: [json.loads(line)["from_step"] for line in (run / "launches.jsonl").read_text().splitlines()]
        for name, run in runs.items()
    }
    assert launched.pop(slow) == [0, interrupted_at]
    assert 20 <= interrupted_at < 100
    assert launched == {name: [0] for name in launched}
    assert all(not run.joinpath("checkpoints").exists() for name, run in runs.items() if name not in bad)


def test_workers_that_start_together_on_an_empty_database_share_one_study_and_queue(cluster):
    url = cluster.new_database("at_once")
    names = [f"cell {index:02d}" for index in range(12)]
    study = toy_study(*names)

    def join(index, wait):
        wait()
        store, taken = StudyStore(url, 60), []
        store.open_or_create(study)
        store.states(study)
        wait()
        store.enqueue(names)  # each of them
        wait()
        for _ in range(12):
            store.run_next(lambda name: taken.append(name) or trained())
        return taken

    taken = side_by_side(3, join)
    assert sorted(sum(taken, [])) == names
    assert StudyStore(url).open(None) == study


def test_a_lost_database_ends_the_worker_which_says_so_without_the_password(cluster, tmp_path, monkeypatch):
    toys.make_quick(monkeypatch)
    study, store = toy_study("a", "b"), StudyStore(cluster.new_database("gone"))
    store.open_or_create(study)
    make_scorer = toys.worker.Scorer

    def stop_the_database(evaluation, workspace):
        scorer = make_scorer(evaluation, workspace)
        score = scorer.score
        scorer.score = lambda cell: cluster.stop() or score(cell)
        return scorer

    monkeypatch.setattr(toys.worker, "Scorer", stop_the_database)
    try:
        with pytest.raises(UserError, match="the database does not answer: .*Trained cells are kept") as refusal:
            work(store, study, workspace_in(tmp_path))
    finally:
        cluster.start()
    assert "secret" not in str(refusal.value)
    monkeypatch.setattr(toys.worker, "Scorer", make_scorer)
    assert store.states(study) == {"a": "running", "b": "waiting"}  # until its heartbeat is too old
