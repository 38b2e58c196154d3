"""An exception that arrives at any step of a call: a signal handler that raises, a killed greenlet, a worker's timeout.

The step may be ours, SQLAlchemy's, or the driver's. The next calls then have their own answers, none of them hangs, and
a charge was made once or not at all.
"""

from __future__ import annotations

import logging
import random
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial

import pytest
from holders import create
from interrupts import Interrupt, count_steps, interrupted_at
from processes import in_a_process
from sqlalchemy import create_engine
from waiting import DEADLINE

from usage_middleware import SQLAlchemyTokenStore, StoreError
from usage_middleware.stores.sql.pool import ConnectionPool

pytestmark = [pytest.mark.servers, pytest.mark.slow]


def engine_of_a_host(url):
    # Not with SQLAlchemy's own pool: an exception between two lines of QueuePool leaves its locks held, which no store
    # can prevent.
    return create_engine(url, poolclass=ConnectionPool)


class Watched:
    """A store and its tokens, whose answers are checked after each interrupt, in this thread and in another."""

    def __init__(self, url, own):
        self._engine = engine_of_a_host(url)
        self.store = SQLAlchemyTokenStore(url if own == "url" else self._engine)
        self.holders = [create(self.store, name=f"holder {number}", total_available=10**9) for number in range(3)]
        self.charges = 0

    def close(self):
        self.store.close()
        self._engine.dispose()

    def look_up(self):
        self.store.get(self.holders[0][0])

    def charge(self):
        self.store.charge(self.holders[0][0], 5, model="m", idempotency_key=f"charge {self.charges}")

    def check(self):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._check).result(DEADLINE)
        self._check()

    def _check(self):
        for key, token in self.holders:
            found = self.store.get(key)
            assert found is not None
            assert (found.id, found.name) == (token.id, token.name)
        assert self.store.get("sk-unknown-key") is None

    def check_and_repeat_charge(self):
        self.check()
        self.charge()
        self.charges += 1
        assert self.store.get(self.holders[0][0]).total_used == 5 * self.charges


def expect_interrupts():
    sys.unraisablehook = lambda unraisable: None  # of finalizers: an interrupt comes to them, or to what they need
    logging.disable()  # SQLAlchemy logs connections that it could not reset
    # A connection that is dropped without being closed is what a program may leave to the interpreter.
    warnings.simplefilter("ignore", ResourceWarning)


def interrupt_steps(url, own, most):
    """Interrupt a look-up, and a charge, at one of its steps after the other, so many at most, evenly distributed."""
    expect_interrupts()
    with closing(Watched(url, own)) as watched:
        for call, then in (
            (watched.look_up, watched.check),
            (watched.charge, watched.check_and_repeat_charge),
        ):
            then()
            steps = count_steps(call)
            then()
            numbers = range(1, steps + 1, max(steps // int(most), 1))
            interrupts = sum(interrupted_at(number, partial(ignore_errors, call), then) for number in numbers)
            assert interrupts >= 15
            print(f"{call.__name__}: {interrupts} of {steps} steps")
        assert len(list(watched.store.history(watched.holders[0][1].id))) == watched.charges
        # No place in our own pool is lost.
        if own == "url":
            use_at_once(watched.store, 15)


def ignore_errors(call):
    # Some finally of SQLAlchemy's raises an error of its own in place of what has interrupted it.
    with suppress(Exception):
        call()


def use_at_once(store, connections):
    barrier = threading.Barrier(connections)
    with ThreadPoolExecutor(connections) as threads:
        for _ in threads.map(lambda _: store._transact(lambda _: barrier.wait(DEADLINE)), range(connections)):
            pass


# In a process of its own: an exception at an opcode that ends a handler leaves Python with that handler for good.
@pytest.mark.parametrize("own", ["url", "engine"])
def test_calls_that_are_interrupted(database, own, full):
    print(in_a_process(interrupt_steps, database.url, own, 3000 if full else 20, timeout=1800))


def is_of_an_interrupt(error):
    while not isinstance(error, Interrupt | None):
        error = error.__context__  # as with ignore_errors()
    return error is not None


def charge_among_signals(url, key, own, seconds, seed):
    """Reads and charges, while a timer raises at random moments."""
    expect_interrupts()
    chance = random.Random(int(seed))
    store = SQLAlchemyTokenStore(url if own == "url" else engine_of_a_host(url))
    end = time.monotonic() + float(seconds)

    number = interrupts = 0

    def interrupt(*_):
        nonlocal interrupts
        interrupts += 1
        raise Interrupt

    def charge(number):
        while True:
            try:
                return store.charge(key, 1, idempotency_key=str(number))
            except StoreError as error:
                # Whoever runs this may be gone, and the server too.
                if not re.search("not known|refused", str(error)) or time.monotonic() > end + DEADLINE:
                    raise

    def check():
        assert store.get(key).name == "holder", "another's answer"
        assert store.get("sk-unknown") is None, "another's answer"

    def until_interrupted():
        before = interrupts
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00005, 0.01))
        while interrupts == before:  # One that arrives in a finalizer goes no further.
            check()
            charge(number)

    signal.signal(signal.SIGALRM, interrupt)
    charge(0)
    while time.monotonic() < end or interrupts < 5:
        number += 1
        try:
            until_interrupted()
        except BaseException as error:
            if not is_of_an_interrupt(error):
                raise
        check()
        used = charge(number).total_used
        assert used == number + 1, (used, number)
    print(interrupts)


@pytest.mark.parametrize("own", ["url", "engine"])
def test_a_timer_that_raises_at_random(database, own, full):
    with SQLAlchemyTokenStore(database.url) as store:
        key, token = create(store, name="holder", total_available=10**9)
        seed = random.randrange(2**32)
        print("seed", seed)
        said = in_a_process(charge_among_signals, database.url, key, own, 60 if full else 1, seed)
        print(said, "interrupts")
        ids = [operation.idempotency_key for operation in store.history(token.id)]
        assert len(ids) == len(set(ids)) == store.get(key).total_used
        assert int(said) > 0
