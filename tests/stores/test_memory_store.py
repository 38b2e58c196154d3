import gc
import sys
import threading

import pytest
from forks import forked
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
    gc.collect()  # or the exception goes to a finalizer of what an earlier test has left
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


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_while_a_thread_uses_the_store_can_use_it():
    store = MemoryTokenStore()
    key, _ = store.create(total_available=100)
    inside, end = threading.Event(), threading.Event()

    def work(transaction):
        inside.set()
        assert end.wait(60)

    thread = threading.Thread(target=store._transact, args=[work])
    thread.start()
    try:
        assert inside.wait(60)
        assert forked(lambda: store.charge(key, 1).total_used) == "1"
    finally:
        end.set()
        thread.join()
    assert store.charge(key, 2).total_used == 2
