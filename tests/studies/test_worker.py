import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import toy_studies as toys
from toy_studies import fall_silent, make_quick, open_toys, toy_cell, toy_study, workspace_in

from hfgen.errors import UserError
from hfgen.studies import launch, worker
from hfgen.studies.launch import train_cell
from hfgen.studies.outcomes import Ending, Outcome
from hfgen.studies.results import reference_digest
from hfgen.studies.scripts import script_digests
from hfgen.studies.storage import StudyStore
from hfgen.studies.worker import work
from hfgen.training.lock import lock_folder


@pytest.fixture
def scorer(monkeypatch):
    """Nothing takes time: see `make_quick`; what scores the cells."""
    return make_quick(monkeypatch)


@pytest.fixture
def launched(monkeypatch):
    """The names of the cells that were launched, in order; their settings say how it ended."""
    names = []

    def end(cell, budget, workspace, has_lost):
        names.append(cell.name)
        if error := cell.settings.get("cannot_start"):
            raise error
        return Ending(*cell.settings.get("ending", ("trained", "", 20)))

    monkeypatch.setattr(worker, "train_cell", end)
    return names


def broken(name, **settings):
    return toy_cell(name, ending=("broken", f"the training of {name} ended with status 1", 4), **settings)


def kinds(store, study):
    return {name: outcome and outcome.kind for name, outcome in store.outcomes(study).items()}


def told(store, study, name):
    outcome = store.outcomes(study)[name]
    return outcome.kind, outcome.reason, outcome.step


def test_all_cells_are_trained_and_scored_and_a_second_worker_has_nothing_to_do(tmp_path, scorer, capsys):
    study = toy_study(toy_cell("a", fid=7.25), "b")
    store, workspace = open_toys(tmp_path, study), workspace_in(tmp_path)
    work(store, study, workspace)
    assert [store.outcomes(study)[name].value for name in "ab"] == [7.25, 5.0]
    said = capsys.readouterr().out
    first, second = (workspace.log_file(study.cells[name]) for name in "ab")
    assert said.splitlines()[:4] == [
        f"a: training, cell 1 of 2; log: {first}",
        "a: scoring 10 images",
        "a: fid 7.25",
        f"b: training, cell 2 of 2; log: {second}",
    ]
    assert first.is_file() and second.is_file()
    kept = [path.name for path in (workspace.output / "cells" / "a").iterdir()]
    assert "pipeline" in kept
    assert "checkpoints" not in kept  # nobody goes on from there
    work(store, study, workspace)
    assert scorer.scored == ["a", "b"]
    assert capsys.readouterr().out == ""


