"""Calls that race. Each is stopped midway while another is made."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date

import pytest
from holders import create
from sql_faults import hooked_store, waits
from waiting import DEADLINE, until

from usage_middleware import (
    OperationConflict,
    OperationNotFound,
    TokenNotFound,
)


def test_two_tokens_and_one_idempotency_key(database, store):
    (key, token), (other_key, other) = create(store), create(store)
    with hooked_store(
        database, "INSERT INTO usage_operations", lambda: store.charge(other_key, 2, idempotency_key="x")
    ) as racing:
        racing.charge(key, 1, idempotency_key="x")
    assert (store.get_by_id(token.id).total_used, store.get_by_id(other.id).total_used) == (1, 2)


def refused(says):
    return pytest.raises(ValueError, match=says)


def test_two_tokens_and_one_key(database, store):
    with (
        hooked_store(database, "INSERT INTO usage_tokens", lambda: store.create(key="a-key")) as racing,
        pytest.raises(ValueError, match="in use"),
    ):
        racing.create(key="a-key")
    assert len(list(store.tokens())) == 1


@pytest.mark.parametrize("give_up", ["rotate", "delete"])
def test_a_key_that_comes_and_goes_while_it_is_brought(database, store, give_up):
    def come_and_go():
        _, token = store.create(key="a-key")
        getattr(store, give_up)(token.id)

    with (
        hooked_store(database, "INSERT INTO usage_tokens", come_and_go) as racing,
        pytest.raises(ValueError, match="was before"),
    ):
        racing.create(key="a-key")
    assert store.get("a-key") is None


@pytest.mark.parametrize(
    ("give_up", "beginning"),
    [
        pytest.param(method, beginning, id=f"{method}, before its {beginning}")
        for method, beginnings in {
            "rotate": ["INSERT INTO usage_retired_keys", "UPDATE usage_tokens"],
            "delete": ["INSERT INTO usage_retired_keys", "DELETE FROM usage_models", "DELETE FROM usage_tokens"],
        }.items()
        for beginning in beginnings
    ],
)
def test_a_key_that_is_brought_while_it_goes(database, store, give_up, beginning):
    _, token = create(store, key="a-key")
    told = []

    def bring():
        with pytest.raises(ValueError, match="was before") as caught:
            store.create(key="a-key")
        told.append(caught)

    with hooked_store(database, beginning, bring) as racing:
        getattr(racing, give_up)(token.id)
    assert told
    assert store.get("a-key") is None
    with pytest.raises(ValueError, match="was before"):
        store.create(key="a-key")


@pytest.mark.parametrize(
    ("call", "meanwhile", "error"),
    [
        pytest.param(lambda s, k, i: s.charge(k, 1), lambda s, i: s.rotate(i), TokenNotFound, id="rotated"),
        pytest.param(lambda s, k, i: s.charge(k, 1), lambda s, i: s.delete(i), TokenNotFound, id="deleted"),
        pytest.param(
            lambda s, k, i: s.settle(s.find_operation(k, "r"), 1),
            lambda s, i: s.delete(i),
            TokenNotFound,
            id="settled, deleted",
        ),
        pytest.param(
            lambda s, k, i: s.settle(s.find_operation(k, "r"), 1),
            lambda s, i: s.settle(next(s.open_reservations()), 2),
            OperationConflict,
            id="settled twice",
        ),
        pytest.param(
            lambda s, k, i: s.refund(s.find_operation(k, "c")),
            lambda s, i: s.prune(2**40),
            OperationNotFound,
            id="refunded, pruned",
        ),
    ],
)
def test_what_changes_before_the_token_is_locked(database, store, call, meanwhile, error):
    """What a call has read before it had the lock is not used."""
    key, token = create(store)
    store.charge(key, 10, idempotency_key="c")
    store.reserve(key, 20, idempotency_key="r")
    with (
        hooked_store(database, "SELECT usage_tokens", lambda: meanwhile(store, token.id)) as racing,
        pytest.raises(error),
    ):
        call(racing, key, token.id)


def test_a_charge_that_waits_for_another_sees_what_it_left(database, store):
    """With a snapshot from before the lock, each of the two would see all that is available."""
    key, token = create(store, total_available=10)
    store.charge(key, 0)
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert go_on.wait(DEADLINE)

    with ThreadPoolExecutor(2) as threads, hooked_store(database, "UPDATE usage_tokens", hold) as first:
        # A store that had taken a snapshot with the first statement, as REPEATABLE READ does.
        slow = threads.submit(first.charge, key, 7)
        assert inside.wait(DEADLINE)
        fast = threads.submit(store.charge, key, 7)
        until(lambda: waits(database))
        go_on.set()
        assert slow.result(DEADLINE).total_used == 7
        assert "3 quota units left" in str(fast.exception(DEADLINE))
    assert store.get_by_id(token.id).total_available == 3


def test_prune_races_with_all_else(database, store, full):
    tokens = [create(store, total_available=10**9) for _ in range(4)]
    rounds = 500 if full else 25
    done = threading.Event()

    def use(number):
        key, _ = tokens[number % len(tokens)]
        for turn in range(rounds):
            name = f"{number}/{turn}"
            store.charge(key, 5, model="a", idempotency_key=name)
            charge = store.find_operation(key, name)
            with suppress(OperationNotFound):
                store.refund(charge or "pruned", 2)
            reservation = store.reserve(key, 7, model="b", expires_in=0.001 if turn % 2 else 600)
            with suppress(OperationNotFound):
                store.settle(reservation, 3)

    def prune():
        forgotten = 0
        while not done.is_set():
            forgotten += store.prune(time.time() - 0.005)
        return forgotten

    with ThreadPoolExecutor(8) as threads:
        pruned = [threads.submit(prune) for _ in range(2)]
        try:
            for used in [threads.submit(use, number) for number in range(6)]:
                used.result()
        finally:
            done.set()
        forgotten = sum(future.result() for future in pruned)
    for _, token in tokens:
        token = store.get_by_id(token.id)
        assert token.total_granted == 10**9
        # What was pruned counts on, so that the models say the same as the total.
        assert sum(store.model_usage(token.id).values()) == token.total_used
        assert sum(day.used for day in store.usage_by_day(token.id, date.min, date.max)) == token.total_used
        assert token.held == sum(operation.held for operation in store.history(token.id) if operation.is_open)
    assert forgotten + store.prune(time.time() + 1) > 0
    left = [operation for _, token in tokens for operation in store.history(token.id)]
    assert all(operation.is_open and operation.held for operation in left)
