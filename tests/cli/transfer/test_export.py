"""``export``, round trips through ``import``, their progress bars, and their memory."""

import gc
import io
import os
import pty
import sqlite3
import subprocess
import tracemalloc
from contextlib import closing

import pytest
from client import ask, wrapped
from command import SCRIPT
from transferring import DIGEST, KEY, MOST, NOW, lines

from usage_middleware import MemoryTokenStore, QuotaExceeded, SQLiteTokenStore, UsageMiddleware
from usage_middleware.cli.transfer.records import read_csv, read_json_lines, write_csv, write_json_lines

# --- Round trips


def fill(store):
    """Create every kind of token, and return the keys."""
    keys = {}

    def create(name, **fields):
        key, token = store.create(name=name, **fields)
        keys[name] = key.removeprefix("sk-")
        return token.id

    store.delete(create("deleted"))
    store.rotate(create("rotated"))
    create("plain", total_available=1000)
    create("")
    create("caf\u00e9 \u4ee4\u724c \U0001f511 'quoted' \"\\, \r\n\t;=1+1\u2028", total_available=MOST)
    create("unlimited", unlimited_quota=True, total_available=5)
    create("expired", expires_at=1)
    create("far", expires_at=MOST)
    store.update(create("disabled", expires_at=-1), enabled=False)
    create("limits off", model_limits={"a": True, "b": 0}, model_limits_enabled=False)
    create("no model", model_limits_enabled=True)
    create("short", key="short")
    create("limited", total_available=1000, model_limits={"capped": 100, '\u6a21\u578b, "': MOST, "any": True})
    store.charge(keys["limited"], 60, model="capped")
    store.charge(keys["limited"], 7, model="any")
    store.charge(keys["unlimited"], 70, model="x")
    create("overdrawn", total_available=100)
    store.settle(store.reserve(keys["overdrawn"], 100), 130)
    return keys


# Stores of other databases could be added here.
STORES = [
    pytest.param(lambda path: MemoryTokenStore(), id="memory"),
    pytest.param(lambda path: SQLiteTokenStore(path / "other.db"), id="SQLite"),
]


def through_csv(records):
    return "".join(write_csv(records)), read_csv


def through_json_lines(records):
    return "".join(write_json_lines(records)), read_json_lines


@pytest.mark.parametrize("write", [through_csv, through_json_lines])
@pytest.mark.parametrize("make_source", STORES)
@pytest.mark.parametrize("make_target", STORES)
def test_a_round_trip_loses_nothing(tmp_path, make_source, make_target, write):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    with make_source(tmp_path / "source") as source, make_target(tmp_path / "target") as target:
        keys = fill(source)
        text, read = write(source.records())
        records = [record for _, record, _ in read(io.StringIO(text, newline=""), NOW)]
        target.create()  # so that its ids differ
        target.restore(records)
        target.delete(1)
        assert [strip_id(record) for record in target.records()] == [strip_id(record) for record in source.records()]
        for key in keys.values():
            answers = [
                ask(UsageMiddleware(wrapped, store), authorization=f"Bearer {key}") for store in (source, target)
            ]
            assert answers[0] == answers[1]
        with pytest.raises(QuotaExceeded):
            target.charge(keys["limited"], 41, model="capped")
        target.charge(keys["limited"], 40, model="capped")
        with pytest.raises(QuotaExceeded):
            target.charge(keys["overdrawn"], 1)


def strip_id(record):
    fields = {name: getattr(record.token, name) for name in record.token.__slots__ if name != "id"}
    return fields, record.digest, dict(record.model_usage)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "tokens.db", "sqlite:///tokens.db"])
