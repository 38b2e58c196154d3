"""``import`` and ``export``, as an operator types them: with real files, databases and processes."""

import hashlib
import io
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from client import ask

from usage_middleware import MemoryTokenStore, QuotaExceeded, SQLiteTokenStore, UsageMiddleware
from usage_middleware.cli import main
from usage_middleware.cli.records import read_csv, read_json_lines, write_csv, write_json_lines
from usage_middleware.keys import key_digest

SCRIPT = os.path.join(os.path.dirname(sys.executable), "usage-middleware")
NOW = 1_800_000_000  # 2027-01-15 08:00:00 UTC
KEY = "canary-key-0001"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
MOST = 2**63 - 1


@pytest.fixture
def db(tmp_path, monkeypatch):
    """The path of a database that the environment names, with nothing in it yet."""
    path = tmp_path / "tokens.db"
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def run(db, capsysbinary):
    """Runs the command in this process; returns its standard output, as bytes, and its standard error."""

    def run(*args, status=0):
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsysbinary.readouterr()
        assert end.value.code == status, err
        assert b"canary" not in err
        assert DIGEST.encode() not in err
        return out, err.decode()

    return run


def tokens(path):
    with SQLiteTokenStore(path) as store:
        return list(store.tokens())


def lines(count):
    """CSV of so many tokens, made as it is read."""
    yield "key,name,total_available\n"
    for number in range(count):
        yield f"sk-{hashlib.sha256(b'%d' % number).hexdigest()},Token {number},{number}\n"


# --- One row


def read_cell(**cells):
    """The record of one CSV row."""
    row = ",".join('"' + text.replace('"', '""') + '"' for text in cells.values())
    text = ",".join(cells) + "\n" + row + "\n"
    ((_, record),) = read_csv(io.StringIO(text, newline=""), NOW)
    if isinstance(record, Exception):
        raise record
    return record


def read_object(**fields):
    """The record of one JSON line."""
    ((_, record),) = read_json_lines([json.dumps(fields) + "\n"], NOW)
    if isinstance(record, Exception):
        raise record
    return record


CELLS = [
    ("total_available", "-5", -5),
    ("total_available", str(MOST), MOST),
    ("total_used", "7", 7),
    ("name", 'caf\u00e9, "令牌"\n', 'caf\u00e9, "令牌"\n'),
    ("name", " ", " "),
    ("unlimited_quota", "yes", True),
    ("unlimited_quota", "NO", False),
    ("enabled", "0", False),
    ("enabled", "True", True),
    ("model_limits_enabled", "1", True),
    ("model_limits", "gpt-4o, gpt-4o-mini", {"gpt-4o": True, "gpt-4o-mini": True}),
    ("model_limits", '{"gpt-4o": 5, "any": true}', {"gpt-4o": 5, "any": True}),
    ("expires_at", "1893456000", 1893456000),
    ("expires_at", "5", 5),
    ("expires_at", str(MOST), MOST),
    ("expires_at", "2030-01-01", 1893456000),
    ("expires_at", "30d", NOW + 30 * 86400),
    ("expires_at", "never", 0),
    ("expires_at", "-1", -1),
    ("created_at", "2027-01-15 08:00", NOW),
    ("hint", "wxyz", "wxyz"),
    ("hint", "", "0001"),
]


@pytest.mark.parametrize(("field", "text", "value"), CELLS)
def test_what_a_cell_of_csv_means(field, text, value):
    assert getattr(read_cell(key=KEY, **{field: text}).token, field) == value


OBJECTS = [
    ("total_available", -5, -5),
    ("name", "令牌", "令牌"),
    ("unlimited_quota", True, True),
    ("model_limits", {"gpt-4o": 5, "any": True}, {"gpt-4o": 5, "any": True}),
    ("expires_at", 5, 5),
    ("expires_at", "2030-01-01", 1893456000),
    ("total_used", None, 0),
    ("enabled", None, True),
]


