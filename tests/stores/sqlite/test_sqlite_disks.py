"""Disks that are full."""

import functools
import multiprocessing
import resource
import shutil
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlite_ledger import A_LOT, SEVERAL_TRANSACTIONS, WRITES, content, nothing_random, open_store

from usage_middleware import StoreError

pytestmark = pytest.mark.slow

# --- Disks that are full


@contextmanager
def files_no_larger_than(size):
    """Yield a disk with room for so much. What this process writes beyond that room fails. It is not a
    signal that ends the process, as Python ignores that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Attempt(NamedTuple):
    """What became of a call on a disk that was full."""

    failed: bool
    before: dict
    found: dict
    repeated: dict
    reopened: dict


def call_on_a_full_disk(path, name, state, room):
    """Make a call while no file can grow further than what the log has and ``room`` bytes more; if that failed, once
    more with room for all. Then closes the store without any, so that what is in the log must stay there."""
    log = Path(f"{path}-wal")
    with nothing_random(), open_store(path) as store:
        if state != "closed":
            store.get("one")
        if state == "a log":
            store.update(2, name="in the log")
        before = content(path)
        failed = False
        with files_no_larger_than(room + (log.stat().st_size if log.exists() else 0)):
            try:
                WRITES[name](store)
            except StoreError:
                failed = True
        found = content(path)
        if failed:
            WRITES[name](store)
        repeated = content(path)
        with files_no_larger_than(0):
            store.close()
    reopened = content(path)
    path.unlink()
    return Attempt(failed, before, found, repeated, reopened)


@pytest.fixture(scope="module")
def other_process():
    """Yield the one process that has no room."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("state", ["closed", "no log", "a log"])
@pytest.mark.parametrize("name", WRITES)
def test_a_disk_that_is_full(ledger, tmp_path, full, other_process, name, state):
    # From none to more than any call needs; each writes the log in pieces of 24 and 4096 bytes.
    rooms = range(0, 50_000, 61 if full else 6101)
    paths = [shutil.copyfile(ledger, tmp_path / f"{room}.db") for room in rooms]
    attempts = list(other_process.map(call_on_a_full_disk, paths, repeat(name), repeat(state), rooms))
    before, after = attempts[0].before, attempts[-1].found
    assert before != after
    for attempt in attempts:
        found = before if attempt.failed and name not in SEVERAL_TRANSACTIONS else attempt.found
        assert attempt == Attempt(attempt.failed, before, found, after, after)
        assert attempt.failed or found == after
    failed = [attempt.failed for attempt in attempts]
    assert failed[0]
    assert not failed[-1]
    assert failed == sorted(failed, reverse=True)


def test_a_database_that_may_not_grow(tmp_path, monkeypatch, full):
    path = tmp_path / "tokens.db"
    with open_store(path) as store:
        store.create(key="key", total_available=A_LOT)
    with closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connect = sqlite3.connect

    def connect_with_limit(most, *arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count = {most}")
        return connection

    charges = 0
    for most in range(pages, pages + (100 if full else 10)):
        monkeypatch.setattr(sqlite3, "connect", functools.partial(connect_with_limit, most))
        with open_store(path) as store:
            for _ in range(2):
                with pytest.raises(StoreError, match="full"):  # noqa: PT012 - some charges still fit
                    for _ in range(100):
                        before = content(path)
                        store.charge("key", 1, model=f"model {charges}", idempotency_key=f"{charges} {'x' * 200}")
                        charges += 1
                assert content(path) == before
            assert store.get("key").total_used == charges
    assert charges > 10
