"""Databases of new-api, made as gorm makes them, and the store that answers from them."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import databases
import pytest
from client import ask
from sqlalchemy import NullPool, column, create_engine, event, insert, make_url, table, text
from test_cli import URL, get, run
from test_cli import start as start  # a fixture

from usage_middleware import (
    DamagedToken,
    NewAPITokenStore,
    SQLAlchemyTokenStore,
    SQLiteTokenStore,
    StoreError,
    Token,
    UsageMiddleware,
)
from usage_middleware.keys import key_digest
from usage_middleware.stores.new_api import new_api_store
from usage_middleware.stores.opening import is_new_api
from usage_middleware.stores.sqlite import reading
from usage_middleware.testing import TokenStoreContract

# --- A database of new-api

# What gorm makes of Go's types.
TYPES = {
    "sqlite": {
        "id": "integer PRIMARY KEY AUTOINCREMENT",
        "int": "integer",
        "bool": "numeric",
        "string": "text",
        "text": "text",
        "time": "datetime",
        "quote": "`",
    },
    "mariadb": {
        "id": "bigint AUTO_INCREMENT PRIMARY KEY",
        "int": "bigint",
        "bool": "boolean",
        "string": "varchar(191)",
        "text": "text",
        "time": "datetime(3) NULL",
        "quote": "`",
    },
    "postgresql": {
        "id": "bigserial PRIMARY KEY",
        "int": "bigint",
        "bool": "boolean",
        "string": "text",
        "text": "text",
        "time": "timestamptz",
        "quote": '"',
    },
}

NEWEST = """
CREATE TABLE {q}tokens{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}key{q} {key}, {q}status{q} {int} DEFAULT 1,
{q}name{q} {string}, {q}created_time{q} {int}, {q}accessed_time{q} {int}, {q}expired_time{q} {int} DEFAULT -1,
{q}remain_quota{q} {int} DEFAULT 0, {q}unlimited_quota{q} {bool}, {q}model_limits_enabled{q} {bool},
{q}model_limits{q} {text}, {q}allow_ips{q} {string} DEFAULT '', {q}used_quota{q} {int} DEFAULT 0,
{q}group{q} {string} DEFAULT '', {q}cross_group_retry{q} {bool}, {q}deleted_at{q} {time});
CREATE UNIQUE INDEX idx_tokens_key ON {q}tokens{q} ({q}key{q});
CREATE INDEX idx_tokens_user_id ON {q}tokens{q} (user_id);
CREATE INDEX idx_tokens_deleted_at ON {q}tokens{q} (deleted_at);
CREATE TABLE {q}users{q} ({q}id{q} {id}, {q}username{q} {string}, {q}status{q} {int} DEFAULT 1,
{q}group{q} {string} DEFAULT 'default', {q}deleted_at{q} {time})
"""
# Nobody had counted, limited or deleted anything yet.
OLDEST = """
CREATE TABLE {q}tokens{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}key{q} {key}, {q}status{q} {int} DEFAULT 1,
{q}name{q} {string}, {q}expired_time{q} {int} DEFAULT -1, {q}remain_quota{q} {int} DEFAULT 0);
CREATE UNIQUE INDEX idx_tokens_key ON {q}tokens{q} ({q}key{q});
CREATE TABLE {q}users{q} ({q}id{q} {id}, {q}username{q} {string}, {q}status{q} {int} DEFAULT 1)
"""

KEY = "aB3" * 16  # 48 characters, as new-api makes them
DELETED_AT = "2025-01-02 03:04:05"


class Gateway:
    """What new-api does with its database."""

    def __init__(self, kind, url, schema=NEWEST, **types):
        self.kind = kind
        self.url = url
        self.engine = create_engine(url, poolclass=NullPool)
        types = {**TYPES[kind], "key": "char(48)", **types}
        self.execute(*schema.format(q=types["quote"], **types).split(";"))

    def execute(self, *statements):
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def add(self, *rows, into="tokens"):
        with self.engine.begin() as connection:
            for row in rows:
                connection.execute(insert(table(into, *map(column, row))).values(**row))

    def add_users(self):
        self.add({"id": 1, "status": 1}, {"id": 2, "status": 2}, into="users")


@contextlib.contextmanager
def database_url(kind, request, tmp_path):
    """The URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'one-api.db'}"
    else:
        with request.getfixturevalue(kind).database() as url:
            yield url


KINDS = list(TYPES)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def url(kind, request, tmp_path):
    with database_url(kind, request, tmp_path) as url:
        yield url


@pytest.fixture
def gateway(kind, url):
    gateway = Gateway(kind, url)
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "name": "Alice", "remain_quota": 987655, "used_quota": 12345})
    return gateway


