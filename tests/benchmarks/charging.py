"""What a durable charge costs, alone and with many processes that charge at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from comparing import Contender, Row, Table, compare

from usage_middleware import SQLiteTokenStore

_TIMEOUT = 30.0  # seconds; the default of a store
_MODEL = "gpt-4o"


def durable_charge(rounds: int) -> Iterator[Table]:
    """Yield a charge that is on the disk when it returns, against its statements by hand in one transaction."""
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        ours, theirs = Path(directory, "ours.db"), Path(directory, "theirs.db")
        with SQLiteTokenStore(ours) as store, SQLiteTokenStore(theirs) as schema:
            key = _make_token(store)
            by_hand_key = _make_token(schema)
            with closing(sqlite3.connect(theirs, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                yield compare(
                    "A durable charge, against the same statements by hand in one transaction",
                    _charge("by hand", _plain_by_hand(connection, by_hand_key)),
                    _charge("SQLiteTokenStore.charge", lambda _: store.charge(key, 1), budget=1.5),
                    rounds=rounds,
                )
                yield compare(
                    "The same with a model and an idempotency key",
                    _charge("by hand", _full_by_hand(connection, by_hand_key)),
                    _charge(
                        "SQLiteTokenStore.charge",
                        lambda operation_id: store.charge(key, 1, model=_MODEL, idempotency_key=operation_id),
                        budget=1.5,
                    ),
                    rounds=rounds,
                )


def slowest_charge(writers: int, charges: int) -> Iterator[Table]:
    """Yield the longest wait of one of many processes, all of which charge one token as fast as they can."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        path = Path(directory, "tokens.db")
        with SQLiteTokenStore(path) as store:
            key = _make_token(store)
        told = fork.SimpleQueue()
        start = fork.Barrier(writers)
        processes = [fork.Process(target=_write, args=(path, key, charges, start, told)) for _ in range(writers)]
        for process in processes:
            process.start()
        slowest = max(told.get() for _ in processes)
        for process in processes:
            process.join()
    ratio = slowest / (_TIMEOUT / 3)
    yield Table(
        f"The slowest of {writers * charges:,} charges by {writers} processes at once",
        [
            Row("a third of the store's timeout", _TIMEOUT / 3),
            Row("SQLiteTokenStore.charge, the slowest", slowest, ratio, ratio, ratio, budget=1.0),
        ],
    )


def _write(path: Path, key: str, charges: int, start: Barrier, told: Any) -> None:
    slowest = 0.0
    with SQLiteTokenStore(path, timeout=_TIMEOUT) as store:
        store.get(key)
        start.wait()
        for _ in range(charges):
            begun = time.perf_counter()
            store.charge(key, 1)
            slowest = max(slowest, time.perf_counter() - begun)
    told.put(slowest)


def _make_token(store: SQLiteTokenStore) -> str:
    key, _ = store.create(total_available=2**62, model_limits={_MODEL: 2**62})
    return key.removeprefix("sk-")


def _charge(name: str, charge: Callable[[str], Any], *, budget: float | None = None) -> Contender:
    # One call a turn: each waits for the disk, and what else the disk does then counts for one of them only.
    return Contender(name, "charge(item)", _new_id, budget=budget, clock=time.perf_counter, calls=1, charge=charge)


def _new_id() -> str:
    return uuid.uuid4().hex


_TOKEN = "SELECT id, total_used, total_available FROM tokens WHERE digest = ?"
_LAPSED = "SELECT id, held FROM operations WHERE final_amount IS NULL AND held > 0 AND token_id = ? AND expires_at <= ?"
_UPDATE = "UPDATE tokens SET total_used = ?, total_available = ? WHERE id = ?"
_INSERT = (
    "INSERT INTO operations"
    " (id, token_id, kind, amount, idempotency_key, model, held, unlimited, final_amount, created_at, changed_at)"
    " VALUES (?, ?, 'charge', 1, ?, ?, 1, 0, 1, ?, ?)"
)
_ADD_DAY = (
    "INSERT INTO usage_by_day (token_id, day, model, used, requests, input_tokens, output_tokens)"
    " VALUES (?, ?, ?, 1, 1, 0, 0)"
    " ON CONFLICT (token_id, day, model) DO UPDATE SET used = used + 1, requests = requests + 1"
)


def _plain_by_hand(connection: sqlite3.Connection, key: str) -> Callable[[str], None]:
    execute = connection.execute

    def charge(operation_id: str) -> None:
        now = time.time()
        execute("BEGIN IMMEDIATE")
        token_id, used, available = execute(_TOKEN, (hashlib.sha256(key.encode()).digest(),)).fetchone()
        execute(_LAPSED, (token_id, now)).fetchall()
        execute(_UPDATE, (used + 1, available - 1, token_id))
        execute(_INSERT, (operation_id, token_id, None, None, now, now))
        execute(_ADD_DAY, (token_id, time.strftime("%Y-%m-%d", time.gmtime(now)), ""))
        execute("COMMIT")

    return charge


def _full_by_hand(connection: sqlite3.Connection, key: str) -> Callable[[str], None]:
    execute = connection.execute

    def charge(operation_id: str) -> None:
        now = time.time()
        execute("BEGIN IMMEDIATE")
        token_id, used, available = execute(_TOKEN, (hashlib.sha256(key.encode()).digest(),)).fetchone()
        execute(
            "SELECT kind, amount, model FROM operations WHERE token_id = ? AND idempotency_key = ?",
            (token_id, operation_id),
        ).fetchone()
        execute(_LAPSED, (token_id, now)).fetchall()
        execute("SELECT used FROM model_usage WHERE token_id = ? AND model = ?", (token_id, _MODEL)).fetchone()
        execute(_UPDATE, (used + 1, available - 1, token_id))
        execute(
            "INSERT INTO model_usage (token_id, model, used) VALUES (?, ?, 1)"
            " ON CONFLICT (token_id, model) DO UPDATE SET used = used + 1",
            (token_id, _MODEL),
        )
        execute(_INSERT, (_new_id(), token_id, operation_id, _MODEL, now, now))
        execute(_ADD_DAY, (token_id, time.strftime("%Y-%m-%d", time.gmtime(now)), _MODEL))
        execute("COMMIT")

    return charge
