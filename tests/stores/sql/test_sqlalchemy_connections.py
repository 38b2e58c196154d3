"""Servers that go and come, and processes that fork."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from holders import create, status
from sqlalchemy import create_engine
from waiting import DEADLINE

from usage_middleware import (
    SQLAlchemyTokenStore,
    StoreError,
)

# --- A server that goes and comes


def open_connections(store, count):
    """Let the pool have several, so that what dies is more than the one that is tried first."""
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as threads:
        for opened in [threads.submit(store._transact, lambda _: barrier.wait(DEADLINE)) for _ in range(count)]:
            opened.result()


def test_a_server_that_is_restarted(disposable_server):
    url = disposable_server.create_database()
    with SQLAlchemyTokenStore(url) as store, SQLAlchemyTokenStore(create_engine(url)) as over_engine:
        key, token = create(store)
        _, deleted = create(store)
        store.delete(deleted.id)
        for restart, use in enumerate(
            [
                lambda s: s.get(key),
                lambda s: s.get_by_id(token.id),
                lambda s: s.charge(key, 1, idempotency_key="a charge"),
                lambda s: list(s.history(token.id)),
            ]
        ):
            for each in (store, over_engine):
                open_connections(each, 3)
            (disposable_server.kill if restart % 2 else disposable_server.stop)()
            if not restart:
                for each in (store, over_engine):
                    for fails in (use, lambda s: s.charge(key, 1)):
                        begun = time.monotonic()
                        with pytest.raises(StoreError, match="refused"):
                            fails(each)
                        assert time.monotonic() - begun < 5
                    assert status(each, key) == 503
            disposable_server.start()
            for each in (store, over_engine):
                use(each)
                assert status(each, key) == 200
                assert each.charge(key, 1).total_used
        _, next_token = create(store)
        assert next_token.id > deleted.id
        assert store.get(key).total_used == 9
        over_engine._database._engine.dispose()


# --- Forks

FORK = """
import os, sys, threading, multiprocessing, gc
from sqlalchemy import create_engine, text
from usage_middleware import SQLAlchemyTokenStore

url, key, how, own, ask = sys.argv[1:]
engine = None if own == "own" else create_engine(url)
store = SQLAlchemyTokenStore(url if engine is None else engine)

def connection_id(transaction):
    return transaction._execute(text(ask)).scalar()

def charge(count, name):
    for number in range(count):
        store.get(key)
        store.charge(key, 1, idempotency_key=f"{name} {number}")

def child(name):
    charge(5, name)
    inherited = {before, *others}
    assert store._transact(connection_id) not in inherited
    if how == "grandchild" and name != "grandchild":
        run("grandchild")
    if how == "closes":
        store.close()
        if engine is not None:
            engine.dispose()
    gc.collect()

def run(name):
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == 0
        return
    pid = os.fork()
    if not pid:
        try:
            child(name)
            # Ends as programs do, so that what it holds is freed.
            sys.exit(0)
        except SystemExit:
            sys.stdout.flush()
            if how != "exits":
                os._exit(0)
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

store.get(key)
others = []
store._transact(lambda transaction: others.extend([connection_id(transaction), store._transact(connection_id)]))
before = store._transact(connection_id)
threads = []
if how == "threads":
    threads = [threading.Thread(target=charge, args=(40, f"thread {number}")) for number in range(6)]
    for thread in threads:
        thread.start()
for number in range(3):
    run(f"child {number}")
for thread in threads:
    thread.join()
if not threads:
    # The parent's connections are as they were.
    assert store._transact(connection_id) in {before, *others}
charge(5, "parent")
store.close()
if engine is not None:
    engine.dispose()
print("charged")
"""


@pytest.mark.parametrize("own", ["own", "engine"])
@pytest.mark.parametrize(
    ("how", "charges"),
    [
        pytest.param("fork", 20, id="a child uses it"),
        pytest.param("closes", 20, id="a child closes it"),
        pytest.param("exits", 20, id="a child exits"),
        pytest.param("grandchild", 25, id="a child has a child"),
        pytest.param("multiprocessing", 20, id="multiprocessing"),
        pytest.param("threads", 20 + 240, id="while threads charge"),
    ],
)
def test_a_store_that_was_used_may_be_forked(database, store, how, charges, own, full):
    if not full and own == "engine" and how not in ("fork", "threads"):
        pytest.skip("run with --full")
    key, token = create(store)
    ask_for = "SELECT connection_id()" if database.is_mysql else "SELECT pg_backend_pid()"
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    # A child that exits frees what it inherited: psycopg notices that it is not its own only when it has warned.
    command += ["-W", "ignore:<psycopg.Connection object:ResourceWarning"]
    done = subprocess.run(
        [*command, "-c", FORK, database.url, key, how, own, ask_for], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("charged\n", "", 0), done.stderr
    token = store.get_by_id(token.id)
    ids = [operation.id for operation in store.history(token.id)]
    assert (token.total_used, len(ids), len(set(ids))) == (charges, charges, charges)
