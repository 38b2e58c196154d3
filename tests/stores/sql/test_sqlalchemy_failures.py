"""Transactions that fail, and a COMMIT whose answer is lost: what is retried, and what is reported."""

from __future__ import annotations

import re
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import databases
import pytest
from holders import create
from interrupts import Interrupt
from proxies import Proxy
from sql_faults import AGAIN, DIE, again, failing, waits
from sqlalchemy import create_engine, event, make_url, text
from waiting import DEADLINE, until

from usage_middleware import (
    SQLAlchemyTokenStore,
    StoreError,
)

# --- What is repeated


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(again("40001", 1213), id="serialization failure, or deadlock"),
        pytest.param(
            {**again("40P01", 1213), "mariadb": AGAIN["mariadb"].format(state="40001", number=1213)}, id="deadlock"
        ),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_a_transaction_that_can_be_begun_again_is(database, store, action, own):
    key, token = create(store)
    engine = create_engine(database.url)
    with failing(database, action, 3) as tried, SQLAlchemyTokenStore(database.url if own else engine) as charging:
        assert charging.charge(key, 5).total_used == 5
        assert tried() == 4
    engine.dispose()
    assert [operation.held for operation in store.history(token.id)] == [5]


def test_a_transaction_is_not_begun_again_for_ever(database, store):
    key, token = create(store)
    with failing(database, again("40001", 1213), 1000) as tried:
        with pytest.raises(StoreError):
            store.charge(key, 5, idempotency_key="x")
        assert tried() == 10
    assert store.get_by_id(token.id) == token
    assert store.charge(key, 5, idempotency_key="x").total_used == 5


@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_a_connection_that_is_killed_while_a_transaction_writes(database, store, own):
    """COMMIT was sent with what is written. If the statements were sent one by one, the transaction is begun again."""
    key, token = create(store)
    engine = create_engine(database.url)
    with failing(database, DIE, 1) as tried, SQLAlchemyTokenStore(database.url if own else engine) as charging:
        if own or not database.is_mysql:
            with pytest.raises(StoreError, match="not known whether"):
                charging.charge(key, 5, idempotency_key="x")
            assert store.get_by_id(token.id) == token
        assert charging.charge(key, 5, idempotency_key="x").total_used == 5
        assert tried() == 2
    engine.dispose()
    assert [operation.held for operation in store.history(token.id)] == [5]


LASTING = again("P0001", 1644)


def test_an_error_that_would_come_again_is_told_at_once(database, store):
    key, token = create(store)
    with failing(database, LASTING, 1000) as tried:
        with pytest.raises(StoreError, match="failed"):  # and it is known that it did nothing
            store.charge(key, 5)
        assert tried() == 1
    assert store.get_by_id(token.id) == token


def test_an_error_in_a_handler_is_told_as_it_is(database, store):
    """An interrupt that the caller was handling already is not raised in its place."""

    def charge():
        with pytest.raises(StoreError, match="failed"):
            store.charge(key, 5)

    key, _ = create(store)
    with failing(database, LASTING, 1000):
        try:
            raise Interrupt
        except Interrupt:
            charge()
            try:
                raise LookupError
            except LookupError:
                charge()


def insert_operation(name, token_id):
    return text(
        "INSERT INTO usage_operations (id, token_id, kind, amount, idempotency_key, held, unlimited, final_amount,"
        f" created_at, changed_at) VALUES ('{name}', {token_id}, 'charge', 0, '{name}', 0, false, 0, 0, 0)"
    )


def test_a_deadlock_is_resolved(database, store):
    key, token = create(store)
    tries = []
    other = create_engine(make_url(database.url).set(username=databases.ADMINISTRATOR))
    engine = create_engine(database.url)

    @event.listens_for(engine, "before_cursor_execute")
    def before(connection, cursor, statement, *rest):
        if "FOR UPDATE" in statement:
            tries.append(statement)

    with ThreadPoolExecutor(1) as thread, SQLAlchemyTokenStore(engine) as charging:
        with other.connect() as connection:
            # The store must be the victim: PostgreSQL chooses the transaction that notices first, MariaDB the one that
            # did least.
            if not database.is_mysql:
                connection.execute(text("SET deadlock_timeout = '60s'"))
            connection.execute(insert_operation("x", token.id))
            for number in range(50):
                connection.execute(insert_operation(f"other {number}", token.id))
            charged = thread.submit(charging.charge, key, 5, idempotency_key="x")
            until(lambda: waits(database))
            connection.execute(text(f"SELECT * FROM usage_tokens WHERE id = {token.id} FOR UPDATE")).all()
            connection.rollback()
        assert charged.result(DEADLINE).total_used == 5
    assert len(tries) > 1
    other.dispose()
    engine.dispose()


