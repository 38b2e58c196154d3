"""The log of a token as new-api keeps it: what is shown of it, and what is not."""

import json

import pytest
from client import ask, wrapped
from gateway import KEY, TYPES, Gateway, database_url
from sqlalchemy import event

from usage_middleware import LogEntry, NewAPI, NewAPITokenStore, StoreError, UsageMiddleware
from usage_middleware.log import KeepsLog

NOW = 1_795_500_000

NEWEST = """
CREATE TABLE {q}logs{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}created_at{q} {int}, {q}type{q} {int},
{q}content{q} {text}, {q}username{q} {string} DEFAULT '', {q}token_name{q} {string} DEFAULT '',
{q}model_name{q} {string} DEFAULT '', {q}quota{q} {int} DEFAULT 0, {q}prompt_tokens{q} {int} DEFAULT 0,
{q}completion_tokens{q} {int} DEFAULT 0, {q}use_time{q} {int} DEFAULT 0, {q}is_stream{q} {bool},
{q}channel_id{q} {int}, {q}token_id{q} {int} DEFAULT 0, {q}group{q} {string}, {q}ip{q} {string} DEFAULT '',
{q}request_id{q} {string} DEFAULT '', {q}other{q} {text});
CREATE INDEX idx_logs_token_id ON {q}logs{q} (token_id);
CREATE INDEX idx_created_at_type ON {q}logs{q} (created_at, type)
"""
# Before streams, durations and names of requests were written down.
OLDER = """
CREATE TABLE {q}logs{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}created_at{q} {int}, {q}type{q} {int},
{q}content{q} {text}, {q}username{q} {string} DEFAULT '', {q}token_name{q} {string} DEFAULT '',
{q}model_name{q} {string} DEFAULT '', {q}quota{q} {int} DEFAULT 0, {q}prompt_tokens{q} {int} DEFAULT 0,
{q}completion_tokens{q} {int} DEFAULT 0, {q}channel_id{q} {int}, {q}token_id{q} {int} DEFAULT 0);
CREATE INDEX idx_logs_token_id ON {q}logs{q} (token_id)
"""
# Before a row named its token by more than the name that its owner gave it.
OLDEST = """
CREATE TABLE {q}logs{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}created_at{q} {int}, {q}type{q} {int},
{q}content{q} {text}, {q}username{q} {string} DEFAULT '', {q}token_name{q} {string} DEFAULT '',
{q}model_name{q} {string} DEFAULT '', {q}quota{q} {int} DEFAULT 0)
"""
WITHOUT_INDEX = NEWEST.replace("CREATE INDEX idx_logs_token_id ON {q}logs{q} (token_id);", "")

SECRET = "another's secret"
ROW = {
    "user_id": 1,
    "created_at": NOW,
    "type": 2,
    "content": SECRET,
    "username": SECRET,
    "token_name": "Alice",
    "model_name": "gpt-4o",
    "quota": 30,
    "prompt_tokens": 20,
    "completion_tokens": 5,
    "use_time": 7,
    "is_stream": True,
    "channel_id": 9,
    "token_id": 1,
    "group": SECRET,
    "ip": SECRET,
    "request_id": "req-1",
    "other": json.dumps({"admin_info": SECRET}),
}
ENTRY = LogEntry(
    kind="charge",
    created_at=NOW,
    units=30,
    model="gpt-4o",
    input_tokens=20,
    output_tokens=5,
    id="req-1",
    seconds=7,
    is_stream=True,
)


def with_log(gateway, schema=NEWEST):
    types = TYPES[gateway.kind]
    gateway.execute(*schema.format(q=types["quote"], **types).split(";"))
    return gateway