def test_a_cell_that_is_trained_but_not_scored_is_not_trained_again(tmp_path, scorer):
    study, workspace = toy_study("a"), workspace_in(tmp_path)
    train_cell(study.cells["a"], study.budget, workspace)
    work(open_toys(tmp_path, study), study, workspace)
    assert scorer.scored == ["a"]
    assert len((workspace.run_folder(study.cells["a"]) / "launches.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("metric", "value"), [("fid", 5.0), ("kid", 0.5), ("minutes", 2.0), ("images_per_second", 30.0)]
)
def test_the_figure_of_a_cell_is_what_the_study_compares(tmp_path, scorer, launched, metric, value):
    study = toy_study("a", metric=metric)
    store = open_toys(tmp_path, study)
    work(store, study, workspace_in(tmp_path))
    assert store.outcomes(study)["a"].value == value


def test_what_diverges_or_cannot_be_scored_has_ended_with_its_reason_and_step(tmp_path, scorer, launched, capsys):
    cells = [toy_cell("gone", ending=("diverged", "diverged: a loss is not finite", 3)), toy_cell("black", fid=None)]
    cells += [toy_cell("flat", kid=None), toy_cell("endless", kid=float("inf"))]
    study = toy_study(*cells, metric="kid")
    store = open_toys(tmp_path, study)
    work(store, study, workspace_in(tmp_path))
    assert told(store, study, "gone") == ("diverged", "diverged: a loss is not finite", 3)
    for name in ("black", "flat", "endless"):
        assert told(store, study, name) == ("diverged", "its images cannot be scored", 20)
        assert store.outcomes(study)[name].result is not None
    assert "gone: diverged at step 3: diverged: a loss is not finite\n" in capsys.readouterr().out
    assert launched == ["gone", "black", "flat", "endless"]  # each once


# ------------------------------------------------------------------------------------------------------- broken cells


@pytest.mark.slow
def test_broken_cells_do_not_stop_others_and_the_next_worker_tries_them_again(tmp_path, scorer, launched, capsys):
    out = {"scoring_fails": RuntimeError("out of memory")}
    study = toy_study(
        broken("a"), "b", toy_cell("c", **out), "d", toy_cell("e", cannot_start=UserError("no space left")), "f"
    )
    stored = toy_study(*"abcdef")  # errors are no plain values
    store, workspace = open_toys(tmp_path, stored), workspace_in(tmp_path)
    work(store, study, workspace)
    expected = {name: "broken" if name in "ace" else "trained" for name in "abcdef"}
    assert kinds(store, study) == expected
    assert told(store, study, "a") == ("broken", "the training of a ended with status 1", 4)
    assert told(store, study, "c") == ("broken", "it could not be scored: out of memory", 20)
    assert told(store, study, "e") == ("broken", "its training could not be started: no space left", None)
    assert "a: broken at step 4: the training of a ended with status 1\n" in capsys.readouterr().out
    with pytest.raises(UserError):
        work(store, study, workspace)
    assert launched == [*"abcdef", *"ace"]
    work(store, stored, workspace)  # what was wrong is mended
    assert set(kinds(store, study).values()) == {"trained"}


def test_three_cells_in_a_row_that_cannot_be_trained_end_the_worker(tmp_path, scorer, launched):
    study = toy_study(broken("a"), broken("b"), "c", broken("d"), broken("e"), broken("f"), "g")
    store = open_toys(tmp_path, study)
    reason = "3 cells in a row could not be trained here; the last: the training of f ended with status 1"
    with pytest.raises(UserError, match=reason):
        work(store, study, workspace_in(tmp_path))
    assert launched == [*"abcdef"]
    assert store.states(study)["g"] == "waiting"


def test_an_error_that_nobody_foresaw_ends_the_worker_and_the_cell_is_missing(tmp_path, scorer, launched):
    study = toy_study(toy_cell("a", cannot_start=ZeroDivisionError("a bug")))
    store = open_toys(tmp_path, toy_study("a"))
    for state in ("missing", "missing", "broken"):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            work(store, study, workspace_in(tmp_path))
        assert store.states(study) == {"a": state}


# ------------------------------------------------------------------------------------------------- machines and data


def test_a_machine_without_cuda_leaves_such_cells_to_other_workers_if_there_are_any(
    tmp_path, scorer, launched, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = [toy_cell(name, device="cuda") for name in ("x", "y", "z", "u")]
    study = toy_study(*gpu, "a", toy_cell("b", device="cpu"))
    store, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    other.enqueue(["x"])

    def train_elsewhere(name):
        work(store, study, workspace_in(tmp_path))  # ends, though cells are left: "x" has a worker
        return toys.trained()

    other.run_next(train_elsewhere)
    done, left = {"a": "trained", "b": "trained", "x": "trained"}, {"y": None, "z": None, "u": None}
    assert kinds(store, study) == done | left
    said = capsys.readouterr().out
    assert said.count("left out: needs a CUDA device, which this machine does not have") == 4
    work(store, study, workspace_in(tmp_path))  # nobody else is there
    assert kinds(store, study) == done | dict.fromkeys(left, "broken")
    assert told(store, study, "y") == ("broken", "needs a CUDA device, which this machine does not have", None)
    work(store, study, workspace_in(tmp_path))
    assert sorted(launched) == ["a", "b"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    work(store, study, workspace_in(tmp_path))
    assert set(kinds(store, study).values()) == {"trained"}


def test_a_script_that_is_edited_while_a_study_runs_ends_it_before_the_next_cell(tmp_path, scorer, monkeypatch):
    def train_and_edit(*arguments):
        ending = train_cell(*arguments)
        script.write_text(script.read_text() + "# improved\n")
        return ending

    workspace = workspace_in(tmp_path)
    script = workspace.scripts / "train_gan.py"
    study = replace(toy_study("a", "b"), scripts=script_digests(workspace.scripts, ["gan"]))
    monkeypatch.setattr(worker, "train_cell", train_and_edit)
    with pytest.raises(UserError, match="the study was begun with other training scripts than there are here"):
        work(open_toys(tmp_path, study), study, workspace)
    assert scorer.scored == ["a"]


def test_other_images_on_another_machine_are_refused_before_a_cell_is_taken(tmp_path, launched, scorer, monkeypatch):
    monkeypatch.setattr(worker, "reference_digest", reference_digest)
    study = toy_study(toy_cell("a"), toy_cell("b", sample_size=16), "c")
    store, workspace = open_toys(tmp_path, study), workspace_in(tmp_path)
    store.enqueue([*"abc"])

    def train_elsewhere(name):
        return Outcome("trained", 5.0, result=toys.toy_result(digest=reference_digest(study.cells[name], workspace)))

    for _ in "ab":
        store.run_next(train_elsewhere)
    with pytest.raises(UserError, match="--dataset toy_paintings:13: these are not the images that a was trained"):
        work(store, study, workspace_in(tmp_path, "toy_paintings:13"))
    assert store.states(study) == {"a": "done", "b": "done", "c": "waiting"}
    work(store, study, workspace)
    assert store.states(study)["c"] == "done"


def test_workers_that_start_together_with_other_images_do_not_mix_them(tmp_path, launched, scorer, monkeypatch):
    monkeypatch.setattr(worker, "reference_digest", reference_digest)
    study = toy_study("a", "b")
    store, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    store.enqueue(["a", "b"])

    def one(name):
        other.note_images(reference_digest(study.cells[name], workspace_in(tmp_path)))
        with pytest.raises(
            UserError, match="--dataset toy_paintings:13: these are not the images that [ab] was trained"
        ):
            work(store, study, workspace_in(tmp_path, "toy_paintings:13"))

    # This one has looked before the other began: it takes the second cell, and looks again.
    look = StudyStore.images_of
    for looks in ([], [1]):
        monkeypatch.setattr(
            StudyStore, "images_of", lambda own, study, looks=looks: {} if looks and looks.pop() else look(own, study)
        )
        other.enqueue(["a"])
        other.run_next(one)
        assert "running" not in store.states(study).values() and launched == []


def test_checkpoints_are_kept_until_the_scores_are_stored(tmp_path, scorer, monkeypatch):
    study = toy_study("a")
    store, workspace = open_toys(tmp_path, study), workspace_in(tmp_path)
    checkpoints = workspace.run_folder(study.cells["a"]) / "checkpoints"

    def lost(*_):
        assert checkpoints.is_dir()
        raise UserError("the database is gone")

    monkeypatch.setattr("hfgen.studies.storage._attributes_of", lost)
    with pytest.raises(UserError, match="the database is gone"):
        work(store, study, workspace)
    assert scorer.scored == ["a"] and list(checkpoints.iterdir())
    monkeypatch.undo()
    make_quick(monkeypatch)
    work(store, study, workspace)
    assert kinds(store, study) == {"a": "trained"} and not checkpoints.exists()


def test_a_data_set_that_is_not_there_is_refused_before_a_cell_is_taken(tmp_path, scorer):
    study = toy_study("a")
    store = open_toys(tmp_path, study)
    with pytest.raises(UserError, match="--dataset ./photos: not on this machine"):
        work(store, study, workspace_in(tmp_path, "./photos"))
    assert store.states(study) == {"a": "missing"}


# ------------------------------------------------------------------------------------------------------ other workers


def test_the_last_cells_of_other_workers_are_waited_for_and_taken_if_they_are_lost(
    tmp_path, scorer, launched, monkeypatch, capsys
):
    study = toy_study("a", "b", "c")
    store, other = open_toys(tmp_path, study), open_toys(tmp_path, study)
    naps, pause = [], time.sleep
    other.enqueue(["a"])

    def hold(name):
        def nap(seconds):
            if threading.current_thread() is not threading.main_thread():
                return pause(seconds)  # a thread of an earlier test
            naps.append(seconds)
            if len(naps) >= 3:  # the other worker is told to stop
                raise KeyboardInterrupt

        monkeypatch.setattr(worker.time, "sleep", nap)
        work(store, study, workspace_in(tmp_path), wait_seconds=0.5)

    with pytest.raises(KeyboardInterrupt):
        other.run_next(hold)
    assert naps == [0.5] * 3
    assert launched == ["b", "c"]
    assert capsys.readouterr().out.count("waiting for 1 cells of other workers\n") == 1
    work(store, study, workspace_in(tmp_path))
    assert launched == ["b", "c", "a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_worker_ends_its_training_with_a_checkpoint_and_returns_the_cell(tmp_path, scorer, number):
    study, workspace = toy_study(toy_cell("a", "linger"), "b"), workspace_in(tmp_path)
    folder = workspace.run_folder(study.cells["a"])
    store = open_toys(tmp_path, study)

    def be_a_worker():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
        try:
            work(open_toys(tmp_path, study), study, workspace)
        except KeyboardInterrupt:
            os._exit(130)

    process = toys.FORK.Process(target=be_a_worker)
    process.start()
    toys.wait_until((folder / "begun").exists)
    assert store.states(study) == {"a": "running", "b": "waiting"}
    os.kill(process.pid, number)
    process.join(300)
    exit_code = process.exitcode
    process.kill()  # if it has not heeded the signal
    assert exit_code == 130
    assert (folder / "checkpoints" / "step-00000007" / "progress.json").is_file()
    assert store.states(study) == {"a": "missing", "b": "waiting"}
    assert [trial.user_attrs["outcome"] for trial in store.trials()["a"]] == ["given back"]


@pytest.mark.slow
def test_a_worker_that_slept_ends_its_training_and_goes_on_with_what_there_is(tmp_path, scorer, capfd):
    study, workspace = toy_study(toy_cell("a", "linger"), "b"), workspace_in(tmp_path)
    begun = workspace.run_folder(study.cells["a"]) / "begun"
    store = open_toys(tmp_path, study)

    def be_a_worker():
        launch.POLL_SECONDS = 0.05
        work(open_toys(tmp_path, study), study, workspace)

    process = toys.FORK.Process(target=be_a_worker)
    process.start()
    try:
        toys.wait_until(begun.exists)
        first = begun.read_text()
        fall_silent(tmp_path)
        assert store.states(study) == {"a": "missing", "b": "waiting"}
        toys.wait_until(lambda: store.states(study)["b"] == "done" and begun.read_text() != first)
        assert not os.path.exists(f"/proc/{first}")
    finally:
        process.terminate()
        process.join(300)
    launches = (begun.parent / "launches.jsonl").read_text().splitlines()
    assert [json.loads(launch)["from_step"] for launch in launches] == [0, 7]
    assert (
        "a: lost: another worker has taken it, because this one did not respond for too long\n"
        in capfd.readouterr().out
    )


def test_a_cell_that_somebody_still_trains_goes_to_the_end_of_the_queue(tmp_path, scorer, monkeypatch, capsys):
    monkeypatch.setattr(launch, "WAIT_SECONDS", 0.0)
    study, workspace = toy_study("a", "b"), workspace_in(tmp_path)
    lock = lock_folder(workspace.run_folder(study.cells["a"]))
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda cell: lock.release() or score(cell))
    store = open_toys(tmp_path, study)
    work(store, study, workspace)
    assert scorer.scored == ["b", "a"] and kinds(store, study) == {"a": "trained", "b": "trained"}
    assert [trial.state.name for trial in store.trials()["a"]] == ["PRUNED", "COMPLETE"]
    assert f"a: in use: {workspace.run_folder(study.cells['a'])} is in use by process" in capsys.readouterr().out


def test_what_sigterm_does_to_this_process_is_as_before(tmp_path, scorer, launched):
    study = toy_study("a")

    def own(number, frame):
        raise AssertionError("nobody sends it")

    before = signal.signal(signal.SIGTERM, own)
    try:
        work(open_toys(tmp_path, study), study, workspace_in(tmp_path))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------------- command line


def test_a_worker_of_another_version_is_refused(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(toys.hfgen, "__version__", "0.0.1")
    store = open_toys(tmp_path, toy_study("a"))
    monkeypatch.undo()
    line = refusal("study", "work", store.url)
    here = toys.hfgen.__version__
    assert line.startswith(f"error: the study was made with hfgen 0.0.1, not {here}: install the same")


def test_a_worker_that_finds_no_study_or_no_database_says_so(tmp_path, refusal):
    assert "there is no such file; start a study" in refusal("study", "work", f"sqlite:///{tmp_path / 'new.db'}")
    assert "not the URL of a database" in refusal("study", "work", "here")
    open_toys(tmp_path, toy_study("a"))
    line = refusal("study", "work", f"sqlite:///{tmp_path / 'study.db'}", "--study", "other")
    assert line == "error: --study other: not in the database, which contains toy"
