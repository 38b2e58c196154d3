"""What :class:`SQLAlchemyTokenStore` does when servers, connections and processes fail, and when calls race.

What fails is real: servers that are stopped, connections that are killed, deadlocks, processes that fork. Where a
failure has to come at one moment, a trigger of the database brings it, or a proxy that reads what passes through.
"""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import databases
import pytest
from client import ask
from sqlalchemy import create_engine, event, make_url, text

from usage_middleware import (
    OperationConflict,
    OperationNotFound,
    SQLAlchemyTokenStore,
    StoreError,
    TokenNotFound,
    UsageMiddleware,
)

DEADLINE = 30  # seconds, for what happens at once on an idle machine


@pytest.fixture
def store(database):
    with SQLAlchemyTokenStore(database.url) as store:
        yield store


def create(store, **fields):
    """Adds a token; returns its key as stores see it, and the token."""
    key, token = store.create(**{"total_available": 1000, **fields})
    return key.removeprefix("sk-"), token


def status(store, key):
    """The status that the endpoint has for a key."""
    return ask(UsageMiddleware(print, store), authorization=f"Bearer {key}").status


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def hooked_store(database, beginning, hook, **options):
    """A store that calls ``hook`` once, when it is about to send a statement that begins so."""
    engine = create_engine(database.url, **options)
    hooks = [hook]

    @event.listens_for(engine, "before_cursor_execute")
    def before(connection, cursor, statement, *rest):
        if hooks and statement.startswith(beginning):
            hooks.pop()()

    try:
        with SQLAlchemyTokenStore(engine) as store:
            yield store
        assert not hooks
    finally:
        engine.dispose()


# --- A server that goes and comes


def open_connections(store, count):
    """Lets the pool have several, so that what dies is more than the one that is tried first."""
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
                lambda s: s.find(token.id),
                lambda s: s.charge(key, 1, operation_id="a charge"),
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
        store.charge(key, 1, operation_id=f"{name} {number}")

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
    token = store.find(token.id)
    ids = [operation.id for operation in store.history(token.id)]
    assert (token.total_used, len(ids), len(set(ids))) == (charges, charges, charges)


# --- What is repeated

# Triggers that do something when an operation is inserted, a number of times. Sequences count in no transaction.
TRIGGERS = {
    "postgresql": (
        "CREATE SEQUENCE attempts",
        (
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF nextval('attempts') <= {times} THEN {action}; END IF; RETURN NEW; END $$"
        ),
        "CREATE {kind} fail {when} INSERT ON usage_operations {deferred} FOR EACH ROW EXECUTE FUNCTION fail()",
    ),
    "mariadb": (
        "CREATE SEQUENCE attempts",
        (
            "CREATE TRIGGER fail BEFORE INSERT ON usage_operations FOR EACH ROW "
            "IF NEXTVAL(attempts) <= {times} THEN {action}; END IF"
        ),
    ),
}
AGAIN = {
    "postgresql": "RAISE EXCEPTION 'again' USING ERRCODE = '{state}'",
    "mariadb": "SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}",
}
DIE = {"postgresql": "PERFORM pg_terminate_backend(pg_backend_pid())", "mariadb": "KILL CONNECTION_ID()"}


@contextmanager
def failing(database, action, times, *, deferred=False):
    """Every operation that is inserted fails, the first times. Gives a function that tells how many were tried."""
    name = "mariadb" if database.is_mysql else "postgresql"
    fields = {
        "times": times,
        "action": action[name],
        "kind": "CONSTRAINT TRIGGER" if deferred else "TRIGGER",
        "when": "AFTER" if deferred else "BEFORE",
        "deferred": "DEFERRABLE INITIALLY DEFERRED" if deferred else "",
    }
    database.server.execute(
        *(["SET GLOBAL log_bin_trust_function_creators = 1"] if database.is_mysql else []),
    )
    database.execute(*(statement.format(**fields) for statement in TRIGGERS[name]))
    try:
        yield (
            lambda: (
                database.execute("SELECT nextval(attempts)" if database.is_mysql else "SELECT nextval('attempts')")[0][
                    0
                ]
                - 1
            )
        )
    finally:
        if database.is_mysql:
            database.execute("DROP TRIGGER fail", "DROP SEQUENCE attempts")
        else:
            database.execute("DROP TRIGGER fail ON usage_operations", "DROP FUNCTION fail", "DROP SEQUENCE attempts")


