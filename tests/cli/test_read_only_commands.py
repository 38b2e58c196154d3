"""Commands that only read need no permission to write, create nothing, and leave a file as it is."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from command import run, run_json
from first_version import KEY, make_first_version
from forks import forked
from sqlalchemy import NullPool, create_engine, text
from sqlite_files import another_process

from usage_middleware import SQLAlchemyTokenStore, SQLiteTokenStore
from usage_middleware.keys import key_digest
from usage_middleware.stores.sql.sql_migrations import SCHEMA

READING = [
    ["list"],
    ["list", "--json"],
    ["show", "1"],
    ["history", "1"],
    ["usage", "1"],
    ["check"],
    ["export"],
    ["export", "--format", "csv"],
    ["prune", "--before", "1d", "--dry-run"],
]
WRITING = [
    ["update", "1", "--name", "x"],
    ["rotate", "1"],
    ["delete", "1", "--yes"],
    ["grant", "1", "5"],
    ["charge", "1", "5"],
    ["refund", "x"],
    ["settle", "x", "5"],
    ["prune", "--before", "1d", "--yes"],
]
IDS = " ".join


def state_of(folder):
    """Return the names, bytes and times of the files in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Yield an empty folder. Temporary files of a command go elsewhere, and are gone at the end."""
    temporary, folder = tmp_path / "temporary", tmp_path / "folder"
    temporary.mkdir()
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield folder
    assert list(temporary.iterdir()) == []


# --- A file that is not ours


def foreign(path, mode="delete", table="other"):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute(f"CREATE TABLE {table} (a)")
        connection.execute(f"INSERT INTO {table} VALUES ('precious')")


@pytest.mark.parametrize("words", [*READING, *WRITING], ids=IDS)
def test_a_foreign_database_stays_as_it_is(folder, words):
    for mode in ("delete", "wal"):
        path = folder / f"{mode}.db"
        foreign(path, mode)
        before = state_of(folder)
        assert run(*words, "--db", path, status=2) == (
            "",
            "Error: this database has no tokens; 'usage-middleware create' makes the first\n",
        )
        assert state_of(folder) == before


@pytest.mark.parametrize("words", [*READING, *WRITING, ["create"], ["serve"]], ids=IDS)
def test_a_foreign_table_of_our_name_is_refused(folder, words):
    path = folder / "foreign.db"
    foreign(path, table="tokens")
    before = state_of(folder)
    out, err = run(*words, "--db", path, status=2)
    assert out == ""
    assert "has a table 'tokens' that usage-middleware did not make" in err
    assert state_of(folder) == before


@pytest.mark.parametrize("words", [*READING, *WRITING, ["create"], ["serve"]], ids=IDS)
def test_a_file_that_is_not_a_database_stays_as_it_is(folder, words):
    path = folder / "letter.txt"
    path.write_text("This is not a database, and is long enough to be read as the beginning of one. " * 20)
    before = state_of(folder)
    assert run(*words, "--db", path, status=2) == ("", f"Error: {path} is not an SQLite database\n")
    assert state_of(folder) == before


@pytest.mark.parametrize("words", READING + WRITING, ids=IDS)
def test_an_empty_file_stays_empty(folder, words):
    path = folder / "empty.db"
    path.touch()
    assert "this database has no tokens" in run(*words, "--db", path, status=2)[1]
    assert state_of(folder)["empty.db"][0] == b""
    assert len(state_of(folder)) == 1


def test_import_leaves_its_source_as_it_is(folder, db):
    for name in ("delete", "wal"):
        foreign(folder / f"{name}.db", name)
    SQLiteTokenStore(folder / "ours.db").create()
    before = state_of(folder)
    for option in ([], ["--dry-run"]):
        assert "this database has no tokens" in run("import", *option, folder / "wal.db", status=2)[1]
        assert "this database has no tokens" in run("import", *option, folder / "delete.db", status=2)[1]
        assert not db.exists()
    assert "1 would be imported" in run("import", "--dry-run", folder / "ours.db")[1]
    assert "1 imported" in run("import", folder / "ours.db")[1]
    assert state_of(folder) == before


def test_a_dry_run_leaves_its_target_as_it_is(folder, db):
    with SQLiteTokenStore(db) as store:
        store.create()
    foreign(folder / "foreign.db", "wal")
    before = state_of(folder)
    assert "1 would be imported" in run("import", "--dry-run", "--db", folder / "foreign.db", db)[1]
    assert state_of(folder) == before


# --- A file of ours


@pytest.fixture
def ours(folder):
    path = folder / "tokens.db"
    with SQLiteTokenStore(path) as store:
        key, _ = store.create(total_available=100, name="Alice")
        store.charge(key, 5)
    return path


@pytest.mark.parametrize("words", READING, ids=IDS)
def test_reading_leaves_a_database_as_it_is(ours, folder, words):
    before = state_of(folder)
    run(*words, "--db", ours)
    assert state_of(folder) == before


@pytest.mark.parametrize("words", [words for words in READING if words != ["check"]], ids=IDS)
def test_reading_needs_no_write_permission(ours, words):
    """``check`` is left out: it reports a problem, as a service could not charge then."""

    def read():
        if os.geteuid() == 0:
            os.setuid(65534)
        _, err = run(*words, "--db", ours)
        return f"{os.access(ours, os.W_OK)} {os.access(ours.parent, os.W_OK)} {'Error' not in err}"

    # Every directory on the path must be open to the other user.
    modes = {folder: folder.stat().st_mode for folder in ours.parents if not folder.stat().st_mode & 0o001}
    modes |= {path: path.stat().st_mode for path in (ours, ours.parent)}
    try:
        for path in modes:
            path.chmod(0o444 if path == ours else 0o555)
        assert forked(read) == "False False True"
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize("words", READING, ids=IDS)
def test_a_database_in_use_is_read(ours, folder, words):
    with another_process(ours, "BEGIN IMMEDIATE", "UPDATE tokens SET name = 'not yet'"):
        out, _ = run(*words, "--db", ours)
        assert "not yet" not in out


# --- Tables of an earlier version


@pytest.fixture
def earlier(folder):
    path = folder / "tokens.db"
    make_first_version(path)
    return path


@pytest.mark.parametrize("words", READING, ids=IDS)
def test_an_earlier_version_is_read_and_stays_as_it_is(earlier, folder, words):
    before = state_of(folder)
    out, err = run(*[word.replace("1", "7") if word == "1" else word for word in words], "--db", earlier)
    assert "Error" not in err
    if words[0] in ("list", "show", "export"):
        assert "First" in out
    if words[0] == "check":
        assert "warning its tables are those of an earlier version" in out
        assert "permissions are" in out
        assert "PROBLEM" not in out
    assert state_of(folder) == before


def test_an_import_from_an_earlier_version_takes_all_of_it(earlier, folder, db):
    before = state_of(folder)
    for option, verb in ((["--dry-run"], "would be imported"), ([], "imported")):
        assert run("import", *option, earlier)[1] == f"1 {verb}, 0 already there, 0 bad.\n"
        assert state_of(folder) == before
    (token,) = run_json("list")
    assert (token["name"], token["total_used"], token["total_available"], token["held"]) == ("First", 10, 90, 0)
    assert sum(day["used"] for day in run_json("usage", token["id"], "--days", 3660)["days"]) == 10
    with SQLiteTokenStore(db) as store:
        assert store.get(KEY).name == "First"


def test_a_dry_run_into_an_earlier_version_leaves_it(earlier, folder, db):
    with SQLiteTokenStore(db) as store:
        store.create()
        store.create(key=KEY)
    before = state_of(folder)
    assert "1 would be imported, 1 already there" in run("import", "--dry-run", "--db", earlier, db)[1]
    assert state_of(folder) == before


def test_the_first_command_that_writes_upgrades_the_tables(earlier):
    assert run_json("update", 7, "--name", "New", "--db", earlier)["name"] == "New"
    assert "opens, and its tables are those of this version" in run("check", "--db", earlier)[0]


def test_a_newer_version_is_refused_by_all(ours, folder):
    with closing(sqlite3.connect(ours, isolation_level=None)) as connection:
        connection.execute("UPDATE usage_schema SET version = 99")
    before = state_of(folder)
    for words in [*READING, *WRITING, ["create"]]:
        assert "was made by a newer usage-middleware" in run(*words, "--db", ours, status=2)[1]
    assert state_of(folder) == before


# --- Servers


@pytest.mark.servers
@pytest.mark.parametrize("words", [*READING, *WRITING], ids=IDS)
def test_no_tables_are_made_in_a_server(database_url, words):
    assert "this database has no tokens" in run(*words, "--db", database_url, status=2)[1]
    with SQLAlchemyTokenStore(database_url, read_only=True) as store:
        assert store.tables_state() == "none"
        assert not store.has_tables()


@pytest.mark.servers
def test_reading_commands_work_on_a_server(database_url, db):
    with SQLAlchemyTokenStore(database_url) as store:
        store.create(name="Alice", total_available=5)
    for words in READING:
        out, _ = run(*words, "--db", database_url)
        assert words[0] not in ("list", "show", "export") or "Alice" in out
    assert "1 would be imported" in run("import", "--dry-run", database_url)[1]
    assert not db.exists()


@pytest.fixture
def earlier_server(database_url):
    """A database with the tables of the first version, and one token in them."""
    token = {
        "id": 7,
        "digest": key_digest(KEY),
        "hint": "-key",
        "name": "First",
        "total_available": 90,
        "total_used": 10,
        "unlimited_quota": False,
        "model_limits": "{}",
        "model_limits_enabled": False,
        "expires_at": 0,
        "enabled": True,
        "created_at": 1_700_000_000,
    }
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        SCHEMA.steps[0](connection)
        SCHEMA.record(connection, 1)
        names = ", ".join(token)
        values = ", ".join(f":{name}" for name in token)
        connection.execute(text(f"INSERT INTO usage_tokens ({names}) VALUES ({values})"), token)
        connection.commit()
    with SQLAlchemyTokenStore(database_url, read_only=True) as store:
        assert store.tables_state() == "earlier"
        yield database_url, store.tables_state


@pytest.mark.servers
def test_a_dry_run_and_a_source_do_not_upgrade_a_server(earlier_server, db):
    url, state = earlier_server
    db.with_name("t.csv").write_text("key\nthe-key-of-a-holder\n")
    for words in (
        ["import", "--dry-run", "--db", url, "t.csv"],
        ["import", url],
        ["prune", "--before", "1d", "--dry-run", "--db", url],
    ):
        assert (
            "are those of an earlier version; any service or command that writes upgrades" in run(*words, status=2)[1]
        )
        assert state() == "earlier"
    assert not db.exists()


@pytest.mark.servers
@pytest.mark.parametrize("words", [["list"], ["show", "7"], ["check"], ["export"], ["update", "7", "--name", "First"]])
def test_tables_of_an_earlier_version_on_a_server_are_upgraded(earlier_server, words):
    """Any other process of this version does the same."""
    url, state = earlier_server
    out, _ = run(*words, "--db", url)
    assert "tokens: 1 active" in out if words == ["check"] else "First" in out
    assert state() == "current"
