"""An SQLite file of new-api that is left alone."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from client import ask
from forks import forked
from gateway import KEY, OLDEST, Gateway, endpoint
from waiting import DEADLINE

from usage_middleware import (
    NewAPITokenStore,
    StoreError,
    forks,
)
from usage_middleware.stores import is_new_api
from usage_middleware.stores.sqlite import reading

# --- An SQLite file that is left alone


def state_of(path):
    """Return all that a reader might change."""
    folder = Path(path).parent
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino)
        for file in folder.iterdir()
        if not file.name.endswith("-shm")  # concurrent readers record themselves in it
    }, sorted(os.listdir(folder))


def use_wal(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("mode", ["delete", "wal, closed", "wal, open"])
def test_nothing_is_written(sqlite_gateway, mode, full):
    path = sqlite_gateway.engine.url.database
    if mode != "delete":
        use_wal(path)
    with contextlib.ExitStack() as stack:
        if mode == "wal, open":
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            writer.execute("UPDATE tokens SET used_quota = 1")
            writer.commit()
        before = state_of(path)
        with NewAPITokenStore(path) as store:
            app = endpoint(store)
            assert is_new_api(path)
            for _ in range(5000 if full else 300):
                assert ask(app, authorization=f"Bearer {KEY}").status == 200
                assert ask(app, authorization="Bearer unknown").status == 401
            assert len(list(store.records())) == store.count() == 1
            assert state_of(path) == before
        assert state_of(path) == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_folder_that_is_read_only(sqlite_gateway, mode):
    path = Path(sqlite_gateway.engine.url.database)
    if mode == "wal":
        use_wal(path)
    store = NewAPITokenStore(path)

    def read():
        if os.geteuid() == 0:
            os.setuid(65534)
        return f"{os.access(path, os.W_OK)} {os.access(path.parent, os.W_OK)} {store.get(KEY).name}"

    # Up to a directory that everybody can enter.
    modes = {folder: folder.stat().st_mode for folder in path.parents if not folder.stat().st_mode & 0o001}
    modes |= {path: path.stat().st_mode, path.parent: path.parent.stat().st_mode}
    try:
        for file in modes:
            file.chmod(0o444 if file == path else 0o555)
        assert forked(read) == "False False Alice"
    finally:
        for file, bits in modes.items():
            file.chmod(bits)


def test_a_symbolic_link(sqlite_gateway, tmp_path):
    path = sqlite_gateway.engine.url.database
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    use_wal(path)
    with contextlib.closing(sqlite3.connect(path)) as writer, NewAPITokenStore(link) as store:
        assert store.get(KEY).total_used == 12345
        writer.execute("UPDATE tokens SET used_quota = 1")
        writer.commit()
        assert store.get(KEY).total_used == 1
        assert os.listdir(link.parent) == ["link.db"]


def test_a_file_that_is_not_there(tmp_path):
    with NewAPITokenStore(tmp_path / "missing.db") as store:
        with pytest.raises(StoreError, match=r"there is no file .*missing\.db"):
            store.get(KEY)
        assert not list(tmp_path.iterdir())
        Gateway("sqlite", f"sqlite:///{tmp_path / 'missing.db'}").add({"key": KEY})
        assert store.get(KEY) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "cannot be opened: Is a directory"), ("no/one-api.db", "there is no file"), ("text", "not a database")],
)
def test_a_file_that_is_not_a_database(tmp_path, name, message):
    (tmp_path / "text").write_text("no database, but long enough to be read as the header of one" * 20)
    with NewAPITokenStore(tmp_path / name) as store, pytest.raises(StoreError, match=message):
        store.get(KEY)


def test_a_file_that_is_replaced(sqlite_gateway, tmp_path):
    path = sqlite_gateway.engine.url.database
    other = Gateway("sqlite", f"sqlite:///{tmp_path / 'other.db'}", OLDEST)
    other.add_users()
    other.add({"user_id": 1, "key": KEY, "name": "Bob"})
    with NewAPITokenStore(path) as store:
        assert store.get(KEY).name == "Alice"
        open_files = len(os.listdir("/proc/self/fd"))
        os.replace(tmp_path / "other.db", path)
        with contextlib.suppress(StoreError):  # The old columns are asked for once more.
            store.get(KEY)
        assert store.get(KEY).name == "Bob"
        os.remove(path)
        with pytest.raises(StoreError, match="there is no file"):
            store.get(KEY)
        assert len(os.listdir("/proc/self/fd")) <= open_files


def test_a_writer_is_waited_for(sqlite_gateway, monkeypatch):
    path = sqlite_gateway.engine.url.database
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as writer,
        NewAPITokenStore(path) as store,
    ):
        store.get(KEY)
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("UPDATE tokens SET used_quota = 1")
        release = threading.Timer(0.2, writer.execute, ["COMMIT"])
        release.start()
        assert store.get(KEY).total_used == 1
        release.join()
        monkeypatch.setattr(reading, "_TIMEOUT", 0.05)
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            store.get(KEY)
        writer.execute("ROLLBACK")
        assert store.get(KEY).total_used == 1


WRITER = """
import sqlite3, sys, time
path, mode, what = sys.argv[1:]
def connect():
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA synchronous = OFF")
    return connection
