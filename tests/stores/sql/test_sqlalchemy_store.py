"""What :class:`SQLAlchemyTokenStore` does on real servers: the contract, its tables, its statements, and what it keeps.

``test_sqlalchemy_failures.py`` and its neighbours have what it does when servers, connections and processes fail.
"""

from __future__ import annotations

import re
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from hashlib import sha256

import databases
import pytest
from holders import create
from processes import to_its_end
from sqlalchemy import NullPool, create_engine, make_url

from usage_middleware import Lookup, QuotaExceeded, SQLAlchemyTokenStore, StoreError, Token
from usage_middleware.keys import key_digest
from usage_middleware.stores.sql import sql_schema
from usage_middleware.testing import QuotaStoreContract
from usage_middleware.tokens import TokenRecord

MOST = 2**63 - 1


@pytest.fixture(scope="module")
def stores(shared_database):
    stores = [SQLAlchemyTokenStore(shared_database.url)]
    yield stores
    stores[-1].close()


class TestSQLAlchemyTokenStore(QuotaStoreContract):
    @pytest.fixture
    def store(self, database, stores, request):
        # Connecting takes longer than most of these tests, so that one store serves them until one of them closes it.
        yield stores[-1]
        if "closed" in request.node.name:
            stores[-1].close()
            stores.append(SQLAlchemyTokenStore(database.url))

    @pytest.fixture(autouse=True)
    def _url(self, database):
        self.url = database.url

    def reopen(self, tmp_path):
        return SQLAlchemyTokenStore(self.url)


# --- Tables

# Makes tables, or dies after the first statement that makes something.
CRASH = """
import os, signal, sys
from sqlalchemy import Engine, event
from usage_middleware import SQLAlchemyTokenStore

@event.listens_for(Engine, "after_cursor_execute")
def after(connection, cursor, statement, *rest):
    if statement.split()[0] in ("CREATE", "INSERT"):
        os.kill(os.getpid(), signal.SIGKILL)

crashes = 0
while True:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        SQLAlchemyTokenStore(sys.argv[1]).get_by_id(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != signal.SIGKILL or crashes == int(sys.argv[2]):
        break
    crashes += 1
print(crashes)
"""


def tables_of(database):
    """Return all that the server says of the tables of a store."""
    with create_engine(database, poolclass=NullPool).connect() as connection:
        if connection.dialect.name == "postgresql":
            return sorted(
                (table, column, kind)
                for table, column, kind in connection.exec_driver_sql(
                    "SELECT table_name, column_name, data_type FROM information_schema.columns "
                    "WHERE table_schema = 'public' UNION "
                    "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
                )
            )
        names = [name for (name,) in connection.exec_driver_sql("SHOW TABLES")]
        tables = [connection.exec_driver_sql(f"SHOW CREATE TABLE {name}").one()[1] for name in sorted(names)]
        # Indexes are in the order in which they were made.
        return [sorted(line.rstrip(",") for line in table.splitlines()) for table in tables]


def test_processes_that_die_while_they_make_tables_hinder_none(database_server, database_url):
    # MariaDB commits each statement, so that each process comes one further; PostgreSQL none, so all die at once.
    most = 3 if database_server.driver.startswith("postgresql") else 30
    crashes = int(to_its_end([sys.executable, "-c", CRASH, database_url, str(most)]))
    assert crashes == 3 if most == 3 else crashes > len(sql_schema.TABLES)
    with SQLAlchemyTokenStore(database_url) as store, database_server.database() as other:
        create(store)
        with SQLAlchemyTokenStore(other) as in_one_go:
            create(in_one_go)
        assert tables_of(database_url) == tables_of(other)


