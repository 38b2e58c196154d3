"""Fill a database with the code of the first version, and write it down: its SQL, and what that code reads of it.

Run once, with the code of commit d432582 installed, and kept so that one can see what the files beside it hold::

    python make.py tokens.db sqlite.sql expected.json
    python make.py postgresql://… postgresql.sql expected.json
    python make.py mysql://… mysql.sql expected.json

The database must be empty. What is expected is the same for each of them.
"""

import dataclasses
import itertools
import json
import sqlite3
import sys
import uuid

import sqlalchemy

from usage_middleware import open_store
from usage_middleware.stores import base
from usage_middleware.tokens import key_digest

DAY, HOUR = 86_400, 3_600
NOW = 1_795_132_800  # 20 November 2026, 0:00 UTC
ROTATED = "rotated-to-this-key-00000001"


class Clock:
    now = NOW

    def at(self, days, hours=0):
        self.now = NOW + days * DAY + hours * HOUR


def key(name):
    return f"{name}-key-of-the-first-version"


def fill(store, clock):
    """Every kind of call, so that each kind of row is left, and some that are not."""

    def create(name, **fields):
        return store.create(name=name, key=key(name), **{"total_available": 1000, **fields})[1].id

    clock.at(-5)
    pruned = create("pruned")
    create("plain")
    create("limits", model_limits={"gpt-4o": 500, "free": True, "模型": 60})
    create("unlimited", total_available=7, unlimited_quota=True)
    toggled = create("toggled", unlimited_quota=True)
    deleted = create("deleted")
    rotated = create("rotated")
    disabled = create("disabled", expires_at=NOW + 100 * DAY)
    overdrawn = create("overdrawn")
    create("unused", model_limits={"gpt-4o": True}, model_limits_enabled=False)
    store.restore(
        [
            base.TokenRecord(
                token=base.Token(name="moved", total_available=500, total_used=500, created_at=NOW - 90 * DAY),
                digest=key_digest(key("moved")),
                model_usage={"gpt-4o": 300},
            )
        ]
    )
    store.charge(key("pruned"), 100, model="gpt-4o", operation_id="pruned/1")
    store.charge(key("pruned"), 10, operation_id="pruned/2")
    clock.at(-3)
    store.charge(key("pruned"), 30, model="gpt-4o", operation_id="pruned/3")
    assert store.prune(NOW - 4 * DAY) == 2

    clock.at(0, 12)
    store.charge(key("pruned"), 7, operation_id="pruned/4")
    store.charge(key("plain"), 100, model="gpt-4o", operation_id="plain/charge")
    store.charge(key("plain"), 50)
    store.reserve(key("plain"), 30, model="gpt-4o", operation_id="plain/settled")
    store.reserve(key("plain"), 25, operation_id="plain/released", expires_in=HOUR)
    store.charge(key("limits"), 200, model="gpt-4o", operation_id="limits/charge")
    store.charge(key("limits"), 60, model="模型", operation_id="limits/模型")
    store.charge(key("unlimited"), 5000, model="gpt-4o", operation_id="unlimited/charge")
    store.reserve(key("unlimited"), 300, operation_id="unlimited/open", expires_in=30 * DAY)
    store.charge(key("toggled"), 40, operation_id="toggled/charge")
    store.reserve(key("toggled"), 60, operation_id="toggled/open", expires_in=30 * DAY)
    store.update(toggled, unlimited_quota=False)
    store.charge(key("deleted"), 70, operation_id="deleted/charge")
    store.reserve(key("deleted"), 80, model="gpt-4o", operation_id="deleted/open", expires_in=30 * DAY)
    store.charge(key("rotated"), 5, operation_id="rotated/charge")
    base.make_key = lambda: ROTATED
    store.rotate(rotated)
    store.charge(key("moved"), 20, model="gpt-4o", operation_id="moved/charge")

    clock.at(1, 12)
    store.settle("plain/settled", 45)
    store.refund("plain/charge", 40, refund_id="plain/refund")
    store.grant(pruned, 5)
    store.grant(toggled, -10)
    store.charge(key("plain"), 10, operation_id="plain/next day")  # releases "plain/released"
    store.reserve(key("plain"), 200, model="gpt-4o", operation_id="plain/open", expires_in=30 * DAY)
    store.reserve(key("plain"), 70, operation_id="plain/lapsed", expires_in=HOUR)
    store.reserve(key("limits"), 90, model="gpt-4o", operation_id="limits/open", expires_in=30 * DAY)
    store.reserve(key("limits"), 15, model="free", operation_id="limits/lapsed", expires_in=HOUR)
    store.reserve(key("overdrawn"), 900, operation_id="overdrawn/settled")
    store.settle("overdrawn/settled", 1300)
    store.charge(key("disabled"), 1, operation_id="disabled/charge")
    store.update(disabled, enabled=False)
    store.refund("pruned/4", 2)
    store.delete(deleted)
    last = create("last")
    store.delete(last)
    return {"overdrawn": overdrawn, "last": last}


