"""An SQLite database that cannot be used, or fails in the middle of its use."""

import dataclasses
import os
import resource
import time
from contextlib import contextmanager
from datetime import date

import pytest
from client import ask, wrapped
from holders import create, status
from sqlite_files import SUFFIXES, another_process, make_database, permissions, sql, untouched, use_two_connections

from usage_middleware import Changes, SQLiteTokenStore, StoreError, UsageMiddleware
from usage_middleware.keys import strip_prefix

# --- A database that fails


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
    sql(path, "UPDATE usage_schema SET version = version + 1000")
    with untouched(path):
        yield
    sql(path, "UPDATE usage_schema SET version = version - 1000")


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
        pytest.param(a_newer_schema, "was made by a newer usage-middleware", id="newer schema"),
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
        assert ask(UsageMiddleware(wrapped, store), path="/elsewhere").status == 404
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


def put_in_place(restored, path):
    for suffix in SUFFIXES[1:]:
        os.unlink(f"{path}{suffix}")
    os.replace(restored, path)


def test_a_database_that_is_put_in_its_place_is_used_from_then_on(path, store):
    restored = path.with_name("backup.db")
    with SQLiteTokenStore(restored) as backup:
        key, token = create(backup, name="from the backup")
    create(store, name="lost")
    put_in_place(restored, path)
    # A reader may take a second to notice, a writer never does.
    create(store, name="new")
    assert store.get(key) == token
    assert [token.name for token in store.tokens()] == ["from the backup", "new"]
    assert sql(path, "SELECT name FROM tokens ORDER BY id") == [("from the backup",), ("new",)]


def test_a_connection_that_comes_back_too_late_is_not_used_again(path, store):
    restored = path.with_name("backup.db")
    with SQLiteTokenStore(restored) as backup:
        key, _ = create(backup)
    create(store)
    pool = store._connections._pools.get()

    class Idle(list):
        def append(self, connection):
            # Another thread may do this when it was found that the connection can be kept.
            if restored.exists():
                put_in_place(restored, path)
                store.charge(key, 1)
            super().append(connection)

    pool.idle = Idle(pool.idle)
    store.get(key)
    assert store.charge(key, 10).total_used == 11
    assert sql(path, "SELECT total_used FROM tokens") == [(11,)]


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
        lambda: store.get_by_id(token.id),
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


def test_a_day_that_another_program_has_damaged_is_named(path, store):
    key, token = create(store)
    store.charge(key, 1)
    sql(path, "UPDATE usage_by_day SET day = '2023-99-99'")
    for read in (
        lambda: store.usage_by_day(token.id, date(2023, 1, 1), date(2024, 1, 1)),
        lambda: list(store.records()),
    ):
        with pytest.raises(StoreError, match=rf"token {token.id} is damaged.*'2023-99-99', which is not a day"):
            read()


@contextmanager
def no_space(path):
    """Yield a disk with room for what is there and no more: this process cannot make the log longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # While another process is connected, the log stays as it is and does not start again.
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
def test_an_interrupted_call_releases_the_lock(path, store, error):
    key, token = create(store)

    def work(transaction):
        transaction.save(Changes(before=token, token=dataclasses.replace(token, name="x")))
        raise error

    with pytest.raises(error):
        store._transact(work)
    assert store.get(key) == token
    sql(path, "PRAGMA busy_timeout = 0", "BEGIN IMMEDIATE", "ROLLBACK")


def test_a_reservation_of_a_token_that_another_program_has_removed_is_pruned(path, store):
    key, _ = create(store)
    store.reserve(key, 1, expires_in=1e-6)
    sql(path, "DELETE FROM tokens")
    assert store.prune(time.time() + 1) == 1
