import sqlite3
import time

import pytest
from toy_studies import fall_silent, open_toys, toy_study, trained, wait_until

from hfgen.errors import UserError
from hfgen.studies import database
from hfgen.studies.database import require_database, shown, with_driver
from hfgen.studies.storage import StudyStore, sqlite_url


def without(monkeypatch, *missing):
    monkeypatch.setattr(database.importlib.util, "find_spec", lambda name: None if name in missing else object())


def test_a_url_of_postgresql_gets_the_driver_that_is_installed(monkeypatch):
    url = "postgresql://me:p%40ss@host:5432/name?sslmode=require"
    assert with_driver(url) == url.replace("postgresql:", "postgresql+psycopg:")
    without(monkeypatch, "psycopg")
    assert with_driver(url) == url.replace("postgresql:", "postgresql+psycopg2:")
    without(monkeypatch, "psycopg", "psycopg2")
    assert with_driver(url) == url.replace("postgresql:", "postgresql+psycopg:")  # of the extra; it is asked for


@pytest.mark.parametrize("url", ["sqlite:///some/file.db", "postgresql+pg8000://me@host/name"])
def test_any_other_url_stays_as_it_is(url):
    assert with_driver(url) == url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("study.db", "--storage: not the URL of a database; give one such as sqlite:///study.db or postgresql://"),
        ("", "--storage: not the URL of a database"),
        ("postgresql://me:secret@host:port/name", "--storage: not the URL of a database"),
        (
            "postgres://me:secret@host/name",
            "--storage: postgres is not a database that SQLAlchemy knows; give a URL such as sqlite:",
        ),
        ("sqlite:////no/such/folder/study.db", "--storage sqlite:////no/such/folder/study.db: .*: unable to open"),
        (
            "postgresql://me:secret@127.0.0.1:1/name?password=secret",
            r"--storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/name: the database cannot be opened: .*refused",
        ),
        ("oracle+none://me:secret@host/name", "--storage: oracle[+.]none is not a database that SQLAlchemy knows"),
    ],
)
def test_a_url_of_no_use_is_refused_without_its_password(url, told):
    with pytest.raises(UserError, match=told) as refusal:
        StudyStore(url)
    assert "secret" not in str(refusal.value)


def test_a_driver_that_is_not_installed_is_asked_for(monkeypatch):
    with pytest.raises(UserError, match="the database cannot be opened: .*install") as refusal:
        StudyStore("mysql+pymysql://me:secret@host/name")
    assert "secret" not in str(refusal.value)


def test_a_password_is_not_shown():
    assert shown("postgresql://me:one@host/name?password=two") == "postgresql://me:***@host/name"


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "study.db").write_text("a diary, of more than a few words\n" * 40)
    with pytest.raises(UserError, match=f"--storage sqlite:///{tmp_path}/study.db: .* file is not a database"):
        StudyStore(sqlite_url(tmp_path))


def test_tables_of_another_optuna_are_refused(tmp_path):
    open_toys(tmp_path, toy_study("a"))
    with sqlite3.connect(tmp_path / "study.db") as file:
        file.execute("UPDATE alembic_version SET version_num = 'v99'")
    file.close()
    with pytest.raises(UserError, match="the database cannot be opened: .*updating optuna"):
        StudyStore(sqlite_url(tmp_path))


@pytest.mark.parametrize("name", ["runs {1} of {NAME}", "better?", "a?b=c#d", "50%41", "100%", "ä & b+c@d:e"])
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    open_toys(folder, toy_study("a"))
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    require_database(sqlite_url(folder))
    assert StudyStore(sqlite_url(folder)).open(None) == toy_study("a")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_study_in_a_file_that_must_not_be_written_can_still_be_read(tmp_path):
    study = toy_study("a")
    store = open_toys(tmp_path, study)
    store.enqueue(["a"])
    store.run_next(lambda name: trained(4.0))
    before = (tmp_path / "study.db").read_bytes()
    reader = StudyStore(f"sqlite:///file:{tmp_path}/study.db?mode=ro&uri=true")
    assert reader.outcomes(reader.open(None))["a"].value == 4.0
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url):
    with pytest.raises(UserError, match="--storage .*: a study needs a file on disk; give sqlite:///study.db"):
        StudyStore(url)


@pytest.mark.parametrize("command", [("work",), ("status",), ("report", "--output", "new")])
def test_a_database_that_is_not_there_is_refused_and_not_created(refusal, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    line = refusal("study", command[0], "sqlite:///gone.db", *command[1:])
    assert line == "error: --storage sqlite:///gone.db: there is no such file; start a study with hfgen study run"
    assert list(tmp_path.iterdir()) == []


def test_tables_of_something_else_are_refused_in_one_line(refusal, tmp_path):
    with sqlite3.connect(tmp_path / "study.db") as file:
        file.execute("CREATE TABLE studies (title TEXT)")
    line = refusal("study", "status", tmp_path)
    assert line.startswith(f"error: --storage sqlite:///{tmp_path}/study.db: the database cannot be ")


@pytest.mark.parametrize(("grace_seconds", "seconds"), [(2, 1), (60, 15), (120, 30), (600, 30)])
def test_a_worker_with_more_patience_beats_often_enough_for_the_others(tmp_path, grace_seconds, seconds):
    assert StudyStore(sqlite_url(tmp_path), grace_seconds)._storage.get_heartbeat_interval() == seconds


@pytest.mark.slow
def test_heartbeats_go_on_when_the_database_is_back(tmp_path):
    study = toy_study("a")
    store = open_toys(tmp_path, study, grace_seconds=4)
    store.enqueue(["a"])

    def rename(old, new):
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute(f"ALTER TABLE {old} RENAME TO {new}")
        database.close()

    def train(name):
        rename("trial_heartbeats", "away")
        time.sleep(1.5)  # one is due every second
        rename("away", "trial_heartbeats")
        fall_silent(tmp_path)
        with sqlite3.connect(tmp_path / "study.db") as database:
            newest = "SELECT max(heartbeat) > datetime('now', '-5 seconds') FROM trial_heartbeats"
            wait_until(lambda: database.execute(newest).fetchone() == (1,), 30)
        database.close()
        return trained()

    store.run_next(train)
    assert store.states(study) == {"a": "done"}
