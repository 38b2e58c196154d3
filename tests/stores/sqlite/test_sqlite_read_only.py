"""SQLite databases that are only read."""

import os
import subprocess
import sys

import pytest
from forks import forked
from holders import create, status
from sqlite_files import make_database, permissions, sql, untouched

from usage_middleware import SQLiteTokenStore, StoreError
from usage_middleware.stores.sqlite.shared_lock import SharedLock, is_wal

# --- Read-only


def test_a_read_only_store_reads_and_never_writes(path, store):
    key, token = create(store)
    with SQLiteTokenStore(path, read_only=True) as reader:
        assert reader.get(key) == reader.get_by_id(token.id) == token
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
        with pytest.raises(StoreError, match="has no tables of usage-middleware"):
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


def test_a_change_is_seen_though_the_time_of_the_file_is_that_of_the_last_one(path):
    """Kernels give files the time of the last tick of their clock, so programs may write several times in one."""
    with SQLiteTokenStore(path) as store:
        key, _ = create(store, name="0")
    with SQLiteTokenStore(path, read_only=True) as reader:
        for number in range(1, 11):
            sql(path, "PRAGMA synchronous = OFF", f"UPDATE tokens SET name = '{number}'")
            tick = os.stat(path).st_mtime_ns // 10**7 * 10**7 + 1
            os.utime(path, ns=(tick, tick))
            assert reader.get(key).name == str(number)


EXCLUSIVE = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("held")
"""


def take_and_leave(path):
    with SharedLock(path) as lock:
        return lock.take()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such lock")
def test_a_log_is_kept_for_the_last_of_those_who_open_it(path, store):
    def is_held():
        command = [sys.executable, "-c", EXCLUSIVE, str(path)]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"held\n"

    store.create()
    store.close()
    first, second = SharedLock(str(path)), SharedLock(str(path))
    with first:
        with second:
            assert first.take()
            assert second.take()
            assert is_wal(str(path))
        assert is_held()
        assert forked(lambda: take_and_leave(str(path))) == "True"
        assert is_held()
    assert not is_held()
