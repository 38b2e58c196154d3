"""If a reservation cannot be settled, its answer is sent nevertheless, and settling is retried."""

import gc
import logging
import os
import threading

import pytest
from metering import KEY, Host, Metered
from processes import end_within

from usage_middleware import FromHeader, MemoryTokenStore, OperationConflict, StoreError, TokenNotFound
from usage_middleware.wsgi.meter import settlement


class Failing(MemoryTokenStore):
    """A store that fails to settle while ``error`` is set, and records what it has settled."""

    error = None

    def __init__(self):
        super().__init__()
        self.settled = []

    def settle(self, operation, amount, **tokens):
        if self.error is not None:
            raise self.error
        self.settled.append((operation.id, amount))
        return super().settle(operation, amount, **tokens)


@pytest.fixture
def metered():
    with Failing() as store:
        yield Metered(store, total_available=10_000)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_failed_settle_does_not_stop_the_answer_and_is_retried(metered, caplog):
    metered.store.error = StoreError("the database is locked")
    for _ in range(3):
        assert metered.serve().finish() == b"done"
    operations = [s.operation_id for s in metered.settlements]
    assert [s.settled for s in metered.settlements] == [False] * 3
    assert [s.units for s in metered.settlements] == [1] * 3
    assert len(list(metered.store.open_reservations())) == 3
    for line, operation in zip(lines(caplog), operations, strict=True):
        assert "the database is locked" in line
        assert f"usage-middleware settle {operation} 1" in line
        assert KEY not in line
    # The next request settles them, after its own and in order.
    metered.store.error = None
    metered.serve().finish()
    assert [operation for operation, _ in metered.store.settled] == [metered.settlements[3].operation_id, *operations]
    assert metered.used == 4


def test_the_logged_command_can_be_pasted(metered, caplog, tmp_path):
    """An operator copies it from the log."""
    metered.store.error = StoreError("gone")
    metered.serve().finish()
    command = lines(caplog)[0].partition("usage-middleware ")[2].split()
    assert command == ["settle", metered.settlement.operation_id, "1"]


def test_a_settle_by_hand_is_not_charged_again(metered, caplog):
    metered.store.error = StoreError("the database is locked")
    metered.serve().finish()
    metered.store.error = None
    MemoryTokenStore.settle(metered.store, metered.settlement.operation_id, 5)
    metered.serve().finish()
    assert metered.token.total_used == 5 + 1
    assert "OperationConflict" in lines(caplog)[-1]
    # It is not tried a third time.
    count = len(lines(caplog))
    metered.serve().finish()
    assert len(lines(caplog)) == count


@pytest.mark.parametrize("error", [OperationConflict("settled"), TokenNotFound("deleted"), ValueError("too large")])
def test_what_would_fail_again_is_not_retried(metered, caplog, error):
    metered.store.error = error
    metered.serve().finish()
    metered.store.error = None
    metered.serve().finish()
    assert [operation for operation, _ in metered.store.settled] == [metered.settlements[1].operation_id]
    assert "It is not tried again" in lines(caplog)[0]
    # The text of another package's error may contain anything.
    assert "too large" not in caplog.text


def test_other_errors_are_retried_and_not_quoted(metered, caplog):
    metered.store.error = ConnectionError(f"the key {KEY}")
    metered.serve().finish()
    assert "ConnectionError" in caplog.text
    assert KEY not in caplog.text
    metered.store.error = None
    metered.serve().finish()
    assert metered.used == 2


def test_a_settle_that_is_interrupted_is_logged(metered, caplog):
    metered.store.error = SystemExit(1)
    with pytest.raises(SystemExit):
        metered.serve().finish()
    (operation,) = metered.store.open_reservations()
    assert f"usage-middleware settle {operation.id} 1" in lines(caplog)[0]


def test_the_queue_is_bounded(metered, monkeypatch):
    monkeypatch.setattr(settlement, "_MOST_WAITING", 5)
    metered.store.error = StoreError("down")
    for _ in range(8):
        metered.serve().finish()
    metered.store.error = None
    for _ in range(2):
        metered.serve().finish()
    kept = [s.operation_id for s in metered.settlements[3:8]]
    assert [operation for operation, _ in metered.store.settled][1:6] == kept
    assert len(list(metered.store.open_reservations())) == 3


