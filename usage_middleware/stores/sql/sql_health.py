"""Check the settings of a database server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, text

from ..findings import Finding, ok, problem, warning
from .sql_schema import MYSQL

_WAITING: Final = ("local", "remote_write", "on", "remote_apply")  # at least for the server's own disk
# A setting, the values with which committed data survives, and the risk with other values.
_POSTGRESQL: Final = (
    ("fsync", ("on",), problem, "a power failure may damage the whole database"),
    ("full_page_writes", ("on",), problem, "a power failure may damage the whole database"),
    ("synchronous_commit", _WAITING, warning, "a crash may undo the last charges"),
)
_MYSQL: Final = (
    ("innodb_flush_log_at_trx_commit", ("1",), warning, "a crash may undo the last charges"),
    ("innodb_doublewrite", ("1", "ON"), warning, "a power failure may damage the whole database"),
)


def findings(connection: Connection) -> Iterator[Finding]:
    """Yield findings on the server's version and on the settings on which durability depends."""
    is_mysql = connection.dialect.name in MYSQL
    version = connection.execute(text("SELECT version()")).scalar()
    yield ok(f"the server is {version}")
    for name, durable, level, risk in _MYSQL if is_mysql else _POSTGRESQL:
        statement = f"SELECT @@GLOBAL.{name}" if is_mysql else f"SHOW {name}"
        value = str(connection.execute(text(statement)).scalar())
        yield ok(f"{name} is {value}") if value in durable else level(f"{name} is {value}: {risk}")
