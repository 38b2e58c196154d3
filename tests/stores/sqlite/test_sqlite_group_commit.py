"""Threads that write at once: one of them commits for all, and each gets its own answer."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from holders import create
from interrupts import Interrupt, interrupt_from_here
from processes import in_a_process
from sqlite_files import another_process, needs_proc, open_files, sql

from usage_middleware import QuotaExceeded, SQLiteTokenStore, StoreError
from usage_middleware.stores.sqlite import group_commit
from usage_middleware.stores.sqlite.connections import Connections

A_LOT = 10**12


@pytest.fixture
def store(path):
    with SQLiteTokenStore(path, timeout=20, synchronous="OFF") as store:
        yield store


@pytest.fixture
def threads():
    with ThreadPoolExecutor(32) as threads:
        yield threads


def queue_of(store):
    return store._connections._pools.get().queue


def wait_for_waiting(store, count):
    """Waits until so many threads have work that waits for another."""
    deadline = time.monotonic() + 30
    while len(queue_of(store).waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lead(store, submit, count):
    """Makes a transaction in which nothing changes. In the middle of it, ``submit`` starts so many other calls."""
    started = []

    def work(transaction):
        if not started:
            started.extend(submit())
            wait_for_waiting(store, count)

    store._transact(work)
    return started


@contextmanager
def watched(store):
    """The statements of the connection with which the next transaction begins."""
    statements = []
    store.get("no-such-key")
    connection = store._connections._pools.get().idle[-1].connection
    connection.set_trace_callback(statements.append)
    yield statements
    connection.set_trace_callback(None)


def used_and_booked(path):
    ((used, held, days),) = sql(
        path,
        "SELECT (SELECT sum(total_used) FROM tokens), (SELECT coalesce(sum(held), 0) FROM operations),"
        " (SELECT coalesce(sum(used), 0) FROM usage_by_day)",
    )
    assert used == held == days
    return used


def test_all_that_wait_are_committed_at_once(path, store, threads):
    key, _ = create(store, total_available=A_LOT)
    poor, _ = create(store, total_available=5)

    def submit():
        for number in range(20):
            yield threads.submit(store.charge, key, number + 1)
        yield threads.submit(store.charge, poor, 6)
        yield threads.submit(store.charge, "no-such-key", 1)

    with watched(store) as statements:
        *charges, refused, unknown = lead(store, submit, 22)
    assert sorted(charge.result(30).total_used for charge in charges)[-1] == 210
    with pytest.raises(QuotaExceeded) as caught:
        refused.result(30)
    assert (caught.value.requested, caught.value.available) == (6, 5)
    with pytest.raises(Exception, match="no token has this key"):
        unknown.result(30)
    assert statements.count("COMMIT") == 1
    assert statements.count("SAVEPOINT unit") == 22
    assert used_and_booked(path) == 210


def test_a_call_that_nobody_waits_for_has_no_savepoint(store):
    key, _ = create(store, total_available=A_LOT)
    with watched(store) as statements:
        store.charge(key, 1)
    assert (statements[0], statements[-1]) == ("BEGIN IMMEDIATE", "COMMIT")
    assert not [statement for statement in statements if "SAVEPOINT" in statement]


def test_what_a_refused_call_has_written_is_rolled_back(store, threads):
    _, token = create(store, name="old", total_available=A_LOT)

    def write_and_refuse(connection):
        connection.execute("UPDATE tokens SET name = 'new'")
        raise QuotaExceeded

    def submit():
        yield threads.submit(store.grant, token.id, 1)
        yield threads.submit(store._connections.transact, write_and_refuse)
        yield threads.submit(store.grant, token.id, 2)

    with watched(store) as statements:
        first, refused, last = lead(store, submit, 3)
    assert {first.result(30).total_granted, last.result(30).total_granted} == {A_LOT + 1, A_LOT + 3}
    with pytest.raises(QuotaExceeded):
        refused.result(30)
    assert store.get_by_id(token.id).name == "old"
    assert statements.count("COMMIT") == 1


@pytest.mark.parametrize(("limit", "value", "most"), [("_MOST_TOGETHER", 2, 2), ("_LONGEST", -1.0, 0)])
def test_a_transaction_takes_in_a_part_and_wakes_the_next(path, store, threads, monkeypatch, limit, value, most):
    monkeypatch.setattr(group_commit, limit, value)
    monkeypatch.setattr(group_commit, "_LOOK_INTERVAL", 1000)
    key, _ = create(store, total_available=A_LOT)
    with watched(store) as statements:
        charges = lead(store, lambda: [threads.submit(store.charge, key, 1) for _ in range(9)], 9)
        assert {charge.result(15).total_used for charge in charges} == set(range(1, 10))  # before the timeout
    transactions = "\n".join(statements).split("COMMIT")
    assert max(transaction.count("SAVEPOINT unit") for transaction in transactions) == most


@pytest.mark.parametrize("error", [ValueError("mine"), sqlite3.OperationalError("mine"), StoreError("mine")])
def test_a_failure_is_of_one_call_alone(path, store, threads, error):
    key, _ = create(store, total_available=A_LOT)
    attempts = []

    def work(transaction):
        attempts.append(threading.get_ident())
        raise error

    def submit():
        for _ in range(3):
            yield threads.submit(store.charge, key, 1)
        yield threads.submit(store._transact, work)
        for _ in range(3):
            yield threads.submit(store.charge, key, 1)

    started = lead(store, submit, 7)
    for number, call in enumerate(started):
        if number == 3:
            with pytest.raises((ValueError, StoreError), match="mine"):
                call.result(30)
        else:
            assert call.result(30).total_used
    assert used_and_booked(path) == 6
    # In its own thread at last.
    assert threading.get_ident() not in attempts[-1:]


def test_what_the_database_refuses_of_one_is_not_the_others_matter(path, store, threads):
    key, _ = create(store, total_available=A_LOT)
    bad, token = create(store, total_available=A_LOT)
    sql(
        path,
        f"CREATE TRIGGER sabotage AFTER UPDATE ON tokens WHEN new.id = {token.id}"
        " BEGIN SELECT RAISE(ROLLBACK, 'sabotage'); END",
    )

    def submit():
        yield threads.submit(store.charge, key, 1)
        yield threads.submit(store.charge, bad, 1)
        yield threads.submit(store.charge, key, 1)

    first, sabotaged, last = lead(store, submit, 3)
    with pytest.raises(StoreError, match="sabotage"):
        sabotaged.result(30)
    assert {first.result(30).total_used, last.result(30).total_used} == {1, 2}
    assert used_and_booked(path) == 2


def test_a_failure_takes_nothing_from_the_one_that_commits(store, threads):
    _, token = create(store, name="old")
    started = []

    def fail(connection):
        raise ValueError("mine")

    def work(connection):
        connection.execute("UPDATE tokens SET name = 'new'")
        if not started:
            started.append(threads.submit(store._connections.transact, fail))
            wait_for_waiting(store, 1)

    store._connections.transact(work)
    assert store.get_by_id(token.id).name == "new"
    with pytest.raises(ValueError, match="mine"):
        started[0].result(30)


# --- Exceptions that arrive anywhere


def lead_until_interrupted(store, threads, key, number):
    """Charges in three threads, and interrupts the one that commits for them, after so many steps.

    :return: the charges, and whether the transaction took so many steps.
    """
    started = []

    def work(transaction):
        if not started:
            started.extend(threads.submit(store.charge, key, units) for units in (5, 70, 900))
            wait_for_waiting(store, 3)
            methods = (Connections._work, Connections._transact, Connections.transact)
            started.append(interrupt_from_here(number, *methods))

    try:
        store._transact(work)
    except Interrupt:
        # While it is handled, others can write.
        store._transact(lambda transaction: None)
    *charges, end = started
    return charges, end()


def interrupt_each_step(path, stride):
    expected = number = 0
    is_interrupted = True
    with (
        SQLiteTokenStore(path, timeout=20, synchronous="OFF") as store,
        ThreadPoolExecutor(3) as threads,
        closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
    ):
        key, _ = create(store, total_available=A_LOT)
        while is_interrupted:
            number += int(stride)
            charges, is_interrupted = lead_until_interrupted(store, threads, key, number)
            for charge in charges:
                charge.result(30)
            expected += 975
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
            assert used_and_booked(path) == expected
    print(number)


@pytest.mark.slow
def test_an_exception_at_any_step_of_the_one_that_commits(path, full):
    """It goes to its caller alone. What the others wait for is done once, by whichever thread."""
    steps = int(in_a_process(interrupt_each_step, path, 1 if full else 29))
    assert steps > 500


@pytest.fixture
def alarm():
    """Makes a signal handler raise an exception after so many seconds, in the main thread."""

    def raise_interrupt(number, frame):
        raise Interrupt

    signal.signal(signal.SIGALRM, raise_interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_work_that_has_begun_is_decided_when_an_exception_leaves_the_call(store, threads, alarm):
    inside, interrupted = threading.Event(), threading.Event()

    def lead(transaction):
        inside.set()
        wait_for_waiting(store, 1)

    def work(transaction):
        alarm(0.05)
        time.sleep(0.3)  # the exception arrives meanwhile, in the thread that waits
        interrupted.set()
        return 7

    leader = threads.submit(store._transact, lead)
    assert inside.wait(30)
    with pytest.raises(Interrupt):
        store._transact(work)
    assert interrupted.is_set()
    leader.result(30)
    assert not queue_of(store).writing


@contextmanager
def written_by_another(store, threads):
    """Let another thread be in a transaction meanwhile."""
    inside, go_on = threading.Event(), threading.Event()

    def write(transaction):
        inside.set()
        assert go_on.wait(30)

    leader = threads.submit(store._transact, write)
    assert inside.wait(30)
    yield
    go_on.set()
    leader.result(30)


def test_work_that_has_not_begun_is_never_done_after_an_exception(path, store, threads, alarm):
    key, _ = create(store, total_available=A_LOT)
    with written_by_another(store, threads):
        alarm(0.05)
        with pytest.raises(Interrupt):
            store.charge(key, 1)
    assert store.charge(key, 10).total_used == 10
    assert not queue_of(store).waiting


def test_work_that_has_waited_too_long_is_never_done(path, threads):
    with SQLiteTokenStore(path, timeout=0.1) as store:
        key, _ = create(store, total_available=A_LOT)
        with written_by_another(store, threads), pytest.raises(StoreError, match="is locked"):
            store.charge(key, 1)
        assert store.charge(key, 10).total_used == 10


@pytest.mark.slow
def test_work_that_is_being_done_is_waited_for(path, threads):
    """When the time is up, it is not yet known whether it will be committed."""
    with SQLiteTokenStore(path, timeout=0.5, synchronous="OFF") as store:
        inside = threading.Event()

        def lead(transaction):
            inside.set()
            wait_for_waiting(store, 1)

        def work(transaction):
            time.sleep(1)
            return threading.get_ident()

        leader = threads.submit(store._transact, lead)
        assert inside.wait(30)
        assert store._transact(work) != threading.get_ident()
        leader.result(30)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_does_not_wait_for_work_that_only_its_parent_does(store, threads, monkeypatch):
    monkeypatch.setattr("usage_middleware.forks._PATIENCE", 0.1)
    parent, inside, forked, statuses = os.getpid(), threading.Event(), threading.Event(), []

    def fork(number, frame):
        child = os.fork()
        if child:
            statuses.append(os.waitpid(child, 0)[1])
            forked.set()
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # which ends it

    def lead(transaction):
        inside.set()
        wait_for_waiting(store, 1)

    def work(transaction):
        signal.raise_signal(signal.SIGALRM)  # for the main thread, which waits
        assert forked.wait(30)

    signal.signal(signal.SIGALRM, fork)
    try:
        leader = threads.submit(store._transact, lead)
        assert inside.wait(30)
        store._transact(work)
    except BaseException as error:
        if os.getpid() == parent:
            raise
        os._exit(7 if isinstance(error, StoreError) else 8)
    finally:
        if os.getpid() != parent:
            os._exit(9)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    leader.result(30)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [7]


# --- Many


def charge_in_threads(store, keys, count):
    failures = []

    def charge(key):
        try:
            for _ in range(count):
                store.charge(key, 1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=charge, args=[key]) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.slow
def test_many_threads_and_another_process_lose_nothing(path, store, full):
    count = 2000 if full else 100
    keys = [create(store, total_available=A_LOT)[0] for _ in range(16)]
    shared, _ = create(store, total_available=A_LOT)
    with another_process(path, "SELECT count(*) FROM tokens"):
        charge_in_threads(store, [*keys, shared, shared, shared, shared], count)
    assert [store.get(key).total_used for key in keys] == [count] * 16
    assert store.get(shared).total_used == 4 * count
    assert used_and_booked(path) == 20 * count


def test_no_work_is_done_twice(path, store):
    """A charge would not be: its operation has an id. So this work has none."""
    create(store)
    sql(path, "CREATE TABLE counted (number INTEGER)", "INSERT INTO counted VALUES (0)")
    calls = 16 * [50]

    def count(connection):
        connection.execute("UPDATE counted SET number = number + 1")
        return connection.execute("SELECT number FROM counted").fetchone()

    def call(times):
        return [store._connections.transact(count)[0] for _ in range(times)]

    with ThreadPoolExecutor(len(calls)) as threads:
        numbers = [number for told in threads.map(call, calls) for number in told]
    assert sorted(numbers) == list(range(1, sum(calls) + 1))
    assert sql(path, "SELECT number FROM counted") == [(sum(calls),)]


@needs_proc
def test_threads_that_wait_need_one_connection(path, store):
    keys = [create(store, total_available=A_LOT)[0] for _ in range(16)]
    charge_in_threads(store, keys, 20)
    assert list(open_files(path).values()).count(str(path)) <= 2
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sqlite3, sys
import gevent
from usage_middleware import SQLiteTokenStore

path, key = sys.argv[1:]

def charge(number):
    store.charge(key, 1, idempotency_key=str(number))

with SQLiteTokenStore(path, timeout=20) as store:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # the first waits for this, and the others for the first
    greenlets = [gevent.spawn(charge, number) for number in range(20)]
    gevent.sleep(0.05)
    for greenlet in greenlets[::3]:
        greenlet.kill()
    other.execute("ROLLBACK")
    gevent.joinall(greenlets, raise_error=True, timeout=20)
    for number in range(20):
        charge(number)
    assert store.get(key).total_used == 20, store.get(key)
"""


def test_greenlets_that_wait_and_greenlets_that_are_killed(path, store):
    key, _ = create(store, total_available=A_LOT)
    subprocess.run([sys.executable, "-c", GREENLETS, str(path), key], check=True, timeout=60)
    assert used_and_booked(path) == 20