@pytest.fixture
def sqlite_gateway(tmp_path):
    gateway = Gateway("sqlite", f"sqlite:///{tmp_path / 'one-api.db'}")
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "name": "Alice", "remain_quota": 987655, "used_quota": 12345})
    return gateway


# --- Rows

FULL = {
    "user_id": 1,
    "status": 1,
    "name": "Default Token",
    "created_time": 1_700_000_000,
    "accessed_time": 1_750_000_000,
    "expired_time": -1,
    "remain_quota": 987655,
    "unlimited_quota": False,
    "model_limits_enabled": False,
    "model_limits": "",
    "used_quota": 12345,
    "group": "vip",
}
FULL_TOKEN = {
    "name": "Default Token",
    "total_available": 987655,
    "total_used": 12345,
    "created_at": 1_700_000_000,
}
NULLS = dict.fromkeys([name for name in FULL if name != "user_id"])

# What a row differs in from FULL, and the token from FULL_TOKEN; None: there is no token.
ROWS = {
    "full": ({}, {}),
    "all NULL": (NULLS, {"name": "", "total_available": 0, "total_used": 0, "created_at": 0}),
    "unlimited": ({"unlimited_quota": True}, {"unlimited_quota": True}),
    "models": (
        {"model_limits_enabled": True, "model_limits": "gpt-4o,a b,\u6a21\u578b"},
        {"model_limits_enabled": True, "model_limits": {"gpt-4o": True, "a b": True, "\u6a21\u578b": True}},
    ),
    "models, not enabled": ({"model_limits": "gpt-4o"}, {"model_limits": {"gpt-4o": True}}),
    "models, odd commas": ({"model_limits": ",gpt-4o,,gpt-4o,"}, {"model_limits": {"gpt-4o": True}}),
    "no models, enabled": ({"model_limits_enabled": True}, {"model_limits_enabled": True}),
    "expires": ({"expired_time": 1_900_000_000}, {"expires_at": 1_900_000_000}),
    "expires never, as 0": ({"expired_time": 0}, {}),
    "disabled": ({"status": 2}, {"enabled": False}),
    "expired": ({"status": 3, "expired_time": 1_700_000_001}, {"expires_at": 1_700_000_001}),
    "exhausted": ({"status": 4, "remain_quota": 0}, {"total_available": 0}),
    "overdrawn": ({"remain_quota": -5}, {"total_available": -5}),
    "refunded": ({"used_quota": -5}, {"total_used": -5}),
    "large": ({"remain_quota": 2**62, "used_quota": 2**62 - 1}, {"total_available": 2**62, "total_used": 2**62 - 1}),
    "name": ({"name": "caf\u00e9 \u4ee4\u724c"}, {"name": "caf\u00e9 \u4ee4\u724c"}),
    "short key": ({"key": "short-key"}, {"hint": "-key"}),
    "very short key": ({"key": "tiny"}, {"hint": ""}),
    "wild key": ({"key": "100%_'\"\\`*?"}, {"hint": "\\`*?"}),
    "deleted": ({"deleted_at": DELETED_AT}, None),
    "banned owner": ({"user_id": 2}, None),
    "deleted owner": ({"user_id": 3}, None),
    "no owner": ({"user_id": 4}, None),
    "owner NULL": ({"user_id": None}, None),
}


def key_of(case):
    changes, _ = ROWS[case]
    return changes.get("key", f"{list(ROWS).index(case):02}-{KEY[3:]}")


@pytest.fixture(scope="module", params=KINDS)
def rows(request, tmp_path_factory):
    """A database with a row of every kind."""
    with database_url(request.param, request, tmp_path_factory.mktemp("rows")) as url:
        gateway = Gateway(request.param, url)
        gateway.add_users()
        gateway.add({"id": 3, "status": 1, "deleted_at": DELETED_AT}, into="users")
        gateway.add(*({**FULL, "key": key_of(case), **changes} for case, (changes, _) in ROWS.items()))
        yield gateway


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_a_token(rows, case):
    _, changes = ROWS[case]
    key = key_of(case)
    expected = None
    if changes is not None:
        number = list(ROWS).index(case) + 1
        expected = Token(**{**FULL_TOKEN, "id": number, "hint": key[-4:], **changes})
    with NewAPITokenStore(rows.url) as store:
        assert store.get(key) == expected


