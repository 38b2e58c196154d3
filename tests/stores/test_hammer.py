"""Many processes and threads charge one token at once: nothing is spent twice, lost, or overdrawn.

Each test is small by default and has its full size with ``--full``.
"""

import random
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from datetime import date

import pytest
from processes import SPAWN

from usage_middleware import Account, Operation, OperationConflict, QuotaExceeded, SQLiteTokenStore, open_store
from usage_middleware.operations import take

pytestmark = pytest.mark.slow

MOST_UNITS = 100


class CarelessStore(SQLiteTokenStore):
    """A mutant, as many stores are written: it looks at what is left, and then writes what it computed from that.

    The barrier between the two makes two charges see the same, which by itself happens too seldom to be noticed.
    """

    barrier = None

    def charge(self, key, amount):
        token = self.get(key)
        now = time.time()
        operation = Operation(id=uuid.uuid4().hex, token_id=token.id, kind="charge", amount=amount, created_at=now)
        changes = take(Account(token=token), operation, now)
        with suppress(threading.BrokenBarrierError):
            self.barrier.wait(1)
        self._transact(lambda transaction: transaction.save(changes))
        return changes.token


def amounts(seed, count):
    numbers = random.Random(seed)
    return [numbers.randint(1, MOST_UNITS) for _ in range(count)]


def share_barrier(barrier):
    CarelessStore.barrier = barrier


def charge_all(open_, text, key, seeds, count):
    """Charge the amounts of each seed in a thread of its own. Return the sum of those that were acknowledged."""
    with open_(text) as store:

        def charge(seed):
            acknowledged = 0
            for amount in amounts(seed, count):
                with suppress(QuotaExceeded):
                    store.charge(key, amount)
                    acknowledged += amount
            return acknowledged

        with ThreadPoolExecutor(len(seeds)) as threads:
            return sum(threads.map(charge, seeds))


def read_until(done, store, key, quota):
    """Read the token over and over, and return how often. Every read must keep the invariant."""
    used = reads = 0
    while not reads or not done.is_set():
        token = store.get(key)
        assert token.total_granted == token.total_used + token.total_available == quota
        assert token.total_available >= 0
        assert token.total_used >= used
        used = token.total_used
        reads += 1
    return reads


def hammer(open_, text, *, processes, threads, charges):
    """Let all of them charge one token, for twice what it has, and compare their answers with the ledger."""
    count = charges // (processes * threads)
    seeds = [range(process * threads, (process + 1) * threads) for process in range(processes)]
    quota = sum(sum(amounts(seed, count)) for of_process in seeds for seed in of_process) // 2
    done = threading.Event()
    with open_store(text) as store, ThreadPoolExecutor(2) as readers:
        key = store.create(total_available=quota)[0]
        reads = [readers.submit(read_until, done, store, key, quota) for _ in range(2)]
        try:
            with ProcessPoolExecutor(
                processes, mp_context=SPAWN, initializer=share_barrier, initargs=(SPAWN.Barrier(2),)
            ) as pool:
                told = [pool.submit(charge_all, open_, text, key, of_process, count) for of_process in seeds]
                acknowledged = sum(future.result() for future in told)
        finally:
            done.set()
        token = store.get(key)
        assert token.total_used == acknowledged
        assert token.total_available == quota - acknowledged
        # The last refusal was for lack of units: fewer are left than a process asked for.
        assert 0 <= token.total_available < MOST_UNITS
        operations = list(store.history(token.id))
        assert sum(operation.held for operation in operations) == acknowledged
        check_days(store, token, len(operations))
        assert all(future.result() > 0 for future in reads)


def check_days(store, token, requests):
    """Check that usage by day comes to what the token has used, and to the number of its charges."""
    days = store.usage_by_day(token.id, date.min, date.max)
    assert sum(day.used for day in days) == token.total_used
    assert sum(day.requests for day in days) == requests
    assert token.held == 0


def small(text):
    """Return how much smaller a test is by default: a server has more to do for each charge than SQLite."""
    return 5 if "://" in text else 1


def test_what_was_acknowledged_is_what_the_token_says(store_text, full):
    size = {"processes": 16, "threads": 4, "charges": 1_000_000}
    if not full:
        size.update(processes=4, charges=4000 // small(store_text))
    hammer(open_store, store_text, **size)


def test_a_careless_store_would_be_found_out(tmp_path):
    with pytest.raises(AssertionError):
        hammer(CarelessStore, str(tmp_path / "tokens.db"), processes=2, threads=2, charges=200)


def send_all(text, key, seed, count):
    """Send every operation once, in an order of its own, and now and then one that differs from what was sent."""
    numbers = random.Random(seed)
    order = list(range(count))
    numbers.shuffle(order)
    with open_store(text) as store:
        for number in order:
            amount = amount_of(number)
            model = "gpt-4o" if number % 2 else None
            store.charge(key, amount, model=model, idempotency_key=f"request {number}")
            if numbers.random() < 0.1:
                with pytest.raises(OperationConflict):
                    store.charge(key, amount + 1, model=model, idempotency_key=f"request {number}")


def amount_of(number):
    return number % MOST_UNITS


def test_an_operation_that_is_sent_ten_times_is_made_once(store_text, full):
    count = 100_000 if full else 200 // small(store_text)
    with open_store(store_text) as store:
        key = store.create(total_available=2**62)[0]
        with ProcessPoolExecutor(10 if full else 4, mp_context=SPAWN) as pool:
            for sent in [pool.submit(send_all, store_text, key, seed, count) for seed in range(10)]:
                sent.result()
        token = store.get(key)
        assert token.total_used == sum(map(amount_of, range(count)))
        assert token.total_available == 2**62 - token.total_used
        assert store.model_usage(token.id) == {"gpt-4o": sum(amount_of(number) for number in range(1, count, 2))}
        made = sorted(operation.idempotency_key for operation in store.history(token.id))
        assert made == sorted(f"request {number}" for number in range(count))
        check_days(store, token, count)
