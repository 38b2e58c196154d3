"""What :class:`SQLiteTokenStore` does beyond the contract: its arguments, its file and its lists.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

import dataclasses
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from client import wrapped
from first_version import make_first_version
from holders import create
from processes import in_a_process
from sqlite_files import content, needs_proc, sql, use_two_connections, watch_connections

from usage_middleware import SQLiteTokenStore, Token, UsageMiddleware
from usage_middleware.keys import key_digest, strip_prefix
from usage_middleware.stores.rows import token_of
from usage_middleware.stores.sqlite import statements
from usage_middleware.testing import QuotaStoreContract


class TestSQLiteTokenStore(QuotaStoreContract):
    def make_store(self, tmp_path):
        return SQLiteTokenStore(tmp_path / "tokens.db")


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
def test_a_path_for_memory_is_refused_with_advice(path):
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
    brought, _ = create(store, key="a-key-that-an-operator-chose")
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
        assert store.get(key) == store.get_by_id(token.id) == token
        assert list(store.tokens()) == [token]
        # Not the log either.
        assert os.path.getsize(f"{path}-wal") == 0
    assert (content(path), path.stat().st_mtime_ns) == before


def test_a_database_of_the_first_version_is_understood(path):
    make_first_version(path)
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
            held=4,
        )
        assert store.charge("the-first-key", 6, model="gpt-4o", idempotency_key="mine") == token
        assert store.settle("open", 3).total_available == 91
        token = store.get("the-first-key")
        new = strip_prefix(store.rotate(7))
        assert store.get(new) == dataclasses.replace(token, hint=new[-4:])


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


def test_a_record_is_of_one_moment(path, monkeypatch):
    with SQLiteTokenStore(path) as store, SQLiteTokenStore(path) as other:
        key, _ = create(store, total_available=100)
        charges = iter([7])

        def charge_meanwhile(row):
            for units in charges:
                other.charge(key, units, model="m")
            return token_of(row)

        monkeypatch.setattr(statements, "token_of", charge_meanwhile)
        (record,) = store.records()
        assert (record.token.total_used, record.model_usage, record.days) == (0, {}, ())
        (record,) = store.records()
        assert record.token.total_used == sum(day.used for day in record.days) == record.model_usage["m"] == 7
