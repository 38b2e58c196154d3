import sys

import pytest
from interrupts import Interrupt

from usage_middleware import MemoryTokenStore
from usage_middleware.testing import QuotaStoreContract


class TestMemoryTokenStore(QuotaStoreContract):
    is_shared = False

    def make_store(self, tmp_path):
        return MemoryTokenStore()


@pytest.mark.parametrize("number", range(1, 50, 3))
def test_an_interrupted_rollback_is_finished_by_the_next_call(number):
    store = MemoryTokenStore()
    key, token = store.create(total_available=100)
    operation = store.reserve(key, 60, model="gpt-4o", idempotency_key="once")
    before = list(store.records())
    left = number

    def step(frame, event, argument):
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupt
        return step

    def fail(transaction):
        transaction.delete(token.id)
        sys.settrace(step)  # what is called from here on is the rollback
        raise LookupError

    trace = sys.gettrace()
    try:
        with pytest.raises((LookupError, Interrupt)) as caught:
            store._transact(fail)
    finally:
        sys.settrace(trace)
    assert caught.type is Interrupt
    assert store.get(key) == store.get_by_id(token.id)
    assert list(store.records()) == before
    assert list(store.open_reservations()) == [operation]
    assert store.settle(operation, 1).total_available == 99
