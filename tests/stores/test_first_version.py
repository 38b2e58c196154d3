"""Databases of the first version are migrated whole. ``first_version/make.py`` has what they hold, and how."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack, closing
from datetime import date, datetime, timezone
from pathlib import Path
from typing import NamedTuple

import databases
import pytest
from processes import end_within, environment, in_a_process, process_of
from sqlalchemy import Engine, NullPool, create_engine, event

from usage_middleware import Operation, OperationNotFound, StoreError, Token, TokenNotFound, open_store
from usage_middleware.stores.sql import sql_migrations
from usage_middleware.stores.sqlite import sqlite_schema

FILES = Path(__file__).parent / "first_version"
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))
NOW = 1_795_132_800 + 2 * 86_400  # after all that was done, before anything lapses but what had an hour
IDS = {token["name"]: token["id"] for token in EXPECTED["tokens"]}
DELETED = 6


class Kind(NamedTuple):
    file: str
    steps: int

    def fill(self, text):
        """Make the database of the first version in an empty one."""
        script = (FILES / self.file).read_text(encoding="utf-8")
        if "://" not in text:
            with closing(sqlite3.connect(text)) as connection:
                connection.executescript(script)
                connection.execute("PRAGMA journal_mode = WAL")
            return
        statements = [line.rstrip(";") for line in script.splitlines() if not line.startswith("--")]
        with connect(text) as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)


KINDS = {
    "sqlite": Kind("sqlite.sql", len(sqlite_schema.SCHEMA.steps)),
    "postgresql": Kind("postgresql.sql", len(sql_migrations.SCHEMA.steps)),
    "mariadb": Kind("mysql.sql", len(sql_migrations.SCHEMA.steps)),
}


def connect(url):
    options = {"no_parameters": True}
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", execution_options=options).connect()


@pytest.fixture(params=["sqlite", *(pytest.param(kind, marks=pytest.mark.servers) for kind in databases.KINDS)])
def kind(request):
    return request.param


@pytest.fixture
def make_database(kind, request, tmp_path):
    """Make databases of the first version. Return what ``open_store`` opens each by."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def make():
            if kind == "sqlite":
                text = str(tmp_path / f"{next(numbers)}.db")
            else:
                text = stack.enter_context(request.getfixturevalue(kind).database())
            KINDS[kind].fill(text)
            return text

        yield make


@pytest.fixture
def text(make_database):
    return make_database()


@pytest.fixture
def store(text):
    with opened(text) as store:
        yield store


def opened(text):
    store = open_store(text)
    store._clock = lambda: NOW
    return store


def key(name):
    return f"{name}-key-of-the-first-version"


def rows(text, query):
    if "://" in text:
        with connect(text) as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]
    with closing(sqlite3.connect(text)) as connection:
        return connection.execute(query).fetchall()


def days_of(token_id):
    """Return what the operations that the first version kept come to, by day and model."""
    days = defaultdict(lambda: [0, 0, 0, 0])
    for operation in EXPECTED["operations"][str(token_id)]:
        if operation["kind"] in ("charge", "reserve"):
            day = datetime.fromtimestamp(operation["created_at"], timezone.utc).date()
            figures = days[day, operation["model"] or ""]
            figures[0] += operation["held"]
            figures[1] += 1
    return dict(days)


def check_whole(store):
    """Check that everything is there that the first version had."""
    tokens = {token.id: token for token in store.tokens()}
    assert list(tokens) == [fields["id"] for fields in EXPECTED["tokens"]]
    for fields in EXPECTED["tokens"]:
        token_id = fields["id"]
        operations = EXPECTED["operations"][str(token_id)]
        held = sum(operation["held"] for operation in operations if operation["final_amount"] is None)
        assert tokens[token_id] == Token(**fields, held=held)
    for token_id, operations in EXPECTED["operations"].items():
        for operation, fields in zip(store.history(int(token_id)), operations, strict=True):
            if fields["token_id"] == DELETED and fields["final_amount"] is None:
                fields = {**fields, "held": 0}  # as a token that is deleted now leaves it
            assert operation == Operation(**{**fields, "number": 0}, idempotency_key=fields["id"])
            assert operation.number == fields["number"]
        assert store.model_usage(int(token_id)) == EXPECTED["model_usage"][token_id]
    for token_id in tokens:
        days = store.usage_by_day(token_id, date.min, date.max)
        assert {(day, model): figures for day, model, *figures in days} == days_of(token_id)
    for name in IDS:
        if name != "rotated":
            assert store.get(key(name)) == tokens[IDS[name]]
    assert store.get(EXPECTED["rotated"]) == tokens[IDS["rotated"]]
    for retired in EXPECTED["retired"]:
        assert store.get(retired) is None
        with pytest.raises(ValueError, match="never returns"):
            store.create(key=retired)