# Several processes that make tables as soon as they are told to.
START = """
import os, signal, sys
from usage_middleware import SQLAlchemyTokenStore

told, tell = os.pipe()
children = []
for number in range(8):
    children.append(os.fork())
    if not children[-1]:
        os.close(tell)
        os.read(told, 1)
        signal.alarm(60)
        with SQLAlchemyTokenStore(sys.argv[1]) as store:
            store.create(name=str(number))
        os._exit(0)
os.close(tell)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""


def test_processes_that_start_at_once_make_the_tables_once(database_server, database_url):
    to_its_end([sys.executable, "-c", START, database_url])
    with SQLAlchemyTokenStore(database_url) as store:
        assert sorted(int(token.name) for token in store.tokens()) == list(range(8))


@pytest.fixture
def plain_user(database_server, database_url):
    """Yield the URL of a user that may read and write existing tables but make none, and a function that grants
    that."""
    name = make_url(database_url).database
    is_mysql = database_server.driver.startswith("mysql")
    database_server.execute(
        f"CREATE USER plain IDENTIFIED BY '{databases.PASSWORD}'"
        if is_mysql
        else f"CREATE ROLE plain LOGIN PASSWORD '{databases.PASSWORD}'"
    )

    def grant():
        database_server.execute(
            *(
                [f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.* TO plain"]
                if is_mysql
                else [
                    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO plain",
                    "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain",
                ]
            ),
            database=name,
        )

    yield make_url(database_url).set(username="plain"), grant
    if not is_mysql:
        database_server.execute("DROP OWNED BY plain", database=name)
    database_server.execute("DROP USER plain")


def test_a_user_who_may_make_no_tables(database_url, plain_user):
    url, grant = plain_user
    grant()
    with SQLAlchemyTokenStore(url) as store:
        with pytest.raises(StoreError, match=r"denied"):
            store.get_by_id(1)
        with SQLAlchemyTokenStore(database_url) as owner:
            owner.get_by_id(1)
        grant()
        key, token = create(store)
        store.charge(key, 5, model="a")
        store.prune(2**40)
        store.delete(token.id)


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        pytest.param(["CREATE TABLE usage_tokens (id integer)"], "'usage_tokens' that usage-middleware", id="foreign"),
        pytest.param(
            ["CREATE TABLE usage_schema (version integer)", "INSERT INTO usage_schema VALUES (99)"],
            "newer usage-middleware",
            id="newer",
        ),
    ],
)
def test_tables_that_are_not_ours(database_url, statements, says):
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    before = tables_of(database_url)
    with SQLAlchemyTokenStore(database_url) as store:
        for use in (lambda: store.get("key"), lambda: store.create(), store.has_tables):
            with pytest.raises(StoreError, match=says) as caught:
                use()
            assert databases.PASSWORD not in str(caught.value)
    assert tables_of(database_url) == before


# --- What is kept

# Texts that a database may treat as equal.
SIMILAR = [
    *("a", "A", "\u00e4", "a\u0308", "\u00c4", "a ", " a", "a\t", "a\n", "a%", "a_", "a'", 'a"', "a\\", "\u00df"),
    *("ss", "s", "\u0131", "i", "I", "\u2460", "1", "%(id)s", ":id", "{}", "NULL", "\U0001f511", "\U0001f510"),
    *("\u200b", "a\u200b", "\ufeffa", "\uffff", "\U0010ffff", "\u4ee4\u724c", "x" * 255, "\U0001f511" * 255),
]


def test_texts_are_distinguished(store):
    key, token = create(store, total_available=MOST, model_limits=dict.fromkeys(SIMILAR, True))
    for number, text in enumerate(SIMILAR, 1):
        store.charge(key, number, model=text, idempotency_key=text)
    assert store.get_by_id(token.id).model_limits == token.model_limits
    assert store.model_usage(token.id) == {text: number for number, text in enumerate(SIMILAR, 1)}
    operations = list(store.history(token.id))
    assert [(operation.idempotency_key, operation.model) for operation in operations] == [(t, t) for t in SIMILAR[::-1]]
    days = store.usage_by_day(token.id, date.min, date.max)
    assert {day.model: day.used for day in days} == store.model_usage(token.id)
    for number, text in enumerate(SIMILAR, 1):
        assert store.charge(key, number, model=text, idempotency_key=text).total_used == sum(range(len(SIMILAR) + 1))
    for operation in operations:
        store.refund(operation)
    assert store.get_by_id(token.id).total_used == 0


def test_a_name_may_be_any_text(store):
    for name in (*SIMILAR, "\U0001f511" * 100_000, "", "\r\n\x1a\x7f"):
        _, token = create(store, name=name)
        assert store.get_by_id(token.id).name == name


def test_digests_may_have_every_byte(store):
    digests = [bytes((start + number) % 256 for number in range(32)) for start in range(256)]
    digests += [bytes(32), b"\xff" * 32, b"a" * 31 + b"\0", b"a" * 31 + b" ", b"A" * 31 + b" ", b"%s" * 16, b"'" * 32]
    ids = store.restore([TokenRecord(token=Token(name=str(n)), digest=d) for n, d in enumerate(digests)])
    assert None not in ids
    assert [record.digest for record in store.records()] == digests
    for token_id, digest in zip(ids, digests, strict=True):
        assert store._get(digest).id == token_id
        lookup = Lookup(digest=digest, now=0, most_lapsed=0)
        assert store._transact(lambda transaction, lookup=lookup: transaction.load(lookup)).token.id == token_id


@pytest.mark.parametrize(
    "seconds", [0.1 + 0.2, 1 / 3, 1e-9, 5e-324, 1.7976931348623157e308, 2**53 + 2.0, 1e22, 600, 123456789.123456789]
)
def test_a_number_of_seconds_is_kept_exactly(database, seconds):
    now = 1_800_000_000.1 + 0.2
    with SQLAlchemyTokenStore(database.url, clock=lambda: now) as store:
        key, token = create(store)
        reservation = store.reserve(key, 1, idempotency_key="x", expires_in=seconds)
        (operation,) = store.history(token.id)
        assert operation == reservation
        assert (operation.expires_in, operation.created_at, operation.expires_at) == (seconds, now, now + seconds)
        assert store.reserve(key, 1, idempotency_key="x", expires_in=seconds) == operation


def test_totals_go_as_far_as_a_column(store):
    key, token = create(store, total_available=MOST, model_limits={"m": MOST})
    assert store.charge(key, MOST, model="m", idempotency_key="x").total_used == MOST
    assert store.model_usage(token.id) == {"m": MOST}
    with pytest.raises(ValueError, match="2\\*\\*63"):
        store.grant(token.id, 1)
    assert store.refund(store.find_operation(key, "x")).total_available == MOST
    assert store.grant(token.id, -MOST).total_granted == 0


@pytest.mark.slow
def test_a_restore_of_more_than_one_statement_takes(store):
    """PostgreSQL takes 65,535 parameters, and one statement has each digest twice."""
    count = 33_000
    records = [TokenRecord(token=Token(), digest=sha256(b"%d" % number).digest()) for number in range(count)]
    ids = store.restore([*records, records[0]])
    assert len(set(ids[:-1])) == count
    assert ids[-1] is None
    assert store.count() == count
    assert len(store.taken([record.digest for record in records])) == count


# --- Statements


@contextmanager
def server_log(database):
    """Yield a list of what the server is sent over the application's connections, which is there at the end."""
    name, said = make_url(database.url).database, []
    if database.is_mysql:
        database.server.execute("SET GLOBAL log_output = 'TABLE'", "SET GLOBAL general_log = 1")
    else:
        database.server.execute(f"ALTER DATABASE {name} SET log_statement = 'all'")
    start = database.server.log.stat().st_size
    try:
        yield said
    finally:
        if database.is_mysql:
            rows = database.server.execute(
                "SET GLOBAL general_log = 0",
                f"SELECT argument FROM mysql.general_log WHERE command_type = 'Query' "
                f"AND user_host LIKE '{databases.APPLICATION}%' ORDER BY event_time",
            )
            said += [argument.decode() if isinstance(argument, bytes) else argument for (argument,) in rows]
            database.server.execute("TRUNCATE mysql.general_log")
        else:
            database.server.execute(f"ALTER DATABASE {name} RESET log_statement")
            with database.server.log.open() as log:
                log.seek(start)
                said += re.findall(r"LOG:  (?:statement|execute [^:]*): (.*)", log.read().replace("\n\t", " "))


