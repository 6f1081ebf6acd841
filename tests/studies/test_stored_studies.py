"""Opening a study in a database: made once, changed never, and told from those of others."""

import dataclasses

import optuna
import pytest
import toy_studies as toys
from optuna.exceptions import StorageInternalError
from optuna.trial import create_trial
from toy_studies import open_toys, side_by_side, toy_study, trained

from hfgen.errors import UserError
from hfgen.studies import storage
from hfgen.studies.cells import expand
from hfgen.studies.scripts import find_scripts
from hfgen.studies.storage import StudyStore, packed, sqlite_url, unpacked
from hfgen.studies.study_file import read_study_file


def test_a_changed_study_is_refused_with_the_difference_and_the_stored_one_stays(tmp_path):
    study = toy_study("a", toys.toy_cell("b", batch_size=4))
    store = open_toys(tmp_path, study)
    changed = toy_study("a", toys.toy_cell("b", batch_size=8))
    with pytest.raises(
        UserError, match=r"the study toy .* a different one \(stored -> now\):\n  cell b: batch_size: 4 -> 8"
    ):
        open_toys(tmp_path, changed)
    assert store.open_or_create(study) == study
    assert StudyStore(sqlite_url(tmp_path)).open("toy") == study


def test_a_changed_study_is_sent_to_a_new_folder(tmp_path):
    study = toy_study("a")
    open_toys(tmp_path, study)
    place = r"another --output \(and another --storage, if you gave one\)$"
    with pytest.raises(UserError, match=f"\nUse {place}"):
        open_toys(tmp_path, dataclasses.replace(study, metric="kid"))


def test_a_study_that_was_scaled_down_is_continued_with_its_budget(tmp_path):
    study = dataclasses.replace(toy_study("a"), asked="8h")
    open_toys(tmp_path, study)
    for asked in (None, "9h"):
        with pytest.raises(
            UserError, match="\nTo continue it, give --budget 8h, as when it was begun; for another, use"
        ):
            open_toys(tmp_path, dataclasses.replace(study, asked=asked, metric="kid"))


def test_corrections_that_alter_no_figure_are_stored_but_a_used_path_stays(tmp_path):
    study = toy_study("a")
    open_toys(tmp_path, study)
    corrected = dataclasses.replace(study, title="Better", dataset="the right one")
    store = open_toys(tmp_path, corrected)
    assert store.open("toy") == corrected
    store.enqueue(["a"])
    store.run_next(lambda name: trained())
    elsewhere = dataclasses.replace(corrected, title="Best", dataset="elsewhere")
    assert open_toys(tmp_path, elsewhere).open("toy") == dataclasses.replace(corrected, title="Best")


def test_a_study_is_opened_by_its_name_or_as_the_only_one_of_hfgen(tmp_path):
    store = StudyStore(sqlite_url(tmp_path))
    optuna.create_study(study_name="somebody's", storage=store._storage)
    with pytest.raises(UserError, match="the database contains 0 studies; start one with hfgen study run"):
        store.open(None)
    assert store.stored("toy") is None
    study = toy_study("a")
    store.open_or_create(study)
    assert store.open(None) == store.open("toy") == store.stored("toy") == study
    with pytest.raises(UserError, match=r"--study somebody's: not in the database, which contains toy$"):
        store.open("somebody's")
    store.open_or_create(toy_study("a", name="other"))
    with pytest.raises(UserError, match="the database contains 2 studies; choose one with --study: toy, other"):
        store.open(None)


@pytest.mark.parametrize("has_trials", [True, False])
def test_the_study_of_somebody_else_by_the_same_name_is_left_alone(tmp_path, monkeypatch, has_trials):
    monkeypatch.setattr(storage, "DEFINITION_SECONDS", 60.0 if has_trials else 0.0)
    store = StudyStore(sqlite_url(tmp_path))
    theirs = optuna.create_study(study_name="toy", storage=store._storage)
    if has_trials:
        theirs.add_trial(create_trial(value=1.0))
    assert store.stored("toy") is None
    with pytest.raises(UserError, match="toy in this database was not created by hfgen; rename the study file"):
        store.open_or_create(toy_study("a"))
    assert theirs.user_attrs == {}


def test_a_study_that_another_worker_is_just_making_is_waited_for(tmp_path, monkeypatch):
    store, study = StudyStore(sqlite_url(tmp_path)), toy_study("a")
    theirs = optuna.create_study(study_name="toy", storage=store._storage)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: theirs.set_user_attr("hfgen_study", packed(study)))
    assert store.open_or_create(study) == study


@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "monet_families"])
def test_a_shipped_study_fits_into_a_field_of_mysql(name):
    scripts = find_scripts()
    study = expand(read_study_file(scripts / "studies" / f"{name}.yaml"), scripts, "photos/")
    assert len(study.cells) >= 27
    assert repr(unpacked(packed(study))) == repr(study)  # not ==, as a published figure is NaN
    assert len(packed(study)) < 65_535 / 4


def test_a_stored_study_of_before_is_read_and_an_unreadable_one_refused():
    study = toy_study("a")
    assert unpacked(study.to_dict()) == study
    for kept in ("no base64!", "bm8gemxpYg==", 7, None, {"version": "9"}):
        with pytest.raises(
            UserError, match="the study was made with hfgen .*, which hfgen .* cannot read: install that version"
        ):
            unpacked(kept)


def test_a_database_that_cannot_keep_a_study_has_none_of_it_afterwards(tmp_path, monkeypatch):
    store, study = StudyStore(sqlite_url(tmp_path)), toy_study("a")

    def fail(*_):
        raise StorageInternalError("data too long")

    with monkeypatch.context() as patch:
        patch.setattr(store._storage, "set_study_user_attr", fail)
        told = "--storage sqlite:.*: the database cannot store the study: data too long"
        with pytest.raises(UserError, match=told):
            store.open_or_create(study)
        assert optuna.get_all_study_names(store._storage) == []
        patch.setattr(store._storage, "delete_study", fail)  # it has gone away altogether
        with pytest.raises(UserError, match=told):
            store.open_or_create(toy_study("a", name="other"))
    assert store.open_or_create(study) == study


def test_of_workers_that_make_a_study_at_once_one_has_its_way(tmp_path):
    def start(index, wait):
        study = toy_study(toys.toy_cell("a", batch_size=index % 2))
        wait()
        try:
            return open_toys(tmp_path, study).open("toy").cells["a"].settings["batch_size"]
        except UserError as error:
            return str(error)

    answers = side_by_side(4, start)
    sizes = [answer for answer in answers if isinstance(answer, int)]
    refused = [answer for answer in answers if isinstance(answer, str)]
    assert len(set(sizes)) == 1
    assert len(refused) == 2
    assert all("is a different one (stored -> now):\n  cell a: batch_size: " in answer for answer in refused)


def test_a_database_that_lacks_any_of_its_pages_is_read_or_refused(tmp_path):
    study = toy_study("a")
    open_toys(tmp_path, study)
    content = (tmp_path / "study.db").read_bytes()
    refused = 0
    for page in range(0, len(content), 4096):
        (tmp_path / "study.db").write_bytes(content[:page] + bytes(4096) + content[page + 4096 :])
        try:
            assert StudyStore(sqlite_url(tmp_path)).open("toy") == study
        except UserError:
            refused += 1
    assert refused > 5
