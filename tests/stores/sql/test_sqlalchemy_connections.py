"""Servers that go and come, and processes that fork.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from holders import create, status
from processes import end_within, in_a_process
from sqlalchemy import create_engine, text
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


class Forking:
    """A store that was used in a process that forks, and what its children do."""

    def __init__(self, url, key, how, own, ask):
        self.engine = create_engine(url) if own == "engine" else None
        self.store = SQLAlchemyTokenStore(url if self.engine is None else self.engine)
        self.key, self.how, self.ask = key, how, ask
        self.connections = set()

    def connection_id(self, transaction=None):
        if transaction is None:
            return self.store._transact(self.connection_id)
        return transaction._execute(text(self.ask)).scalar()

    def use_two_connections(self):
        self.store._transact(
            lambda transaction: self.connections.update([self.connection_id(transaction), self.connection_id()])
        )

    def charge(self, count, name):
        for number in range(count):
            self.store.get(self.key)
            self.store.charge(self.key, 1, idempotency_key=f"{name} {number}")

    def close(self):
        self.store.close()
        if self.engine is not None:
            self.engine.dispose()

    def child(self, name):
        end_within(30)
        self.charge(5, name)
        assert self.connection_id() not in self.connections
        if self.how == "grandchild" and name != "grandchild":
            self.fork("grandchild")
        if self.how == "closes":
            self.close()
        gc.collect()

    def fork(self, name):
        if self.how == "multiprocessing":
            process = multiprocessing.get_context("fork").Process(target=self.child, args=(name,))
            process.start()
            process.join()
            assert process.exitcode == 0
            return
        pid = os.fork()
        if not pid:
            try:
                self.child(name)
                # Ends as programs do, so that what it holds is freed.
                sys.exit(0)
            except SystemExit:
                sys.stdout.flush()
                if self.how != "exits":
                    os._exit(0)
                raise
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0


def fork_after_use(*arguments):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    # A child that exits frees what it inherited: psycopg notices that it is not its own only when it has warned.
    warnings.filterwarnings("ignore", "<psycopg.Connection object", ResourceWarning)
    forking = Forking(*arguments)
    forking.use_two_connections()
    threads = []
    if forking.how == "threads":
        threads = [threading.Thread(target=forking.charge, args=(40, f"thread {number}")) for number in range(6)]
    for thread in threads:
        thread.start()
    for number in range(3):
        forking.fork(f"child {number}")
    for thread in threads:
        thread.join()
    if not threads:
        # The parent's connections are as they were.
        assert forking.connection_id() in forking.connections
    forking.charge(5, "parent")
    forking.close()
    print("charged")


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
    assert in_a_process(fork_after_use, database.url, key, how, own, ask_for) == "charged\n"
    token = store.get_by_id(token.id)
    ids = [operation.id for operation in store.history(token.id)]
    assert (token.total_used, len(ids), len(set(ids))) == (charges, charges, charges)


def fork_while_a_thread_connects(scheme):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    events = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"{scheme}://user:password@127.0.0.1:{server.getsockname()[1]}/database"
        with SQLAlchemyTokenStore(url, timeout=20) as store, ThreadPoolExecutor(2) as threads:
            looking = threads.submit(store.get, "a-key")
            connection, _ = server.accept()

            def refuse():
                time.sleep(0.3)
                events.append("refused")
                connection.close()

            refusing = threads.submit(refuse)
            if os.fork() == 0:
                os._exit(0)
            events.append("forked")
            refusing.result()
            os.wait()
            try:
                looking.result()
            except StoreError:
                print(*events)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "mysql+pymysql"])
def test_a_fork_waits_for_a_thread_that_connects(scheme):
    """Drivers use OpenSSL when they connect. If another thread forks meanwhile, OpenSSL's locks may be held for ever in
    the child, which hangs when it connects."""
    assert in_a_process(fork_while_a_thread_connects, scheme) == "refused forked\n"