def test_a_request_is_one_statement(database, store):
    key, token = create(store)
    with server_log(database) as said, SQLAlchemyTokenStore(database.url) as asking:
        asking.get(key)
        for _ in range(10):
            assert asking.get(key) == token
            assert asking.get("unknown") is None
    end = max(
        number for number, statement in enumerate(said) if "digest" not in statement and "ROLLBACK" not in statement
    )
    assert [statement.split()[0] for statement in said[end + 1 :][-20:]] == ["SELECT"] * 20


def test_a_request_uses_the_index(database, store):
    store.restore([TokenRecord(token=Token(), digest=sha256(b"%d" % n).digest()) for n in range(3000)])
    database.execute("ANALYZE TABLE usage_tokens" if database.is_mysql else "ANALYZE usage_tokens")
    digest = sha256(b"1000").hexdigest()
    literal = f"x'{digest}'" if database.is_mysql else f"'\\x{digest}'"
    plan = str(database.execute(f"EXPLAIN SELECT * FROM usage_tokens WHERE digest = {literal}"))
    assert "'const', 'digest'" in plan if database.is_mysql else "Index Scan using usage_tokens_digest_key" in plan


# --- An engine that is handed in


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"isolation_level": "AUTOCOMMIT"}, id="AUTOCOMMIT"),
        pytest.param({"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}, id="no rollback"),
        pytest.param({"isolation_level": "REPEATABLE READ"}, id="REPEATABLE READ"),
        pytest.param({"isolation_level": "SERIALIZABLE"}, id="SERIALIZABLE"),
        pytest.param({"poolclass": NullPool}, id="no pool"),
        pytest.param({"pool_size": 1, "max_overflow": 1}, id="small pool"),
        pytest.param({"pool_reset_on_return": None}, id="no reset"),
    ],
)
def test_an_engine_of_the_host(database, options):
    engine = create_engine(database.url, **options)
    with SQLAlchemyTokenStore(engine) as store:
        key, token = create(store, total_available=15)

        def charge(number):
            with suppress(QuotaExceeded):
                store.get(key)
                store.charge(key, 1, idempotency_key=f"{number % 20}", model="m")

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(charge, range(40)))
        assert (store.get(key).total_used, store.get(key).total_available) == (15, 0)
        with SQLAlchemyTokenStore(database.url) as other:
            other.grant(token.id, 5)
            # No connection still sees the old state.
            assert {store.get(key).total_available for _ in range(8)} == {5}
        assert store.model_usage(token.id) == {"m": 15}
        pool = engine.pool
    with pytest.raises(StoreError, match="closed"):
        store.get(key)
    assert engine.pool is pool
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
        if options.get("isolation_level", "AUTOCOMMIT") != "AUTOCOMMIT":
            # As its owner configured it.
            assert connection.get_isolation_level() == options["isolation_level"]
    engine.dispose()