def test_records_are_all_that_are_not_deleted(rows, monkeypatch):
    monkeypatch.setattr(new_api_store, "_PAGE_SIZE", 3)
    shown = [case for case in ROWS if case != "deleted"]
    with NewAPITokenStore(rows.url) as store:
        records = list(store.records())
        assert store.count() == len(shown)
        assert [record.digest for record in records] == [key_digest(key_of(case)) for case in shown]
        for record, case in zip(records, shown, strict=True):
            if ROWS[case][1] is None:
                assert not record.token.enabled, case
            else:
                assert record.token == store.get(key_of(case)), case


def test_what_is_imported_is_answered_the_same(rows, tmp_path):
    with NewAPITokenStore(rows.url) as theirs, SQLiteTokenStore(tmp_path / "tokens.db") as ours:
        assert None not in ours.restore([record for record in theirs.records() if record.token.total_used >= 0])
        for case in ROWS.keys() - {"refunded"}:
            authorization = f"Bearer sk-{key_of(case)}"
            answers = [ask(wrapped(store), authorization=authorization) for store in (ours, theirs)]
            assert answers[0] == answers[1], case


def wrapped(store):
    return UsageMiddleware(lambda environ, start_response: [], store)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(KEY.lower(), id="lower case"),
        pytest.param(KEY + " ", id="blank behind"),
        pytest.param(KEY[:-1], id="shorter"),
        pytest.param(KEY + "\0", id="NUL behind"),
        pytest.param("\0", id="NUL"),
        pytest.param("\u00e9" * 8, id="not ASCII"),
        pytest.param("\ud800", id="surrogate"),
        pytest.param("\uff41B3" + KEY[3:], id="full width"),
        pytest.param("", id="empty"),
        pytest.param("k" * 513, id="long"),
        pytest.param("\\", id="backslash"),
        pytest.param("%s", id="format"),
        pytest.param("%(key)s:key", id="parameters"),
    ],
)
def test_a_key_that_a_host_asks_for_matches_exactly(rows, key):
    with NewAPITokenStore(rows.url) as store:
        assert store.get(key) is None


def test_a_key_that_a_collation_takes_for_another(kind, url):
    gateway = Gateway(kind, url, key="varchar(128)")
    gateway.add_users()
    stored = ["trailing ", "Capital", " leading", "tab\t", "caf\u00e9"]
    gateway.add(*({"user_id": 1, "key": key} for key in stored))
    with NewAPITokenStore(url) as store:
        for key in ("trailing", "capital", "CAPITAL", "leading", "tab", "cafe"):
            assert store.get(key) is None, key
        assert store.get("Capital").id == 2


@pytest.mark.parametrize("value", [None, 5, b"bytes"])
def test_a_key_that_is_no_text(gateway, value):
    with NewAPITokenStore(gateway.url) as store, pytest.raises(TypeError, match="a key must be a str"):
        store.get(value)


def test_the_oldest_database_has_defaults(kind, url):
    gateway = Gateway(kind, url, OLDEST)
    gateway.add_users()
    gateway.add(
        {"user_id": 1, "key": KEY, "name": "Old", "remain_quota": 5, "expired_time": 1_900_000_000},
        {"user_id": 2, "key": "banned-key", "name": "Old", "remain_quota": 5},
    )
    with NewAPITokenStore(url) as store:
        expected = Token(id=1, name="Old", total_available=5, expires_at=1_900_000_000, hint=KEY[-4:])
        assert store.get(KEY) == expected
        assert store.get("banned-key") is None
        assert [record.token.enabled for record in store.records()] == [True, False]
        # new-api is updated: what the table has now is seen as soon as a statement fails, or with a new store.
        gateway.execute("DROP TABLE users")
        with pytest.raises(StoreError):
            store.get(KEY)
        assert store.get(KEY) == expected
        assert store.get("banned-key").id == 2


BOOLEANS = [
    pytest.param("sqlite", "text", "true", "false", id="sqlite text"),
    pytest.param("sqlite", "real", 1.0, 0.0, id="sqlite real"),
    pytest.param("sqlite", "blob", b"\1", b"\0", id="sqlite blob"),
    pytest.param("mariadb", "bit(1)", 1, 0, id="mariadb bit"),
    pytest.param("mariadb", "varchar(5)", "1", "0", id="mariadb text"),
    pytest.param("mariadb", "decimal(3,1)", 1, 0, id="mariadb decimal"),
    pytest.param("postgresql", "smallint", 1, 0, id="postgresql number"),
    pytest.param("postgresql", "text", "t", "f", id="postgresql text"),
]


@pytest.mark.parametrize(("kind", "bool_type", "true", "false"), BOOLEANS)
def test_booleans_of_every_type(url, kind, bool_type, true, false):
    gateway = Gateway(kind, url, bool=bool_type)
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "unlimited_quota": true, "model_limits_enabled": false})
    with NewAPITokenStore(url) as store:
        token = store.get(KEY)
        assert (token.unlimited_quota, token.model_limits_enabled) == (True, False)


