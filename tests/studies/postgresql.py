"""A PostgreSQL of a test's own: a new cluster in a temporary folder, on a socket there."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path


# The server refuses to run as root, as which tests run in a container: the first of these that there is runs it then.
OTHER_USERS = ("postgres", "nobody")


class NoPostgreSQLError(Exception):
    """It cannot be started here; says why."""


def find_programs() -> Path:
    """Return the folder of initdb and pg_ctl, which Debian keeps out of the PATH.

    Raises:
        NoPostgreSQLError: if there is none.
    """
    folders = [Path(found).parent for found in [shutil.which("initdb")] if found]
    if shutil.which("pg_config"):
        told = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True).stdout
        folders.append(Path(told.strip()))
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if all((folder / name).is_file() for name in ("initdb", "pg_ctl", "postgres")):
            return folder
    raise NoPostgreSQLError("PostgreSQL is not installed: apt-get install postgresql")


class Cluster:
    """A running server; use it with `with`.

    Raises:
        NoPostgreSQLError: if it is not installed, or there is nobody whom root can start it as.
    """

    def __init__(self):
        self._programs = find_programs()
        self._user = None
        if os.getuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self._user = next((name for name in OTHER_USERS if name in known), None)
            if self._user is None:
                raise NoPostgreSQLError(f"root cannot start PostgreSQL, and there is no user {OTHER_USERS[0]}")

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="hfgen-postgresql-"))  # its socket's path must be short
        if self._user:
            shutil.chown(self.folder, self._user)
        try:
            self._call("initdb", "--username=hfgen", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
            self.start()
        except NoPostgreSQLError:
            shutil.rmtree(self.folder)
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self._call("pg_ctl", "start", "--wait", f"--options={options}", f"--log={self.folder / 'log'}")

    def stop(self) -> None:
        """Stop the server if it runs, whoever is connected."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self._call("pg_ctl", "stop", "--wait", "--mode=immediate")

    def new_database(self, name: str) -> str:
        """Make a database; return its URL as a user would write it, with a password that nobody asks for."""
        import psycopg

        with psycopg.connect(host=str(self.folder), user="hfgen", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://hfgen:secret@/{name}?host={self.folder}"

    def _call(self, program: str, *arguments: str) -> None:
        # Nothing of this process goes on in the server, neither its user nor the pipes that are waited for.
        with tempfile.TemporaryFile("w+") as output:
            command = [str(self._programs / program), f"--pgdata={self.folder / 'data'}", *arguments]
            options = {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid} if self._user else {}
            options |= {"extra_groups": []} if self._user else {}
            called = subprocess.run(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options
            )
            output.seek(0)
            if called.returncode:
                raise NoPostgreSQLError(f"{program} failed: {output.read()[-500:]}")