def test_a_connection_that_is_killed_while_it_waits_for_a_lock(database, store):
    key, token = create(store)
    with database.engine.connect() as connection, ThreadPoolExecutor(1) as thread:
        connection = connection.execution_options(isolation_level="READ COMMITTED")
        connection.exec_driver_sql(f"SELECT * FROM usage_tokens WHERE id = {token.id} FOR UPDATE").all()
        charged = thread.submit(store.charge, key, 5)
        until(lambda: waits(database))
        if database.is_mysql:
            rows = waits(database)
            ids = [row.trx_mysql_thread_id for row in rows]
            database.server.execute(*(f"KILL {number}" for number in ids))
        else:
            database.server.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
        connection.rollback()
        assert charged.result(DEADLINE).total_used == 5
    assert store.get_by_id(token.id).total_used == 5


# --- A COMMIT whose answer is lost


_COMMIT = re.compile(rb"COMMIT(?!TED)")


@pytest.fixture
def proxy(database):
    with closing(Proxy(database.server.port)) as proxy:
        yield proxy


def lose_a_commit(proxy, loses, is_done):
    """Cut the connection at the next COMMIT of what has inserted, or at the answer to it."""
    seen = []

    def cut(chunk, is_request):
        if seen == ["insert", "commit"]:
            # An answer to what was sent with the COMMIT may come first, and a server that cannot send it rolls back.
            until(is_done)
            proxy.cut = None
            return 0
        if is_request and b"INSERT" in chunk:
            seen.append("insert")
        if seen and is_request and _COMMIT.search(chunk):
            if loses == "the request":
                proxy.cut = None
                return 0
            seen[:] = ["insert", "commit"]
        return None

    proxy.cut = cut


@pytest.mark.parametrize("loses", ["the request", "the answer"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_a_commit_that_is_lost(database, store, proxy, loses, own):
    key, token = create(store)
    url = make_url(database.url).set(port=proxy.port)
    engine = create_engine(url)
    with SQLAlchemyTokenStore(url if own else engine) as charging:
        charging.get(key)
        for number in (1, 2):
            made = 5 * number
            lose_a_commit(proxy, loses, lambda: store.get_by_id(token.id).total_used == made)  # noqa: B023
            with pytest.raises(StoreError, match="not known whether") as caught:
                charging.charge(key, 5, idempotency_key=f"charge {number}")
            assert databases.PASSWORD not in "".join(traceback.format_exception(caught.value))
            assert store.get_by_id(token.id).total_used == (made if loses == "the answer" else made - 5)
            assert charging.charge(key, 5, idempotency_key=f"charge {number}").total_used == made
    engine.dispose()
    assert [operation.held for operation in store.history(token.id)] == [5, 5]


def test_a_connection_that_is_killed_in_the_middle_of_a_commit(database, store):
    if database.is_mysql:
        pytest.skip("MariaDB runs nothing at a COMMIT")
    key, token = create(store)
    with failing(database, DIE, 1, deferred=True):
        with pytest.raises(StoreError, match="not known whether"):
            store.charge(key, 5, idempotency_key="x")
        assert store.get_by_id(token.id) == token
        assert store.charge(key, 5, idempotency_key="x").total_used == 5
        assert store.charge(key, 5, idempotency_key="x").total_used == 5


def test_a_commit_that_is_refused_is_begun_again(database, store):
    if database.is_mysql:
        pytest.skip("MariaDB runs nothing at a COMMIT")
    key, _ = create(store)
    with failing(database, again("40001", 1213), 2, deferred=True) as tried:
        assert store.charge(key, 5).total_used == 5
        assert tried() == 3