def test_quotas_of_every_type(kind, url):
    schema = NEWEST.replace("remain_quota{q} {int}", "remain_quota{q} decimal(20,0)")
    gateway = Gateway(kind, url, schema.replace("used_quota{q} {int}", "used_quota{q} decimal(20,4)"))
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "remain_quota": 5, "used_quota": 6})
    with NewAPITokenStore(url) as store:
        token = store.get(KEY)
        assert (token.total_available, token.total_used) == (5, 6)


@pytest.mark.parametrize(
    ("column", "value"),
    [("remain_quota", "much"), ("used_quota", 1.5), ("name", b"\xff"), ("unlimited_quota", "perhaps")],
)
def test_a_damaged_row_is_told_by_its_id_and_keeps_no_other(sqlite_gateway, column, value, caplog):
    with contextlib.closing(sqlite3.connect(sqlite_gateway.engine.url.database)) as connection, connection:
        connection.execute(f"INSERT INTO tokens (user_id, key, {column}) VALUES (1, 'damaged-key', ?)", (value,))
        if column == "name":
            connection.execute("UPDATE tokens SET name = CAST(name AS TEXT)")
        connection.execute("INSERT INTO tokens (user_id, key) VALUES (1, 'good-key')")
        connection.execute("INSERT INTO tokens (user_id, key) VALUES (1, NULL)")
        connection.execute("INSERT INTO tokens (user_id, key) VALUES (1, 'a key of words')")
    with NewAPITokenStore(sqlite_gateway.url) as store:
        with pytest.raises(DamagedToken, match="token 2 is damaged in the database: ") as error:
            store.get("damaged-key")
        assert error.value.token_id == 2
        records = list(store.records())
        assert [getattr(record, "token_id", 0) for record in records] == [0, 2, 0, 4, 5]
        assert isinstance(records[1], DamagedToken)
        assert ask(wrapped(store), authorization="Bearer damaged-key").status == 503
    assert "token 2 is damaged" in caplog.text
    assert "damaged-key" not in caplog.text + str(records)


class TestContract(TokenStoreContract):
    key = key_of("full")

    @pytest.fixture(autouse=True)
    def _rows(self, rows):
        self.url = rows.url

    def make_store(self, tmp_path):
        return NewAPITokenStore(self.url)


# --- How it is asked


@pytest.mark.parametrize(
    ("kind", "key_type"),
    [
        ("sqlite", "char(48)"),
        ("sqlite", "varchar(128)"),
        ("postgresql", "char(48)"),
        ("postgresql", "varchar(128)"),
        ("mariadb", "char(48)"),
        ("mariadb", "varchar(128)"),
        ("mariadb", "char(48) CHARACTER SET latin1"),
        ("mariadb", "char(48) COLLATE utf8mb4_unicode_ci"),
    ],
)
def test_a_request_is_one_statement_that_uses_the_index(kind, url, key_type):
    gateway = Gateway(kind, url, key=key_type)
    gateway.add_users()
    with gateway.engine.begin() as connection:
        connection.execute(
            insert(table("tokens", column("key"), column("user_id"))),
            [{"key": f"{number:06}-key", "user_id": 1} for number in range(2000)],
        )
    gateway.execute("ANALYZE TABLE tokens" if kind == "mariadb" else "ANALYZE")
    engine = create_engine(url)
    statements = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2:4]))
    with NewAPITokenStore(engine) as store:
        assert store.get("001000-key").id == 1001
        statements.clear()
        # Often enough for a statement that the driver has prepared.
        for _ in range(12):
            assert store.get("001000-key").id == 1001
    assert len(statements) == 12
    explain = "EXPLAIN QUERY PLAN " if kind == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(explain + statements[-1][0], statements[-1][1]).all()
    engine.dispose()
    if kind == "mariadb":
        assert (plan[0].type, plan[0].key) == ("const", "idx_tokens_key")
    else:
        how = "USING INDEX idx_tokens_key (key=?)" if kind == "sqlite" else "Index Scan using idx_tokens_key on tokens"
        assert how in str(plan)


