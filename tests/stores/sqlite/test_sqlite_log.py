"""A write-ahead log of which only the beginning was written."""

import random
import sqlite3
import struct
import subprocess
from bisect import bisect_right
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlite_ledger import content, open_store

pytestmark = pytest.mark.slow

# --- A log that ends anywhere


class Recording(NamedTuple):
    """A database as it was when its log began, the whole log, and what the ledger was after each transaction in it."""

    database: bytes
    log: bytes
    earlier_log: bytes  # which the log has overwritten in part
    contents: list
    commits: list  # where in the log the transactions end; the first of the contents was there before them


def some_of_everything(store, rounds):
    """Make one call after the other."""
    for number in rounds:
        key, token = store.create(total_available=1000, model_limits={"gpt-4o": 500, "free": True})
        yield
        store.charge(key, 100, model="gpt-4o", idempotency_key=f"charge {number}")
        yield
        reserved = store.reserve(key, 200, model="gpt-4o", idempotency_key=f"reserve {number}")
        yield
        lapsed = store.reserve(key, 300, model="free", idempotency_key=f"lapses {number}", expires_in=1e-9)
        yield
        store.refund(store.find_operation(key, f"charge {number}"), 40)
        yield
        # It releases lapsed reservations.
        store.charge(key, 700)
        yield
        store.settle(reserved, 250)
        yield
        store.grant(token.id, 50)
        yield
        store.update(token.id, name=f"Token {number}", enabled=False)
        yield
        store.rotate(token.id)
        yield
        store.settle(lapsed, 10)
        yield
        if number % 2:
            store.delete(token.id)
            yield


def copy(path):
    """Return the bytes of a file that is in use. Another process reads it: closing it here would release SQLite's locks
    (sqlite.org/howtocorrupt.html, section 2.2)."""
    return subprocess.run(["cat", path], stdout=subprocess.PIPE, check=True).stdout


def frame_size(log):
    """Of a frame, its header included (sqlite.org/fileformat2.html, section 4.1)."""
    return int.from_bytes(log[8:12], "big") + 24


def ends_of_commits(log):
    """Where frames end that are the last of a transaction, and no remains of an earlier log."""
    salt = log[16:24]
    for start in range(32, len(log), frame_size(log)):
        _, pages, of_log = struct.unpack_from(">II8s", log, start)
        if pages and of_log == salt:
            yield start + frame_size(log)


def record(path, *, earlier):
    log_path = f"{path}-wal"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection, open_store(path) as store:
        store.get("key")
        earlier_log = b""
        if earlier:
            for _ in some_of_everything(store, range(-6, 0)):
                pass
            assert connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
            earlier_log = copy(log_path)
        database = copy(path)
        contents = [content(path)]
        contents += [content(path) for _ in some_of_everything(store, range(6))]
        log = copy(log_path)
        assert copy(path) == database
    commits = list(ends_of_commits(log))
    # The tables were made in a transaction that is in the log, too, if there was no checkpoint after it.
    if not earlier:
        del commits[0]
    assert len(commits) == len(contents) - 1
    return Recording(database, log, earlier_log, contents, commits)


@pytest.mark.parametrize(
    ("earlier", "remains"),
    [
        pytest.param(False, lambda recording, end: b"", id="nothing"),
        pytest.param(False, lambda recording, end: bytes(len(recording.log) - end), id="zeros"),
        pytest.param(False, lambda recording, end: random.Random(end).randbytes(len(recording.log) - end), id="noise"),
        pytest.param(True, lambda recording, end: recording.earlier_log[end:], id="an earlier log"),
    ],
)
def test_a_log_of_which_only_the_beginning_was_written(tmp_path, full, earlier, remains):
    recording = record(tmp_path / "recorded.db", earlier=earlier)
    size = len(recording.log)
    places = 10_000 if full else 100
    ends = [size * n // places for n in range(places + 1)]
    boundaries = [end + near for end in range(32, size, frame_size(recording.log)) for near in (-1, 0, 1)]
    ends += boundaries if full else random.Random(0).sample(boundaries, 25)
    path = tmp_path / "tokens.db"
    for end in ends:
        log = recording.log[:end] + remains(recording, end)
        path.write_bytes(recording.database)
        Path(f"{path}-wal").write_bytes(log)
        # The remains may happen to equal what would have been written.
        while end < size and log[end : end + 1] == recording.log[end : end + 1]:
            end += 1
        with open_store(path) as store:
            store.get("key")
            assert content(path) == recording.contents[bisect_right(recording.commits, end)]
            key, _ = store.create(total_available=5)
            assert store.charge(key, 3).total_available == 2
            content(path)
