"""What requests about the past cost: usage by day, and pages of the log of a token with many operations."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from calling import USAGE_PATH, answer_of, environ
from comparing import Contender, Result, compare

from usage_middleware import NewAPI, SQLiteTokenStore, UsageMiddleware

_DAYS = 366
_MODELS = 50
_FIGURES = ("used", "requests", "input_tokens", "output_tokens")
_LOG_PATH = "/api/log/token"
_PAGES = (1, 500, 999)
_DAY = """
    INSERT INTO usage_by_day (token_id, day, model, used, requests, input_tokens, output_tokens)
    VALUES (1, ?, ?, ?, 40, 9000, 3000)
"""
_OPERATION = """
    INSERT INTO operations (id, token_id, kind, amount, model, held, unlimited, final_amount,
                            input_tokens, output_tokens, created_at, changed_at)
    VALUES (?, 1, ?, 100, ?, 100, 0, 100, 900, 300, ?, ?)
"""


def days_of_a_year(rounds: int) -> Iterator[Result]:
    """Measure usage by day of a token that used many models on every day of a year."""
    with _store() as (store, path, key), closing(sqlite3.connect(path, isolation_level=None)) as connection:
        first = store.today() - timedelta(_DAYS - 1)
        days = [first + timedelta(number) for number in range(_DAYS)]
        _fill(path, _DAY, ((str(day), f"model-{n}", 100_000 + n) for day in days for n in range(_MODELS)))
        app = UsageMiddleware(_nothing, store)
        asked = environ(USAGE_PATH + "/days", f"Bearer {key}") | {"QUERY_STRING": f"days={_DAYS}"}

        def by_hand(first: date) -> bytes:
            rows = connection.execute(
                f"SELECT day, model, {', '.join(_FIGURES)} FROM usage_by_day WHERE token_id = 1 AND day >= ?"
                " ORDER BY day, model",
                (str(first),),
            )
            found: dict[str, Any] = {}
            for day, model, *figures in rows:
                found.setdefault(day, {})[model] = dict(zip(_FIGURES, figures, strict=True))
            return json.dumps(found).encode()

        yield compare(
            f"Usage by day: {_DAYS} days of {_MODELS} models",
            Contender("by hand: one query, one json.dumps", "by_hand(item)", lambda: first, by_hand=by_hand, calls=1),
            Contender("UsageMiddleware, SQLiteTokenStore", "ask(app, item)", lambda: dict(asked), **_asking(app)),
            rounds=rounds,
        )


def pages_of_a_log(operations: int, rounds: int) -> Iterator[Result]:
    """Compare pages of the log of one token."""
    with _store() as (store, path, key):
        rows = ((f"{n:032x}", "refund" if n % 20 == 0 else "charge", f"model-{n % 9}", n, n) for n in range(operations))
        _fill(path, _OPERATION, rows)
        app = UsageMiddleware(_nothing, store, new_api=NewAPI())

        def page(name: str, query: str) -> Contender:
            asked = environ(_LOG_PATH, f"Bearer {key}") | {"QUERY_STRING": query}
            return Contender(name, "ask(app, item)", lambda: dict(asked), **_asking(app))

        yield compare(
            f"The log of a token with {operations:,} operations",
            *(page(f"page {number} of 100 rows", f"p={number}&page_size=100") for number in _PAGES),
            page("no page: 1,000 rows", ""),
            rounds=rounds,
        )


@contextmanager
def _store() -> Iterator[tuple[SQLiteTokenStore, Path, str]]:
    """Yield a temporary store with one token, its path, and the key."""
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        path = Path(directory, "tokens.db")
        with SQLiteTokenStore(path) as store:
            key, _ = store.create(name="Used much", total_available=10**12)
            yield store, path, key


def _fill(path: Path, statement: str, rows: Iterator[tuple[object, ...]]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        with connection:
            connection.executemany(statement, rows)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _asking(app: Any) -> dict[str, Any]:
    return {"ask": answer_of, "app": app, "calls": 1}


def _nothing(environ: Any, start_response: Any) -> Any:
    raise AssertionError("called")
