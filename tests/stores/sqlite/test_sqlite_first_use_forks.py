"""A process that forks while another of its threads opens the SQLite store for the first time.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

import os
import random
import sqlite3
import sys
import threading
import time
import warnings

import pytest
from holders import create
from processes import end_within, in_a_process
from sqlite_files import make_database, needs_proc, open_files, sql

from usage_middleware import SQLiteTokenStore, StoreError, forks

IN_EACH = 20  # charges


def ignore_that_threads_fork():
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def wait_for(child):
    """Return what a child has exited with, or the number of the signal that ended it, as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def charge_in_child(store, key):
    """Charges, and exits."""
    end_within(30)
    try:
        for _ in range(IN_EACH):
            store.charge(key, 1)
    except StoreError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def fork_during_first_uses(path, count):
    ignore_that_threads_fork()
    with SQLiteTokenStore(path) as store:
        key, _ = create(store, total_available=10**12)
    numbers = random.Random(count)
    for _ in range(int(count)):
        store = SQLiteTokenStore(path, synchronous="OFF")
        threads = [threading.Thread(target=store.charge, args=[key, 1]) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(numbers.uniform(0, 0.004))
        child = os.fork()
        if child == 0:
            charge_in_child(store, key)
        for thread in threads:
            thread.join()
        assert wait_for(child) == 0
        store.close()
    with SQLiteTokenStore(path) as store:
        print(store.get(key).total_used == int(count) * (2 + IN_EACH))


@pytest.mark.slow
def test_what_a_child_has_charged_is_there(tmp_path, full):
    path = tmp_path / "tokens.db"
    assert in_a_process(fork_during_first_uses, path, 300 if full else 40) == "True\n"
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_while_it_is_opened(path, seconds, patience):
    """Fork while another thread is in the middle of opening the database, which takes so many seconds."""
    ignore_that_threads_fork()
    forks._PATIENCE = float(patience)
    make_database(f"{path}.other")  # what is imported when it is first needed is there then
    with SQLiteTokenStore(path) as store:
        key, _ = create(store, total_available=10**12)
    store = SQLiteTokenStore(path)
    opening = threading.Event()
    connect = sqlite3.connect

    def connect_slowly(*arguments, **options):
        sqlite3.connect = connect
        connection = connect(*arguments, **options)
        connection.execute("SELECT count(*) FROM tokens").fetchall()
        opening.set()
        time.sleep(float(seconds))
        return connection

    sqlite3.connect = connect_slowly
    thread = threading.Thread(target=store.charge, args=[key, 1])
    thread.start()
    assert opening.wait(30)
    child = os.fork()
    if child == 0:
        print(len(open_files(path)), end=" ", flush=True)
        sys.stderr = sys.stdout
        charge_in_child(store, key)
    status = wait_for(child)
    thread.join()
    print(status, store.get(key).total_used)


@needs_proc
def test_a_fork_waits_for_what_is_being_opened(tmp_path):
    said = in_a_process(fork_while_it_is_opened, tmp_path / "tokens.db", 0.2, 30)
    assert said == f"0 0 {1 + IN_EACH}\n"


@pytest.mark.slow
@needs_proc
def test_a_child_of_a_fork_that_cannot_wait_is_refused(tmp_path):
    path = tmp_path / "tokens.db"
    inherited, *words, status, used = in_a_process(fork_while_it_is_opened, path, 1, 0.05).split()
    assert int(inherited) > 0
    assert f"{path} was open when this process was forked" in " ".join(words)
    assert (status, used) == ("1", "1")


def fork_among_calls(path, count):
    ignore_that_threads_fork()
    store = SQLiteTokenStore(path)
    key, _ = create(store, total_available=10**12)
    done = threading.Event()
    charged = []

    def read():
        while not done.is_set():
            store.get(key)

    def charge():
        while not done.is_set():
            store.charge(key, 1000)
            charged.append(1000)

    # Those that charge commit for each other.
    threads = [threading.Thread(target=call) for call in (read, read, charge, charge, charge)]
    for thread in threads:
        thread.start()
    statuses = []
    for _ in range(int(count)):
        child = os.fork()
        if child == 0:
            charge_in_child(store, key)
        statuses.append(wait_for(child))
    done.set()
    for thread in threads:
        thread.join()
    assert statuses == [0] * int(count)
    print(store.get(key).total_used == int(count) * IN_EACH + sum(charged))


@pytest.mark.slow
def test_a_fork_among_requests_has_its_turn(tmp_path, full):
    assert in_a_process(fork_among_calls, tmp_path / "tokens.db", 200 if full else 10) == "True\n"
