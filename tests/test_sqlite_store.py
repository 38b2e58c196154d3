"""What :class:`SQLiteTokenStore` does beyond the contract: its file, its failures, and many threads and processes.

Other programs' doings are done by real ones. A function that runs ``in_a_process`` of its own is in this module, above
the test that calls it.
"""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from client import ask

from usage_middleware import SQLiteTokenStore, StoreError, Token, UsageMiddleware
from usage_middleware.keys import key_digest, strip_prefix
from usage_middleware.stores.sqlite import connections
from usage_middleware.testing import QuotaStoreContract

SUFFIXES = ("", "-wal", "-shm")  # of the database and the files that SQLite keeps next to it (sqlite.org/wal.html)

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are seen in /proc")


class TestSQLiteTokenStore(QuotaStoreContract):
    def make_store(self, tmp_path):
        return SQLiteTokenStore(tmp_path / "tokens.db")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.db"


@pytest.fixture
def store(path):
    with SQLiteTokenStore(path) as store:
        yield store


def wrapped(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"the wrapped application"]


def create(store, **fields):
    """Adds a token; returns its key as stores see it, and the token."""
    key, token = store.create(**fields)
    return strip_prefix(key), token


def status(store, key):
    """The status that the endpoint has for a key."""
    return ask(UsageMiddleware(wrapped, store), authorization=f"Bearer {key}").status