def test_import_copies_all_tokens_once_from_files_and_databases(run, db, name):
    with SQLiteTokenStore(db) as store:
        fill(store)
        expected = [strip_id(record) for record in store.records()]
    if name.startswith("out"):
        out, err = run("export", "--output", name)
        assert (out, err) == (b"", f"13 exported to {name}.\n")
        assert db.with_name(name).stat().st_mode & 0o777 == 0o600
        # Standard output gets the same.
        assert run("export", "--format", name.partition(".")[2]) == (db.with_name(name).read_bytes(), "13 exported.\n")
    for summary in ("13 imported, 0 already there, 0 bad.\n", "0 imported, 13 already there, 0 bad.\n"):
        assert run("import", "--db", "second.db", name) == (b"", summary)
    with SQLiteTokenStore(db.with_name("second.db")) as store:
        assert [strip_id(record) for record in store.records()] == expected


# --- export


def test_an_export_never_replaces_a_file_and_leaves_no_part_of_one(run, db):
    with SQLiteTokenStore(db) as store:
        store.create()
    path = db.with_name("out.csv")
    path.write_text("precious")
    assert "exists already" in run("export", "--output", "out.csv", status=2)[1]
    assert path.read_text() == "precious"
    assert "No such file" in run("export", "--output", "missing/out.csv", status=2)[1]
    assert "does not say which format" in run("export", "--output", "out", status=2)[1]
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE tokens SET model_limits = '['")
    assert "damaged" in run("export", "--output", "new.csv", status=2)[1]
    assert not list(db.parent.glob("*new.csv*"))
    assert not list(db.parent.glob(".*"))


def test_an_export_has_the_digest_and_no_key(run, db):
    with SQLiteTokenStore(db) as store:
        store.create(key=KEY, name="\u4ee4\u724c")
    out, _ = run("export")
    assert DIGEST.encode() in out
    assert b"canary" not in out
    done = subprocess.run([SCRIPT, "export"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.stdout == out
    assert "\u4ee4\u724c".encode() in out


def test_an_export_to_a_closed_pipe_ends_quietly(db):
    with SQLiteTokenStore(db) as store:
        store.restore([record for _, record, _ in read_csv(lines(5000), NOW)])
    process = subprocess.Popen([SCRIPT, "export"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_an_export_to_a_full_disk_is_one_line(db):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with SQLiteTokenStore(db) as store:
        store.create()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([SCRIPT, "export"], stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"Error: cannot write to standard output: No space left on device\n"
    assert done.returncode == 2


# --- Progress and memory


def terminal(*args):
    """Run the script at a terminal, and return what it shows there."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen([SCRIPT, *args], stdout=subprocess.PIPE, stderr=theirs)
    finally:
        os.close(theirs)
    shown = b""
    with process, open(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                part = terminal.read(10_000)
            except OSError:  # Linux raises it at the end
                break
            if not part:
                break
            shown += part
    return shown.decode()


@pytest.mark.slow
def test_a_progress_bar_is_shown_at_a_terminal(db):
    text = list(lines(2000))
    text[10] = "sk-canary,x,many\n"
    db.with_name("t.csv").write_text("".join(text))
    shown = terminal("import", "t.csv")
    assert "Importing" in shown
    assert "100%" in shown
    assert "\r\x1b[Kline 11: total_available must be a whole number" in shown
    assert "canary" not in shown
    for args in (("import", "--db", "other.db", "tokens.db"), ("export", "--output", "t.jsonl")):
        shown = terminal(*args)
        assert "100%" in shown
        assert "1,999" in shown


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(run, db, monkeypatch, full):
    """A third of the rows takes as much memory as all of them, as it is more than two pages of a store's tokens."""
    monkeypatch.setattr("usage_middleware.cli.transfer.importing.BATCH", 300)
    count = 100_000 if full else 6000
    peaks = []
    for size in (count // 3, count):
        db.with_name("t.csv").write_text("".join(lines(size)))
        peak = 0
        for args in (
            ("import", "--dry-run", "t.csv"),
            ("import", "t.csv"),
            ("export", "--output", f"{size}.jsonl"),
            ("import", "--db", f"{size}.db", "tokens.db"),
        ):
            gc.collect()
            tracemalloc.start()
            try:
                run(*args)
                peak = max(peak, tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        peaks.append(peak)
    # There are three times as many rows. What Python has not collected yet differs from run to run.
    assert peaks[1] < peaks[0] * 1.5