def test_it_is_asked_as_a_path_a_url_or_an_engine(sqlite_gateway, monkeypatch):
    path = sqlite_gateway.engine.url.database
    monkeypatch.chdir(os.path.dirname(path))
    for name in (
        path,
        Path(path),
        f"sqlite:///{path}",
        "one-api.db",
        "sqlite:///one-api.db",
        make_url(f"sqlite:///{path}"),
    ):
        with NewAPITokenStore(name) as store:
            monkeypatch.chdir("/")
            assert store.get(KEY).name == "Alice"
            assert path in repr(store)
        monkeypatch.chdir(os.path.dirname(path))
    with NewAPITokenStore(sqlite_gateway.engine) as store:
        assert store.get(KEY).name == "Alice"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (5, TypeError),
        ("", ValueError),
        (":memory:", ValueError),
        ("file:one-api.db", ValueError),
        ("sqlite://", ValueError),
        ("sqlite:///one-api.db?mode=rw", ValueError),
        ("oracle://user:canary@host/name", ValueError),
        ("root:canary@tcp(localhost:3306)/oneapi", ValueError),
        ("postgresql+asyncpg://user:canary@host/name", (ValueError, ImportError)),
    ],
)
def test_what_is_no_database(value, error):
    with pytest.raises(error) as raised:
        NewAPITokenStore(value)
    assert "canary" not in str(raised.value)


def test_nothing_is_opened_before_the_first_use(tmp_path):
    for name in (tmp_path / "missing.db", "postgresql://user@127.0.0.1:1/name", "mysql://user@127.0.0.1:1/name"):
        NewAPITokenStore(name).close()
    assert not list(tmp_path.iterdir())


def test_a_closed_store(gateway):
    store = NewAPITokenStore(gateway.url)
    store.get(KEY)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get(KEY)


def test_64_threads(gateway):
    with NewAPITokenStore(gateway.url) as store, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(store.get, [KEY, "no-such-key"] * 320))
    assert {token and token.name for token in answers[::2]} == {"Alice"}
    assert set(answers[1::2]) == {None}


