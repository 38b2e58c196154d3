"""Each statement of a transaction fails once, in which one thread does the work of others.

The failure is the matter of one caller at most. What the others wait for is done, once.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from sqlite_ledger import content, open_store
from sqlite_statements import each_error
from waiting import until

pytestmark = pytest.mark.slow

OTHERS = (20, 30, 40)


class Together(NamedTuple):
    """What became of a charge of 1 and of those for which it wrote."""

    ran: list[str]
    outcome: Any
    others: list[Any]


def charge_together(path, statements, errors=()):
    """Charge in four threads at once. The first that writes does the work of the others."""
    with open_store(path) as store, ThreadPoolExecutor(len(OTHERS)) as threads:
        store.get("one")
        queue = store._connections._pools.get().queue
        started = []

        def start():
            # timeout=0 of the store is for locks of other processes.
            store._connections._timeout = 60
            started.extend(threads.submit(store.charge, "one", units) for units in OTHERS)
            until(lambda: len(queue.waiting) == len(OTHERS))

        with statements.watched({(1, "after"): start, **dict(errors)}) as ran:
            outcome = try_to_charge(store)
            others = [charge.exception(60) for charge in started]
        assert ran[0] == "BEGIN IMMEDIATE"
        used = store.get("one").total_used
        store.charge("one", 1, idempotency_key="first")
        assert store.get("one").total_used - used == (outcome is not None)
        return Together(ran, outcome, others)


def try_to_charge(store):
    try:
        store.charge("one", 1, idempotency_key="first")
    except BaseException as error:
        return error
    return None


def books(path):
    """Return all that charges change, without the random ids of operations."""
    rows = content(path)
    return rows["tokens"], sorted(row[2:] for row in rows["operations"]), rows["usage_by_day"]


@each_error
def test_a_statement_that_fails(ledger, tmp_path, monkeypatch, statements, error, raised, full):
    # All are taken in, on however slow a machine.
    monkeypatch.setattr("usage_middleware.stores.sqlite.group_commit._LONGEST", 60)
    path = shutil.copyfile(ledger, tmp_path / "whole.db")
    ran, *_ = charge_together(path, statements)
    assert (ran.count("SAVEPOINT unit"), ran.count("COMMIT")) == (len(OTHERS), 1)
    expected = books(path)
    end = ran.index("COMMIT") + 1
    outcomes = set()
    for number in [*range(2, end, 1 if full else 4), end]:
        for when in ("before", "after") if number < end else ("before",):
            path = shutil.copyfile(ledger, tmp_path / f"{number} {when}.db")
            done = charge_together(path, statements, {(number, when): error})
            assert done.outcome is None or isinstance(done.outcome, raised)
            assert done.others == [None] * len(OTHERS)
            assert books(path) == expected
            outcomes.add(done.outcome is None)
            path.unlink()
    print(f"{end} statements, {outcomes}")
    assert False in outcomes
