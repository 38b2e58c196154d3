"""A server that stops answering: every call ends in time with a StoreError, and asks once.

A server is stopped by a signal, as a machine is that swaps or that is paused: its kernel still accepts connections and
acknowledges what is sent. Or a proxy forwards nothing any more, as a broken network.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial

import psutil
import pytest
from client import ask
from proxies import Proxy
from sqlalchemy import create_engine, make_url

from usage_middleware import SQLAlchemyTokenStore, StoreError, UsageMiddleware
from usage_middleware.stores.sql.pool import ConnectionPool

pytestmark = [pytest.mark.servers, pytest.mark.slow]

TIMEOUT = 2.0
# Beside the timeout: turns of a tenth of a second, whole seconds when connecting, a machine that is busy.
SLACK = 2.5


@contextmanager
def stopped(server):
    """Let no process of a server run for a while."""
    processes = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(processes):
            os.kill(pid, signal.SIGCONT)


def seconds_of(call, says="did not answer within 2 s|not known whether"):
    begun = time.monotonic()
    with pytest.raises(StoreError, match=says):
        call()
    return time.monotonic() - begun


@pytest.fixture
def stores(disposable_server):
    """Yield a store by URL and one over an engine, both with a connection in their pools."""
    url = disposable_server.create_database()
    engine = create_engine(url)
    with (
        SQLAlchemyTokenStore(url, timeout=TIMEOUT) as store,
        SQLAlchemyTokenStore(engine, timeout=TIMEOUT) as over_engine,
    ):
        yield store, over_engine
    engine.dispose()


def test_a_server_that_is_stopped(disposable_server, stores):
    store, over_engine = stores
    key, token = store.create(total_available=1000)
    for each in stores:
        each.charge(key, 1, idempotency_key="before")
    with SQLAlchemyTokenStore(store._database._engine.url, timeout=TIMEOUT) as new:
        calls = [
            lambda: store.get(key),
            lambda: over_engine.get(key),
            lambda: store.charge(key, 1, idempotency_key="x"),
            lambda: over_engine.charge(key, 1, idempotency_key="y"),
            lambda: list(store.history(token.id)),
            lambda: new.get(key),
            lambda: new.charge(key, 1),
        ]
        with stopped(disposable_server), ThreadPoolExecutor(len(calls)) as threads:
            # Connections in the pools first, new ones then.
            for _ in range(2):
                taken = list(threads.map(seconds_of, calls))
                assert max(taken) < TIMEOUT + SLACK
            begun = time.monotonic()
            assert ask(UsageMiddleware(print, store), authorization=f"Bearer {key}").status == 503
            assert time.monotonic() - begun < TIMEOUT + SLACK
        for call in calls:
            call()
    assert store.get(key).total_used == store.get(key).total_granted - store.get(key).total_available


def test_a_commit_that_is_not_answered(disposable_server, stores):
    """Its outcome is unknown, and repeating the call with the same idempotency key makes it once."""
    store, _ = stores
    key, _ = store.create(total_available=1000)
    for number, each in enumerate(stores, 1):
        url = make_url(each._database._engine.url)
        with closing(Proxy(disposable_server.port)) as proxy:
            engine = create_engine(url.set(port=proxy.port))
            over = url.set(port=proxy.port) if number == 1 else engine
            with SQLAlchemyTokenStore(over, timeout=TIMEOUT) as cut:
                cut.get(key)

                def cut_answer(chunk, is_request):
                    if is_request and b"COMMIT" in chunk and b"COMMITTED" not in chunk:
                        proxy.cut = lambda *_: proxy.fall_silent()
                    return

                proxy.cut = cut_answer
                seconds = seconds_of(lambda: cut.charge(key, 5, idempotency_key=f"{number}"), "not known whether")  # noqa: B023
                assert seconds < TIMEOUT + SLACK
            engine.dispose()
        assert each.charge(key, 5, idempotency_key=f"{number}").total_used == 5 * number


@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
@pytest.mark.parametrize("name", ["get_by_id", "charge"])
def test_a_rollback_that_is_not_answered(database, store, name, own):
    """SQLAlchemy ends each use of a connection with one. The call has its answer already."""
    key, token = store.create(total_available=1000)
    with ThreadPoolExecutor(1) as thread, closing(Proxy(database.server.port)) as proxy:
        url = make_url(database.url).set(port=proxy.port)
        engine = create_engine(url)
        with SQLAlchemyTokenStore(url if own else engine, timeout=TIMEOUT) as cut:
            cut.get_by_id(token.id)

            def cut_answer(chunk, is_request):
                if is_request and b"ROLLBACK" in chunk:
                    proxy.fall_silent()

            proxy.cut = cut_answer
            call = partial(cut.charge, key, 5) if name == "charge" else partial(cut.get_by_id, token.id)
            assert thread.submit(call).result(TIMEOUT + SLACK).id == token.id
        engine.dispose()
    assert store.get(key).total_used == 5 * (name == "charge")


def test_a_network_that_drops_everything(database_server, database_url):
    with closing(Proxy(database_server.port)) as proxy:
        url = make_url(database_url).set(port=proxy.port)
        engine = create_engine(url)
        with (
            SQLAlchemyTokenStore(url, timeout=TIMEOUT) as store,
            SQLAlchemyTokenStore(engine, timeout=TIMEOUT) as over_engine,
        ):
            key, _ = store.create(total_available=1000)
            over_engine.get(key)
            proxy.fall_silent()
            calls = [
                call for each in (store, over_engine) for call in (partial(each.get, key), partial(each.charge, key, 1))
            ]
            with ThreadPoolExecutor(4) as threads:
                assert max(threads.map(seconds_of, calls)) < TIMEOUT + SLACK
        engine.dispose()


def test_what_an_owners_engine_asks_by_itself(database, store):
    """SQLAlchemy asks a new server for its version, and tests a pooled connection before it is used."""
    store.count()
    with (
        ThreadPoolExecutor(2) as threads,
        closing(Proxy(database.server.port)) as new,
        closing(Proxy(database.server.port)) as pooled,
    ):
        url = make_url(database.url)
        engines = [create_engine(url.set(port=new.port)), create_engine(url.set(port=pooled.port), pool_pre_ping=True)]
        stores = [SQLAlchemyTokenStore(engine, timeout=TIMEOUT) for engine in engines]
        with engines[1].connect():
            pass
        pooled.fall_silent()

        def cut_query(chunk, is_request):
            if is_request and b"select" in chunk.lower():
                new.fall_silent()

        new.cut = cut_query
        calls = [threads.submit(seconds_of, partial(store.get, "sk-key"), "did not answer") for store in stores]
        for call in calls:
            assert call.result(TIMEOUT + SLACK) < TIMEOUT + SLACK
        for engine in engines:
            engine.dispose()


@pytest.mark.parametrize("driver", ["postgresql", "mysql"])
def test_a_place_that_becomes_free_too_late_is_not_connected_with(driver, monkeypatch):
    def take_place(pool):
        time.sleep(0.1)  # longer than the timeout
        return object()

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        with SQLAlchemyTokenStore(f"{driver}://user:secret@127.0.0.1:{port}/name", timeout=0.05) as store:
            monkeypatch.setattr(ConnectionPool, "_take_place", take_place)
            assert seconds_of(partial(store.get, "sk-key"), "did not answer within 0.05 s") < TIMEOUT
        listening.settimeout(0.2)
        assert list(accepted(listening)) == []


@pytest.mark.parametrize("driver", ["postgresql", "mysql"])
def test_a_server_that_never_answers(driver):
    """One attempt at a connection, however many calls wait for a place in the pool."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=100)) as listening:
        port = listening.getsockname()[1]
        with (
            SQLAlchemyTokenStore(f"{driver}://user:secret@127.0.0.1:{port}/name", timeout=TIMEOUT) as store,
            ThreadPoolExecutor(30) as threads,
        ):
            call = partial(store.get, "sk-key")
            taken = list(threads.map(lambda _: seconds_of(call, "answer|time|in use"), range(30)))
        assert max(taken) < TIMEOUT + SLACK
        listening.settimeout(0.2)
        assert sum(1 for _ in accepted(listening)) <= 30


