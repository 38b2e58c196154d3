"""The servers that other tests rely on: they answer, keep what was committed, and are gone when the tests are."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import databases
import programs
import pytest
from places import ROOT, TESTS
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError, ProgrammingError
from waiting import until

# A session of one test, which prints what it had, and then ends in a given way.
SESSION = """
import os
import signal
from pathlib import Path

def test(postgresql, mariadb):
    had = [f"{{server.pid}} {{server.directory}}" for server in (postgresql, mariadb)]
    Path(__file__).with_name("had").write_text("\\n".join(had))
    {end}
"""


def execute(url, *statements):
    """Run statements in one transaction. Return the rows of the last."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        *_, result = [connection.exec_driver_sql(statement) for statement in statements]
        return result.all() if result.returns_rows else None


def test_each_database_is_empty(database_server, database_url):
    assert execute(database_url, "CREATE TABLE tokens (id integer)", "SELECT * FROM tokens") == []
    with database_server.database() as other, pytest.raises(ProgrammingError, match="tokens"):
        execute(other, "SELECT * FROM tokens")


def test_commits_are_durable(postgresql, mariadb):
    assert postgresql.execute("SHOW fsync") == [("on",)]
    assert postgresql.execute("SHOW synchronous_commit") == [("on",)]
    assert mariadb.execute("SELECT @@innodb_flush_log_at_trx_commit") == [(1,)]


def test_mariadb_takes_one_text_for_another(mariadb):
    """As it does by default. A column must say otherwise, and a test must be able to see that it does."""
    with mariadb.database() as url:
        assert execute(
            url,
            "CREATE TABLE tokens (name varchar(20))",
            "INSERT INTO tokens VALUES ('Key')",
            "SELECT name FROM tokens WHERE name = 'key '",
        ) == [("Key",)]


def test_a_database_is_dropped_while_a_client_is_connected(database_server):
    with database_server.database() as url:
        execute(url, "CREATE TABLE tokens (id integer)")
        connection = create_engine(url, poolclass=NullPool).connect()
        connection.exec_driver_sql("SELECT * FROM tokens")
    with pytest.raises(OperationalError), closing(connection):
        connection.exec_driver_sql("SELECT * FROM tokens")
    with pytest.raises(OperationalError):
        execute(url, "SELECT 1")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_what_was_committed_is_there_when_a_server_comes_back(disposable_server, end):
    url = disposable_server.create_database()
    execute(url, "CREATE TABLE tokens (id integer)", "INSERT INTO tokens VALUES (1)")
    with create_engine(url, poolclass=NullPool).connect() as connection:
        connection.exec_driver_sql("INSERT INTO tokens VALUES (2)")
        getattr(disposable_server, end)()
        with pytest.raises(OperationalError):
            execute(url, "SELECT 1")
        disposable_server.start()
        with pytest.raises(OperationalError):
            connection.exec_driver_sql("INSERT INTO tokens VALUES (3)")
    assert execute(url, "SELECT id FROM tokens") == [(1,)]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param("assert False", 1, id="fails"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, id="is killed"),
    ],
)
def test_nothing_is_left_of_a_session_that(end, status, postgresql, mariadb, tmp_path):
    session = tmp_path / "test_session.py"
    session.write_text(SESSION.format(end=end))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "setup.cfg", "-o", "addopts=", session],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    had = [line.split(" ", 1) for line in (tmp_path / "had").read_text().splitlines()]
    assert {int(pid) for pid, _ in had}.isdisjoint({postgresql.pid, mariadb.pid})

    def left():
        return [pid for pid, directory in had if databases.is_running(int(pid)) or Path(directory).exists()]

    if status < 0:  # What guards the servers ends them a moment later.
        until(lambda: not left())
    assert left() == []


def test_a_program_that_is_missing_skips_the_test_or_fails_it(monkeypatch):
    monkeypatch.delenv(programs.NOTHING_SKIPPED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="install Debian's package of-it"):
        programs.find_program("no-such-program", "of-it")
    monkeypatch.setenv(programs.NOTHING_SKIPPED, "1")
    with pytest.raises(pytest.fail.Exception, match="install Debian's package of-it"):
        programs.find_program("no-such-program", "of-it")
