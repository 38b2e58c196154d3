import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import databases
import hypothesis
import pytest
import storage_servers
import web_servers
from command import SCRIPT
from places import ROOT
from waiting import until_logged

pytest.register_assert_rewrite("usage_middleware.testing")

# Tests would wait for the disk most of the time. They check what processes leave behind, not what a disk keeps, so
# files in memory will do, if programs in them may run.
MEMORY = "/dev/shm"
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    and shutil.disk_usage(MEMORY).free >= 4 * 2**30
):
    os.environ["TMPDIR"] = tempfile.tempdir = MEMORY

# Tests start hundreds of processes. Without its bytecode, each would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Programs that run in the background of a shell, or under nohup, ignore some signals, and their children inherit that.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from usage_middleware import Changes, MemoryTokenStore, SQLiteTokenStore, Token  # noqa: E402 - after the line above
from usage_middleware.keys import with_prefix  # noqa: E402


class Host:
    """A token store of some kind, to which a test adds tokens by their fields."""

    def __init__(self, store):
        self.store = store

    def add(self, key, **fields):
        """Add a token under ``key`` with any fields, even those that only a ledger or an operator can change."""
        if isinstance(self.store, dict):
            self.store[key] = Token(**fields)
            return
        # Stores get keys without the prefix. A key that is given to create() may have it.
        _, token = self.store.create(key=with_prefix(key))
        changes = Changes(before=token, token=dataclasses.replace(token, **fields))
        self.store._transact(lambda transaction: transaction.save(changes))


@pytest.fixture(params=["dict", "memory", "sqlite"])
def host(request, tmp_path):
    if request.param == "dict":
        yield Host({})
        return
    with MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db") as store:
        yield Host(store)


@pytest.fixture(scope="session")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


# Fixtures that start a server, whatever they are asked for, and names of servers that tests are parametrized with.
STARTS_A_SERVER = {
    "database",
    "database_server",
    "database_url",
    "disposable_server",
    "mariadb",
    "postgresql",
    "running",
    "served",
    "service",
    "shared_database",
    "start",
}
SERVERS = {*databases.KINDS, *storage_servers.PROGRAMS, *web_servers.SERVERS}


def pytest_collection_modifyitems(items):
    """Mark tests that start a server as ``servers``, so that a test need not repeat what its fixtures show."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if STARTS_A_SERVER.intersection(item.fixturenames) or any(
            isinstance(value, str) and value in SERVERS for value in values
        ):
            item.add_marker("servers")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Those of a marker take the cores of the machine. All tests take twice as many processes, as many tests wait; each
    has a server of each kind.

    What is named runs in this process, where ``-s`` and a debugger work; so does what is run at its full size.
    """
    if config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("full"):
        return 0
    cores = os.cpu_count() or 1
    return min(cores if config.getoption("markexpr") else 2 * cores, 4)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="Run the evidence at its full size: hours of charges, kills and cuts instead of a minute.",
    )


def pytest_configure(config):
    # A slow machine is not an error, and a run fails only because of a change. At full size, each run has its own
    # examples.
    full = config.getoption("full")
    hypothesis.settings.register_profile(
        "tests",
        deadline=None,
        derandomize=not full,
        print_blob=full,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("tests")


@pytest.fixture
def full(request):
    """Return whether the tests run at their full size."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def postgresql():
    """The PostgreSQL server of this session, with durable commits. For a test that stops it: ``disposable_server``."""
    with databases.PostgreSQL() as server:
        server.start()
        yield server


@pytest.fixture(scope="session")
def mariadb():
    """The MariaDB server of this session."""
    with databases.MariaDB() as server:
        server.start()
        yield server


@pytest.fixture(params=list(databases.KINDS))
def database_server(request):
    """Each server in turn, started when the first test needs it."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def database_url(database_server):
    """The SQLAlchemy URL of an empty database on each server in turn."""
    with database_server.database() as url:
        yield url


@pytest.fixture(scope="module", params=list(databases.KINDS))
def shared_database(request):
    """One database for the tests of a module on each server in turn; see ``database``."""
    with databases.shared(request.getfixturevalue(request.param)) as database:
        yield database


@pytest.fixture
def database(shared_database):
    """A database whose tables are empty, on each server in turn. Faster than ``database_url``, and not durable."""
    yield shared_database
    shared_database.empty()


@pytest.fixture(params=["sqlite", *databases.KINDS])
def store_text(request, tmp_path):
    """The name of an empty store for :func:`open_store`, of each kind that processes may share; commits are durable."""
    if request.param == "sqlite":
        yield str(tmp_path / "tokens.db")
    else:
        with request.getfixturevalue(request.param).database() as url:
            yield url


@pytest.fixture(params=list(databases.KINDS))
def disposable_server(request):
    """A server of each kind in turn, for this test alone, which may stop, kill and start it."""
    with databases.KINDS[request.param]() as server:
        server.start()
        yield server


@pytest.fixture
def db(tmp_path, monkeypatch):
    """The path of a database that the environment names, with nothing in it yet."""
    path = tmp_path / "tokens.db"
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def start(tmp_path):
    """Return a function that starts the script and waits until it prints a match of a pattern.

    It returns the process, the match, and the log.
    """
    processes = []

    def start(*args, ready, **environment):
        log = tmp_path / f"log{len(processes)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [SCRIPT, *args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONWARNINGS": "default::ResourceWarning",
                    "TMPDIR": str(tmp_path),
                    **environment,
                },
            )
        processes.append(process)
        return process, until_logged(ready, log, process), log

    yield start
    for process in processes:
        process.kill()
        process.wait()