@pytest.mark.parametrize(("field", "given", "value"), OBJECTS)
def test_what_a_field_of_json_means(field, given, value):
    assert getattr(read_object(key=KEY, **{field: given}).token, field) == value


@pytest.mark.parametrize("read", [read_cell, read_object])
def test_a_key_and_its_digest_say_the_same(read):
    expected = read(key=KEY)
    assert expected.digest == key_digest(KEY)
    assert expected.token.hint == "0001"
    assert read(key=f"sk-{KEY}") == expected
    assert read(key=KEY, digest=DIGEST.upper()) == expected
    assert read(digest=DIGEST, hint="0001") == expected
    assert read(digest=DIGEST).token.hint == ""
    assert DIGEST not in repr(expected)


def test_limits_are_enabled_where_they_are_given():
    assert read_cell(key=KEY, model_limits="a").token.model_limits_enabled
    assert not read_cell(key=KEY, model_limits="a", model_limits_enabled="no").token.model_limits_enabled
    assert not read_cell(key=KEY, model_limits="").token.model_limits_enabled
    assert read_cell(key=KEY, model_limits="", model_limits_enabled="yes").token.model_limits_enabled


def test_total_granted_stands_for_total_available_or_agrees_with_it():
    assert read_cell(key=KEY, total_granted="100", total_used="30").token.total_available == 70
    assert read_cell(key=KEY, total_granted="100", total_used="130").token.total_available == -30
    assert read_object(key=KEY, total_granted=100, total_used=30, total_available=70).token.total_granted == 100
    with pytest.raises(ValueError, match="total_granted is not the sum"):
        read_object(key=KEY, total_granted=100, total_used=30, total_available=100)


def test_the_number_of_another_store_is_ignored():
    assert read_cell(key=KEY, id="what ever").token.id is None
    assert read_object(key=KEY, id=[5]).token.id is None


BAD_CELLS = [
    *(
        (field, text, "whole number")
        for field in ("total_available", "total_used", "total_granted")
        for text in ("1.0", "1e6", "1,000", "1_000", " 1", "+1", "0x1", "\u0661", "many", "1" * 20, "1" * 5000, "5\0")
    ),
    ("total_available", str(MOST + 1), "2**63"),
    ("total_used", "-1", "negative"),
    ("name", "a\0b", "name"),
    ("name", "\udcff", "name is not UTF-8"),
    ("enabled", "on", "enabled must be true or false"),
    ("unlimited_quota", "2", "unlimited_quota must be true or false"),
    ("model_limits", "a,,b", "model_limits must have models that are names"),
    ("model_limits", "{", "model_limits is no JSON"),
    ("model_limits", '{"a": 1.5}', "model_limits must have 0 to"),
    ("model_limits", '{"a": -1}', "model_limits must have 0 to"),
    ("model_limits", '{"a": false}', "model_limits must have 0 to"),
    ("model_limits", '{"a": 9223372036854775808}', "model_limits must have 0 to"),
    ("model_usage", "a", "model_usage is no JSON"),
    ("model_usage", "[]", "model_usage must be a JSON object"),
    ("model_usage", '{"a": true}', "model_usage must have 0 to"),
    ("model_usage", json.dumps({"canary" * 50: 1}), "model_usage must be 1 to 255"),
    ("expires_at", "soon", "expires_at must be Unix seconds"),
    ("expires_at", str(MOST + 1), "expires_at must be"),
    ("created_at", "1.5", "created_at must be Unix seconds"),
    ("hint", "12345", "hint"),
    ("digest", DIGEST[:-1], "digest must be"),
    ("digest", DIGEST[:-1] + "g", "digest must be"),
    ("digest", "0" * 64, "digest is not that of key"),
    ("key", "", "needs a key or a digest"),
    ("key", "canary, key", "key must be"),
    ("key", "canary\0key", "key must be"),
    ("key", "sk-", "key must be"),
]