connection = connect()
connection.execute(f"PRAGMA journal_mode = {mode}")
if what == "crash":
    connection.execute("UPDATE tokens SET used_quota = 1")
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO tokens (user_id, name) VALUES (1, ?)", (("x" * 1000,) for _ in range(500)))
    print("ready", flush=True)
    time.sleep(60)
print("ready", flush=True)
number = 0
while True:
    number += 1
    # On many pages: a reader that mixes old and new pages would see both.
    connection.execute("UPDATE tokens SET used_quota = ?, model_limits = ?", (number, str(number % 10) * 50_000))
    if what == "reopens":
        connection.close()
        connection = connect()
"""


@contextlib.contextmanager
def writer_process(path, mode, what):
    process = subprocess.Popen([sys.executable, "-c", WRITER, path, mode, what], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what"), [("delete", "stays"), ("wal", "stays"), ("wal", "reopens")])
def test_a_reader_among_writes_sees_whole_transactions(sqlite_gateway, mode, what, full):
    path = sqlite_gateway.engine.url.database
    sqlite_gateway.execute("UPDATE tokens SET used_quota = 0, model_limits = ''")
    seen = set()
    end = time.monotonic() + (60 if full else 1.5)
    with writer_process(path, mode, what) as process, NewAPITokenStore(path) as store:
        # A busy machine lets the two take turns seldom.
        while time.monotonic() < end or (len(seen) < 20 and time.monotonic() < end + DEADLINE):
            token = store.get(KEY)
            limits = "".join(token.model_limits)
            assert limits in ("", str(token.total_used % 10) * 50_000)
            seen.add(token.total_used)
        assert process.poll() is None
    assert len(seen) >= 20


@pytest.mark.parametrize("writer_stays", [True, False])
def test_a_writer_that_comes_while_it_is_read(sqlite_gateway, monkeypatch, writer_stays):
    path = sqlite_gateway.engine.url.database
    use_wal(path)
    open_reader = reading.open_reader
    unfinished = []
    with contextlib.ExitStack() as stack, NewAPITokenStore(path) as store:

        def open_before_a_write(*arguments, **options):
            monkeypatch.setattr(reading, "open_reader", open_reader)
            reader = open_reader(*arguments, **options)
            unfinished.append(reader.execute("SELECT used_quota FROM tokens"))  # it keeps the pages
            assert unfinished[0].fetchone() == (12345,)
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            writer.execute("UPDATE tokens SET used_quota = 1")
            writer.commit()
            if not writer_stays:
                writer.close()
            return reader

        store.get(KEY)
        monkeypatch.setattr(reading, "open_reader", open_before_a_write)
        assert store.get(KEY).total_used == 1


def test_a_writer_that_was_killed_with_a_journal(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        with writer_process(path, "delete", "crash") as process:
            process.kill()
            process.wait()
        before = state_of(path)
        with pytest.raises(StoreError, match="left in the middle of a transaction"):
            store.get(KEY)
        assert state_of(path) == before
        with contextlib.closing(sqlite3.connect(path)) as connection:  # new-api starts
            connection.execute("SELECT * FROM tokens").fetchall()
        assert store.get(KEY).total_used == 1


def test_a_writer_that_was_killed_with_a_log(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        with writer_process(path, "wal", "crash") as process:
            process.kill()
            process.wait()
        before = state_of(path)
        assert store.get(KEY).total_used == 1
        assert state_of(path) == before


LOCKED = """
import sqlite3, sys
try:
    sqlite3.connect(sys.argv[1], timeout=0).execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_locks_that_the_host_has_on_the_file_stay(sqlite_gateway, mode):
    path = sqlite_gateway.engine.url.database
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("BEGIN IMMEDIATE")
        with NewAPITokenStore(path) as store:
            for _ in range(3):
                assert store.get(KEY).name == "Alice"
                assert is_new_api(path)
        tried = subprocess.run([sys.executable, "-c", LOCKED, path], capture_output=True, text=True, check=True)
        assert tried.stdout == "database is locked\n"
        connection.execute("ROLLBACK")


@pytest.mark.slow
def test_connections_and_descriptors_do_not_add_up(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        store.get(KEY)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            store.get(KEY)
            with NewAPITokenStore(path) as other:
                other.get(KEY)
        assert len(os.listdir("/proc/self/fd")) == before
        assert not forks._held[os.getpid()]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_it_is_read(sqlite_gateway, monkeypatch):
    monkeypatch.setattr(forks, "_PATIENCE", 0.05)
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        said = reading.look(path, lambda connection: forked(lambda: store.get(KEY)))
        assert "in use when this process was forked" in said
        assert forked(lambda: store.get(KEY).name) == "Alice"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_until_another_thread_has_read(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    reading_now, forking = threading.Event(), threading.Event()

    def read(connection):
        reading_now.set()
        assert forking.wait(30)
        time.sleep(0.1)
        return connection.execute("SELECT 1").fetchall()

    with NewAPITokenStore(path) as store:
        thread = threading.Thread(target=reading.look, args=[path, read])
        thread.start()
        assert reading_now.wait(30)
        forking.set()
        assert forked(lambda: store.get(KEY).name) == "Alice"
        thread.join()