def expected(store):
    tokens = [dataclasses.asdict(token) for token in store.tokens()]
    ids = range(1, max(token["id"] for token in tokens) + 2)
    return {
        "tokens": tokens,
        "operations": {i: [dataclasses.asdict(operation) for operation in store.history(i)] for i in ids},
        "model_usage": {i: store.model_usage(i) for i in ids},
        "retired": [key("rotated"), key("deleted"), key("last")],
        "rotated": ROTATED,
    }


def main(text, sql_path, json_path):
    clock = Clock()
    base.QuotaStore._now = lambda self: float(clock.now)
    numbers = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(numbers))
    definitions = []

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
    def watch(connection, cursor, statement, parameters, context, executemany):
        if statement.lstrip().startswith("CREATE"):
            definitions.append(statement)

    with open_store(text) as store:
        fill(store, clock)
        what = json.dumps(expected(store), ensure_ascii=False, indent=1, sort_keys=True)
    try:
        with open(json_path, encoding="utf-8") as file:
            assert file.read() == what + "\n", "another database holds something else"
    except FileNotFoundError:
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(what + "\n")
    with open(sql_path, "w", encoding="utf-8") as file:
        file.write("-- Made by make.py with the code of the first version. Never edited.\n")
        for statement in sqlite(text) if "://" not in text else server(text, definitions):
            file.write(statement.rstrip(";") + ";\n")


def sqlite(path):
    connection = sqlite3.connect(path)
    yield from connection.iterdump()


def server(url, definitions):
    yield from (" ".join(statement.split()) for statement in definitions)
    is_mysql = url.startswith("mysql")
    with sqlalchemy.create_engine(url).connect() as connection:
        for table in ("usage_schema", "usage_tokens", "usage_retired_keys", "usage_operations", "usage_models"):
            rows = connection.exec_driver_sql(f"SELECT * FROM {table}")
            names = list(rows.keys())
            for row in sorted(map(tuple, rows)):
                values = ", ".join(map(literal_of(is_mysql), names, row))
                yield f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})"
        # No number of these tables is given twice, even if the row that had it is gone.
        for table, column in (("usage_tokens", "id"), ("usage_operations", "number")):
            if is_mysql:
                connection.exec_driver_sql(f"ANALYZE TABLE {table}")
                last = connection.exec_driver_sql(
                    "SELECT auto_increment FROM information_schema.tables"
                    f" WHERE table_schema = database() AND table_name = '{table}'"
                ).scalar()
                yield f"ALTER TABLE {table} AUTO_INCREMENT = {last}"
            else:
                last = connection.exec_driver_sql(f"SELECT last_value FROM {table}_{column}_seq").scalar()
                yield f"SELECT setval('{table}_{column}_seq', {last})"


def literal_of(is_mysql):
    def literal(name, value):
        if value is None:
            return "NULL"
        if name == "digest":
            return f"X'{value.hex()}'" if is_mysql else f"'\\x{value.hex()}'"
        if isinstance(value, (str, bytes)):  # MySQL has identifiers as bytes
            text = value.decode() if isinstance(value, bytes) else value
            assert "\\" not in text
            return "'" + text.replace("'", "''") + "'"
        return repr(value)

    return literal


if __name__ == "__main__":
    main(*sys.argv[1:])
