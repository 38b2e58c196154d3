"""One SQLite database under many threads and processes.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from holders import create
from processes import end_within, environment, in_a_process, process_of
from sqlite_files import (
    another_process,
    count_connections,
    make_database,
    needs_proc,
    open_files,
    sql,
    use_two_connections,
)

from usage_middleware import SQLiteTokenStore
from usage_middleware.keys import strip_prefix
from usage_middleware.stores.sqlite import sqlite_schema

# --- Threads


@needs_proc
def test_connections_are_as_many_as_are_needed_at_once(path):
    make_database(path)
    with SQLiteTokenStore(path) as store:
        connections = store._connections
        pool = connections._pools.get()
        boxes = [[] for _ in range(80)]
        for box in boxes:
            connections._lend(pool, box)
            box[0].connection.execute("SELECT count(*) FROM tokens").fetchall()
        assert count_connections(path) == 80
        for box in boxes:
            pool.take_back(box)
        assert count_connections(path) == 64
        with ThreadPoolExecutor(80) as threads:
            list(threads.map(store.get, ["no-such-key"] * 640))
        assert count_connections(path) == 64
    assert open_files(path) == {}


@needs_proc
def test_a_thread_that_waits_to_write_has_no_connection(path):
    make_database(path)
    with SQLiteTokenStore(path) as store, ThreadPoolExecutor(20) as threads:
        with another_process(path, "BEGIN IMMEDIATE"):
            answers = [threads.submit(store.create, name=str(number)) for number in range(20)]
            assert store.get("no-such-key") is None
            assert not any(answer.done() for answer in answers)
            assert count_connections(path) <= 2
        assert {answer.result()[1].name for answer in answers} == {str(number) for number in range(20)}


@needs_proc
def test_a_thread_for_each_request_leaks_nothing(path, store):
    key, token = create(store)
    answers = []
    before = open_files(path)
    for _ in range(500):
        thread = threading.Thread(target=lambda: answers.append(store.get(key)))
        thread.start()
        thread.join()
    assert answers == [token] * 500
    assert open_files(path) == before


@needs_proc
def test_a_store_that_is_freed_closes_its_files(path):
    store = SQLiteTokenStore(path)
    use_two_connections(store, create(store)[0])
    assert count_connections(path) == 2
    del store
    gc.collect()
    assert open_files(path) == {}
    assert list(path.parent.iterdir()) == [path]


# --- Processes


def leave_it_open(path):
    global left_open
    left_open = SQLiteTokenStore(path)
    use_two_connections(left_open, create(left_open)[0])
    print(os.path.getsize(f"{path}-wal") > 0)


def test_the_end_of_the_interpreter_closes_the_store(path):
    assert in_a_process(leave_it_open, path) == "True\n"
    assert list(path.parent.iterdir()) == [path]


def start_workers(count, target, *arguments):
    """Fork workers that run ``target(number, barrier, *arguments)``, and wait for their end."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    workers = [context.Process(target=target, args=(number, barrier, *arguments)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * count


def create_in_each(number, barrier, count, *paths):
    end_within(60)
    try:
        for path in paths:
            store = SQLiteTokenStore(path)
            barrier.wait()
            for n in range(count):
                key, token = create(store, name=f"{number}-{n}")
                assert store.get(key) == token
    except threading.BrokenBarrierError:
        sys.exit("another worker failed")
    except BaseException:
        barrier.abort()
        raise


def start_at_once(workers, count, *paths):
    # What is imported when it is first needed would keep the workers from meeting at the database.
    make_database(f"{paths[0]}.other")
    start_workers(int(workers), create_in_each, int(count), *paths)


@pytest.mark.slow
def test_workers_that_start_at_once_agree_on_one_database(tmp_path):
    paths = [tmp_path / f"{number}.db" for number in range(10)]
    in_a_process(start_at_once, 16, 1, *paths)
    for path in paths:
        with SQLiteTokenStore(path) as store:
            assert sorted(token.name for token in store.tokens()) == sorted(f"{number}-0" for number in range(16))
        assert sql(path, "SELECT version FROM usage_schema") == [(len(sqlite_schema.SCHEMA.steps),)]


def test_workers_that_write_at_once_lose_nothing(path):
    make_database(path)
    in_a_process(start_at_once, 8, 50, path)
    with SQLiteTokenStore(path) as store:
        _, *created = store.tokens()
    assert sorted(token.name for token in created) == sorted(f"{number}-{n}" for number in range(8) for n in range(50))
    assert len({token.id for token in created}) == 400
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def answer_keys(path):
    with SQLiteTokenStore(path) as store:
        for line in sys.stdin:
            token = store.get(line.strip())
            print(token and (token.name, token.enabled), flush=True)


def test_what_one_process_changes_another_sees_at_once(path, store):
    with subprocess.Popen(
        process_of(answer_keys, path),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:

        def seen(key):
            print(key, file=process.stdin)
            return process.stdout.readline().strip()

        assert seen("no-such-key") == "None"
        for _ in range(20):
            key, token = create(store, name="created")
            assert seen(key) == "('created', True)"
            store.update(token.id, name="disabled", enabled=False)
            assert seen(key) == "('disabled', False)"
            new = strip_prefix(store.rotate(token.id))
            assert (seen(key), seen(new)) == ("None", "('disabled', False)")
            store.delete(token.id)
            assert seen(new) == "None"
        # What it wrote itself counts for it as well as what others did.
        process.stdin.close()
        assert process.wait(timeout=30) == 0