def forked(function):
    """What ``function`` returns in a child process: a text."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                result = str(function())
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(sending, result.encode())
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving) as file:
        result = file.read()
    os.waitpid(child, 0)
    return result


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_after_use(gateway):
    with NewAPITokenStore(gateway.url) as store:
        store.get(KEY)
        assert forked(lambda: store.get(KEY).name) == "Alice"
        assert store.get(KEY).name == "Alice"


# --- A database that fails


def test_a_database_without_the_table(kind, url):
    if kind == "sqlite":
        sqlite3.connect(url.removeprefix("sqlite:///")).close()
    with NewAPITokenStore(url) as store:
        for statement in (None, "CREATE TABLE tokens (id integer, name varchar(9))"):
            if statement:
                with create_engine(url, poolclass=NullPool).begin() as connection:
                    connection.execute(text(statement))
            with pytest.raises(StoreError, match="is no database of new-api: it has no table 'tokens' with") as error:
                store.get(KEY)
            assert "p%40ss" not in str(error.value)
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.execute(text("DROP TABLE tokens"))
        Gateway(kind, url).add({"user_id": 1, "key": KEY})
        assert store.get(KEY) is None  # now it is one


def test_a_server_that_goes_and_comes_back(disposable_server, caplog):
    kind = "postgresql" if isinstance(disposable_server, databases.PostgreSQL) else "mariadb"
    gateway = Gateway(kind, disposable_server.create_database())
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY})
    with NewAPITokenStore(gateway.url) as store:
        app = wrapped(store)
        assert ask(app, authorization=f"Bearer {KEY}").status == 200
        disposable_server.kill()
        assert ask(app, authorization=f"Bearer {KEY}").status == 503
        disposable_server.start()
        assert ask(app, authorization=f"Bearer {KEY}").status == 200
    assert caplog.text
    for secret in (databases.PASSWORD, "p%40ss", KEY):
        assert secret not in caplog.text


# --- An SQLite file that is left alone


def state_of(path):
    """All that a reader might change."""
    folder = Path(path).parent
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino)
        for file in folder.iterdir()
        if not file.name.endswith("-shm")  # readers that are there at once tell each other so in it
    }, sorted(os.listdir(folder))


def use_wal(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("mode", ["delete", "wal, closed", "wal, open"])
def test_nothing_is_written(sqlite_gateway, mode, full):
    path = sqlite_gateway.engine.url.database
    if mode != "delete":
        use_wal(path)
    with contextlib.ExitStack() as stack:
        if mode == "wal, open":
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            writer.execute("UPDATE tokens SET used_quota = 1")
            writer.commit()
        before = state_of(path)
        with NewAPITokenStore(path) as store:
            app = wrapped(store)
            assert is_new_api(path)
            for _ in range(5000 if full else 300):
                assert ask(app, authorization=f"Bearer {KEY}").status == 200
                assert ask(app, authorization="Bearer unknown").status == 401
            assert len(list(store.records())) == store.count() == 1
            assert state_of(path) == before
        assert state_of(path) == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_folder_that_is_read_only(sqlite_gateway, mode):
    path = Path(sqlite_gateway.engine.url.database)
    if mode == "wal":
        use_wal(path)
    store = NewAPITokenStore(path)

    def read():
        if os.geteuid() == 0:
            os.setuid(65534)
        return f"{os.access(path, os.W_OK)} {os.access(path.parent, os.W_OK)} {store.get(KEY).name}"

    # Up to where everybody can go.
    modes = {folder: folder.stat().st_mode for folder in path.parents if not folder.stat().st_mode & 0o001}
    modes |= {path: path.stat().st_mode, path.parent: path.parent.stat().st_mode}
    try:
        for file in modes:
            file.chmod(0o444 if file == path else 0o555)
        assert forked(read) == "False False Alice"
    finally:
        for file, bits in modes.items():
            file.chmod(bits)


def test_a_symbolic_link(sqlite_gateway, tmp_path):
    path = sqlite_gateway.engine.url.database
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    use_wal(path)
    with contextlib.closing(sqlite3.connect(path)) as writer, NewAPITokenStore(link) as store:
        assert store.get(KEY).total_used == 12345
        writer.execute("UPDATE tokens SET used_quota = 1")
        writer.commit()
        assert store.get(KEY).total_used == 1
        assert os.listdir(link.parent) == ["link.db"]


def test_a_file_that_is_not_there(tmp_path):
    with NewAPITokenStore(tmp_path / "missing.db") as store:
        with pytest.raises(StoreError, match=r"there is no file .*missing\.db"):
            store.get(KEY)
        assert not list(tmp_path.iterdir())
        Gateway("sqlite", f"sqlite:///{tmp_path / 'missing.db'}").add({"key": KEY})
        assert store.get(KEY) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "cannot be opened: Is a directory"), ("no/one-api.db", "there is no file"), ("text", "not a database")],
)
def test_a_file_that_is_none(tmp_path, name, message):
    (tmp_path / "text").write_text("no database, but long enough to be read as the header of one" * 20)
    with NewAPITokenStore(tmp_path / name) as store, pytest.raises(StoreError, match=message):
        store.get(KEY)


def test_a_file_that_is_replaced(sqlite_gateway, tmp_path):
    path = sqlite_gateway.engine.url.database
    other = Gateway("sqlite", f"sqlite:///{tmp_path / 'other.db'}", OLDEST)
    other.add_users()
    other.add({"user_id": 1, "key": KEY, "name": "Bob"})
    with NewAPITokenStore(path) as store:
        assert store.get(KEY).name == "Alice"
        open_files = len(os.listdir("/proc/self/fd"))
        os.replace(tmp_path / "other.db", path)
        with contextlib.suppress(StoreError):  # The old columns are asked for once more.
            store.get(KEY)
        assert store.get(KEY).name == "Bob"
        os.remove(path)
        with pytest.raises(StoreError, match="there is no file"):
            store.get(KEY)
        assert len(os.listdir("/proc/self/fd")) <= open_files


def test_a_writer_is_waited_for(sqlite_gateway, monkeypatch):
    path = sqlite_gateway.engine.url.database
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as writer,
        NewAPITokenStore(path) as store,
    ):
        store.get(KEY)
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("UPDATE tokens SET used_quota = 1")
        release = threading.Timer(0.2, writer.execute, ["COMMIT"])
        release.start()
        assert store.get(KEY).total_used == 1
        release.join()
        monkeypatch.setattr(reading, "_TIMEOUT", 0.05)
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            store.get(KEY)
        writer.execute("ROLLBACK")
        assert store.get(KEY).total_used == 1


WRITER = """
import sqlite3, sys, time
path, mode, what = sys.argv[1:]
def connect():
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA synchronous = OFF")
    return connection
connection = connect()
connection.execute(f"PRAGMA journal_mode = {mode}")
if what == "crash":
    connection.execute("UPDATE tokens SET used_quota = 1")
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO tokens (user_id, name) VALUES (1, ?)", (("x" * 1000,) for _ in range(500)))
    print("ready", flush=True)
    time.sleep(60)
print("ready", flush=True)
number = 0
while True:
    number += 1
    # On many pages: a reader of some before and of some after would see both.
    connection.execute("UPDATE tokens SET used_quota = ?, model_limits = ?", (number, str(number % 10) * 50_000))
    if what == "reopens":
        connection.close()
        connection = connect()
