"""Opening a study's database by its URL, safely with any number of concurrent workers."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from hfgen.errors import UserError
from hfgen.texts import one_line


LOCK_SECONDS = 60
# At most so long between heartbeats: other workers and `status` judge by their own grace period, which may be shorter.
MAX_HEARTBEAT_SECONDS = 30
OPENING_TRIES, OPENING_PAUSE = 20, 0.2
DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)


class Storage(RDBStorage):
    """A storage whose heartbeats outlive a restart of the database, instead of ending with the first that fails."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that the worker of a trial is alive; the next one is due soon if the database does not answer."""
        with suppress(*DATABASE_ERRORS):
            super().record_heartbeat(trial_id)


def open_database(url: str, grace_seconds: int) -> RDBStorage:
    """Open a database, and create Optuna's tables in it if they are missing.

    Args:
        url: from `with_driver`.
        grace_seconds: seconds without a heartbeat after which a worker loses its trial.

    Raises:
        SQLAlchemyError, StorageInternalError, ImportError, RuntimeError: if it cannot be reached, there is no driver
            for it, or its tables were created by an incompatible Optuna version.
    """
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    options: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
    for attempt in range(OPENING_TRIES):
        try:
            storage = Storage(
                url.replace("{", "{{").replace("}", "}}"),  # Optuna treats it as a template
                engine_kwargs=options,
                heartbeat_interval=min(max(1, grace_seconds // 4), MAX_HEARTBEAT_SECONDS),
                grace_period=grace_seconds,
            )
            break
        except (*DATABASE_ERRORS, AssertionError) as error:
            # Workers that start at the same time all create the tables, and all but one fail.
            clash = isinstance(error, ProgrammingError | IntegrityError | StorageInternalError | AssertionError)
            if attempt == OPENING_TRIES - 1 or not (clash or "already exists" in str(error)):
                raise
            time.sleep(OPENING_PAUSE)
    if is_sqlite:
        event.listen(storage.engine, "connect", _begin_nothing)
        event.listen(storage.engine, "begin", _begin_writing)
        storage.remove_session()
        storage.engine.dispose()
    return storage


def _begin_nothing(connection: Any, _: object) -> None:
    """Stop Python from starting a transaction by itself on the first write."""
    connection.isolation_level = None


def _begin_writing(connection: Connection) -> None:
    """Take SQLite's write lock before a transaction reads, because SQLite has no SELECT ... FOR UPDATE.

    Otherwise two workers could both find a trial waiting and both take it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def reading_from(url: str) -> Iterator[None]:
    """Turn an error of a database, such as damaged or other tables, into a `UserError` that names it."""
    try:
        yield
    except DATABASE_ERRORS as error:
        raise UserError(f"--storage {shown(url)}: the database cannot be read: {reason_of(error)}") from error


def require_database(url: str) -> None:
    """Raise a `UserError` if a URL names the file of an SQLite database that does not exist; nothing is created."""
    parsed = make_url(with_driver(url))
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise UserError(f"--storage {shown(url)}: there is no such file; start a study with hfgen study run")


def reason_of(error: BaseException) -> str:
    """Return a database's error message on one line, without the SQL."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return one_line(getattr(error, "orig", None) or error)


def shown(url: str) -> str:
    """Return a database's URL without the password, for display."""
    return make_url(url).set(query={}).render_as_string(hide_password=True)


def with_driver(url: str) -> str:
    """Return a database's URL with an installed driver.

    Raises:
        UserError: if it is not a database URL.
    """
    example = "such as sqlite:///study.db or postgresql://user@host/name"
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":  # the default driver depends on the SQLAlchemy version
            installed = [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name) is not None]
            parsed = parsed.set(drivername=f"postgresql+{(installed or ['psycopg'])[0]}")
        parsed.get_dialect()
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise UserError(f"--storage {parsed}: a study needs a file on disk; give sqlite:///study.db")
    except NoSuchModuleError as error:
        raise UserError(
            f"--storage: {parsed.drivername} is not a database that SQLAlchemy knows; give a URL {example}"
        ) from error
    except UserError:
        raise
    except (ArgumentError, ValueError):  # the message may contain the password
        raise UserError(f"--storage: not the URL of a database; give one {example}") from None
    return parsed.render_as_string(hide_password=False)