def test_one_request_retries_only_some(metered, monkeypatch):
    monkeypatch.setattr(settlement, "_MOST_AT_ONCE", 2)
    metered.store.error = StoreError("down")
    for _ in range(5):
        metered.serve().finish()
    metered.store.error = None
    left = []
    for _ in range(3):
        metered.serve().finish()
        left.append(len(list(metered.store.open_reservations())))
    assert left == [3, 1, 0]


def test_a_retry_that_fails_keeps_the_order(metered):
    metered.store.error = StoreError("down")
    for _ in range(3):
        metered.serve().finish()
    waiting = [s.operation_id for s in metered.settlements]
    settle, tried = Failing.settle, []

    def once(operation, amount, **tokens):
        tried.append(operation.id)
        metered.store.error = StoreError("down") if len(tried) > 2 else None
        return settle(metered.store, operation, amount, **tokens)

    metered.store.settle = once
    metered.serve().finish()
    assert tried[1:] == waiting[:2]
    metered.store.settle = settle.__get__(metered.store)
    metered.store.error = None
    metered.serve().finish()
    assert [operation for operation, _ in metered.store.settled][-2:] == waiting[1:]
    assert metered.used == 5


def test_a_settle_that_waits_blocks_no_later_request():
    """The reservation that waits holds all that is left. It is settled before a later request is refused."""
    with Failing() as store:
        cost = FromHeader("X-Usage-Cost", most=10, least=5)
        metered = Metered(store, Host(headers=[("X-Usage-Cost", "1")]), total_available=10, cost=cost)
        store.error = StoreError("down")
        metered.serve().finish()
        assert metered.serve().status == 429
        store.error = None
        assert metered.serve().finish() == b"done"
        assert metered.used == 2


def test_threads_settle_each_reservation_once(metered):
    metered.store.error = StoreError("down")
    for _ in range(200):
        metered.serve().finish()
    metered.store.error = None
    barrier = threading.Barrier(8)

    def serve():
        barrier.wait()
        for _ in range(10):
            metered.serve().finish()

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # While one thread retries, the others do not wait for it.
    for _ in range(20):
        metered.serve().finish()
    settled = [operation for operation, _ in metered.store.settled]
    assert len(settled) == len(set(settled)) == 300
    assert metered.used == 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_the_queue_to_its_parent(metered):
    metered.store.error = StoreError("down")
    metered.serve().finish()
    metered.store.error = None
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            end_within(60)
            metered.serve().finish()
            os.write(sender, b"%d" % len(metered.store.settled))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receiver, 10) == b"1"
    os.close(receiver)
    os.close(sender)
    metered.serve().finish()
    assert len(metered.store.settled) == 2


@pytest.mark.slow
def test_an_answer_that_is_never_closed_is_settled_with_the_next_request(metered):
    """It cannot be settled when Python frees it, as this thread may hold a lock of the store then."""

    def drop():
        metered.serve().next()
        metered.app.environ = None
        gc.collect()

    drop()
    drop()
    assert not metered.settlements
    assert not metered.store.settled
    metered.serve().finish()
    assert [s.outcome for s in metered.settlements] == ["completed", "abandoned", "abandoned"]
    assert metered.used == 3
    # While the store fails, it waits with the others.
    metered.store.error = StoreError("down")
    metered.serve().close()
    drop()
    metered.store.error = None
    for _ in range(2):
        metered.serve().finish()
    assert metered.used == 3 + 4


def test_what_on_settled_raises_is_logged(caplog):
    def fail(settled):
        raise ValueError("a bug of the host")

    with MemoryTokenStore() as store:
        metered = Metered(store, on_settled=fail)
        assert metered.serve().finish() == b"done"
        assert metered.token.total_used == 1
    assert "on_settled" in lines(caplog)[0]


def test_a_settlement_has_all_its_fields(store):
    metered = Metered(store, cost=3, model="gpt-4o")
    metered.serve().finish()
    settled = metered.settlement
    (operation,) = store.history(metered.token_id)
    assert settled == settlement.Settlement(
        operation_id=operation.id,
        token_id=metered.token_id,
        model="gpt-4o",
        reserved=3,
        units=3,
        input_tokens=0,
        output_tokens=0,
        basis="fixed",
        outcome="completed",
        status=200,
        seconds=settled.seconds,
        settled=True,
        added=settled.added,
    )
    assert 0 < settled.added < settled.seconds
    assert KEY not in repr(settled)
