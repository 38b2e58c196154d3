"""An SQLite ledger whose clock stands still, and all calls of a store."""

import itertools
import secrets
import sqlite3
from contextlib import closing, contextmanager

import pytest

from usage_middleware import SQLiteTokenStore

NOW = 1_800_000_000.0  # 2027-01-15 08:00 UTC
AN_HOUR = 3600
A_DAY = 24 * AN_HOUR
A_LOT = 10**12


def content(path):
    """Check that the database is sound and not locked, and return the rows of each table that has any."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'usage_schema'"
        ).fetchall()
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for (table,) in tables}
        return {table: rows[table] for table in rows if rows[table]}


def open_store(path, *, now=NOW, synchronous="OFF"):
    """Return a store whose clock stands still and that does not wait for locks.

    It does not wait for the disk either, as no test simulates a power failure.
    """
    return SQLiteTokenStore(path, timeout=0, synchronous=synchronous, clock=lambda: now)


@contextmanager
def nothing_random(first_id=1):
    """Within the context, make all keys the same, and the ids of operations consecutive numbers."""
    numbers = itertools.count(first_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda size: f"{next(numbers):0{2 * size}x}")
        patch.setattr(secrets, "choice", lambda sequence: sequence[0])
        yield


def _always_the_same(call):
    """Return a call that leaves the same rows each time it is made on the same ledger."""

    def called(store):
        with nothing_random():
            return call(store)

    return called


# The ids of the operations of `make_ledger`.
CHARGE, OPEN, LAPSED, REFUND = (f"{number:032x}" for number in (100, 200, 300, 400))


def make_ledger(path):
    """Make a ledger on which all of the calls can be made."""
    with open_store(path, now=NOW - 2 * A_DAY) as store:
        for key in ("one", "two", "three"):
            store.create(key=key, total_available=1000, model_limits={"gpt-4o": 500, "free": True})
        store.create(key="renewing", renewal="daily", renewal_quota=1000)
    with open_store(path, now=NOW - AN_HOUR) as store:
        with nothing_random(100):
            store.charge("one", 100, model="gpt-4o", input_tokens=10, output_tokens=5)
        with nothing_random(200):
            store.reserve("one", 200, model="gpt-4o", expires_in=2 * AN_HOUR)
        with nothing_random(300):
            store.reserve("two", 900, model="free", expires_in=AN_HOUR / 2)
        with nothing_random(400):
            store.refund(CHARGE, 10)
        store.delete(3)


WRITES = {
    name: _always_the_same(call)
    for name, call in {
        "create": lambda store: store.create(name="New", total_available=5),
        "update": lambda store: store.update(1, name="Changed", enabled=False),
        "rotate": lambda store: store.rotate(1),
        "delete": lambda store: store.delete(1),
        "charge": lambda store: store.charge("one", 7),
        "charge for a model": lambda store: store.charge("one", 7, model="gpt-4o", input_tokens=3),
        "charge with a name": lambda store: store.charge("one", 7, model="gpt-4o", idempotency_key="new"),
        "charge that takes back": lambda store: store.charge("two", 500, model="free"),
        "charge that renews": lambda store: store.charge("renewing", 7, idempotency_key="new"),
        "charge by id": lambda store: store.charge_by_id(1, 7, idempotency_key="new"),
        "reserve": lambda store: store.reserve("one", 7),
        "reserve what there is": lambda store: store.reserve("one", 1000, at_least=1),
        "reserve with a name": lambda store: store.reserve("one", 7, model="gpt-4o", idempotency_key="new"),
        "settle": lambda store: store.settle(OPEN, 250, output_tokens=9),
        "settle late": lambda store: store.settle(LAPSED, 1200),
        "refund": lambda store: store.refund(CHARGE, 40),
        "refund with a name": lambda store: store.refund(CHARGE, idempotency_key="new"),
        "grant": lambda store: store.grant(1, 10),
        "grant with a name": lambda store: store.grant(1, 10, idempotency_key="new"),
        "grant that takes back": lambda store: store.grant(2, -1000),
        "prune": lambda store: store.prune(NOW - AN_HOUR + 1),
        "prune that takes back": lambda store: store.prune(NOW),
    }.items()
}
READS = {
    "get": lambda store: store.get("one"),
    "get_by_id": lambda store: store.get_by_id(1),
    "tokens": lambda store: list(store.tokens()),
    "history": lambda store: list(store.history(1)),
    "model_usage": lambda store: store.model_usage(1),
}
CALLS = {**WRITES, **READS}
# It needs a transaction for each token whose reservations it releases, and others to delete operations.
SEVERAL_TRANSACTIONS = ("prune that takes back",)
# A caller may repeat them if it does not know whether they were committed.
REPEATABLE = (
    "charge with a name",
    "charge that renews",
    "charge by id",
    "reserve with a name",
    "settle",
    "settle late",
    "refund with a name",
    "grant with a name",
)
