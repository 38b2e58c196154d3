"""Very many lapsed reservations: a refused charge releases them a portion at a time, and keeps what it has released."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import databases
import pytest

from usage_middleware import Lookup, MemoryTokenStore, Operation, QuotaExceeded, SQLiteTokenStore, open_store
from usage_middleware.operations import take
from usage_middleware.stores.hooks import MOST_LAPSED

NOW = 1_800_000_000.0


@pytest.fixture(
    params=["memory", "sqlite", *(pytest.param(kind, marks=pytest.mark.servers) for kind in databases.KINDS)]
)
def store(request, tmp_path):
    if request.param == "memory":
        yield MemoryTokenStore()
    elif request.param == "sqlite":
        with SQLiteTokenStore(tmp_path / "tokens.db", synchronous="OFF") as store:
            yield store
    else:
        with request.getfixturevalue(request.param).database() as url, open_store(url) as store:
            yield store


def reserve(store, token_id, count):
    """Make as many reservations of one unit, all of which lapse soon, in one transaction."""

    def work(transaction):
        account = transaction.load(Lookup(token_id=token_id, now=NOW, most_lapsed=0))
        for number in range(count):
            made = Operation(
                id=f"{token_id}/{number}",
                token_id=token_id,
                kind="reserve",
                amount=1,
                expires_in=1.0,
                expires_at=NOW + 1,
                created_at=NOW,
            )
            changes = take(account, made, NOW)
            transaction.save(changes)
            account = dataclasses.replace(account, token=changes.token)

    store._transact(work)


@pytest.mark.slow
def test_a_charge_that_is_refused_releases_them_all(store, full, monkeypatch):
    count = 20_000 if full else 1_000
    store._clock = lambda: NOW
    key, token = store.create(total_available=count)
    other_key, other = store.create(total_available=count)
    reserve(store, token.id, count)
    store._clock = lambda: NOW + 1
    assert store.get(key).held == count

    transact, held = store._transact, []

    def watch(work):
        result = transact(work)
        held.append(store.get(key).held)
        # Nothing is locked between two portions.
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as thread:
            patch.setattr(store, "_transact", transact)
            thread.submit(store.charge, other_key, 1).result(60)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(store, "_transact", watch)
        with pytest.raises(QuotaExceeded) as caught:
            store.charge(key, count + 1)
    assert (caught.value.requested, caught.value.available, caught.value.held) == (count + 1, count, 0)
    assert held == list(range(count - MOST_LAPSED, -1, -MOST_LAPSED))
    assert store.get_by_id(other.id).total_used == len(held)
    # It is all there, and is not released again.
    assert store.charge(key, count).total_available == 0
    assert list(store.open_reservations()) == []
