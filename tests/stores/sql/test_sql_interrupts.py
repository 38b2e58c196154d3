"""An exception that arrives at any step of a call: a signal handler that raises, a killed greenlet, a worker's timeout.

The step may be ours, SQLAlchemy's, or the driver's. The next calls then have their own answers, none of them hangs, and
a charge was made once or not at all.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from holders import create
from interrupts import interrupted_at
from sqlalchemy import create_engine
from waiting import DEADLINE

from usage_middleware import SQLAlchemyTokenStore

# A connection that is dropped without being closed is what a program may leave to the interpreter.
pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Watched:
    """A store and its tokens, whose answers are checked after each interrupt, in this thread and in another."""

    def __init__(self, store, is_own):
        self.store = store
        self.is_own = is_own
        self.holders = [create(store, name=f"holder {number}", total_available=10**9) for number in range(3)]
        self.charges = 0

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

    def repeat_charge(self):
        self.charge()
        self.charges += 1
        assert self.store.get(self.holders[0][0]).total_used == 5 * self.charges


@pytest.fixture(params=["url", "engine"])
def watched(request, database):
    engine = create_engine(database.url)
    with SQLAlchemyTokenStore(database.url if request.param == "url" else engine) as store:
        yield Watched(store, request.param == "url")
    engine.dispose()


def interrupt(number, call):
    """Whether the call took so many steps."""
    try:
        return interrupted_at(number, call)
    except Exception:
        return True  # Some finally of SQLAlchemy's raises an error of its own in place of what has interrupted it.


def count_steps(call):
    steps = 0

    def step(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += 1
        return step

    sys.settrace(step)
    try:
        call()
    finally:
        sys.settrace(None)
    return steps


def test_a_look_up_that_is_interrupted(watched, full):
    def call():
        watched.store.get(watched.holders[0][0])

    call()
    steps = count_steps(call)
    watched.check()
    some = range(1, steps + 1, 1 if full else max(steps // 20, 1))
    for number in some:
        interrupt(number, call)
        watched.check()
    print(f"\n{len(some)} of {steps} steps of a look-up")


def test_a_charge_that_is_interrupted(watched, full):
    watched.repeat_charge()
    steps = count_steps(watched.charge)
    watched.repeat_charge()
    some = range(1, steps + 1, max(steps // (3000 if full else 20), 1))
    for number in some:
        interrupt(number, watched.charge)
        watched.check()
        watched.repeat_charge()
    print(f"\n{len(some)} of {steps} steps of a charge")
    made = list(watched.store.history(watched.holders[0][1].id))
    assert len(made) == watched.charges
    if not watched.is_own:
        return  # The pool is its owner's; SQLAlchemy's can lose a place.
    # No place of the pool is lost: as many as it has can be used at once.
    barrier = threading.Barrier(15)
    with ThreadPoolExecutor(15) as threads:
        waits = [threads.submit(watched.store._transact, lambda _: barrier.wait(DEADLINE)) for _ in range(15)]
        for wait in waits:
            wait.result()


# A program whose timer raises at random moments of whatever it does.
TIMER = """
import random, signal, sys, time
from sqlalchemy import create_engine
from usage_middleware import SQLAlchemyTokenStore, StoreError

url, key, own, seconds, seed = sys.argv[1:]
engine = create_engine(url)
store = SQLAlchemyTokenStore(url if own == "url" else engine)
chance = random.Random(int(seed))

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

def again(call):
    while True:
        try:
            return call()
        except StoreError as error:
            if "not known" not in str(error) and "refused" not in str(error):
                raise

signal.signal(signal.SIGALRM, interrupt)
end = time.monotonic() + float(seconds)
charges = interrupts = 0
store.charge(key, 1, idempotency_key="0")
while time.monotonic() < end:
    charges += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00005, 0.01))
        try:
            while True:
                assert store.get(key).name == "holder", "another's answer"
                assert store.get("sk-unknown") is None, "another's answer"
                again(lambda: store.charge(key, 1, idempotency_key=str(charges)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        interrupts += 1
    assert store.get(key).name == "holder", "another's answer"
    token = again(lambda: store.charge(key, 1, idempotency_key=str(charges)))
    assert token.total_used == charges + 1, (token.total_used, charges)
print(interrupts)
"""


@pytest.mark.parametrize("own", ["url", "engine"])
def test_a_timer_that_raises_at_random(database, own, full):
    with SQLAlchemyTokenStore(database.url) as store:
        key, token = create(store, name="holder", total_available=10**9)
        seed = random.randrange(2**32)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TIMER, database.url, key, own, "60" if full else "3", str(seed)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (seed, done.stderr[-3000:])
        ids = [operation.idempotency_key for operation in store.history(token.id)]
        assert len(ids) == len(set(ids)) == store.get(key).total_used
        assert int(done.stdout) > 0