# --- Errors


# Not a literal of the test: a traceback shows the lines of its source.
BROUGHT = "-".join(["another", "key"])


def test_no_error_shows_a_secret(database, store):
    key, _ = create(store)
    digest = key_digest(key)
    engine = create_engine(database.url)
    shown = []
    for trouble, repair, calls in (
        (
            "RENAME COLUMN name TO other",
            "RENAME COLUMN other TO name",
            [
                lambda s: s.get(key),
                lambda s: s.charge(key, 7, idempotency_key="x"),
                lambda s: s.create(key=BROUGHT),
            ],
        ),
        # A database's message about a wrong value quotes the value; PostgreSQL's quotes the whole row.
        (
            "ADD CONSTRAINT small CHECK (total_used < 5)",
            "DROP CONSTRAINT small",
            [
                lambda s: s.charge(key, 7),
                lambda s: s.restore([TokenRecord(token=Token(total_used=7), digest=key_digest(BROUGHT))]),
            ],
        ),
    ):
        database.execute(f"ALTER TABLE usage_tokens {trouble}")
        try:
            for each in (store, SQLAlchemyTokenStore(engine)):
                for call in calls:
                    with pytest.raises(StoreError) as caught:
                        call(each)
                    shown.append("".join(traceback.format_exception(caught.value)))
        finally:
            database.execute(f"ALTER TABLE usage_tokens {repair}")
    engine.dispose()
    for text in shown:
        for secret in (
            key,
            digest.hex()[:16],  # PostgreSQL shows the beginning of long values
            repr(digest),
            databases.PASSWORD,
            BROUGHT,
            key_digest(BROUGHT).hex()[:16],
        ):
            assert secret not in text
            assert secret.upper() not in text
