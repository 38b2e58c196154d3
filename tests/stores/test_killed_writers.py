"""Writers, and servers, that are killed: a call takes effect completely or not at all.

Each test is small by default and has its full size with ``--full``.
"""

import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import NamedTuple

import crash_writer
import pytest
from sqlite_ledger import content

import usage_middleware
from usage_middleware import Lookup, StoreError

pytestmark = pytest.mark.slow

A_LOT = 10**12


class Entry(NamedTuple):
    """The fields of an operation that can be compared."""

    kind: str
    amount: int
    model: str | None
    held: int
    final_amount: int | None
    refund_of: str | None = None


def entry(operation, names):
    fields = {field: getattr(operation, field) for field in Entry._fields}
    return Entry(**{**fields, "refund_of": names.get(operation.refund_of)})


def outcome(steps):
    """Return the operations that these calls leave, by their idempotency keys."""
    left = {}
    for method, name, amount, model, refund_of in steps:
        if method == "charge":
            left[name] = Entry("charge", amount, model, amount, amount)
        elif method == "reserve":
            left[name] = Entry("reserve", amount, model, amount, None)
        elif method == "settle":
            left[name] = left[name]._replace(held=amount, final_amount=amount)
        else:
            charge = left[refund_of]
            left[refund_of] = charge._replace(held=charge.held - amount)
            left[name] = Entry("refund", amount, charge.model, 0, amount, refund_of)
    return left


def wait_until_nothing_runs(store, token_id):
    """A server may learn of a client's death, and end its transaction, a moment after it: a transaction that has the
    token's lock is the last."""
    store._transact(lambda transaction: transaction.load(Lookup(token_id=token_id, now=0, most_lapsed=0)))


def first_steps(life, count):
    return itertools.islice(crash_writer.steps(life), count)


def kill_writers(text, key, lanes, lives, threads):
    """Kill writers one after the other, in several lanes at once. Return how many calls of each of their threads have
    returned."""
    command = [sys.executable, "-W", "error", crash_writer.__file__, text, key]
    numbers = [[str(lane), str(lives), str(threads)] for lane in range(lanes)]
    processes = [subprocess.Popen([*command, *each], stdout=subprocess.PIPE, text=True) for each in numbers]
    try:
        reports = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * lanes
    return {life: int(returned) for report in reports for life, returned in map(str.split, report.splitlines())}


@pytest.mark.parametrize(
    ("lanes", "lives", "all_lives"),
    [
        # The next one finds a database that no process has open, and recovers it.
        pytest.param(1, 10, 500, id="one at a time"),
        # The others go on.
        pytest.param(3, 4, 170, id="three at a time"),
    ],
)
def test_a_writer_that_is_killed(store_text, full, lanes, lives, all_lives):
    with usage_middleware.open_store(store_text) as store:
        key, token = store.create(total_available=A_LOT, model_limits={"gpt-4o": A_LOT, "gpt-4o-mini": True})
    lives = all_lives if full else lives
    returned = kill_writers(store_text, key, lanes, lives, threads=1)
    assert len(returned) == lanes * lives
    check_killed_writers(store_text, key, token, returned)


def test_threads_that_are_killed_while_one_commits_for_all(tmp_path, full):
    """An answer that has returned was committed, whichever thread has done it; and what was not returned is whole."""
    text, lives, threads = str(tmp_path / "tokens.db"), 400 if full else 5, 6
    with usage_middleware.open_store(text) as store:
        key, token = store.create(total_available=A_LOT, model_limits={"gpt-4o": A_LOT, "gpt-4o-mini": True})
    returned = kill_writers(text, key, 1, lives, threads)
    assert len(returned) == lives * threads
    check_killed_writers(text, key, token, returned)


def check_killed_writers(store_text, key, token, returned):
    def read():
        """Return the history of each life, once it agrees with the totals."""
        operations = list(store.history(token.id))
        token_now = store.get_by_id(token.id)
        held = sum(operation.held for operation in operations)
        assert (token_now.total_used, token_now.total_available) == (held, A_LOT - held)
        models = Counter()
        for operation in operations:
            models[operation.model] += operation.held
        del models[None]
        assert Counter(store.model_usage(token.id)) == models
        days = store.usage_by_day(token.id, date.min, date.max)
        assert sum(day.used for day in days) == held
        assert sum(day.requests for day in days) == sum(operation.is_request for operation in operations)
        assert token_now.held == sum(operation.held for operation in operations if operation.is_open)
        names = {operation.id: operation.idempotency_key for operation in operations}
        lives = defaultdict(dict)
        for operation in operations:
            name = operation.idempotency_key
            lives[name.split("/")[0]][name] = entry(operation, names)
        assert len(operations) == sum(map(len, lives.values()))
        return lives

    if "://" not in store_text:
        content(store_text)
    with usage_middleware.open_store(store_text) as store:
        wait_until_nothing_runs(store, token.id)
        found = read()
        assert found.keys() <= returned.keys()
        in_flight = 0
        for life, count in returned.items():
            # The one call that had not returned was made, or was not.
            assert found[life] in (outcome(first_steps(life, count)), outcome(first_steps(life, count + 1)))
            in_flight += found[life] != outcome(first_steps(life, count))
        print(f"{len(returned)} killed, {sum(returned.values())} calls returned, {in_flight} made and not returned")

        for life, count in returned.items():
            crash_writer.take(next(itertools.islice(crash_writer.steps(life), count, None)), store, key)
        assert read() == {life: outcome(first_steps(life, count + 1)) for life, count in returned.items()}


def charge_until_acknowledged(store, key, name, done):
    """Charge again and again, and repeat each charge until it returns. Return how many did, and how many were
    repeated."""
    number = repeated = 0
    while not done.is_set():
        while True:
            try:
                store.charge(key, 1, model="gpt-4o", idempotency_key=f"{name}/{number}")
                break
            except StoreError:
                repeated += 1
                time.sleep(0.01)
        number += 1
    return number, repeated


def test_a_server_that_is_killed(disposable_server, full):
    kills = 50 if full else 3
    done = threading.Event()
    with (
        usage_middleware.open_store(disposable_server.create_database()) as store,
        ThreadPoolExecutor(4) as threads,
    ):
        key, token = store.create(total_available=A_LOT, model_limits={"gpt-4o": A_LOT})
        writers = [threads.submit(charge_until_acknowledged, store, key, name, done) for name in range(4)]
        try:
            for kill in range(kills):
                used = store.get_by_id(token.id).total_used
                while store.get_by_id(token.id).total_used < used + 20:
                    assert not any(writer.done() for writer in writers)
                time.sleep(random.Random(kill).uniform(0, 0.05))
                disposable_server.kill()
                disposable_server.start()
        finally:
            done.set()
        counts = [writer.result(60) for writer in writers]
        expected = [f"{name}/{number}" for name, (count, _) in enumerate(counts) for number in range(count)]
        assert sorted(operation.idempotency_key for operation in store.history(token.id)) == sorted(expected)
        token = store.get_by_id(token.id)
        assert (token.total_used, token.total_available) == (len(expected), A_LOT - len(expected))
        assert store.model_usage(token.id) == {"gpt-4o": len(expected)}
        print(f"{kills} kills, {len(expected)} charges, {sum(repeated for _, repeated in counts)} repeated")