def add(gateway, *changes):
    gateway.add(*({**ROW, **change} for change in changes), into="logs")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, {}, id="full"),
        pytest.param({"type": 6}, {"kind": "refund"}, id="a refund"),
        pytest.param({"quota": -5}, {"units": -5}, id="a correction"),
        pytest.param({"is_stream": False, "use_time": 0}, {"is_stream": False, "seconds": 0}, id="not a stream"),
        pytest.param(
            dict.fromkeys(("model_name", "prompt_tokens", "completion_tokens", "use_time", "is_stream", "request_id")),
            {"model": "", "input_tokens": 0, "output_tokens": 0, "seconds": 0, "is_stream": False, "id": ""},
            id="NULL",
        ),
        pytest.param({"model_name": "\u6a21\u578b"}, {"model": "\u6a21\u578b"}, id="not ASCII"),
    ],
)
def test_a_row_is_an_entry(gateway, change, expected):
    add(with_log(gateway), change)
    with NewAPITokenStore(gateway.url) as store:
        assert isinstance(store, KeepsLog)
        assert list(store.log(1)) == [ENTRY._replace(**expected)]


def test_columns_differ_with_age(gateway):
    with_log(gateway, OLDER)
    known = ("user_id", "created_at", "type", "model_name", "quota", "prompt_tokens", "completion_tokens", "token_id")
    gateway.add({name: ROW[name] for name in known}, into="logs")
    with NewAPITokenStore(gateway.url) as store:
        assert list(store.log(1)) == [ENTRY._replace(seconds=0, is_stream=False, id="")]


@pytest.mark.parametrize("schema", [None, OLDEST, WITHOUT_INDEX], ids=["no log", "no token", "no index by token"])
def test_without_a_log_by_token_there_is_nothing(gateway, schema):
    if schema is not None:
        with_log(gateway, schema)
        gateway.add({"user_id": 1, "created_at": NOW, "type": 2, "token_name": "Alice", "quota": 5}, into="logs")
    with NewAPITokenStore(gateway.url) as store:
        assert store.log(1) == []
        assert log(store) == []


def test_only_charges_and_refunds_of_the_token(gateway):
    others = [{"type": kind} for kind in (0, 1, 3, 4, 5, 7)]
    add(with_log(gateway), {"token_id": 2}, {"token_id": 0}, {"token_id": None}, *others, {"quota": 1}, {"type": 6})
    with NewAPITokenStore(gateway.url) as store:
        assert [(entry.kind, entry.units) for entry in store.log(1)] == [("refund", 30), ("charge", 1)]
        assert [entry.kind for entry in store.log(1, kinds=["charge"])] == ["charge"]
        assert [entry.kind for entry in store.log(1, kinds=["refund"])] == ["refund"]
        assert store.log(1, kinds=[]) == store.log(3) == []


def test_pages_and_times(gateway):
    add(with_log(gateway), *({"quota": n, "created_at": NOW + n} for n in range(30)))
    with NewAPITokenStore(gateway.url) as store:

        def units(**options):
            return [entry.units for entry in store.log(1, **options)]

        assert units() == list(range(29, -1, -1))
        assert units(offset=5, size=3) == [24, 23, 22]
        assert units(offset=28, size=10) == [1, 0]
        assert units(offset=30, size=10) == []
        assert units(since=NOW + 3, until=NOW + 5) == [5, 4, 3]
        assert units(since=NOW + 5, until=NOW + 3) == []
        assert units(until=NOW + 9, offset=2, size=2) == [7, 6]


def test_there_are_at_most_1000_rows(sqlite_gateway):
    add(with_log(sqlite_gateway), *({"quota": n} for n in range(1010)))
    with NewAPITokenStore(sqlite_gateway.url) as store:
        assert [entry.units for entry in store.log(1, size=5000)] == list(range(1009, 9, -1))
        assert [entry.units for entry in store.log(1, offset=995, size=100)] == list(range(14, 9, -1))
        assert store.log(1, offset=1000, size=100) == []
        assert store.log(1, offset=2**63 - 1, size=100) == []


