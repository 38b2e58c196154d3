"""An export is read back unchanged, whatever text and numbers a token has, and memory stays bounded for any file."""

import io
import subprocess
import sys
from dataclasses import replace
from datetime import date

import pytest
from command import NOW, SCRIPT
from hypothesis import given, settings
from hypothesis import strategies as st

from usage_middleware import MemoryTokenStore, SQLiteTokenStore, Token
from usage_middleware.cli.transfer.records import (
    LINE_LIMIT,
    read_csv,
    read_json_lines,
    write_csv,
    write_json_lines,
)
from usage_middleware.cli.transfer.sources import open_source
from usage_middleware.tokens import TokenRecord
from usage_middleware.usage import DayUsage

MOST = 2**63 - 1
FORMATS = {"csv": (write_csv, read_csv), "jsonl": (write_json_lines, read_json_lines)}

# Any text that a store accepts: without NUL, and valid as UTF-8.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
lines_and_quotes = st.text(st.sampled_from("\r\n\",;\t\ufeff\u2028\x85\x1c '=a"), max_size=8)
names = texts | lines_and_quotes
models = st.one_of(texts, lines_and_quotes).filter(bool).map(lambda model: model[:255])
units = st.integers(0, MOST) | st.integers(0, 10)
limits = st.dictionaries(models, units | st.just(True), max_size=4)
days = st.dictionaries(
    st.tuples(st.dates(), models | st.just("")), st.tuples(units, units, units, units), max_size=4
).map(lambda figures: tuple(DayUsage(*place, *of_place) for place, of_place in sorted(figures.items())))
renewals = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "renewal": st.sampled_from(["daily", "weekly", "monthly"]),
            "renewal_quota": st.integers(1, MOST),
            "renews_at": st.integers(0, 253_402_300_799),
        }
    ),
)
records = st.builds(
    lambda token, renewal, digest, usage, days: TokenRecord(
        token=replace(token, **renewal), digest=digest, model_usage=usage, days=days
    ),
    renewal=renewals,
    token=st.builds(
        Token,
        name=names,
        total_available=st.integers(-1000, 2**62),
        total_used=st.integers(0, 2**62 - 1),
        unlimited_quota=st.booleans(),
        model_limits=limits,
        model_limits_enabled=st.booleans(),
        expires_at=st.integers(-1, MOST),
        enabled=st.booleans(),
        hint=st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=4),
        created_at=units,
    ),
    digest=st.binary(min_size=32, max_size=32),
    usage=st.dictionaries(models, units, max_size=4),
    days=days,
)


def through_a_file(records, format_name, path):
    """Write records to a file as ``export`` does, and return the rows that ``import`` reads from it."""
    write, _ = FORMATS[format_name]
    path.write_bytes("".join(write(records)).encode())
    with open_source(str(path), format_name) as source:
        return list(source.rows)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", FORMATS)
@given(written=st.lists(records, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_token_comes_back(tmp_path_factory, format_name, written):
    path = tmp_path_factory.mktemp("file") / "t"
    assert [row.content for row in through_a_file(written, format_name, path)] == written


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_carriage_return_comes_back(tmp_path, format_name):
    token = Token(name="a\rb", model_limits={"m\r": 5}, model_limits_enabled=True)
    written = [TokenRecord(token=token, digest=bytes(32), model_usage={"\r": 1})]
    assert [row.content for row in through_a_file(written, format_name, tmp_path / "t")] == written


@pytest.mark.parametrize("format_name", FORMATS)
def test_ten_thousand_limits_and_days_come_back(tmp_path, format_name):
    """They take more than 131,072 characters, the default limit of the csv module."""
    token = Token(model_limits={f"model {number}": number for number in range(10_000)}, model_limits_enabled=True)
    first = date(2026, 1, 1).toordinal()
    days = tuple(DayUsage(date.fromordinal(first + n // 30), f"model {n % 30}", n, 1, 2, 3) for n in range(10_000))
    written = [TokenRecord(token=token, digest=bytes(32), days=days)]
    (row,) = through_a_file(written, format_name, tmp_path / "t")
    assert row.content == written[0]


@pytest.mark.slow
def test_an_export_that_import_could_not_read_is_refused(run, db):
    figures = (1, 1, 0, 0)
    with MemoryTokenStore() as store:
        store.create(name="small")
        store.create(name="large")
        (small, large) = store.records()
    days = [DayUsage(date.fromordinal(730_000 + n // 50), "m" * 150 + str(n % 50), *figures) for n in range(25_000)]
    with SQLiteTokenStore(db) as store:
        store.restore([small, replace(large, days=days)])
    _, err = run("export", "--output", "t.jsonl", status=2)
    assert "the usage by day of token 2 takes more than 4,194,304 characters, the most that a line may have" in err
    assert not db.with_name("t.jsonl").exists()
    assert "2 imported" in run("import", "--db", "other.db", db)[1]


# --- Bounds


def rows_of(text):
    return [(row.number, row.content) for row in read_csv(io.StringIO(text, newline=""), NOW)]


def test_a_row_of_several_lines_is_bounded_like_one_line():
    long = "x" * (LINE_LIMIT // 4)
    text = f'key,name\nthe-key-of-one,"{long}\n{long}\n{long}\n{long}\nthe-key-of-two,b\nthe-key-of-three,c\n'
    (number, bad), *others = rows_of(text)
    assert (number, str(bad)) == (2, "is longer than 4,194,304 characters; a quotation mark may be missing")
    # The row ends at the line that makes it too long. The next line begins a new row.
    assert [(number, record.token.name) for number, record in others] == [(6, "b"), (7, "c")]


def test_the_line_after_one_that_is_too_long_is_read():
    text = "key,name\nthe-key-of-holder-one," + '"' * LINE_LIMIT + "\nthe-key-of-holder-two,b\n"
    (number, bad), (last, record) = rows_of(text)
    assert (number, last, record.token.name) == (2, 3, "b")
    assert "is longer" in str(bad)


def test_the_longest_row_is_read():
    row = "the-key-of-holder-one,"
    name = "x" * (LINE_LIMIT - len(row) - 1)
    ((_, record),) = rows_of(f"key,name\n{row}{name}\n")
    assert record.token.name == name


def test_a_header_is_bounded(run, db):
    db.with_name("t.csv").write_text("key," + "x" * LINE_LIMIT)
    assert "the first line is longer than 4,194,304 characters" in run("import", "t.csv", status=2)[1]


PARTS = {
    "one line": (b"x" * 10**6, 1),
    "lines": (b"x" * (10**6 - 1) + b"\n", 1),
    "fields of lines": (b'x\n","' + b"x" * (10**5 - 5), 10),
    "wide characters": ("令".encode() * (10**6 // 3), 1),
    "quotation marks": (b'""' * (5 * 10**5), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_huge_field_is_never_held_in_memory(tmp_path, part, full):
    """Measure the peak memory of a process from outside. It is about 35 MB if it imports two small rows."""
    megabytes = 480 if full else 160
    text, times = PARTS[part]
    with (tmp_path / "t.csv").open("wb") as file:
        file.write(b'key,name\nthe-key-of-holder-one,"')
        for _ in range(megabytes * times):
            file.write(text)
        file.write(b'"\nthe-key-of-holder-two,b\n')
    program = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, SCRIPT, "import", "--db", "t.db", "--dry-run", "t.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, status = map(int, done.stdout.split())
    assert status == 1
    assert peak < 100 * 2**20
