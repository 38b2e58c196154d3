"""``import`` with real files, databases and processes."""

import re
import signal
import sqlite3
import subprocess
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from command import SCRIPT
from sqlite_files import another_process
from transferring import lines, tokens

from usage_middleware import SQLiteTokenStore

# --- A file


def test_bad_rows_are_reported_by_the_line_on_which_they_begin(run, db):
    db.with_name("t.csv").write_bytes(
        b"\xef\xbb\xbfkey,name,total_available\r\n"
        b'the-key-of-holder-one,"two\nlines\n",5\r\n'
        b"\r\n"
        b"the-key-of-holder-two,x,many\r\n"
        b",,\r\n"
        b'the-key-of-holder-three,"three\nlines\n",many\r\n'
        b"the-key-of-holder-four,caf\xe9,1\r\n"
        b"the-key-of-holder-five,1\r\n"
        b"the-key-of-holder-six,1,2,3\r\n"
        b'the-key-of-holder-seven,"a"b,1\r\n'
        b"the-key-of-holder-one,again,9\r\n"
        b"sk-the-key-of-holder-eight,last,8"
    )
    assert run("import", "t.csv", status=1)[1] == (
        "line 6: total_available must be a whole number, written in digits only\n"
        "line 8: total_available must be a whole number, written in digits only\n"
        "line 11: name is not UTF-8 text\n"
        "line 12: has 2 fields where the header has 3\n"
        "line 13: has 4 fields where the header has 3\n"
        "line 14: is not CSV: ',' expected after '\"'\n"
        "2 imported, 1 already there, 6 bad.\n"
    )
    assert [(token.name, token.total_available) for token in tokens(db)] == [("two\nlines\n", 5), ("last", 8)]


def test_bad_json_lines_are_reported_by_their_line(run, db):
    db.with_name("t.ndjson").write_bytes(
        b'\xef\xbb\xbf{"key": "the-key-of-holder-one", "total_used": 1}\r\n\n'
        b'{"key": "the-key-of-holder-two", "name": "caf\xe9"}\n{"key": "sk-the-key-of-holder-one"}\n'
        b'{"key": "the-key-of-holder-three", "name": "\xe2\x80\xa8"}'
    )
    assert run("import", "t.ndjson", status=1) == (
        b"",
        "line 3: name is not UTF-8 text\n2 imported, 1 already there, 1 bad.\n",
    )
    assert [(token.name, token.total_used) for token in tokens(db)] == [("", 1), ("\u2028", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param("t.csv", b"the-key-of-holder-two," + b"x" * 100_000_000 + b"\n", id="CSV field"),
        pytest.param("t.csv", b"the-key-of-holder-two" + b"," * 100_000_000 + b"\n", id="CSV fields"),
        pytest.param("t.csv", b'the-key-of-holder-two,"' + b'""' * 50_000_000 + b'"\n', id="CSV quotes"),
        pytest.param(
            "t.jsonl", b'{"key": "the-key-of-holder-two", "name": "' + b"x" * 100_000_000 + b'"}\n', id="JSON"
        ),
    ],
)
def test_a_huge_line_is_bad_and_is_never_held_in_memory(run, db, name, row):
    first, last = (
        (b"key,name\n", b"the-key-of-holder-three,c\n")
        if name == "t.csv"
        else (b'{"key": "the-key-of-holder-one"}\n', b'{"key": "the-key-of-holder-three"}\n')
    )
    db.with_name(name).write_bytes(first + row + last)
    tracemalloc.start()
    try:
        _, err = run("import", name, status=1)
        assert tracemalloc.get_traced_memory()[1] < 90_000_000
    finally:
        tracemalloc.stop()
    assert err.startswith("line 2: ")
    assert err.endswith(f"{1 if name == 't.csv' else 2} imported, 0 already there, 1 bad.\n")