"""


@contextlib.contextmanager
def writer_process(path, mode, what):
    process = subprocess.Popen([sys.executable, "-c", WRITER, path, mode, what], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("mode", "what"), [("delete", "stays"), ("wal", "stays"), ("wal", "reopens")])
def test_a_reader_among_writes_sees_whole_transactions(sqlite_gateway, mode, what, full):
    path = sqlite_gateway.engine.url.database
    sqlite_gateway.execute("UPDATE tokens SET used_quota = 0, model_limits = ''")
    seen = set()
    deadline = time.monotonic() + (60 if full else 1.5)
    with writer_process(path, mode, what) as process, NewAPITokenStore(path) as store:
        while time.monotonic() < deadline:
            token = store.get(KEY)
            limits = "".join(token.model_limits)
            assert limits in ("", str(token.total_used % 10) * 50_000)
            seen.add(token.total_used)
        assert process.poll() is None
    assert len(seen) > 20


@pytest.mark.parametrize("writer_stays", [True, False])
def test_a_writer_that_comes_while_it_is_read(sqlite_gateway, monkeypatch, writer_stays):
    path = sqlite_gateway.engine.url.database
    use_wal(path)
    connect = reading.connect
    unfinished = []
    with contextlib.ExitStack() as stack, NewAPITokenStore(path) as store:

        def connect_before_a_write(path):
            monkeypatch.setattr(reading, "connect", connect)
            reader = connect(path)
            unfinished.append(reader.execute("SELECT used_quota FROM tokens"))  # it keeps the pages
            assert unfinished[0].fetchone() == (12345,)
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            writer.execute("UPDATE tokens SET used_quota = 1")
            writer.commit()
            if not writer_stays:
                writer.close()
            return reader

        store.get(KEY)
        monkeypatch.setattr(reading, "connect", connect_before_a_write)
        assert store.get(KEY).total_used == 1


def test_a_writer_that_was_killed_with_a_journal(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        with writer_process(path, "delete", "crash") as process:
            process.kill()
            process.wait()
        before = state_of(path)
        with pytest.raises(StoreError, match="left in the middle of a transaction"):
            store.get(KEY)
        assert state_of(path) == before
        with contextlib.closing(sqlite3.connect(path)) as connection:  # new-api starts
            connection.execute("SELECT * FROM tokens").fetchall()
        assert store.get(KEY).total_used == 1


def test_a_writer_that_was_killed_with_a_log(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        with writer_process(path, "wal", "crash") as process:
            process.kill()
            process.wait()
        before = state_of(path)
        assert store.get(KEY).total_used == 1
        assert state_of(path) == before


LOCKED = """
import sqlite3, sys
try:
    sqlite3.connect(sys.argv[1], timeout=0).execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_locks_that_the_host_has_on_the_file_stay(sqlite_gateway, mode):
    path = sqlite_gateway.engine.url.database
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("BEGIN IMMEDIATE")
        with NewAPITokenStore(path) as store:
            for _ in range(3):
                assert store.get(KEY).name == "Alice"
                assert is_new_api(path)
        tried = subprocess.run([sys.executable, "-c", LOCKED, path], capture_output=True, text=True, check=True)
        assert tried.stdout == "database is locked\n"
        connection.execute("ROLLBACK")


