"""Connections that are lost at every moment of every operation: nothing is done twice, and nothing that was answered is
undone.

A proxy cuts the connection at each chunk that passes in turn: before it, in its middle, behind it. So each operation is
cut before its COMMIT, in it, and after it, down to what the pool does with the connection when all is done.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
from databases import ADMINISTRATOR
from proxies import Proxy
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from usage_middleware import Operation, SQLAlchemyTokenStore, StoreError, Token, TokenNotFound

pytestmark = [pytest.mark.servers, pytest.mark.slow]

SHARES = (0.0, 0.5, 1.0)


class Place(NamedTuple):
    """What an operation is tried on."""

    key: str
    token: Token
    charge: Operation
    reservation: Operation


class Case(NamedTuple):
    call: Any  # of a store and a place
    times: Any  # how often that was done, by a store and a place
    repeats: bool = True  # whether the same call may be made again


def operations(store, place):
    return list(store.history(place.token.id))


def named(store, name):
    return sum(token.name == name for token in store.tokens())


CASES = {
    "create": Case(lambda s, p: s.create(name="created", key=p.key + "x"), lambda s, p: named(s, "created"), False),
    "charge": Case(
        lambda s, p: s.charge(p.key, 5, model="m", idempotency_key="call"),
        lambda s, p: (s.get(p.key).total_used - 30) / 5,
    ),
    "reserve": Case(
        lambda s, p: s.reserve(p.key, 5, model="m", idempotency_key="call"),
        lambda s, p: (s.get(p.key).total_used - 30) / 5,
    ),
    "settle": Case(lambda s, p: s.settle(p.reservation, 13), lambda s, p: (20 - s.get(p.key).held) / 20),
    "refund": Case(
        lambda s, p: s.refund(p.charge, 4, idempotency_key="call"), lambda s, p: (30 - s.get(p.key).total_used) / 4
    ),
    "grant": Case(
        lambda s, p: s.grant(p.token.id, 100, idempotency_key="call"),
        lambda s, p: (s.get(p.key).total_granted - 1000) / 100,
    ),
    "update": Case(lambda s, p: s.update(p.token.id, name="new"), lambda s, p: named(s, "new")),
    "rotate": Case(lambda s, p: s.rotate(p.token.id), lambda s, p: s.get(p.key) is None, False),
    "delete": Case(lambda s, p: s.delete(p.token.id), lambda s, p: s.get_by_id(p.token.id) is None, False),
    "prune": Case(lambda s, p: s.prune(2**40), lambda s, p: 2 - len(operations(s, p))),
}

MYSQLCLIENT = "mysqlclient"
ENGINES = {
    "url": None,
    "engine": {},
    "pre-ping": {"pool_pre_ping": True},
    "no pool": {"poolclass": NullPool},
    "REPEATABLE READ": {"isolation_level": "REPEATABLE READ"},
    "SERIALIZABLE": {"isolation_level": "SERIALIZABLE"},
    "AUTOCOMMIT": {"isolation_level": "AUTOCOMMIT"},
}
ALWAYS = ("url", "engine")


def prepared(store):
    """Return a token with a charge and an open reservation."""
    key, token = store.create(total_available=1000, model_limits={"m": 500})
    store.charge(key, 10, idempotency_key="charge")
    charge = store.find_operation(key, "charge")
    return Place(key, token, charge, store.reserve(key, 20))


@pytest.fixture
def proxy(database):
    with closing(Proxy(database.server.port)) as proxy:
        yield proxy


@contextmanager
def over(proxy, database, kind, driver):
    """Yield a store whose connections go through a proxy."""
    url = make_url(database.url).set(port=proxy.port)
    if driver == MYSQLCLIENT:
        url = url.set(drivername="mysql+mysqldb")
    options = ENGINES[kind]
    engine = None if options is None else create_engine(url, **options)
    try:
        with SQLAlchemyTokenStore(url if engine is None else engine) as store:
            yield store
        if engine is not None:
            pool = engine.pool
            with engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT 1").scalar() == 1
            assert engine.pool is pool  # It is its owner's to dispose of.
    finally:
        if engine is not None:
            engine.dispose()


@pytest.mark.parametrize("driver", ["ordinary", MYSQLCLIENT])
@pytest.mark.parametrize("kind", list(ENGINES))
@pytest.mark.parametrize("name", list(CASES))
def test_a_connection_that_is_cut(database, proxy, name, kind, driver, full):
    if driver == MYSQLCLIENT and (not database.is_mysql or find_spec("MySQLdb") is None):
        pytest.skip("needs MariaDB and mysqlclient")
    if not full and (kind not in ALWAYS or driver == MYSQLCLIENT):
        pytest.skip("run with --full")
    case = CASES[name]
    with SQLAlchemyTokenStore(database.url) as store, over(proxy, database, kind, driver) as cut:
        outcomes, uncut = set(), 0
        for number in itertools.count(1):
            uncut += 1
            for share in SHARES if full else [SHARES[number % 3]]:
                database.empty()
                place = prepared(store)
                cut.get(place.key)
                proxy.cut_at(number, share)
                outcome = try_to(partial(case.call, cut, place))
                uncut = uncut if proxy.cut else 0
                proxy.cut = None
                outcomes.add(outcome)
                check(store, cut, case, place, outcome)
            if uncut == 3:  # What is sent may be received in one chunk or in two.
                break
        # Without a pool each call connects, and a call does not connect twice. So a connection that is cut while it is
        # made is an error that says so, and nothing was done.
        if kind == "no pool":
            outcomes = {outcome for outcome in outcomes if not outcome.startswith("not done")}
        assert outcomes <= {"done", "unknown"}
        assert outcomes == {"done", "unknown"} or not full


def try_to(call):
    try:
        call()
    except StoreError as error:
        return "unknown" if "not known whether" in str(error) else f"not done: {error}"
    return "done"


def check(store, cut, case, place, outcome):
    """Whether what was said is true, and the same call is then done once."""
    times = case.times(store, place)
    # prune() is several transactions, and a connection of a later one may be cut.
    assert times in {"done": {1}, "unknown": {0, 1}}.get(outcome, {0, 1} if case is CASES["prune"] else {0})
    if case.repeats:
        case.call(cut, place)
        assert case.times(store, place) == 1
    for token in store.tokens():
        made = list(store.history(token.id))
        assert len({operation.id for operation in made}) == len(made)
        assert sum(operation.idempotency_key == "call" for operation in made) <= 1
        assert token.total_granted in (0, 1000, 1100)
        if token.id == place.token.id and len(made) > 1:
            assert sum(operation.held for operation in made) == token.total_used
        # A server may still be at the COMMIT of a deletion.
        with suppress(TokenNotFound) if outcome == "unknown" and case is CASES["delete"] else nullcontext():
            store.rotate(token.id)
            store.delete(token.id)


@pytest.mark.parametrize("has_keys", [True, False], ids=["idempotency keys", "no keys"])
def test_connections_that_an_administrator_kills(database_server, database_url, has_keys, full):
    """A charge that succeeded was made once. One whose outcome was unknown is made once when it is repeated with its
    idempotency key; without one, it was made once or not at all."""
    seconds = 40 if full else 2
    engine = create_engine(database_url)
    with (
        SQLAlchemyTokenStore(database_url) as store,
        SQLAlchemyTokenStore(engine) as over_engine,
        ThreadPoolExecutor(8) as threads,
    ):
        key, token = store.create(total_available=10**12)
        over_engine.get(key)
        end = time.monotonic() + seconds

        def charge(thread):
            made = unknown = 0
            charging = (store, over_engine)[thread % 2]
            while time.monotonic() < end:
                outcome = try_to(
                    partial(charging.charge, key, 1, idempotency_key=f"{thread}/{made}" if has_keys else None)
                )
                made += outcome == "done"
                unknown += outcome == "unknown"
            return made, unknown

        with killing_connections(database_server, database_url) as killed:
            charges = [charged.result() for charged in [threads.submit(charge, thread) for thread in range(8)]]
    engine.dispose()
    made, unknown = (sum(counts) for counts in zip(*charges, strict=True))
    with SQLAlchemyTokenStore(database_url) as looking:
        used = looking.get(key).total_used
        print(f"\n{used} charges: {made} succeeded, {unknown} unknown, {killed[0]} connections killed")
        assert len({operation.id for operation in looking.history(token.id)}) == used
    # The last call of a thread may be one that nothing repeated.
    assert made <= used <= made + (8 if has_keys else unknown)
    assert killed[0] > 10
    assert made


@contextmanager
def killing_connections(server, url):
    """Kill the connections to a database, again and again. Gives a list with how many it were."""
    is_mysql = server.driver.startswith("mysql")
    name, done, killed = make_url(url).database, threading.Event(), [0]
    administrator = create_engine(server.url(server.no_database, user=ADMINISTRATOR), isolation_level="AUTOCOMMIT")

    def kill():
        with administrator.connect() as connection:
            while not done.wait(0.03):
                if is_mysql:
                    ids = connection.execute(text(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"))
                    statements = [f"KILL CONNECTION {row.id}" for row in ids]
                else:
                    statements = [f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"]
                for statement in statements:
                    with suppress(DBAPIError):  # It has gone by itself.
                        killed[0] += max(connection.execute(text(statement)).rowcount, 1)

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill)
        try:
            yield killed
        finally:
            done.set()
            killing.result()
            administrator.dispose()


@pytest.mark.parametrize("name", list(CASES))
def test_a_socket_whose_error_the_driver_does_not_know(database, name):
    """For a moment a socket that was reset has an error and nothing to read. psycopg then raises an error of its own,
    and calls the connection open. A pipe whose reader has gone stays in that state."""
    case, engine = CASES[name], create_engine(database.url, pool_size=1, max_overflow=0)
    with closing_engine(engine), SQLAlchemyTokenStore(database.url) as store, SQLAlchemyTokenStore(engine) as broken:
        place = prepared(store)
        broken.get(place.key)
        with engine.connect() as connection:
            break_socket(connection.connection.dbapi_connection)
        outcome = try_to(partial(case.call, broken, place))
        check(store, broken, case, place, outcome)
        assert outcome == "done"


@contextmanager
def closing_engine(engine):
    try:
        yield
    finally:
        engine.dispose()


def break_socket(connection):
    reader, writer = os.pipe()
    os.close(reader)
    descriptor = connection.fileno() if hasattr(connection, "fileno") else connection._sock.fileno()
    os.dup2(writer, descriptor)
    os.close(writer)


def test_a_token_that_is_not_there_costs_no_connection(database):
    with SQLAlchemyTokenStore(database.url) as store:
        with pytest.raises(TokenNotFound):
            store.charge("sk-unknown", 1)
        ids = connections(database)
        for _ in range(3):
            with pytest.raises(TokenNotFound):
                store.charge("sk-unknown", 1)
        assert connections(database) == ids


def connections(database):
    name = make_url(database.url).database
    return set(
        database.server.execute(
            f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"
            if database.is_mysql
            else f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"
        )
    )