@pytest.mark.parametrize(("field", "text", "reason"), BAD_CELLS)
def test_a_bad_cell_is_named_and_not_shown(field, text, reason):
    if sys.version_info < (3, 11) and "\0" in text:
        reason = "NUL"  # said by the csv module
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_cell(**{"key": KEY, "enabled": "no", field: text})
    assert "canary" not in str(caught.value)
    assert field in str(caught.value) or "\0" in text
    # The text of a cell may be a key that stands in the wrong column.
    with pytest.raises(ValueError, match=field if sys.version_info >= (3, 11) else "NUL") as caught:
        read_cell(**{"key": "other-key", field: "sk-canary, canary canary canary canary canary\0"})
    assert "canary" not in str(caught.value)


BAD_OBJECTS = [
    *(
        (field, value, "whole number")
        for field in ("total_available", "total_used", "total_granted")
        for value in (1.0, True, "1", [1], {})
    ),
    *(
        (field, value, "true or false")
        for field in ("unlimited_quota", "model_limits_enabled", "enabled")
        for value in (1, 0, "true", [])
    ),
    *((field, 5, "text") for field in ("name", "hint")),
    ("name", "\ud800", "name is not UTF-8"),
    ("model_limits", ["a"], "model_limits must be a JSON object"),
    ("model_limits", "a", "model_limits must be a JSON object"),
    ("model_limits", {"\ud800": 1}, "model_limits is not UTF-8"),
    ("model_usage", {"": 1}, "model_usage must have models"),
    ("expires_at", 1.5, "expires_at must be a whole number"),
    ("expires_at", True, "expires_at must be a whole number"),
    ("total_used", -1, "total_used must not be negative"),
    ("total_available", 10**30, "2**63"),
    ("key", 5, "key must be a str"),
    ("digest", 5, "digest must be"),
    ("total_avilable", 5, "unknown field 'total_avilable'"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BAD_OBJECTS)
def test_a_bad_field_of_json_is_named(field, value, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_object(**{"key": KEY, field: value})
    assert field in str(caught.value)
    assert "canary" not in str(caught.value)


BAD_LINES = [
    ("{", "no JSON"),
    ("canary", "no JSON"),
    ('{"key": "canary"} x', "no JSON"),
    ("5", "JSON object"),
    ("null", "JSON object"),
    ('["canary"]', "JSON object"),
    ("[" * 200_000, "nested too deeply"),
    ('{"key": "k", "name": ' + "[" * 200_000, "nested too deeply"),
    ('{"key": "k", "total_used": ' + "1" * 5000 + "}", ""),
    ('{"sk-canary": {"total_used": 5}}', "needs a key or a digest"),
    ("{}", "needs a key or a digest"),
    ('{"key": null}', "needs a key or a digest"),
    ('{"key": "k", "name": "\udcff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), [pytest.param(*case, id=case[0][:30]) for case in BAD_LINES])
def test_a_line_that_is_no_token(line, reason):
    rows = list(read_json_lines(['{"key": "one"}\n', line + "\n", "\n", '{"key": "two"}'], NOW))
    assert [number for number, _ in rows] == [1, 2, 4]
    assert isinstance(rows[1][1], ValueError)
    assert reason in str(rows[1][1])
    assert "canary" not in str(rows[1][1])


# --- A file


def test_rows_are_told_by_the_line_on_which_they_begin(run, db):
    db.with_name("t.csv").write_bytes(
        b"\xef\xbb\xbfkey,name,total_available\r\n"
        b'one,"two\nlines\n",5\r\n'
        b"\r\n"
        b"two,x,many\r\n"
        b",,\r\n"
        b'three,"three\nlines\n",many\r\n'
        b"four,caf\xe9,1\r\n"
        b"five,1\r\n"
        b"six,1,2,3\r\n"
        b'seven,"a"b,1\r\n'
        b"one,again,9\r\n"
        b"sk-eight,last,8"
    )
    assert run("import", "t.csv", status=1)[1] == (
        "line 6: total_available must be a whole number, of digits alone\n"
        "line 8: total_available must be a whole number, of digits alone\n"
        "line 11: name is not UTF-8 text\n"
        "line 12: has 2 fields where the header has 3\n"
        "line 13: has 4 fields where the header has 3\n"
        "line 14: is no CSV: ',' expected after '\"'\n"
        "2 imported, 1 already there, 6 bad.\n"
    )
    assert [(token.name, token.total_available) for token in tokens(db)] == [("two\nlines\n", 5), ("last", 8)]


def test_json_lines(run, db):
    db.with_name("t.ndjson").write_bytes(
        b'\xef\xbb\xbf{"key": "one", "total_used": 1}\r\n\n{"key": "two", "name": "caf\xe9"}\n{"key": "sk-one"}\n'
        b'{"key": "three", "name": "\xe2\x80\xa8"}'
    )
    assert run("import", "t.ndjson", status=1) == (
        b"",
        "line 3: name is not UTF-8 text\n2 imported, 1 already there, 1 bad.\n",
    )
    assert [(token.name, token.total_used) for token in tokens(db)] == [("", 1), ("\u2028", 0)]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param("t.csv", b"two," + b"x" * 100_000_000 + b"\n", id="CSV field"),
        pytest.param("t.csv", b"two" + b"," * 100_000_000 + b"\n", id="CSV fields"),
        pytest.param("t.csv", b'two,"' + b'""' * 50_000_000 + b'"\n', id="CSV quotes"),
        pytest.param("t.jsonl", b'{"key": "two", "name": "' + b"x" * 100_000_000 + b'"}\n', id="JSON"),
    ],
)
def test_a_huge_line_is_bad_and_never_in_memory(run, db, name, row):
    first, last = (b"key,name\n", b"three,c\n") if name == "t.csv" else (b'{"key": "one"}\n', b'{"key": "three"}\n')
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
    ("t.csv", "key,total_avilable\n", "unknown column 'total_avilable'; known are key, digest, name,"),
    ("t.csv", "key,Name\n", "unknown column 'Name'"),
    ("t.csv", "key,name,key\n", "the column 'key' twice"),
    ("t.csv", '"key\n', "the first line is no CSV"),
    ("t.csv", "\udcff\udcfek\0e\0y\0\n\0", "first line"),
    ("t.jsonl", '[{"key": "canary"}]', "it is a JSON array"),
    ("t.txt", "key\ncanary\n", "nothing tells what it is: known are .csv, .jsonl"),
    ("folder", None, "Is a directory"),
    ("missing.csv", None, "No such file or directory"),
    ("-", None, "--format"),
    ("postgresql://user:canary@127.0.0.1:1/db", None, "failed: "),
    ("sqlite:///:memory:", None, "must name a file"),
    ("sqlite:///missing.db", None, "missing.db cannot be opened: there is no such file"),
    ("foreign.db", None, "tokens"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_before_anything_is_made(run, db, name, text, message):
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
def test_a_file_without_tokens(run, db, name, text):
    db.with_name(name).write_text(text)
    assert run("import", name) == (b"", "0 imported, 0 already there, 0 bad.\n")


def test_format_goes_before_the_name(run, db):
    db.with_name("t.csv").write_text('{"key": "one"}\n')
    assert "1 imported" in run("import", "--format", "jsonl", "t.csv")[1]


def test_standard_input(db):
    done = subprocess.run(
        [SCRIPT, "import", "--format", "csv", "-"],
        input=b"key,name\none,caf\xc3\xa9\n",
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"", b"1 imported, 0 already there, 0 bad.\n")
    assert [token.name for token in tokens(db)] == ["caf\u00e9"]


def test_a_key_that_was_given_up_stays_so(run, db):
    with SQLiteTokenStore(db) as store:
        store.create(key="deleted-key")
        store.create(key="rotated-key")
        store.delete(1)
        store.rotate(2)
    db.with_name("t.csv").write_text("key\ndeleted-key\nrotated-key\nnew-key\n")
    assert run("import", "--dry-run", "t.csv")[1] == "1 would be imported, 2 already there, 0 bad.\n"
    assert run("import", "t.csv")[1] == "1 imported, 2 already there, 0 bad.\n"


def test_a_token_that_is_there_is_left_alone(run, db):
    db.with_name("t.csv").write_text("key,name,total_available\none,First,5\n")
    run("import", "t.csv")
    before = tokens(db)
    db.with_name("t.csv").write_text("key,name,total_available\none,Second,7\n")
    assert run("import", "t.csv")[1] == "0 imported, 1 already there, 0 bad.\n"
    assert tokens(db) == before


# --- --dry-run


def test_a_rehearsal_tells_what_the_import_then_does_and_writes_nothing(run, db, monkeypatch, tmp_path):
    # Two batches, and a key that comes again in the second.
    monkeypatch.setattr("usage_middleware.cli.transfer.BATCH", 3)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    db.with_name("t.csv").write_text("key,total_used\none,1\ntwo,2\nthree,x\none,1\nfour,4\nfour,4\n")
    (tmp_path / "temporary").mkdir()
    rehearsed = run("import", "--dry-run", "t.csv", status=1)[1]
    assert rehearsed.endswith("3 would be imported, 2 already there, 1 bad.\n")
    assert not db.exists()
    assert not list((tmp_path / "temporary").iterdir())
    assert run("import", "t.csv", status=1)[1] == rehearsed.replace("would be imported", "imported")
    before = db.read_bytes(), tokens(db)
    assert "0 would be imported, 5 already there" in run("import", "--dry-run", "t.csv", status=1)[1]
    assert (db.read_bytes(), tokens(db)) == before


def test_a_rehearsal_does_not_need_to_write(run, db):
    db.with_name("t.csv").write_text("key\none\ntwo\n")
    with SQLiteTokenStore(db) as store:
        store.create(key="one")
        with store._connections.write():  # somebody is busy
            assert "1 would be imported, 1 already there" in run("import", "--dry-run", "t.csv")[1]


# --- Round trips


def fill(store):
    """Every kind of token; returns the keys."""
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


# A store of another database belongs here too.
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
        records = [record for _, record in read(io.StringIO(text, newline=""), NOW)]
        target.create()  # its ids are other ones
        target.restore(records)
        target.delete(1)
        assert [strip_id(record) for record in target.records()] == [strip_id(record) for record in source.records()]
        for key in keys.values():
            answers = [
                ask(UsageMiddleware(no_application, store), authorization=f"Bearer {key}") for store in (source, target)
            ]
            assert answers[0] == answers[1]
        with pytest.raises(QuotaExceeded):
            target.charge(keys["limited"], 41, model="capped")
        target.charge(keys["limited"], 40, model="capped")
        with pytest.raises(QuotaExceeded):
            target.charge(keys["overdrawn"], 1)


def no_application(environ, start_response):
    raise AssertionError


def strip_id(record):
    fields = {name: getattr(record.token, name) for name in record.token.__slots__ if name != "id"}
    return fields, record.digest, dict(record.model_usage)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "tokens.db", "sqlite:///tokens.db"])
def test_from_one_database_to_another(run, db, name):
    with SQLiteTokenStore(db) as store:
        fill(store)
        expected = [strip_id(record) for record in store.records()]
    if name.startswith("out"):
        out, err = run("export", "--output", name)
        assert (out, err) == (b"", f"13 exported to {name}.\n")
        assert db.with_name(name).stat().st_mode & 0o777 == 0o600
        # On standard output it is the same.
        assert run("export", "--format", name.partition(".")[2]) == (db.with_name(name).read_bytes(), "13 exported.\n")
    for summary in ("13 imported, 0 already there, 0 bad.\n", "0 imported, 13 already there, 0 bad.\n"):
        assert run("import", "--db", "second.db", name) == (b"", summary)
    with SQLiteTokenStore(db.with_name("second.db")) as store:
        assert [strip_id(record) for record in store.records()] == expected


# --- export


def test_an_export_is_a_new_file_or_none(run, db):
    with SQLiteTokenStore(db) as store:
        store.create()
    path = db.with_name("out.csv")
    path.write_text("precious")
    assert "is there already" in run("export", "--output", "out.csv", status=2)[1]
    assert path.read_text() == "precious"
    assert "No such file" in run("export", "--output", "missing/out.csv", status=2)[1]
    assert "nothing tells the format" in run("export", "--output", "out", status=2)[1]
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE tokens SET model_limits = '['")
    assert "damaged" in run("export", "--output", "new.csv", status=2)[1]
    assert not list(db.parent.glob("*new.csv*"))
    assert not list(db.parent.glob(".*"))


def test_an_export_has_no_key_and_says_so_only_where_it_should(run, db):
    with SQLiteTokenStore(db) as store:
        store.create(key=KEY, name="\u4ee4\u724c")
    out, _ = run("export")
    assert DIGEST.encode() in out
    assert b"canary" not in out
    done = subprocess.run([SCRIPT, "export"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.stdout == out
    assert "\u4ee4\u724c".encode() in out


def test_nobody_reads_on(db):
    with SQLiteTokenStore(db) as store:
        store.restore([record for _, record in read_csv(lines(5000), NOW)])
    process = subprocess.Popen([SCRIPT, "export"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_full_disk_is_one_line(db):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with SQLiteTokenStore(db) as store:
        store.create()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([SCRIPT, "export"], stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"Error: cannot write to standard output: No space left on device\n"
    assert done.returncode == 2


# --- Stopped, and killed


def wait_for_tokens(path, process):
    """Waits until an import has committed something; returns how many tokens are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be stopped"
        if path.exists():
            with SQLiteTokenStore(path, read_only=True) as store:
                try:
                    if count := store.count():
                        return count
                except Exception:  # its tables are being made
                    pass
        time.sleep(0.005)
    raise AssertionError("nothing was imported")


def feed(pipe, texts):
    with suppress(BrokenPipeError), pipe:
        for text in texts:
            pipe.write(text.encode())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_goes_on_where_one_was_stopped(run, db, kill):
    command = [SCRIPT, "import", "--format", "csv", "-"]

    def heed_interrupts():
        # A shell lets its background jobs, such as this test run, ignore them, and their children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process,
        ThreadPoolExecutor(1) as feeder,
    ):
        try:
            # There is no end to what it reads, so it is stopped in the middle of a batch.
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
        assert re.fullmatch(r"\d0,000 imported, 0 already there, 0 bad\.", told)
        assert stopped == "Error: stopped; the same command goes on from there"
    assert run("import", "t.csv")[1] == f"{count - there:,} imported, {there:,} already there, 0 bad.\n"
    assert [(token.name, token.total_available) for token in tokens(db)] == [
        (f"Token {number}", number) for number in range(count)
    ]


def test_a_database_that_fails_on_the_way(run, db, monkeypatch):
    monkeypatch.setattr("usage_middleware.cli.transfer.BATCH", 10)
    db.with_name("t.csv").write_text("".join(lines(25)))
    with SQLiteTokenStore(db) as store:
        store.find(1)
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON tokens WHEN NEW.name = 'Token 15'"
            " BEGIN SELECT RAISE(ABORT, 'no more'); END"
        )
    told, error = run("import", "t.csv", status=2)[1].splitlines()
    assert told == "10 imported, 0 already there, 0 bad."
    assert error == f"Error: {db} failed: no more"
    assert len(tokens(db)) == 10


# --- How it goes


def terminal(*args):
    """Runs the script at a terminal; returns what it shows there."""
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
            except OSError:  # Linux says so at the end
                break
            if not part:
                break
            shown += part
    return shown.decode()


def test_a_bar_is_shown_at_a_terminal(db):
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


def test_memory_does_not_grow_with_the_rows(run, db, monkeypatch, full):
    """A part of the rows takes as much of it as all of them, if it is more than two pages of a store's tokens."""
    monkeypatch.setattr("usage_middleware.cli.transfer.BATCH", 300)
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
            tracemalloc.start()
            try:
                run(*args)
                peak = max(peak, tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        peaks.append(peak)
    assert peaks[1] < peaks[0] * 1.2