def test_connections_and_descriptors_do_not_add_up(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        store.get(KEY)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            store.get(KEY)
            with NewAPITokenStore(path) as other:
                other.get(KEY)
        assert len(os.listdir("/proc/self/fd")) == before
        assert not reading._readers


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_reads(sqlite_gateway):
    path = sqlite_gateway.engine.url.database
    with NewAPITokenStore(path) as store:
        reader = reading.connect(path)
        reader.execute("SELECT * FROM tokens")
        assert "was being read when this process was forked" in forked(lambda: store.get(KEY))
        reader.close()
        assert forked(lambda: store.get(KEY).name) == "Alice"


# --- Which database is one of new-api


def test_a_database_of_new_api_is_known(gateway):
    assert is_new_api(gateway.url)
    if gateway.kind != "sqlite":
        with SQLAlchemyTokenStore(gateway.url) as store:  # a service that has its tables beside them
            store.create()
        assert not is_new_api(gateway.url)


def test_other_databases_are_known_not_to_be(tmp_path, request):
    with SQLiteTokenStore(tmp_path / "ours.db") as store:
        store.create()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE tokens (id, key)")
    (tmp_path / "text").write_text("no database, but long enough to be read as the header of one" * 20)
    (tmp_path / "empty").touch()
    before = sorted(os.listdir(tmp_path))
    for name in ("ours.db", "other.db", "text", "empty", "missing.db", "."):
        assert not is_new_api(str(tmp_path / name)), name
        assert not is_new_api(f"sqlite:///{tmp_path / name}"), name
    assert not is_new_api("memory:")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_server_that_is_no_new_api_keeps_its_tables(url):
    assert not is_new_api(url)
    with create_engine(url, poolclass=NullPool).connect() as connection:
        count = "SELECT count(*) FROM information_schema.tables WHERE table_schema IN ('public', database())"
        count = count.replace("database()", "'public'") if url.startswith("postgresql") else count
        assert connection.execute(text(count)).scalar() == 0


# --- The command


def test_serve_answers_from_it(gateway, start, tmp_path):
    process, match, log = start("serve", "--db", gateway.url, "--port", "0", ready=URL)
    status, headers, body = get(match[1], Authorization=f"Bearer sk-{KEY}")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert body == (
        b'{"code":true,"message":"ok","data":{"object":"token_usage","name":"Alice","total_granted":1000000,'
        b'"total_used":12345,"total_available":987655,"unlimited_quota":false,"model_limits":{},'
        b'"model_limits_enabled":false,"expires_at":0}}'
    )
    gateway.execute("UPDATE tokens SET remain_quota = 0, model_limits = 'gpt-4o', model_limits_enabled = '1'")
    data = json.loads(get(match[1], Authorization=f"Bearer {KEY}")[2])["data"]
    assert (data["total_available"], data["model_limits"], data["model_limits_enabled"]) == (0, {"gpt-4o": True}, True)
    gateway.execute("UPDATE tokens SET status = 2")
    assert get(match[1], Authorization=f"Bearer {KEY}")[0] == 401
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "database of new-api" in log.read_text()
    for secret in ("p%40ss", KEY, "Traceback"):
        assert secret not in log.read_text()


COMMANDS = [
    ["create"],
    ["list"],
    ["show", "1"],
    ["update", "1", "--name", "x"],
    ["rotate", "1"],
    ["delete", "1", "--yes"],
    ["grant", "1", "5"],
    ["charge", "1", "5"],
    ["refund", "x"],
    ["history", "1"],
    ["prune", "--before", "1d"],
    ["check"],
]


def test_other_commands_refuse_it(gateway):
    for command in COMMANDS:
        out, err = run(*command, "--db", gateway.url, status=2)
        assert out == ""
        assert err.count("\n") == 1
        assert "which is only read: 'usage-middleware serve' answers from it" in err
    with create_engine(gateway.url, poolclass=NullPool).connect() as connection:
        assert connection.execute(text("SELECT remain_quota, used_quota, status FROM tokens")).one() == (
            987655,
            12345,
            1,
        )


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_only_create_makes_tables_in_a_server(url):
    for command in [*COMMANDS[1:], ["serve"]]:
        out, err = run(*command, "--db", url, status=2)
        assert (out, err) == ("", "Error: this database has no tokens; 'usage-middleware create' makes the first\n")
    with SQLAlchemyTokenStore(url) as store:
        assert not store.has_tables()
    key = run("create", "--name", "Alice", "--quota", "5", "--db", url)[0]
    assert key.startswith("sk-")
    assert "Alice" in run("list", "--db", url)[0]
    assert json.loads(run("charge", "1", "2", "--json", "--db", url)[0])["total_available"] == 3


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ("memory:", "ends with the command"),
        ("root:canary@tcp(localhost:3306)/oneapi", "has the form mysql://user:password@host/name"),
        ("postgresql://user:canary@127.0.0.1:1/name", "127.0.0.1:1/name failed"),
        ("mysql://user:canary@127.0.0.1:1/name", "127.0.0.1:1/name failed"),
        ("oracle://user:canary@127.0.0.1:1/name", "oracle is none of the databases"),
        ("mysql+mysqldb://user:canary@127.0.0.1:1/name", "needs the package MySQLdb"),
        ("sqlite://", "has the form sqlite:///PATH"),
        ("sqlite:///missing.db", "there is no database missing.db"),
    ],
)
def test_databases_that_cannot_be_used_are_one_line(database, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("list", "serve"):
        out, err = run(command, "--db", database, status=2)
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert "canary" not in err
    assert not list(tmp_path.iterdir())


WITHOUT_SQLALCHEMY = "import sys; sys.modules['sqlalchemy'] = None; from usage_middleware.cli import main; main()"


def test_without_sqlalchemy_one_line_says_what_to_install(sqlite_gateway):
    for database in (sqlite_gateway.url, "mysql://user:canary@127.0.0.1/name"):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_SQLALCHEMY, "serve", "--db", database], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr == (
            "Error: NewAPITokenStore needs SQLAlchemy; pip install 'usage-middleware[sql]' brings it\n"
        )