def test_the_rows_are_found_by_an_index(sqlite_gateway):
    add(with_log(sqlite_gateway), {})
    asked = []
    with NewAPITokenStore(sqlite_gateway.url) as store:
        event.listen(store._database._engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2:4]))
        store.log(1)
    statement, parameters = asked[-1]
    with sqlite_gateway.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        # Also in the order of the rows, so that nothing is sorted.
        assert [row[3] for row in plan] == ["SEARCH logs USING INDEX idx_logs_token_id (token_id=?)"]


def test_a_damaged_row_is_a_store_error(sqlite_gateway):
    add(with_log(sqlite_gateway), {"quota": "much"})
    with NewAPITokenStore(sqlite_gateway.url) as store, pytest.raises(StoreError, match="row 1 of the table 'logs'"):
        store.log(1)


def test_a_name_that_is_not_utf_8_costs_no_other_row(sqlite_gateway):
    add(with_log(sqlite_gateway), {}, {})
    sqlite_gateway.execute("UPDATE logs SET model_name = CAST(x'ff41' AS TEXT) WHERE id = 1")
    with NewAPITokenStore(sqlite_gateway.url) as store:
        assert [row["model_name"] for row in log(store)] == ["gpt-4o", "?A"]


# --- Over HTTP


def get(store, path, query=""):
    app = UsageMiddleware(wrapped, store, new_api=NewAPI())
    answer = ask(app, path=path, authorization=f"Bearer sk-{KEY}", QUERY_STRING=query)
    assert answer.status == 200, answer
    return answer


def log(store, query=""):
    return get(store, "/api/log/token", query).json["data"]


def test_every_endpoint_answers(gateway):
    add(with_log(gateway), {}, {"type": 6, "quota": 4})
    with NewAPITokenStore(gateway.url) as store:
        assert get(store, "/api/status").json["data"]["quota_per_unit"] == 500_000
        assert log(store)[1] == {
            "id": 2,
            "user_id": 0,
            "created_at": NOW,
            "type": 2,
            "content": "",
            "username": "",
            "token_name": "Alice",
            "model_name": "gpt-4o",
            "quota": 30,
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "use_time": 7,
            "is_stream": True,
            "channel": 0,
            "channel_name": "",
            "token_id": 1,
            "group": "default",
            "ip": "",
            "request_id": "req-1",
            "other": "",
        }
        assert [row["quota"] for row in log(store, "type=6")] == [4]
        assert get(store, "/dashboard/billing/subscription").json["hard_limit_usd"] == 2
        for query in ("", "start_date=2026-11-01&end_date=2026-11-02"):
            assert get(store, "/v1/dashboard/billing/usage", query).json["total_usage"] == 2.469
        account = get(store, "/api/user/self").json["data"]
        assert (account["id"], account["username"], account["used_quota"], account["request_count"]) == (
            1,
            "Alice",
            12345,
            0,
        )


def test_nothing_about_other_people_is_shown(gateway):
    add(with_log(gateway), {}, {"type": 5}, {"token_id": 2})
    with NewAPITokenStore(gateway.url) as store:
        assert SECRET.encode() not in get(store, "/api/log/token").body


def test_a_table_that_changes_while_it_is_served(sqlite_gateway):
    with NewAPITokenStore(sqlite_gateway.url) as store:
        assert log(store) == []
        # The tables are looked at again when a question about them failed.
        add(with_log(sqlite_gateway), {})
        sqlite_gateway.execute("ALTER TABLE tokens RENAME COLUMN used_quota TO used_before")
        with pytest.raises(StoreError):
            store.get(KEY)
        assert len(log(store)) == 1


def test_the_key_of_a_token_has_a_prefix_or_none(tmp_path, request):
    with database_url("sqlite", request, tmp_path) as url:
        gateway = Gateway("sqlite", url)
        gateway.add_users()
        gateway.add({"user_id": 1, "key": KEY})
        with NewAPITokenStore(url) as store:
            assert store.get(KEY) == store.get(f"sk-{KEY}") == store.get(f"sk-sk-{KEY}") is not None
            assert store.get("sk-") is None