REFUSED = [
    ("t.csv", "", "its first line must name the columns"),
    ("t.csv", "sk-canary,Alice,5\n", "its first line must name the columns"),
    ("t.csv", "key;name;total_available\n", "separated by ';'"),
    ("t.csv", "key\tname\n", r"separated by '\t'"),
    ("t.csv", "key,total_avilable\n", "unknown column 'total_avilable'; the known ones are key, digest, name,"),
    ("t.csv", "key,Name\n", "unknown column 'Name'"),
    ("t.csv", "key,name,key\n", "the column 'key' twice"),
    ("t.csv", '"key\n', "the first line is not CSV"),
    ("t.csv", "\udcff\udcfek\0e\0y\0\n\0", "first line"),
    ("t.jsonl", '[{"key": "canary"}]', "it is a JSON array"),
    (
        "t.txt",
        "key\ncanary\n",
        "its format is not known; name an SQLite database or a file that ends with .csv, .jsonl",
    ),
    ("folder", None, "Is a directory"),
    ("missing.csv", None, "No such file or directory"),
    ("-", None, "--format"),
    ("postgresql://user:canary@127.0.0.1:1/db", None, "failed: "),
    ("sqlite:///:memory:", None, "must name a file"),
    ("sqlite:///missing.db", None, "there is no file "),
    ("foreign.db", None, "tokens"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_before_a_database_is_created(run, db, name, text, message):
    db.with_name("folder").mkdir()
    with closing(sqlite3.connect(db.with_name("foreign.db"))) as connection:
        connection.execute("CREATE TABLE tokens (a)")
    if text is not None:
        db.with_name(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    out, err = run("import", name, status=2)
    assert out == b""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not db.exists()


@pytest.mark.parametrize(("name", "text"), [("t.csv", "key,name\n"), ("t.jsonl", ""), ("t.jsonl", "\n\n")])
def test_a_file_without_tokens_imports_none(run, db, name, text):
    db.with_name(name).write_text(text)
    assert run("import", name) == (b"", "0 imported, 0 already there, 0 bad.\n")


def test_format_overrides_the_file_extension(run, db):
    db.with_name("t.csv").write_text('{"key": "the-key-of-holder-one"}\n')
    assert "1 imported" in run("import", "--format", "jsonl", "t.csv")[1]


def test_import_reads_standard_input(db):
    done = subprocess.run(
        [SCRIPT, "import", "--format", "csv", "-"],
        input=b"key,name\nthe-key-of-holder-one,caf\xc3\xa9\n",
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"", b"1 imported, 0 already there, 0 bad.\n")
    assert [token.name for token in tokens(db)] == ["caf\u00e9"]


def test_a_deleted_or_rotated_key_is_not_imported_again(run, db):
    with SQLiteTokenStore(db) as store:
        store.create(key="deleted-key-of-a-holder")
        store.create(key="rotated-key-of-a-holder")
        store.delete(1)
        store.rotate(2)
    db.with_name("t.csv").write_text("key\ndeleted-key-of-a-holder\nrotated-key-of-a-holder\nnew-key-of-a-holder\n")
    assert run("import", "--dry-run", "t.csv")[1] == "1 would be imported, 2 already there, 0 bad.\n"
    assert run("import", "t.csv")[1] == "1 imported, 2 already there, 0 bad.\n"


def test_an_existing_token_stays_as_it_is(run, db):
    db.with_name("t.csv").write_text("key,name,total_available\nthe-key-of-holder-one,First,5\n")
    run("import", "t.csv")
    before = tokens(db)
    db.with_name("t.csv").write_text("key,name,total_available\nthe-key-of-holder-one,Second,7\n")
    assert run("import", "t.csv")[1] == "0 imported, 1 already there, 0 bad.\n"
    assert tokens(db) == before


# --- --dry-run


def test_a_dry_run_reports_what_the_import_then_does_and_writes_nothing(run, db, monkeypatch, tmp_path):
    # Two batches, and a key that comes again in the second.
    monkeypatch.setattr("usage_middleware.cli.transfer.importing.BATCH", 3)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    db.with_name("t.csv").write_text(
        "key,total_used\nthe-key-of-holder-one,1\nthe-key-of-holder-two,2\nthe-key-of-holder-three,x\nthe-key-of-holder-one,1\nthe-key-of-holder-four,4\nthe-key-of-holder-four,4\n"
    )
    (tmp_path / "temporary").mkdir()
    rehearsed = run("import", "--dry-run", "t.csv", status=1)[1]
    assert rehearsed.endswith("3 would be imported, 2 already there, 1 bad.\n")
    assert not db.exists()
    assert not list((tmp_path / "temporary").iterdir())
    assert run("import", "t.csv", status=1)[1] == rehearsed.replace("would be imported", "imported")
    before = db.read_bytes(), tokens(db)
    assert "0 would be imported, 5 already there" in run("import", "--dry-run", "t.csv", status=1)[1]
    assert (db.read_bytes(), tokens(db)) == before


def test_a_dry_run_needs_no_lock(run, db):
    db.with_name("t.csv").write_text("key\nthe-key-of-holder-one\nthe-key-of-holder-two\n")
    with SQLiteTokenStore(db) as store:
        store.create(key="the-key-of-holder-one")
        with another_process(db, "BEGIN IMMEDIATE"):  # another process has the write lock
            assert "1 would be imported, 1 already there" in run("import", "--dry-run", "t.csv")[1]


# --- Stopped, and killed


def wait_for_tokens(path, process):
    """Wait until an import has committed something, and return how many tokens there are."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be stopped"
        if path.exists():
            with SQLiteTokenStore(path, read_only=True) as store:
                try:
                    if count := store.count():
                        return count
                except Exception:  # its tables are being created
                    pass
        time.sleep(0.005)
    raise AssertionError("nothing was imported")


def feed(pipe, texts):
    with suppress(BrokenPipeError), pipe:
        for text in texts:
            pipe.write(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_continues_a_stopped_import(run, db, kill):
    command = [SCRIPT, "import", "--format", "csv", "-"]

    def heed_interrupts():
        # A shell makes its background jobs ignore SIGINT. If the tests are such a job, child processes inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process,
        ThreadPoolExecutor(1) as feeder,
    ):
        try:
            # Its input has no end, so it is stopped in the middle of a batch.
            feeder.submit(feed, process.stdin, lines(10**9))
            assert wait_for_tokens(db, process) % 10_000 == 0
            process.send_signal(kill)
            err = process.stderr.read().decode()
        finally:
            process.kill()
    there = len(tokens(db))
    assert there % 10_000 == 0
    count = there + 5000
    db.with_name("t.csv").write_text("".join(lines(count)))
    if kill == signal.SIGINT:
        assert process.returncode == 2
        told, stopped = err.splitlines()
        said = re.fullmatch(r"(\d0,000|0) imported, 0 already there, 0 bad\.", told)[1].replace(",", "")
        # It may have been stopped at the COMMIT of a batch.
        unsure = re.fullmatch(r"Error: stopped(.*); run the same command again to continue", stopped)[1]
        assert unsure in ("", "; 10,000 more may have been imported")
        assert there - int(said) in ((0, 10_000) if unsure else (0,))
    assert run("import", "t.csv")[1] == f"{count - there:,} imported, {there:,} already there, 0 bad.\n"
    assert [(token.name, token.total_available) for token in tokens(db)] == [
        (f"Token {number}", number) for number in range(count)
    ]


def test_a_database_that_fails_in_the_middle_keeps_whole_batches(run, db, monkeypatch):
    monkeypatch.setattr("usage_middleware.cli.transfer.importing.BATCH", 10)
    db.with_name("t.csv").write_text("".join(lines(25)))
    with SQLiteTokenStore(db) as store:
        store.get_by_id(1)
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON tokens WHEN NEW.name = 'Token 15'"
            " BEGIN SELECT RAISE(ABORT, 'no more'); END"
        )
    told, error = run("import", "t.csv", status=2)[1].splitlines()
    assert told == "10 imported, 0 already there, 0 bad."
    assert error == f"Error: {db} failed: no more"
    assert len(tokens(db)) == 10
