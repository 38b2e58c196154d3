"""Exceptions that arrive anywhere, as those of a signal handler do, or of what ends a worker or a greenlet.

They leave nothing behind: the process's write lock is free, no connection is lent out, no transaction is open, the
totals are exact, and a child that is forked then may use the store. That holds as soon as the exception has left the
call, while it is still being handled and its traceback keeps every frame alive.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from forks import forked
from holders import create
from interrupts import Interrupt, interrupted_at
from processes import in_a_process

from usage_middleware import QuotaExceeded, SQLiteTokenStore, StoreError, TokenNotFound, forks
from usage_middleware.stores.sqlite import group_commit
from usage_middleware.stores.sqlite.group_commit import Turn, Unit

pytestmark = pytest.mark.slow


class Ledger:
    """A store that waits for nothing, one token in it, and another connection that would find what is left behind."""

    def __init__(self, path):
        self.path = path
        self.store = SQLiteTokenStore(path, timeout=0, synchronous="OFF")
        self.key, self.token = create(self.store, total_available=10**12)
        self.other = sqlite3.connect(path, timeout=0, isolation_level=None)

    def close(self):
        self.store.close()
        self.other.close()

    def used(self):
        ((used, operations, days),) = self.other.execute(
            "SELECT total_used, (SELECT coalesce(sum(held), 0) FROM operations),"
            " (SELECT coalesce(sum(used), 0) FROM usage_by_day) FROM tokens"
        )
        assert used == operations == days
        return used

    def check_nothing_is_left(self, store):
        pool = store._connections._pools.get()
        assert not pool.queue.writing
        # Not even one that is closed and counts as open.
        assert forks._held.get(os.getpid(), set()) <= {*_references(pool), *_references(self.pool)}
        self.other.execute("BEGIN IMMEDIATE")
        self.other.execute("ROLLBACK")
        # Nor the lock of a reader that opens it.
        if os.path.exists("/proc/locks"):
            assert not re.search(rf"OFDLCK .*:{os.stat(self.path).st_ino} ", Path("/proc/locks").read_text())

    @property
    def pool(self):
        return self.store._connections._pools.get()


def _references(pool):
    return {reference for reference in forks._held.get(os.getpid(), ()) if reference() in pool.idle}


@pytest.fixture
def ledger(tmp_path):
    with closing(Ledger(tmp_path / "tokens.db")) as ledger:
        yield ledger


def refused(ledger, store):
    with pytest.raises(QuotaExceeded):
        store.charge(ledger.key, 10**13)


def same(ledger):
    return ledger.store


def idle(ledger):
    """Return a store whose connections were closed, as after a fork."""
    ledger.store._connections.close_idle()
    return ledger.store


def new(ledger):
    return SQLiteTokenStore(ledger.path, timeout=0, synchronous="OFF")


def reader(ledger):
    return SQLiteTokenStore(ledger.path, timeout=0, read_only=True)


def reader_in_use(ledger):
    store = reader(ledger)
    store.get(ledger.key)
    return store


CALLS = {
    "get": (same, lambda ledger, store: store.get(ledger.key)),
    "get, first": (new, lambda ledger, store: store.get(ledger.key)),
    "get, read-only": (reader_in_use, lambda ledger, store: store.get(ledger.key)),
    "get, read-only, first": (reader, lambda ledger, store: store.get(ledger.key)),
    "charge": (same, lambda ledger, store: store.charge(ledger.key, 7, model="gpt-4o")),
    "charge, first": (idle, lambda ledger, store: store.charge(ledger.key, 7)),
    "charge, refused": (same, refused),
    "fork": (same, lambda ledger, store: forks._before_fork()),
}


def ignore_interrupts_of_finalizers(unraisable):
    # An exception that arrives in one goes nowhere, whatever the program does.
    if not isinstance(unraisable.exc_value, Interrupt):
        sys.__unraisablehook__(unraisable)


def interrupt_each_step(path, name, stride):
    sys.unraisablehook = ignore_interrupts_of_finalizers
    prepare, call = CALLS[name]
    charged = set()

    def check():
        ledger.check_nothing_is_left(store)
        charged.add(ledger.used() - before)

    number = interrupts = 0
    is_interrupted = True
    with closing(Ledger(path)) as ledger:
        while is_interrupted:
            number += int(stride)
            before = ledger.used()
            store = prepare(ledger)
            is_interrupted = interrupted_at(number, lambda: call(ledger, store), check)  # noqa: B023
            forks._forking.clear()  # as a fork that goes on does
            if interrupts % 50 == 0:
                assert forked(lambda: store.get(ledger.key).id) == str(ledger.token.id)  # noqa: B023
            if store is not ledger.store:
                store.close()
            interrupts += is_interrupted
        # Complete or not at all.
        assert charged <= {0, 7}
        assert ledger.store.charge(ledger.key, 5).total_used == ledger.used()
    print(interrupts)


# In a process of its own: an exception at an opcode that ends a handler leaves Python with that handler for good.
@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_any_step(tmp_path, full, name):
    # A look-up has few steps.
    stride = 1 if full or name == "get, read-only" else 7
    assert int(in_a_process(interrupt_each_step, tmp_path / "tokens.db", name, stride)) > 5


# --- Signals


class Alarm:
    """A signal handler that raises an exception, once, if a call is going on."""

    def __init__(self, numbers, longest):
        self._numbers = numbers
        self._longest = longest
        self._is_armed = False
        self.raised = 0
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, number, frame):
        if self._is_armed:
            self._is_armed = False
            self.raised += 1
            raise Interrupt

    def sound_during(self, call):
        """Return whether the call has returned."""
        try:
            self._is_armed = True
            signal.setitimer(signal.ITIMER_REAL, self._numbers.uniform(1e-6, self._longest))
            call()
            self._is_armed = False
        except Interrupt:
            return False
        return True


def charge_among_signals(path, count):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    sys.unraisablehook = ignore_interrupts_of_finalizers
    numbers = random.Random(count)
    store = SQLiteTokenStore(path, timeout=20, synchronous="OFF")
    key, token = create(store, total_available=10**12)
    alarm = Alarm(numbers, 0.001)
    done = threading.Event()
    charged_by_others = []

    def charge():
        while not done.is_set():
            store.charge(key, 1000)
            charged_by_others.append(1000)
            done.wait(0.0005)

    # Some do the main thread's work in their transactions, and it does theirs.
    others = [threading.Thread(target=charge) for _ in range(4)]
    for other in others:
        other.start()
    answered = []
    try:
        for number in range(int(count)):
            if number % 2:
                alarm.sound_during(lambda: store.get(key))
            elif alarm.sound_during(lambda: store.charge(key, 1, idempotency_key=str(number))):  # noqa: B023
                answered.append(number)
            if number % 500 == 0:
                assert forked(lambda: store.get(key).id) == str(token.id)
    finally:
        done.set()
        for other in others:
            other.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
    made = [number for number in range(int(count)) if store.find_operation(key, str(number)) is not None]
    assert set(answered) <= set(made)
    assert store.get(key).total_used == len(made) + sum(charged_by_others)
    assert len(forks._held[os.getpid()]) == len(store._connections._pools.get().idle)
    print(alarm.raised, len(made) - len(answered))


def test_signal_handlers_that_raise(tmp_path, full):
    count = 50_000 if full else 2_000
    raised, made_and_not_answered = map(int, in_a_process(charge_among_signals, tmp_path / "tokens.db", count).split())
    assert raised > count / 20
    if full:
        assert made_and_not_answered  # some came between the commit and the answer


def charge_in_a_storm(path, count):
    """Exceptions come so fast that some arrive while an earlier one is being dealt with."""
    sys.unraisablehook = ignore_interrupts_of_finalizers
    store = SQLiteTokenStore(path, timeout=20, synchronous="OFF")
    key, _ = create(store, total_available=10**12)

    def handle(number, frame):
        # One that arrives in the hook would be printed.
        while frame is not None and frame.f_code is not ignore_interrupts_of_finalizers.__code__:
            if frame.f_code is SQLiteTokenStore.charge.__code__:
                raise Interrupt
            frame = frame.f_back

    signal.signal(signal.SIGALRM, handle)
    numbers = random.Random(count)
    for number in range(int(count)):
        signal.setitimer(signal.ITIMER_REAL, numbers.uniform(1e-6, 5e-4), 3e-5)
        with suppress(Interrupt):
            store.charge(key, 1, idempotency_key=str(number))
        signal.setitimer(signal.ITIMER_REAL, 0)
    made = [number for number in range(int(count)) if store.find_operation(key, str(number)) is not None]
    assert store.get(key).total_used == len(made)
    assert store.charge(key, 1).total_used == len(made) + 1
    assert len(forks._held[os.getpid()]) == len(store._connections._pools.get().idle)


def test_several_exceptions_at_once(tmp_path, full):
    in_a_process(charge_in_a_storm, tmp_path / "tokens.db", 5_000 if full else 500)


def test_a_turn_whose_owner_died_is_taken(tmp_path, monkeypatch):
    """As after more exceptions at once than anything can be made for."""
    monkeypatch.setattr("usage_middleware.stores.sqlite.group_commit._LOOK_INTERVAL", 0.01)
    with SQLiteTokenStore(tmp_path / "tokens.db", timeout=5) as store:
        key, _ = create(store)
        turn = Turn(store._connections._pools.get().queue, Unit(None))
        assert turn.take(0)
        with pytest.raises(StoreError, match="locked"):
            SQLiteTokenStore.charge(_impatient(store), key, 1)
        del turn
        assert store.charge(key, 1).total_used == 1


def test_a_turn_whose_owner_died_is_taken_by_a_thread_that_waits(tmp_path):
    """Nothing wakes it."""
    with SQLiteTokenStore(tmp_path / "tokens.db", timeout=60) as store, ThreadPoolExecutor(1) as thread:
        key, _ = create(store)
        queue = store._connections._pools.get().queue
        turn = Turn(queue, Unit(None))
        assert turn.take(0)
        charge = thread.submit(store.charge, key, 1)
        while not queue.waiting:
            time.sleep(0.001)
        del turn
        assert charge.result(20).total_used == 1


def interrupt_turns_without_an_end(path, stride):
    sys.unraisablehook = ignore_interrupts_of_finalizers
    group_commit._LOOK_INTERVAL = 0.001
    end = Turn.end
    is_first = []

    def never_end(turn):
        is_first.append(sys.exc_info()[1] is None)
        raise Interrupt

    number = used = 0
    with SQLiteTokenStore(path, timeout=5, synchronous="OFF") as store:
        key, _ = create(store, total_available=10**12)
        while True not in is_first:  # until the end is reached before the step
            is_first.clear()
            number += int(stride)
            Turn.end = never_end
            interrupted_at(number, lambda: store.charge(key, 1), lambda: None)
            Turn.end = end
            before, used = used, store.charge(key, 1).total_used
            assert used - before in (1, 2)
            assert not store._connections._pools.get().queue.writing
    print(number)


def test_a_turn_that_ends_nowhere_is_taken_wherever_it_was(tmp_path, full):
    """As after so many exceptions that each end of it is interrupted at its first step."""
    assert int(in_a_process(interrupt_turns_without_an_end, tmp_path / "tokens.db", 1 if full else 3)) > 500


def _impatient(store):
    store._connections._timeout = 0.05
    return store


def test_a_connection_that_an_unknown_exception_has_passed_is_not_used_again(ledger):
    pool = ledger.pool

    def refuse(transaction):
        raise TokenNotFound

    def fail(transaction):
        raise error

    ledger.store.get(ledger.key)
    (before,) = pool.idle
    with pytest.raises(TokenNotFound):
        ledger.store._transact(refuse)
    assert pool.idle == [before]
    for error in (Interrupt(), RuntimeError(), MemoryError()):
        with pytest.raises(type(error)):
            ledger.store._transact(fail)
        assert before not in pool.idle
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            before.connection.execute("SELECT 1")
        ledger.store.get(ledger.key)
        (before,) = pool.idle