def sql(path, *statements):
    """Runs statements in the database as another program does; returns the rows of the last."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
        return rows


def content(path):
    """The bytes of the database's files. Another process reads them: closing a file would give up the locks that
    SQLite has on it in this one (sqlite.org/howtocorrupt.html, section 2.2)."""
    names = [f"{path}{suffix}" for suffix in SUFFIXES if os.path.exists(f"{path}{suffix}")]
    return subprocess.run(["cat", *names], stdout=subprocess.PIPE, check=True).stdout


def open_files(path):
    """The open files of this process that belong to the database: their numbers and names."""
    files = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith(str(path)):
            files[number] = target
    return files


def count_connections(path):
    """How many connections to the database this process has. Each has the log open for itself."""
    return list(open_files(path).values()).count(f"{path}-wal")


@contextmanager
def another_process(path, *statements):
    """Another process that has run statements in the database and keeps its connection until the end."""
    program = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement)\n"
        "print('done', flush=True)\n"
        "sys.stdin.read()\n"
        "connection.close()\n"
    )
    command = [sys.executable, "-c", program, path, *statements]
    # Its input is closed at the end, also of a test that failed, and that ends it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"done\n"
        yield


def process_of(function, *arguments):
    """The command to run a function of this module in a new interpreter, where every warning is an error."""
    program = f"import sys, {__name__} as module; module.{function.__name__}(*sys.argv[1:])"
    return [sys.executable, "-X", "dev", "-W", "error", "-c", program, *map(str, arguments)]


def in_a_process(function, *arguments):
    """Runs a function of this module in a new interpreter to its end. Nothing may be amiss, neither there nor in
    processes that it forked: they share its error output. Returns what it printed."""
    done = subprocess.run(
        process_of(function, *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# --- Construction


@needs_proc
def test_construction_opens_nothing(path):
    before = os.listdir("/proc/self/fd"), threading.enumerate()
    store = SQLiteTokenStore(path)
    UsageMiddleware(wrapped, store)
    assert (os.listdir("/proc/self/fd"), threading.enumerate()) == before
    assert list(path.parent.iterdir()) == []


def test_a_service_that_only_passes_through_pays_for_nothing_else(tmp_path):
    program = (
        "import sys, usage_middleware\n"
        "app = usage_middleware.UsageMiddleware(print, usage_middleware.SQLiteTokenStore('tokens.db'))\n"
        "app({'PATH_INFO': '/elsewhere'}, None)\n"
        "print('loaded:', *{'sqlite_utils', 'sqlalchemy', 'click', 'werkzeug'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert list(tmp_path.iterdir()) == []


class PathOfBytes:
    def __fspath__(self):
        return b"tokens.db"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"path": ""}, ValueError, id="no path"),
        pytest.param({"path": ":memory:"}, ValueError, id="memory"),
        pytest.param({"path": "file:x?mode=memory"}, ValueError, id="URI of memory"),
        pytest.param({"path": "file:tokens.db"}, ValueError, id="URI"),
        pytest.param({"path": "tokens\0.db"}, ValueError, id="path with NUL"),
        pytest.param({"path": b"tokens.db"}, TypeError, id="path bytes"),
        pytest.param({"path": PathOfBytes()}, TypeError, id="path object of bytes"),
        pytest.param({"path": 5}, TypeError, id="path int"),
        pytest.param({"path": None}, TypeError, id="path None"),
        pytest.param({"timeout": -1}, ValueError, id="timeout negative"),
        pytest.param({"timeout": float("nan")}, ValueError, id="timeout NaN"),
        pytest.param({"timeout": float("inf")}, ValueError, id="timeout infinite"),
        pytest.param({"timeout": 2**31}, ValueError, id="timeout longer than SQLite can count"),
        pytest.param({"timeout": "1"}, TypeError, id="timeout str"),
        pytest.param({"timeout": True}, TypeError, id="timeout bool"),
        pytest.param({"timeout": None}, TypeError, id="timeout None"),
        pytest.param({"synchronous": "full"}, ValueError, id="synchronous in lower case"),
        pytest.param({"synchronous": "2"}, ValueError, id="synchronous by number"),
        pytest.param({"synchronous": "FULL; DROP TABLE tokens"}, ValueError, id="synchronous and more"),
        pytest.param({"synchronous": ""}, ValueError, id="synchronous empty"),
    ],
)
def test_an_impossible_argument_is_named(arguments, error):
    (name,) = arguments
    given = {"path": "tokens.db", **arguments}
    with pytest.raises(error, match=rf"^{name} must "):
        SQLiteTokenStore(given.pop("path"), **given)


@pytest.mark.parametrize("path", ["", ":memory:", "file::memory:?cache=shared"])
def test_who_wants_memory_is_told_where_it_is(path):
    with pytest.raises(ValueError, match="MemoryTokenStore"):
        SQLiteTokenStore(path)


@pytest.mark.parametrize(
    "name",
    [
        "per%20cent",
        "what?mode=memory",
        "number#sign",
        "white space",
        "-dash",
        "quote'\"",
        "back\\slash",
        "line\nfeed",
        "caf\u00e9 \u4ee4\u724c",
        "file:name",
        pytest.param(os.fsdecode(b"no text \xff"), marks=pytest.mark.skipif(sys.platform != "linux", reason="no name")),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_any_name_is_that_of_a_file(tmp_path, name, kind):
    with SQLiteTokenStore(kind(os.path.join(tmp_path, name))) as store:
        key, token = create(store)
        assert store.get(key) == token
        assert {entry.name for entry in os.scandir(tmp_path)} == {name, f"{name}-wal", f"{name}-shm"}
    assert os.listdir(tmp_path) == [name]


def test_a_relative_path_is_of_the_directory_where_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with SQLiteTokenStore("tokens.db") as store:
        monkeypatch.chdir(tmp_path)
        store.create()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.db")] == ["here/tokens.db"]


# --- The file


def test_the_database_is_in_wal_mode_and_its_tables_are_strict(path, store):
    store.create()
    assert sql(path, "PRAGMA journal_mode") == [("wal",)]
    tables = dict(sql(path, "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'"))
    assert {name: tables[name] for name in ("tokens", "retired_keys")} == {"tokens": 1, "retired_keys": 1}


def watch_connections():
    """A list of the connections that this process opens from now on, and a child of it from the fork on."""
    opened = []

    def hook(event, arguments):
        if event == "sqlite3.connect/handle":
            opened.append(arguments[0])

    sys.addaudithook(hook)
    return opened


def use_two_connections(store, key):
    # A transaction holds the first.
    store._transact(lambda transaction: store.get(key))


def print_synchronous(path, **arguments):
    opened = watch_connections()
    with SQLiteTokenStore(path, **arguments) as store:
        use_two_connections(store, create(store)[0])
        print(*(connection.execute("PRAGMA synchronous").fetchone()[0] for connection in opened))


def print_synchronous_as(path, mode):
    print_synchronous(path, synchronous=mode)


def test_what_a_method_returned_has_reached_the_disk(path):
    # 2 is FULL (sqlite.org/pragma.html#pragma_synchronous).
    assert in_a_process(print_synchronous, path) == "2 2\n"


@pytest.mark.parametrize(("mode", "number"), [("OFF", 0), ("NORMAL", 1), ("FULL", 2), ("EXTRA", 3)])
def test_synchronous_is_as_it_was_asked_for(path, mode, number):
    assert in_a_process(print_synchronous_as, path, mode) == f"{number} {number}\n"


def test_digests_are_in_the_files_and_never_keys(path, store):
    kept, _ = create(store)
    brought, _ = create(store, key="a-key-that-somebody-brought")
    rotated, token = create(store)
    new = strip_prefix(store.rotate(token.id))
    deleted, token = create(store)
    store.delete(token.id)
    while_open = content(path)
    store.close()
    for data in (while_open, content(path)):
        for key in (kept, brought, rotated, new, deleted):
            assert key_digest(key) in data
            assert key.encode() not in data
            assert key_digest(key).hex().encode() not in data.lower()


def test_an_empty_file_becomes_a_database(path):
    path.touch()
    with SQLiteTokenStore(path) as store:
        key, token = create(store)
        assert store.get(key) == token


def test_a_database_that_is_current_is_not_written_when_it_is_read(path):
    with SQLiteTokenStore(path) as store:
        key, token = create(store)
    before = content(path), path.stat().st_mtime_ns
    with SQLiteTokenStore(path) as store:
        assert store.get(key) == store.find(token.id) == token
        assert list(store.tokens()) == [token]
        # Not the log either.
        assert os.path.getsize(f"{path}-wal") == 0
    assert (content(path), path.stat().st_mtime_ns) == before


# As the first version made it. A later one may add to it, and has to understand it.
FIRST_SCHEMA = """
CREATE TABLE "_sqlite_migrations" ("id" INTEGER PRIMARY KEY, "migration_set" TEXT, "name" TEXT, "applied_at" TEXT);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name" ON "_sqlite_migrations" ("migration_set", "name");
INSERT INTO "_sqlite_migrations" VALUES (1, 'usage_middleware', 'tokens', '2026-11-23 00:47:26.044889+00:00');
CREATE TABLE retired_keys (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE tokens (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    name TEXT NOT NULL,
    total_available INTEGER NOT NULL,
    total_used INTEGER NOT NULL,
    unlimited_quota INTEGER NOT NULL CHECK (unlimited_quota IN (0, 1)),
    model_limits TEXT NOT NULL,
    model_limits_enabled INTEGER NOT NULL CHECK (model_limits_enabled IN (0, 1)),
    expires_at INTEGER NOT NULL,
    enabled INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO tokens VALUES (
    7, X'52C9B5F8E20E7EC3F2B8E5C7BF3EF72D1B1F4A1A0A9A1C1B5C9E3C0B2E8C5F11',
    '-key', 'First', 90, 10, 0, '{"gpt-4o":true}', 1, 4102444800, 1, 1700000000
);
PRAGMA journal_mode = WAL;
"""


def test_a_database_of_the_first_version_is_understood(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST_SCHEMA)
        connection.execute("UPDATE tokens SET digest = ?", (key_digest("the-first-key"),))
        connection.commit()
    with SQLiteTokenStore(path) as store:
        token = store.get("the-first-key")
        assert token == Token(
            id=7,
            hint="-key",
            name="First",
            total_available=90,
            total_used=10,
            model_limits={"gpt-4o": True},
            model_limits_enabled=True,
            expires_at=4102444800,
            created_at=1700000000,
        )
        new = strip_prefix(store.rotate(7))
        assert store.get(new) == dataclasses.replace(token, hint=new[-4:])


# --- A database that fails


@pytest.fixture
def folder():
    """A directory that another user may enter, too: the path to ``tmp_path`` is for its owner alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        # What is imported when it is first needed is imported by whoever may.
        with SQLiteTokenStore(os.path.join(name, "other.db")) as store:
            store.get("no-such-key")
        os.unlink(os.path.join(name, "other.db"))
        yield Path(name)


@contextmanager
def without_privileges():
    """As somebody who is bound by the permissions of files, which root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def permissions(path, mode):
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with without_privileges():
            yield
    finally:
        path.chmod(before)


@contextmanager
def untouched(path):
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def make_database(path):
    with SQLiteTokenStore(path) as store:
        store.create()


@contextmanager
def a_directory(path):
    path.mkdir()
    yield
    path.rmdir()


@contextmanager
def no_folder(path):
    path.parent.rmdir()
    yield
    assert not path.parent.exists()
    path.parent.mkdir()


@contextmanager
def a_file_for_a_folder(path):
    path.parent.rmdir()
    path.parent.touch()
    yield
    path.parent.unlink()
    path.parent.mkdir()


def not_a_database(data):
    @contextmanager
    def trouble(path):
        path.write_bytes(data)
        with untouched(path):
            yield
        path.unlink()

    return trouble


@contextmanager
def cut_off(path):
    make_database(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    yield
    path.write_bytes(whole)


@contextmanager
def unwritable_folder(path):
    with permissions(path.parent, 0o555):
        yield


@contextmanager
def unreadable_file(path):
    make_database(path)
    with permissions(path, 0o000):
        yield


@contextmanager
def a_newer_schema(path):
    make_database(path)
    sql(path, "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('usage_middleware', 'from_the_future')")
    with untouched(path):
        yield
    sql(path, "DELETE FROM _sqlite_migrations WHERE name = 'from_the_future'")


def made_by_others(*statements):
    @contextmanager
    def trouble(path):
        sql(path, *statements)
        with untouched(path):
            yield
        path.unlink()

    return trouble


@contextmanager
def locked_for_good(path):
    make_database(path)
    with another_process(path, "PRAGMA locking_mode = EXCLUSIVE", "UPDATE tokens SET name = ''"):
        yield


@contextmanager
def locked_while_empty(path):
    with another_process(path, "PRAGMA journal_mode = WAL", "BEGIN IMMEDIATE"):
        yield


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        pytest.param(a_directory, "is a directory", id="directory"),
        pytest.param(no_folder, "there is no directory", id="no folder"),
        pytest.param(a_file_for_a_folder, "there is no directory", id="a file for a folder"),
        pytest.param(not_a_database(b"tokens\n"), "is not an SQLite database", id="a short text"),
        pytest.param(not_a_database(b"tokens\n" * 1000), "is not an SQLite database", id="a long text"),
        pytest.param(not_a_database(bytes(4096)), "is not an SQLite database", id="zeros"),
        pytest.param(cut_off, "malformed", id="cut off"),
        pytest.param(unwritable_folder, "may not read and write the file and its folder", id="unwritable folder"),
        pytest.param(unreadable_file, "may not read and write the file and its folder", id="unreadable file"),
        pytest.param(a_newer_schema, "was made by a newer version", id="newer schema"),
        pytest.param(
            made_by_others(
                "CREATE TABLE tokens (id integer PRIMARY KEY AUTOINCREMENT, `key` char(48), status integer)"
            ),
            "has a table 'tokens' that usage-middleware did not make",
            id="one-api",
        ),
        pytest.param(
            made_by_others("CREATE TABLE Tokens (id)"),
            "that usage-middleware did not make",
            id="another's table, in other letters",
        ),
        pytest.param(
            made_by_others("CREATE VIEW tokens AS SELECT 1 AS id"),
            "that usage-middleware did not make",
            id="another's view",
        ),
        pytest.param(
            made_by_others("CREATE TABLE retired_keys (id)"),
            "that usage-middleware did not make",
            id="another's second table",
        ),
        pytest.param(locked_for_good, "is locked", id="locked for good"),
        pytest.param(locked_while_empty, "is locked", id="locked while it has no tables"),
    ],
)
def test_a_database_that_cannot_be_used(folder, caplog, trouble, says):
    path = folder / "data" / "tokens.db"
    path.parent.mkdir()
    store = SQLiteTokenStore(path, timeout=0.1)
    with trouble(path):
        for use in (lambda: store.get("no-such-key"), store.create, lambda: list(store.tokens())):
            with pytest.raises(StoreError, match=says) as caught:
                use()
            assert str(path) in str(caught.value)
        assert status(store, "no-such-key") == 503
        assert says in caplog.text
        assert ask(UsageMiddleware(wrapped, store), path="/elsewhere").status == 200
    with store:
        key, token = create(store)
        assert store.get(key) == token
        assert status(store, key) == 200


@contextmanager
def table_vanished(path):
    sql(path, "ALTER TABLE tokens RENAME TO elsewhere")
    yield
    sql(path, "ALTER TABLE elsewhere RENAME TO tokens")


@contextmanager
def file_deleted(path):
    away = path.parent / "away"
    away.mkdir()
    for suffix in SUFFIXES:
        os.rename(f"{path}{suffix}", away / f"tokens.db{suffix}")
    yield
    for suffix in SUFFIXES:
        os.rename(away / f"tokens.db{suffix}", f"{path}{suffix}")


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        pytest.param(table_vanished, "no such table: tokens", id="table vanished"),
        pytest.param(file_deleted, "there is no such file", id="file deleted"),
    ],
)
def test_a_database_that_fails_later(path, caplog, store, trouble, says):
    key, token = create(store)
    use_two_connections(store, key)
    with trouble(path):
        # More often than there are connections.
        for use in (store.create, lambda: store.get(key), lambda: list(store.tokens())) * 2:
            with pytest.raises(StoreError, match=says) as caught:
                use()
            assert str(path) in str(caught.value)
        assert status(store, key) == 503
        assert says in caplog.text
    assert store.get(key) == token
    assert status(store, key) == 200


def test_a_database_that_is_put_in_its_place_is_used_from_then_on(path, store):
    restored = path.with_name("backup.db")
    with SQLiteTokenStore(restored) as backup:
        key, token = create(backup, name="from the backup")
    create(store, name="lost")
    for suffix in SUFFIXES[1:]:
        os.unlink(f"{path}{suffix}")
    os.replace(restored, path)
    # A reader may take a second to notice, a writer never does.
    create(store, name="new")
    assert store.get(key) == token
    assert [token.name for token in store.tokens()] == ["from the backup", "new"]
    assert sql(path, "SELECT name FROM tokens ORDER BY id") == [("from the backup",), ("new",)]


def test_a_writer_elsewhere_hinders_writing_and_not_reading(path):
    with SQLiteTokenStore(path, timeout=0.1) as store:
        key, token = create(store)
        with another_process(path, "BEGIN IMMEDIATE", "UPDATE tokens SET name = 'not committed'"):
            assert store.get(key) == token
            assert status(store, key) == 200
            with SQLiteTokenStore(path, timeout=0.1) as not_used_before:
                assert not_used_before.get(key) == token
            for use in (
                store.create,
                lambda: store.update(token.id, name="x"),
                lambda: store.rotate(token.id),
                lambda: store.delete(token.id),
            ):
                with pytest.raises(StoreError, match=r"is locked: .* 0\.1 s"):
                    use()
        assert list(store.tokens()) == [token]
        assert store.update(token.id, name="x").name == "x"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("model_limits = 'not JSON'", id="no JSON"),
        pytest.param("model_limits = ''", id="empty"),
        pytest.param("model_limits = '[]'", id="JSON of another kind"),
        pytest.param("""model_limits = '{"gpt-4o":-1}'""", id="impossible limit"),
        pytest.param("""model_limits = '{"gpt-4o":NaN}'""", id="NaN"),
        pytest.param(f"""model_limits = '{"[" * 100_000}'""", id="too deep"),
        pytest.param("name = CAST(X'66FF' AS TEXT)", id="name that is not UTF-8"),
    ],
)
def test_a_damaged_row_is_one_token_less(path, store, damage):
    key, token = create(store)
    other_key, other = create(store)
    sql(path, f"UPDATE tokens SET {damage} WHERE id = {token.id}")
    for use in (
        lambda: store.get(key),
        lambda: store.find(token.id),
        lambda: list(store.tokens()),
        lambda: store.update(token.id, name="x"),
    ):
        with pytest.raises(StoreError):
            use()
    assert status(store, key) == 503
    assert status(store, other_key) == 200
    assert store.update(other.id, name="x").name == "x"
    sql(path, f"UPDATE tokens SET model_limits = '{{}}', name = '' WHERE id = {token.id}")
    assert store.get(key) == token


def test_the_message_about_a_damaged_row_says_which(path, store):
    create(store)
    key, token = create(store)
    sql(path, f"UPDATE tokens SET model_limits = '[]' WHERE id = {token.id}")
    with pytest.raises(StoreError, match=rf"token {token.id} is damaged.*model_limits"):
        store.get(key)


@contextmanager
def no_space(path):
    """A disk with room for what is there and no more: this process cannot make the log longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # While somebody else is connected the log stays as it is, and does not begin anew.
    with another_process(path, "SELECT count(*) FROM tokens"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{path}-wal"), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_space_nothing_is_changed(path, store):
    key, token = create(store)
    with no_space(path):
        for use in (store.create, lambda: store.rotate(token.id), lambda: store.delete(token.id)):
            with pytest.raises(StoreError) as caught:
                use()
            assert str(path) in str(caught.value)
            assert store.get(key) == token
            assert status(store, key) == 200
    assert list(store.tokens()) == [token]
    new = strip_prefix(store.rotate(token.id))
    assert status(store, new) == 200
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


# --- Read-only


def test_a_read_only_store_reads_and_never_writes(path, store):
    key, token = create(store)
    with SQLiteTokenStore(path, read_only=True) as reader:
        assert reader.get(key) == reader.find(token.id) == token
        assert list(reader.tokens()) == [token]
        assert status(reader, key) == 200
        for use in (
            reader.create,
            lambda: reader.update(token.id, name="x"),
            lambda: reader.rotate(token.id),
            lambda: reader.delete(token.id),
        ):
            with pytest.raises(StoreError, match="was opened read-only") as caught:
                use()
            assert str(path) in str(caught.value)
        changed = store.update(token.id, name="changed elsewhere")
        assert reader.get(key) == changed
    assert list(store.tokens()) == [changed]


def test_a_read_only_store_makes_no_file(path, store):
    reader = SQLiteTokenStore(path, read_only=True)
    with pytest.raises(StoreError, match="there is no such file"):
        reader.get("no-such-key")
    assert status(reader, "no-such-key") == 503
    assert list(path.parent.iterdir()) == []
    key, _ = create(store)
    with reader:
        assert status(reader, key) == 200


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 0", "CREATE TABLE other (id)"])
def test_a_read_only_store_makes_no_tables(path, statement):
    sql(path, statement)
    reader = SQLiteTokenStore(path, read_only=True)
    with untouched(path):
        for use in (lambda: reader.get("no-such-key"), reader.create):
            with pytest.raises(StoreError):
                use()
        with pytest.raises(StoreError, match="has not all tables"):
            reader.get("no-such-key")
        assert status(reader, "no-such-key") == 503
    make_database(path)
    with reader:
        assert status(reader, "no-such-key") == 401


def test_a_write_protected_file_is_not_written(folder):
    path = folder / "tokens.db"
    make_database(path)
    before = path.read_bytes()
    folder.chmod(0o777)
    with permissions(path, 0o444), SQLiteTokenStore(path) as store:
        with pytest.raises(StoreError, match="cannot be written") as caught:
            store.create()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


# --- Transactions


@pytest.mark.parametrize(
    ("use", "event"),
    [
        pytest.param(lambda store, token: store.create(), "AFTER INSERT ON tokens", id="create"),
        pytest.param(lambda store, token: store.update(token.id, name="x"), "AFTER UPDATE ON tokens", id="update"),
        pytest.param(lambda store, token: store.rotate(token.id), "AFTER INSERT ON retired_keys", id="rotate, begun"),
        pytest.param(lambda store, token: store.rotate(token.id), "AFTER UPDATE OF hint ON tokens", id="rotate, done"),
        pytest.param(lambda store, token: store.delete(token.id), "AFTER INSERT ON retired_keys", id="delete, begun"),
        pytest.param(lambda store, token: store.delete(token.id), "AFTER DELETE ON tokens", id="delete, done"),
    ],
)
# FAIL keeps what the statement did so far, ABORT undoes the statement, ROLLBACK ends the whole transaction
# (sqlite.org/lang_conflict.html).
@pytest.mark.parametrize("resolution", ["FAIL", "ABORT", "ROLLBACK"])
def test_what_fails_changes_nothing(path, store, use, event, resolution):
    key, token = create(store)
    before = sql(path, "SELECT * FROM tokens"), sql(path, "SELECT * FROM retired_keys")
    sql(path, f"CREATE TRIGGER sabotage {event} BEGIN SELECT RAISE({resolution}, 'sabotage'); END")
    for _ in range(2):
        with pytest.raises(StoreError, match="sabotage"):
            use(store, token)
        assert store.get(key) == token
    assert (sql(path, "SELECT * FROM tokens"), sql(path, "SELECT * FROM retired_keys")) == before
    sql(path, "DROP TRIGGER sabotage")
    use(store, token)
    assert list(store.tokens()) != [token]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_interrupted_gives_the_lock_back(path, store, error):
    key, token = create(store)

    def work(transaction):
        transaction.save(dataclasses.replace(token, name="x"))
        raise error

    with pytest.raises(error):
        store._transact(work)
    assert store.get(key) == token
    sql(path, "PRAGMA busy_timeout = 0", "BEGIN IMMEDIATE", "ROLLBACK")


# --- tokens()


def fill(path, count):
    sql(
        path,
        f"""
        WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})
        INSERT INTO tokens (digest, hint, name, total_available, total_used, unlimited_quota, model_limits,
            model_limits_enabled, expires_at, enabled, created_at)
        SELECT randomblob(32), '', 'Token ' || n, n, 0, 0, '{{}}', 0, 0, 1, 0 FROM numbers
        """,
    )


def test_a_list_of_tokens_holds_no_lock(path, store):
    store.create()
    fill(path, 3000)
    tokens = store.tokens()
    for _ in range(1500):
        next(tokens)
    sql(path, "UPDATE tokens SET name = 'changed'")
    # Not busy, and the whole log is written back (sqlite.org/pragma.html#pragma_wal_checkpoint).
    assert sql(path, "PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]
    assert next(tokens).id == 1501
    assert [token.id for token in tokens] == list(range(1502, 3002))


def test_a_list_of_tokens_needs_the_same_memory_however_long_it_is(path, store):
    def peak():
        tracemalloc.start()
        count = sum(1 for _ in store.tokens())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, peak

    store.create()
    fill(path, 2999)
    peak()
    short, little = peak()
    fill(path, 12_000)
    long, much = peak()
    assert (short, long) == (3000, 15_000)
    assert much < 1.5 * little


# --- Threads


@needs_proc
def test_connections_are_as_many_as_are_needed_at_once(path):
    make_database(path)
    with SQLiteTokenStore(path) as store, ThreadPoolExecutor(80) as pool:
        store.get("no-such-key")  # the tables are looked at once
        with another_process(path, "BEGIN IMMEDIATE"):
            answers = [pool.submit(store.create, name=str(number)) for number in range(80)]
            # All at once: each waits for the lock, with a connection of its own.
            deadline = time.monotonic() + 30
            while list(open_files(path).values()).count(str(path)) < 80:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert {answer.result()[1].name for answer in answers} == {str(number) for number in range(80)}
        assert 1 <= count_connections(path) <= 64
        at_most = len(open_files(path))
        for _ in range(5):
            list(pool.map(store.get, ["no-such-key"] * 640))
        assert len(open_files(path)) <= at_most
        assert count_connections(path) <= 64
    assert open_files(path) == {}


@needs_proc
def test_a_thread_for_each_request_leaks_nothing(path, store):
    key, token = create(store)
    answers = []
    before = open_files(path)
    for _ in range(500):
        thread = threading.Thread(target=lambda: answers.append(store.get(key)))
        thread.start()
        thread.join()
    assert answers == [token] * 500
    assert open_files(path) == before


@needs_proc
def test_a_store_that_nobody_has_any_more_gives_its_files_back(path):
    store = SQLiteTokenStore(path)
    use_two_connections(store, create(store)[0])
    assert count_connections(path) == 2
    del store
    gc.collect()
    assert open_files(path) == {}
    assert list(path.parent.iterdir()) == [path]


# --- Processes


def leave_it_open(path):
    global left_open
    left_open = SQLiteTokenStore(path)
    use_two_connections(left_open, create(left_open)[0])
    print(os.path.getsize(f"{path}-wal") > 0)


def test_the_end_of_the_interpreter_closes_the_store(path):
    assert in_a_process(leave_it_open, path) == "True\n"
    assert list(path.parent.iterdir()) == [path]


def start_workers(count, target, *arguments):
    """Forks workers that run ``target(number, barrier, *arguments)``, and waits for their end."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    workers = [context.Process(target=target, args=(number, barrier, *arguments)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * count


def create_in_each(number, barrier, count, *paths):
    try:
        for path in paths:
            store = SQLiteTokenStore(path)
            barrier.wait()
            for n in range(count):
                key, token = create(store, name=f"{number}-{n}")
                assert store.get(key) == token
    except threading.BrokenBarrierError:
        sys.exit("another worker failed")
    except BaseException:
        barrier.abort()
        raise


def start_at_once(workers, count, *paths):
    # What is imported when it is first needed would keep the workers from meeting at the database.
    make_database(f"{paths[0]}.other")
    start_workers(int(workers), create_in_each, int(count), *paths)


def test_workers_that_start_at_once_agree_on_one_database(tmp_path):
    paths = [tmp_path / f"{number}.db" for number in range(10)]
    in_a_process(start_at_once, 16, 1, *paths)
    for path in paths:
        with SQLiteTokenStore(path) as store:
            assert sorted(token.name for token in store.tokens()) == sorted(f"{number}-0" for number in range(16))
        ((applied, distinct),) = sql(path, "SELECT count(*), count(DISTINCT name) FROM _sqlite_migrations")
        assert applied == distinct > 0


def test_workers_that_write_at_once_lose_nothing(path):
    make_database(path)
    in_a_process(start_at_once, 8, 50, path)
    with SQLiteTokenStore(path) as store:
        _, *created = store.tokens()
    assert sorted(token.name for token in created) == sorted(f"{number}-{n}" for number in range(8) for n in range(50))
    assert len({token.id for token in created}) == 400
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def answer_keys(path):
    with SQLiteTokenStore(path) as store:
        for line in sys.stdin:
            token = store.get(line.strip())
            print(token and (token.name, token.enabled), flush=True)


def test_what_one_process_changes_another_sees_at_once(path, store):
    with subprocess.Popen(
        process_of(answer_keys, path),
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:

        def seen(key):
            print(key, file=process.stdin)
            return process.stdout.readline().strip()

        assert seen("no-such-key") == "None"
        for _ in range(20):
            key, token = create(store, name="created")
            assert seen(key) == "('created', True)"
            store.update(token.id, name="disabled", enabled=False)
            assert seen(key) == "('disabled', False)"
            new = strip_prefix(store.rotate(token.id))
            assert (seen(key), seen(new)) == ("None", "('disabled', False)")
            store.delete(token.id)
            assert seen(new) == "None"
        # What it wrote itself counts for it as well as what others did.
        process.stdin.close()
        assert process.wait(timeout=30) == 0


# --- Fork


def fork(in_child, *arguments, by=os.fork):
    """Forks a child, which runs a function and then ends as any interpreter does; waits for its good end."""
    child = by()
    if child == 0:
        in_child(*arguments)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0


def child_ignores(stores, key):
    pass


def child_uses(stores, key):
    assert stores[0].get(key).name == "parent"
    create(stores[0], name="child")
    use_two_connections(stores[0], key)


def child_closes(stores, key):
    stores[0].close()


def child_uses_and_closes(stores, key):
    child_uses(stores, key)
    child_closes(stores, key)


def child_forgets(stores, key):
    stores.clear()
    gc.collect()


def child_has_a_child(stores, key):
    child_uses(stores, key)
    fork(child_uses_and_closes, stores, key)
    assert stores[0].get(key).name == "parent"


def fork_after_use(path, in_child):
    stores = [SQLiteTokenStore(path)]
    key, token = create(stores[0], name="parent")
    use_two_connections(stores[0], key)

    def child():
        # Nothing is inherited: SQLite would take the parent's locks for the child's.
        assert open_files(path) == {}
        globals()[in_child](stores, key)

    fork(child)
    (store,) = stores
    assert store.get(key) == token
    create(store, name="parent, afterwards")
    print(*(token.name for token in store.tokens()), sep="; ")
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_in_c_after_use(path):
    """Forks as C code does, behind Python's back."""
    opened = watch_connections()
    store = SQLiteTokenStore(path)
    key, token = create(store, name="parent")
    use_two_connections(store, key)
    inherited = open_files(path)
    statements = []
    # Nothing here may keep them alive.
    while opened:
        opened.pop().set_trace_callback(statements.append)

    def child():
        for use in (store.create, lambda: store.get(key)):
            with pytest.raises(StoreError, match="was open when this process was forked"):
                use()
        store.close()
        # None of what was inherited was used, and none closed.
        assert statements == []
        assert inherited.items() <= open_files(path).items()

    before = os.stat(path).st_mtime_ns, os.path.getsize(path)
    fork(child, by=ctypes.CDLL(None).fork)
    # The log is where it was, and was not written back behind the parent's back.
    assert all(os.path.exists(f"{path}{suffix}") for suffix in SUFFIXES)
    assert (os.stat(path).st_mtime_ns, os.path.getsize(path)) == before

    assert store.get(key) == token
    assert len(statements) == 1
    create(store, name="parent, afterwards")
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


@needs_proc
def test_a_fork_behind_python_s_back_leaves_a_child_without_the_database(path):
    in_a_process(fork_in_c_after_use, path)
    with SQLiteTokenStore(path) as store:
        assert [token.name for token in store.tokens()] == ["parent", "parent, afterwards"]


@needs_proc
@pytest.mark.parametrize(
    ("in_child", "created"),
    [
        (child_ignores, 0),
        (child_uses, 1),
        (child_closes, 0),
        (child_uses_and_closes, 1),
        (child_forgets, 0),
        (child_has_a_child, 2),
    ],
)
def test_a_store_that_was_used_may_be_forked(path, in_child, created):
    names = in_a_process(fork_after_use, path, in_child.__name__)
    assert names == "; ".join(["parent", *["child"] * created, "parent, afterwards"]) + "\n"
    assert list(path.parent.iterdir()) == [path]


def become_a_daemon(path, count):
    """Uses the store, forks, and goes on in the child, while the parent leaves."""
    store = SQLiteTokenStore(path)
    store.create(name="parent")
    reader, writer = os.pipe()
    if os.fork():
        sys.exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b""  # the parent is gone
    for number in range(int(count)):
        store.create(name=f"daemon {number}")
    store.close()
    print("done", flush=True)


@needs_proc
def test_what_a_child_writes_after_its_parent_has_left_is_not_lost(path):
    # A child that took the parent's locks for its own would hold none, and others would take its log away.
    count = 300
    daemon = subprocess.Popen(
        process_of(become_a_daemon, path, count), cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert daemon.wait(30) == 0
    others = 0
    # Each use opens the file and, as far as it can tell, closes it as the last one.
    while True:
        with SQLiteTokenStore(path) as store:
            store.create(name="other")
            others += 1
            names = {token.name for token in store.tokens()}
        if f"daemon {count - 1}" in names:
            break
        assert others < 10_000
    assert daemon.stdout.read() == "done\n"
    daemon.stdout.close()
    with SQLiteTokenStore(path) as store:
        assert len(list(store.tokens())) == 1 + count + others
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_in_the_middle(path, method, key):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    make_database(f"{path}.other")  # what is imported when it is first needed is there then
    store = SQLiteTokenStore(path)
    asleep = threading.Event()

    def sleep(seconds):
        asleep.set()
        time.sleep(0.5)

    # The fork is to come while the thread sleeps until it asks for the lock again: in the middle of SQLite's code it
    # could find a mutex of the whole library locked, which no store can help.
    connections.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    thread = threading.Thread(target=getattr(store, method), args=[key] if method == "get" else [])
    thread.start()
    assert asleep.wait(30)
    child = os.fork()
    if child == 0:
        if method == "get":  # between its attempts to open the database, the thread has nothing open
            assert store.get(key) is not None
            store.create()
        else:
            with pytest.raises(StoreError, match="was open when this process was forked"):
                store.create()
        store.close()
        return
    print("forked", flush=True)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert store.get(key) is not None


@needs_proc
@pytest.mark.parametrize(
    ("method", "lock", "created"),
    [
        pytest.param("get", ("PRAGMA locking_mode = EXCLUSIVE", "UPDATE tokens SET name = ''"), 1, id="opens"),
        pytest.param("create", ("BEGIN IMMEDIATE",), 1, id="writes"),
    ],
)
def test_a_fork_while_a_thread(path, method, lock, created):
    with SQLiteTokenStore(path) as store:
        key, _ = create(store)
    with another_process(path, *lock):
        process = subprocess.Popen(
            process_of(fork_in_the_middle, path, method, key),
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "forked\n", process.communicate()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, ""), errors
    with SQLiteTokenStore(path) as store:
        assert len(list(store.tokens())) == 1 + created
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
