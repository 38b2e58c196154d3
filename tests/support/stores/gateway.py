"""Databases of new-api, with the tables that gorm creates."""

import contextlib

from client import wrapped
from sqlalchemy import NullPool, column, create_engine, insert, table, text

from usage_middleware import (
    UsageMiddleware,
)

# The column types that gorm uses for Go's types.
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


# Its tokens had no usage, no limits, and no mark of deletion.
OLDEST = """
CREATE TABLE {q}tokens{q} ({q}id{q} {id}, {q}user_id{q} {int}, {q}key{q} {key}, {q}status{q} {int} DEFAULT 1,
{q}name{q} {string}, {q}expired_time{q} {int} DEFAULT -1, {q}remain_quota{q} {int} DEFAULT 0);
CREATE UNIQUE INDEX idx_tokens_key ON {q}tokens{q} ({q}key{q});
CREATE TABLE {q}users{q} ({q}id{q} {id}, {q}username{q} {string}, {q}status{q} {int} DEFAULT 1)
"""


KEY = "aB3" * 16  # 48 characters, as new-api makes them


DELETED_AT = "2025-01-02 03:04:05"


class Gateway:
    """A database of new-api, and writes to it as new-api makes them."""

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


KINDS = list(TYPES)


def endpoint(store):
    return UsageMiddleware(wrapped, store)


@contextlib.contextmanager
def database_url(kind, request, tmp_path):
    """Yield the URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'one-api.db'}"
    else:
        with request.getfixturevalue(kind).database() as url:
            yield url