def again(state, number):
    return {name: action.format(state=state, number=number) for name, action in AGAIN.items()}


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(again("40001", 1213), id="serialization failure, or deadlock"),
        pytest.param(
            {**again("40P01", 1213), "mariadb": AGAIN["mariadb"].format(state="40001", number=1213)}, id="deadlock"
        ),
        pytest.param(DIE, id="connection killed"),
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
            store.charge(key, 5, operation_id="x")
        assert tried() == 10
    assert store.find(token.id) == token
    assert store.charge(key, 5, operation_id="x").total_used == 5


def test_an_error_that_would_come_again_is_told_at_once(database, store):
    key, token = create(store)
    with failing(database, again("P0001" if not database.is_mysql else "45000", 1644), 1000) as tried:
        with pytest.raises(StoreError):
            store.charge(key, 5)
        assert tried() == 1
    assert store.find(token.id) == token


def waits(database):
    """Whether some transaction waits for a lock of another."""
    if database.is_mysql:
        # What this table shows is made anew only where nobody has read it for a tenth of a second.
        time.sleep(0.15)
        return database.server.execute("SELECT * FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
    return database.server.execute("SELECT * FROM pg_locks WHERE NOT granted")


def insert_operation(operation_id, token_id):
    return text(
        "INSERT INTO usage_operations (id, token_id, kind, amount, held, unlimited, final_amount, created_at,"
        f" changed_at) VALUES ('{operation_id}', {token_id}, 'charge', 0, 0, false, 0, 0, 0)"
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
            # The victim is to be the store: PostgreSQL takes who notices first, MariaDB who has done least.
            if not database.is_mysql:
                connection.execute(text("SET deadlock_timeout = '60s'"))
            connection.execute(insert_operation("x", token.id))
            for number in range(50):
                connection.execute(insert_operation(f"other {number}", token.id))
            charged = thread.submit(charging.charge, key, 5, operation_id="x")
            until(lambda: waits(database))
            connection.execute(text(f"SELECT * FROM usage_tokens WHERE id = {token.id} FOR UPDATE")).all()
            connection.rollback()
        assert charged.result(DEADLINE).total_used == 5
    assert len(tries) == 2
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
    assert store.find(token.id).total_used == 5


# --- A COMMIT whose answer is lost


_COMMIT = re.compile(rb"COMMIT(?!TED)")


class Proxy:
    """Stands between a store and its server, and loses one COMMIT, or the answer to it."""

    def __init__(self, port):
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.loses = None
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._threads.append(threading.Thread(target=self._pass_on, args=(client,)))
                self._threads[-1].start()

    def _pass_on(self, client):
        with client, socket.create_connection(("127.0.0.1", self._port)) as server, suppress(OSError):
            wrote = False
            while not self._closed.is_set():
                for ready in select.select([client, server], [], [], 0.1)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    wrote = wrote or b"INSERT" in data
                    loses = self.loses
                    # SQLAlchemy also commits, and nothing, where it sets MySQL's isolation level.
                    commits = wrote and ready is client and _COMMIT.search(data)
                    if loses and commits:
                        self.loses = None
                        if loses == "the answer":
                            server.sendall(data)
                            assert server.recv(65536)
                        return
                    wrote = wrote and not commits
                    (server if ready is client else client).sendall(data)

    def close(self):
        self._closed.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def proxy(database):
    with closing(Proxy(database.server.port)) as proxy:
        yield proxy


@pytest.mark.parametrize("loses", ["the request", "the answer"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_a_commit_that_is_lost(database, store, proxy, loses, own):
    key, token = create(store)
    url = make_url(database.url).set(port=proxy.port)
    engine = create_engine(url)
    with SQLAlchemyTokenStore(url if own else engine) as charging:
        charging.get(key)
        for number in (1, 2):
            proxy.loses = loses
            with pytest.raises(StoreError, match="not known whether") as caught:
                charging.charge(key, 5, operation_id=f"charge {number}")
            assert databases.PASSWORD not in "".join(traceback.format_exception(caught.value))
            assert store.find(token.id).total_used == 5 * (number - (loses == "the request"))
            assert charging.charge(key, 5, operation_id=f"charge {number}").total_used == 5 * number
    engine.dispose()
    assert [operation.held for operation in store.history(token.id)] == [5, 5]


def test_a_connection_that_is_killed_in_the_middle_of_a_commit(database, store):
    if database.is_mysql:
        pytest.skip("MariaDB runs nothing at a COMMIT")
    key, token = create(store)
    with failing(database, DIE, 1, deferred=True):
        with pytest.raises(StoreError, match="not known whether"):
            store.charge(key, 5, operation_id="x")
        assert store.find(token.id) == token
        assert store.charge(key, 5, operation_id="x").total_used == 5
        assert store.charge(key, 5, operation_id="x").total_used == 5


def test_a_commit_that_is_refused_is_begun_again(database, store):
    if database.is_mysql:
        pytest.skip("MariaDB runs nothing at a COMMIT")
    key, _ = create(store)
    with failing(database, again("40001", 1213), 2, deferred=True) as tried:
        assert store.charge(key, 5).total_used == 5
        assert tried() == 3


# --- Calls that race. Each is stopped in its middle, while another is made.


def test_two_tokens_and_one_operation_id(database, store):
    (key, token), (other_key, other) = create(store), create(store)
    with (
        hooked_store(
            database, "INSERT INTO usage_operations", lambda: store.charge(other_key, 1, operation_id="x")
        ) as racing,
        pytest.raises(OperationConflict),
    ):
        racing.charge(key, 1, operation_id="x")
    assert (store.find(token.id).total_used, store.find(other.id).total_used) == (0, 1)


def refused(says):
    return pytest.raises(ValueError, match=says)


def test_two_tokens_and_one_key(database, store):
    with (
        hooked_store(database, "INSERT INTO usage_tokens", lambda: store.create(key="a-key")) as racing,
        pytest.raises(ValueError, match="in use"),
    ):
        racing.create(key="a-key")
    assert len(list(store.tokens())) == 1


@pytest.mark.parametrize("give_up", ["rotate", "delete"])
def test_a_key_that_comes_and_goes_while_it_is_brought(database, store, give_up):
    def come_and_go():
        _, token = store.create(key="a-key")
        getattr(store, give_up)(token.id)

    with (
        hooked_store(database, "INSERT INTO usage_tokens", come_and_go) as racing,
        pytest.raises(ValueError, match="was before"),
    ):
        racing.create(key="a-key")
    assert store.get("a-key") is None


@pytest.mark.parametrize(
    ("give_up", "beginning"),
    [
        pytest.param(method, beginning, id=f"{method}, before its {beginning}")
        for method, beginnings in {
            "rotate": ["INSERT INTO usage_retired_keys", "UPDATE usage_tokens"],
            "delete": ["INSERT INTO usage_retired_keys", "DELETE FROM usage_models", "DELETE FROM usage_tokens"],
        }.items()
        for beginning in beginnings
    ],
)
def test_a_key_that_is_brought_while_it_goes(database, store, give_up, beginning):
    _, token = create(store, key="a-key")
    told = []

    def bring():
        with pytest.raises(ValueError, match="was before") as caught:
            store.create(key="a-key")
        told.append(caught)

    with hooked_store(database, beginning, bring) as racing:
        getattr(racing, give_up)(token.id)
    assert told
    assert store.get("a-key") is None
    with pytest.raises(ValueError, match="was before"):
        store.create(key="a-key")


@pytest.mark.parametrize(
    ("call", "meanwhile", "error"),
    [
        pytest.param(lambda s, k, i: s.charge(k, 1), lambda s, i: s.rotate(i), TokenNotFound, id="rotated"),
        pytest.param(lambda s, k, i: s.charge(k, 1), lambda s, i: s.delete(i), TokenNotFound, id="deleted"),
        pytest.param(lambda s, k, i: s.settle("r", 1), lambda s, i: s.delete(i), TokenNotFound, id="settled, deleted"),
        pytest.param(
            lambda s, k, i: s.settle("r", 1), lambda s, i: s.settle("r", 2), OperationConflict, id="settled twice"
        ),
        pytest.param(
            lambda s, k, i: s.refund("c"), lambda s, i: s.prune(2**40), OperationNotFound, id="refunded, pruned"
        ),
    ],
)
def test_what_changes_before_the_token_is_locked(database, store, call, meanwhile, error):
    """What a call has looked at before it had the lock counts for nothing."""
    key, token = create(store)
    store.charge(key, 10, operation_id="c")
    store.reserve(key, 20, operation_id="r")
    with (
        hooked_store(database, "SELECT usage_tokens", lambda: meanwhile(store, token.id)) as racing,
        pytest.raises(error),
    ):
        call(racing, key, token.id)


def test_a_charge_that_waits_for_another_sees_what_it_left(database, store):
    """With a snapshot from before the lock, each of the two would see all that is available."""
    key, token = create(store, total_available=10)
    store.charge(key, 0)
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert go_on.wait(DEADLINE)

    with ThreadPoolExecutor(2) as threads, hooked_store(database, "UPDATE usage_tokens", hold) as first:
        # A store that had taken a snapshot with the first statement, as REPEATABLE READ does.
        slow = threads.submit(first.charge, key, 7)
        assert inside.wait(DEADLINE)
        fast = threads.submit(store.charge, key, 7)
        until(lambda: waits(database))
        go_on.set()
        assert slow.result(DEADLINE).total_used == 7
        assert "3 quota units left" in str(fast.exception(DEADLINE))
    assert store.find(token.id).total_available == 3


def test_prune_races_with_all_else(database, store, full):
    tokens = [create(store, total_available=10**9) for _ in range(4)]
    rounds = 500 if full else 25
    done = threading.Event()

    def use(number):
        key, _ = tokens[number % len(tokens)]
        for turn in range(rounds):
            name = f"{number}/{turn}"
            store.charge(key, 5, model="a", operation_id=name)
            with suppress(OperationNotFound):
                store.refund(name, 2)
            store.reserve(key, 7, model="b", operation_id=f"{name}/r", expires_in=0.001 if turn % 2 else 600)
            with suppress(OperationNotFound):
                store.settle(f"{name}/r", 3)

    def prune():
        forgotten = 0
        while not done.is_set():
            forgotten += store.prune(time.time() - 0.005)
        return forgotten

    with ThreadPoolExecutor(8) as threads:
        pruned = [threads.submit(prune) for _ in range(2)]
        try:
            for used in [threads.submit(use, number) for number in range(6)]:
                used.result()
        finally:
            done.set()
        assert sum(future.result() for future in pruned) > 0
    for _, token in tokens:
        token = store.find(token.id)
        assert token.total_granted == 10**9
        # What was pruned counts on, so that the models say the same as the total.
        assert sum(store.model_usage(token.id).values()) == token.total_used
    store.prune(time.time() + 1)
    left = [operation for _, token in tokens for operation in store.history(token.id)]
    assert all(operation.is_open and operation.held for operation in left)