def everything(text):
    """Return every row of every table, and the name of every index."""
    if "://" not in text:
        tables = [name for (name,) in rows(text, "SELECT name FROM sqlite_master WHERE type = 'table'")]
        indexes = rows(text, "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    else:
        of_mysql = "mysql" in text
        schema = "database()" if of_mysql else "'public'"
        tables = [
            name
            for (name,) in rows(text, f"SELECT table_name FROM information_schema.tables WHERE table_schema = {schema}")
        ]
        indexes = rows(
            text,
            f"SELECT DISTINCT index_name FROM information_schema.statistics WHERE table_schema = {schema}"
            if of_mysql
            else "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'",
        )
    content = {table: sorted(rows(text, f"SELECT * FROM {table}"), key=repr) for table in tables}
    return {**content, "indexes": sorted(indexes)}


# --- What is there


def test_everything_is_whole(store, text, kind):
    check_whole(store)
    (version,) = rows(text, "SELECT version FROM usage_schema")
    assert version == (KINDS[kind].steps,)


def test_days_add_up_if_no_operation_was_pruned_and_none_imported(store):
    for name, token_id in IDS.items():
        used = sum(day.used for day in store.usage_by_day(token_id, date.min, date.max))
        earlier = {"pruned": 110, "moved": 500}.get(name, 0)
        assert used == store.get_by_id(token_id).total_used - earlier


def test_numbers_and_ids_go_on(store):
    _, token = store.create()
    assert token.id == 13  # 12 was given, and deleted
    last = max(operation["number"] for operations in EXPECTED["operations"].values() for operation in operations)
    store.charge(key("plain"), 1)
    assert next(store.history(IDS["plain"])).number > last


def test_calls_that_were_made_before_are_found_again(store):
    before = {token.id: token for token in store.tokens()}
    store.charge(key("plain"), 100, model="gpt-4o", idempotency_key="plain/charge")
    store.charge(key("limits"), 60, model="模型", idempotency_key="limits/模型")
    store.charge(EXPECTED["rotated"], 5, idempotency_key="rotated/charge")
    store.charge_by_id(IDS["disabled"], 1, idempotency_key="disabled/charge")
    store.refund("plain/charge", 40, idempotency_key="plain/refund")
    reservation = store.reserve(key("plain"), 200, model="gpt-4o", idempotency_key="plain/open", expires_in=30 * 86_400)
    assert (reservation.id, reservation.replayed, reservation.held) == ("plain/open", True, 200)
    store.settle("plain/settled", 45)
    store.settle("overdrawn/settled", 1300)
    assert store.find_operation(key("plain"), "plain/open") == reservation
    assert store.operation("plain/open") == reservation
    assert {token.id: token for token in store.tokens()} == before
    # They belong to their token: another holder may choose the same.
    assert store.charge(key("unused"), 1, idempotency_key="plain/charge").total_used == 1


def test_reservations_are_settled_and_lapse(store):
    open_before = {operation.id for operation in store.open_reservations()}
    assert open_before == {
        *("plain/open", "plain/lapsed", "limits/open", "limits/lapsed", "unlimited/open", "toggled/open"),
    }
    before = store.get_by_id(IDS["plain"])
    token = store.settle("plain/open", 150, input_tokens=7, output_tokens=8)
    # Lapsed reservations are released too.
    assert (token.total_used, token.held) == (before.total_used - 50 - 70, 0)
    assert token.total_granted == before.total_granted
    day = store.usage_by_day(IDS["plain"], date(2026, 11, 21), date(2026, 11, 21))
    assert [tuple(figures) for _, *figures in day] == [("", 10, 2, 0, 0), ("gpt-4o", 150, 1, 7, 8)]
    assert store.settle("plain/lapsed", 70).total_used == token.total_used + 70  # late
    store.charge(key("limits"), 0)
    assert store.model_usage(IDS["limits"]) == {"free": 0, "gpt-4o": 290, "模型": 60}
    # One that was made while quota was unlimited takes from it only now.
    before = store.get_by_id(IDS["toggled"])
    assert store.settle("toggled/open", 60).total_available == before.total_available - 60
    before = store.get_by_id(IDS["unlimited"])
    assert store.settle("unlimited/open", 1).total_available == before.total_available
    assert {token.held for token in store.tokens()} == {90, 0}  # "limits/open"


def test_refunds_of_what_was_charged_before_make_no_day_negative(store):
    for name, token_id in IDS.items():
        for operation in list(store.history(token_id)):
            if operation.kind == "reserve" and operation.is_open:
                store.settle(operation, 0)
        for operation in list(store.history(token_id)):
            if operation.is_request:
                store.refund(operation)
        days = store.usage_by_day(token_id, date.min, date.max)
        assert {day.used for day in days} <= {0}
        # What is left is what was pruned, or was used before the token was moved.
        assert store.get_by_id(token_id).total_used == {"pruned": 110, "moved": 500}.get(name, 0)
    with pytest.raises(OperationNotFound):
        store.refund("pruned/1")


def test_what_a_deleted_token_left_is_pruned(store):
    assert {operation.id for operation in store.history(DELETED)} == {"deleted/charge", "deleted/open"}
    with pytest.raises(TokenNotFound):
        store.settle("deleted/open", 1)
    store._clock = lambda: NOW + 40 * 86_400
    store.prune(NOW + 35 * 86_400)
    assert list(store.history(DELETED)) == []
    assert [operation for token_id in IDS.values() for operation in store.history(token_id)] == []
    assert list(store.open_reservations()) == []
    assert {token.held for token in store.tokens()} == {0}


def test_it_is_imported_into_a_new_store(store, text, tmp_path):
    records = list(store.records())
    with open_store(str(tmp_path / "new.db")) as new:
        ids = new.restore(records)
        assert None not in ids
        for record, moved in zip(records, new.records(), strict=True):
            token = dataclasses.replace(record.token, id=moved.token.id, held=0)
            assert moved == dataclasses.replace(record, token=token)


# --- How it is migrated


def open_and_read(text):
    with open_store(text) as store:
        assert store.get(key("plain")) is not None


def open_when_told(barrier, text):
    end_within(60)
    with open_store(text) as store:
        barrier.wait()
        assert store.get(key("plain")) is not None


def open_at_once(text):
    """Run in a process of its own, as it forks."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(8)
    workers = [fork.Process(target=open_when_told, args=(barrier, text)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8


def test_eight_processes_that_start_at_once(make_database, full):
    for _ in range(10 if full else 1):
        text = make_database()
        in_a_process(open_at_once, text)
        with opened(text) as store:
            check_whole(store)


def open_and_die(text, number):
    """Is killed, without a chance to tidy up, at its statement of that number."""
    left = int(number)

    def count(*_):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    connect = sqlite3.connect

    def connect_and_watch(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    sqlite3.connect = connect_and_watch
    event.listen(Engine, "after_cursor_execute", count)
    open_and_read(text)


def die_when_told():
    """Run in a process of its own, as it forks: reads numbers and databases, and prints how a child of each ended."""
    for line in sys.stdin:
        number, text = line.split()
        child = os.fork()
        if not child:
            end_within(60)
            open_and_die(text, number)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.mark.slow
def test_one_that_is_killed_at_every_statement(make_database, full):
    """By default at every seventh."""
    whole = make_database()
    open_and_read(whole)
    expected = everything(whole)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(process_of(die_when_told), env=environment(), text=True, **pipes) as forker:
        for number in itertools.count(1, 1 if full else 7):
            text = make_database()
            forker.stdin.write(f"{number} {text}\n")
            forker.stdin.flush()
            ended = int(forker.stdout.readline())
            open_and_read(text)
            assert everything(text) == expected
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
    print(f"killed at {number - 1} statements")
    assert number > 20


def test_a_newer_version_is_refused(text, kind):
    open_and_read(text)
    newer = KINDS[kind].steps + 1
    if "://" in text:
        with connect(text) as connection:
            connection.exec_driver_sql(f"UPDATE usage_schema SET version = {newer}")
    else:
        with closing(sqlite3.connect(text)) as connection, connection:
            connection.execute(f"UPDATE usage_schema SET version = {newer}")
    before = everything(text)
    for use in (lambda store: store.get(key("plain")), lambda store: store.charge(key("plain"), 1)):
        with open_store(text) as store, pytest.raises(StoreError, match=f"newer usage-middleware .*{newer}.*upgrade"):
            use(store)
    assert everything(text) == before


def test_the_first_version_refuses_a_migrated_database(text):
    open_and_read(text)
    if "://" in text:
        # It knows version 1, and nothing that is greater.
        ((version,),) = rows(text, "SELECT version FROM usage_schema")
        assert version > 1
    else:
        # It refuses tables of these names if it has no record of them.
        assert rows(text, "SELECT * FROM _sqlite_migrations") == []
        assert rows(text, "SELECT name FROM sqlite_master WHERE name = 'tokens'") == [("tokens",)]


def test_a_migrated_database_is_what_a_new_one_is(text, kind, request, tmp_path):
    open_and_read(text)
    old = {name: content for name, content in everything(text).items() if name != "_sqlite_migrations"}
    if kind == "sqlite":
        new = str(tmp_path / "new.db")
        open_store(new).count()
        assert everything(new).keys() == old.keys()
        assert everything(new)["indexes"] == [name for name in old["indexes"] if "_sqlite_migrations" not in name[0]]
        return
    with request.getfixturevalue(kind).database() as new:
        open_store(new).count()
        assert everything(new).keys() == old.keys()
        assert everything(new)["indexes"] == old["indexes"]
