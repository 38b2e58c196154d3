"""The store that answers from databases of new-api."""

import contextlib
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import databases
import pytest
from client import ask
from forks import forked
from gateway import DELETED_AT, KEY, KINDS, NEWEST, OLDEST, Gateway, database_url, endpoint
from sqlalchemy import NullPool, column, create_engine, event, insert, make_url, table, text

from usage_middleware import (
    DamagedToken,
    NewAPITokenStore,
    SQLiteTokenStore,
    StoreError,
    Token,
)
from usage_middleware.keys import key_digest
from usage_middleware.stores.new_api import new_api_store
from usage_middleware.testing import TokenStoreContract

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

# What a row differs in from FULL, and the token from FULL_TOKEN; None: it is not a token.
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
    "short key": ({"key": "short-key"}, {"hint": ""}),
    "very short key": ({"key": "tiny"}, {"hint": ""}),
    "wild key": ({"key": "100%_'\"\\`*?"}, {"hint": ""}),
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
    """Yield a database with a row of every kind."""
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
            answers = [ask(endpoint(store), authorization=authorization) for store in (ours, theirs)]
            assert answers[0] == answers[1], case


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
def test_a_key_that_is_not_a_text(gateway, value):
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
def test_a_damaged_row_is_reported_by_its_id_and_hides_no_other(sqlite_gateway, column, value, caplog):
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
        assert ask(endpoint(store), authorization="Bearer damaged-key").status == 503
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
def test_what_is_not_a_database(value, error):
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
            with pytest.raises(
                StoreError, match="is not a database of new-api: it has no table 'tokens' with"
            ) as error:
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
        app = endpoint(store)
        assert ask(app, authorization=f"Bearer {KEY}").status == 200
        disposable_server.kill()
        assert ask(app, authorization=f"Bearer {KEY}").status == 503
        disposable_server.start()
        assert ask(app, authorization=f"Bearer {KEY}").status == 200
    assert caplog.text
    for secret in (databases.PASSWORD, "p%40ss", KEY):
        assert secret not in caplog.text
