"""``check``: its findings, and its exit status."""

import json
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from usage_middleware import SQLiteTokenStore, open_store
from usage_middleware.cli import main
from usage_middleware.stores.sqlite.sqlite_health import has_wal_reset_bug


@pytest.fixture
def path():
    """Yield a database in a directory that every user can enter. Only their owner can enter those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield database_in(Path(folder))


def database_in(folder):
    path = folder / "tokens.db"
    with SQLiteTokenStore(path) as store:
        store.create(name="active", total_available=5)
        store.create(name="exhausted")
        store.create(name="expired", expires_at=1, total_available=5)
    path.chmod(0o600)
    return path


@pytest.fixture
def check(capsys):
    def run(database):
        with pytest.raises(SystemExit) as ended:
            main(["check", "--db", str(database)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def sql(path, statement):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def test_a_sound_database_exits_with_0(check, path):
    status, out, err = check(path)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ok      opens, and its tables are those of this version"
    assert "ok      permissions are 600" in lines
    assert "ok      journal mode is WAL" in lines
    assert "ok      the file is sound (PRAGMA quick_check)" in lines
    assert "ok      tokens: 1 active, 1 exhausted, 1 expired" in lines
    assert "ok      open reservations: 0, none of which has lapsed" in lines
    assert sum("SQLite 3." in line for line in lines) == 1


def test_json_lists_findings_with_their_level(path, capsys):
    for break_, level in ((lambda: None, "ok"), (lambda: path.chmod(0o666), "problem")):
        break_()
        with pytest.raises(SystemExit) as ended:
            main(["check", "--json", "--db", str(path)])
        findings = json.loads(capsys.readouterr().out)
        assert ended.value.code == (level == "problem")
        assert all(set(finding) == {"level", "text"} for finding in findings)
        assert {"level": "ok", "text": "tokens: 1 active, 1 exhausted, 1 expired"} in findings
        assert level in {finding["level"] for finding in findings}


def test_check_changes_nothing(check, path):
    before = sql(path, "SELECT * FROM tokens")
    check(path)
    assert sql(path, "SELECT * FROM tokens") == before


def empty_index(path):
    """Empty an index behind SQLite's back. Its table still has a row."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE other (a UNIQUE)")
        connection.execute("INSERT INTO other VALUES (1)")
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'other' AND type = 'index'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek((root - 1) * size + 3)
        file.write(b"\0\0")  # the number of cells in the page (sqlite.org/fileformat.html, section 1.6)


@pytest.mark.parametrize(
    ("break_", "status", "line"),
    [
        pytest.param(lambda path: path.chmod(0o666), 1, "PROBLEM permissions are 666", id="everybody writes"),
        pytest.param(lambda path: path.chmod(0o660), 0, "ok      permissions are 660", id="a group writes"),
        pytest.param(lambda path: path.chmod(0o644), 0, "warning permissions are 644", id="everybody reads"),
        pytest.param(
            lambda path: sql(path, "PRAGMA journal_mode = DELETE"), 1, "PROBLEM journal mode is 'delete'", id="no WAL"
        ),
        pytest.param(empty_index, 1, "PROBLEM the file is damaged: ", id="damaged"),
    ],
)
def test_each_fault_has_its_line_and_exit_status(check, path, break_, status, line):
    break_(path)
    found, out, _ = check(path)
    assert line in out
    assert found == status


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize(("mode", "status", "line"), [(0o644, 0, "warning"), (0o666, 1, "PROBLEM")])
def test_the_permissions_of_wal_and_shm_are_checked_too(check, path, suffix, mode, status, line):
    with SQLiteTokenStore(path) as store:
        store.create()
        Path(f"{path}{suffix}").chmod(mode)
        found, out, _ = check(path)
    assert f"{line} permissions of {path}{suffix} are {mode:o}: " in out
    assert found == status


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_directory_closed_to_others_protects_the_file(check, path, closed):
    """It may be any directory on the path."""
    folders = [path.parent / "a", path.parent / "a" / "b", path.parent / "a" / "b" / "c"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        folder.chmod(0o700 if number == closed else 0o755)
    inner = database_in(folders[-1])
    inner.chmod(0o644)
    status, out, _ = check(inner)
    assert status == 0
    assert "ok      permissions are 644, in a folder that other users cannot enter\n" in out
    folders[closed].chmod(0o755)
    assert "warning permissions are 644: " in check(inner)[1]


def test_a_folder_in_which_others_may_replace_the_file_is_a_problem(check, path):
    path.parent.chmod(0o777)
    status, out, _ = check(path)
    assert status == 1
    assert f"PROBLEM permissions of {path.parent} let every user of this machine replace the database" in out
    path.parent.chmod(0o1777)  # like /tmp: only the owner of a file may remove it
    assert check(path)[0] == 0


def test_a_reservation_that_has_lapsed_is_a_warning(check, path):
    with SQLiteTokenStore(path) as store:
        key = store.create(total_available=100)[0].removeprefix("sk-")
        store.reserve(key, 10)
        store.reserve(key, 30, expires_in=1e-6)
    status, out, _ = check(path)
    assert status == 0
    assert "warning open reservations: 2, of which 1 have lapsed and hold 30 quota units" in out


@pytest.mark.parametrize("text", ["no database at all" * 100, None], ids=["another file", "no file"])
def test_what_cannot_be_opened_exits_with_2(check, tmp_path, text):
    path = tmp_path / "other.db"
    if text is not None:
        path.write_text(text)
    status, out, err = check(path)
    assert (status, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert os.path.exists(path) == (text is not None)


@pytest.mark.parametrize(
    ("version", "bug"),
    [
        ((3, 37, 0), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_versions_of_sqlite_with_the_wal_reset_bug_are_known(version, bug):
    assert has_wal_reset_bug(version) == bug


def test_a_server(check, database_url):
    with open_store(database_url) as store:
        store.create()
    status, out, err = check(database_url)
    assert (status, err) == (0, "")
    assert "ok      the server is " in out
    assert "PROBLEM" not in out
    assert "warning" not in out
    assert "ok      tokens: 1 exhausted" in out
