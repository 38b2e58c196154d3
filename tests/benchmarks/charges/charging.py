"""What a durable charge costs, alone, and with many threads or processes that charge at once."""

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

from charges.at_once import MODEL, Charges, charge_at_once, charges_table, make_keys, shares_table
from comparing import Contender, Row, Table, compare, in_turn

from usage_middleware import SQLiteTokenStore

_TIMEOUT = 30.0  # seconds; the default of a store


def durable_charge(rounds: int) -> Iterator[Table]:
    """Compare a charge that is on the disk when it returns with the same statements by hand in one transaction."""
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
                        lambda operation_id: store.charge(key, 1, model=MODEL, idempotency_key=operation_id),
                        budget=1.5,
                    ),
                    rounds=rounds,
                )


def charges_by_threads(threads: int, rounds: int) -> Iterator[Table]:
    """Yield how many durable charges the threads of one process make, and whether each has its share."""
    with (
        tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory,
        SQLiteTokenStore(Path(directory, "tokens.db"), timeout=_TIMEOUT) as store,
    ):
        keys = make_keys(store, threads)
        at_once = {
            "1 thread": [keys[:1]],
            f"{threads} threads, one key": [keys[:1]] * threads,
            f"{threads} threads, a key each": [[key] for key in keys],
        }
        charges: dict[str, list[Charges]] = {name: [] for name in at_once}
        for turn in range(rounds):
            for name in in_turn(list(at_once), turn):
                charges[name].append(charge_at_once(store, at_once[name]))
    least = dict.fromkeys(list(at_once)[1:], 2.5)
    yield charges_table("Durable charges by the threads of one process, SQLite", charges, least)
    del charges["1 thread"]
    yield shares_table("What each of these threads had", charges)
    yield _slowest(
        "The slowest of their charges", {name: max(each.latencies[-1] for each in charges[name]) for name in charges}
    )


def slowest_charge(writers: int, charges: int) -> Iterator[Table]:
    """Measure the longest wait of any of many processes that charge one token as fast as they can."""
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
    title = f"The slowest of {writers * charges:,} charges by {writers} processes at once"
    yield _slowest(title, {"SQLiteTokenStore.charge, the slowest": slowest})


def _slowest(title: str, slowest: dict[str, float]) -> Table:
    reference = _TIMEOUT / 3
    rows = [Row(name, seconds, *[seconds / reference] * 3, budget=1.0) for name, seconds in slowest.items()]
    return Table(title, [Row("a third of the store's timeout", reference), *rows])


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
    (key,) = make_keys(store, 1)
    return key.removeprefix("sk-")


def _charge(name: str, charge: Callable[[str], Any], *, budget: float | None = None) -> Contender:
    # One call per turn: each waits for the disk, and other work of the disk then disturbs a single call.
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
        execute("SELECT used FROM model_usage WHERE token_id = ? AND model = ?", (token_id, MODEL)).fetchone()
        execute(_UPDATE, (used + 1, available - 1, token_id))
        execute(
            "INSERT INTO model_usage (token_id, model, used) VALUES (?, ?, 1)"
            " ON CONFLICT (token_id, model) DO UPDATE SET used = used + 1",
            (token_id, MODEL),
        )
        execute(_INSERT, (_new_id(), token_id, operation_id, MODEL, now, now))
        execute(_ADD_DAY, (token_id, time.strftime("%Y-%m-%d", time.gmtime(now)), MODEL))
        execute("COMMIT")

    return charge
