"""An SQLite ledger whose clock stands still, and every call that can be made of it."""

import secrets
import sqlite3
import uuid
from contextlib import closing, contextmanager

import pytest

from usage_middleware import SQLiteTokenStore

NOW = 1_800_000_000.0


AN_HOUR = 3600
A_LOT = 10**12


def content(path):
    """The rows of each table that has any, of a database that is sound and that nobody has locked."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> '_sqlite_migrations'"
        ).fetchall()
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for (table,) in tables}
        return {table: rows[table] for table in rows if rows[table]}


def open_store(path, *, now=NOW, synchronous="OFF"):
    """A store whose clock stands still, and which waits for nobody. No power fails here, so it need not wait for the
    disk either."""
    store = SQLiteTokenStore(path, timeout=0, synchronous=synchronous)
    store._now = lambda: now
    return store


@contextmanager
def nothing_random():
    """Within it, the same call leaves the same rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
        patch.setattr(secrets, "choice", lambda sequence: sequence[0])
        yield


WRITES = {
    "create": lambda store: store.create(name="New", total_available=5),
    "update": lambda store: store.update(1, name="Changed", enabled=False),
    "rotate": lambda store: store.rotate(1),
    "delete": lambda store: store.delete(1),
    "charge": lambda store: store.charge("one", 7),
    "charge for a model": lambda store: store.charge("one", 7, model="gpt-4o"),
    "charge with an id": lambda store: store.charge("one", 7, model="gpt-4o", idempotency_key="new"),
    "charge that takes back": lambda store: store.charge("two", 500, model="free"),
    "charge by id": lambda store: store.charge_by_id(1, 7, idempotency_key="new"),
    "reserve": lambda store: store.reserve("one", 7),
    "reserve with an id": lambda store: store.reserve("one", 7, model="gpt-4o", idempotency_key="new"),
    "settle": lambda store: store.settle("open", 250),
    "settle late": lambda store: store.settle("lapsed", 1200),
    "refund": lambda store: store.refund("charge", 40),
    "refund with an id": lambda store: store.refund("charge", idempotency_key="new"),
    "grant": lambda store: store.grant(1, 10),
    "grant that takes back": lambda store: store.grant(2, -1000),
    "prune": lambda store: store.prune(NOW),
}


READS = {
    "get": lambda store: store.get("one"),
    "find": lambda store: store.get_by_id(1),
    "tokens": lambda store: list(store.tokens()),
    "history": lambda store: list(store.history(1)),
    "model_usage": lambda store: store.model_usage(1),
}


CALLS = {**WRITES, **READS}


# A caller who does not know whether they were made calls again.
REPEATABLE = ("charge with an id", "charge by id", "reserve with an id", "settle", "settle late", "refund with an id")