def accepted(listening):
    with suppress(TimeoutError):
        while True:
            listening.accept()[0].close()
            yield


@pytest.mark.parametrize(
    "host", ["two.test:{port}/name", "/name?host=127.0.0.1:{port}&host=127.0.0.2:{port}"], ids=["name", "hosts"]
)
def test_two_addresses(monkeypatch, host):
    """All attempts together take no longer than one would."""
    listening = [socket.create_server(("127.0.0.1", 0))]
    port = listening[0].getsockname()[1]
    listening.append(socket.create_server(("127.0.0.2", port)))
    resolve = socket.getaddrinfo

    def both(host, *rest, **options):
        if host != "two.test":
            return resolve(host, *rest, **options)
        return [found for address in ("127.0.0.1", "127.0.0.2") for found in resolve(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with SQLAlchemyTokenStore(f"postgresql://user:secret@{host.format(port=port)}", timeout=6) as store:
        assert seconds_of(lambda: store.get("sk-key"), "timeout") < 6 + SLACK
    for each in listening:
        each.close()


def test_a_lock_that_another_has(database):
    """A row that is locked for longer causes an error in time, and the next call succeeds."""
    with SQLAlchemyTokenStore(database.url, timeout=TIMEOUT) as store:
        key, token = store.create(total_available=1000)
        with database.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="READ COMMITTED")
            connection.exec_driver_sql(f"SELECT * FROM usage_tokens WHERE id = {token.id} FOR UPDATE").all()
            assert seconds_of(lambda: store.charge(key, 1)) < TIMEOUT + SLACK
            assert store.get(key).total_used == 0
            connection.rollback()
        assert store.charge(key, 1).total_used == 1


def test_what_takes_long_but_answers(database):
    """The timeout is for each answer, not for all of a call: a restore may take its time."""
    with closing(Proxy(database.server.port)) as proxy:
        url = make_url(database.url).set(port=proxy.port)
        with SQLAlchemyTokenStore(url, timeout=TIMEOUT) as store:
            keys = [store.create(total_available=5)[0]]
            proxy.delay = 0.06
            begun = time.monotonic()

            def slow(transaction):

                while time.monotonic() - begun < 2 * TIMEOUT:
                    transaction.lapsed_tokens(0, 1)
                return True

            assert store._transact(slow)
            assert store.get(keys[0]).total_available == 5


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf"])
def test_a_timeout_in_a_url_is_a_number_of_seconds(text):
    with pytest.raises(ValueError, match="timeout in the URL"):
        SQLAlchemyTokenStore(f"postgresql://user@127.0.0.1/name?timeout={text}")


def test_a_timeout_may_stand_in_the_url():
    store = SQLAlchemyTokenStore("mysql://user@127.0.0.1/name?timeout=2.5&charset=utf8mb4")
    assert store._database.timeout == 2.5
    assert dict(store._database._engine.url.query) == {"charset": "utf8mb4"}
