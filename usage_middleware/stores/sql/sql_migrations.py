"""How the tables of a :class:`~usage_middleware.SQLAlchemyTokenStore` are made, and upgraded.

The steps are SQL as text, so that no later change of :mod:`.sql_schema` changes what they once did. MySQL commits each
statement that defines something by itself, so a process may die in the middle of a step. Each step can be run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, inspect, text

from ..migrations import Schema, TablesState, WrongTables
from .sql_schema import MYSQL, TABLES

VERSION_TABLE: Final = "usage_schema"

# Any number that is ours alone: PostgreSQL identifies advisory locks by a number (its manual, 13.3.5).
_LOCK_NUMBER: Final = 7_216_885_309_340_021
_LOCK_NAME: Final = "usage_middleware"
_LOCK_SECONDS: Final = 60

# The words of the two families of databases for the same things.
_POSTGRESQL: Final = {
    "number": "BIGSERIAL",
    "digest": "BYTEA",
    "identifier": "VARCHAR(255)",
    "text": "TEXT",
    "boolean": "BOOLEAN",
    "double": "DOUBLE PRECISION",
    "options": "",
    "of_operations": "",
    "if_lapsing": " WHERE lapses_at IS NOT NULL",
    "day_of_operation": "DATE '1970-01-01' + CAST(floor(created_at / 86400) AS INTEGER)",
    "no_model": "''",
    "false": "FALSE",
}
_MYSQL: Final = {
    "number": "BIGINT NOT NULL AUTO_INCREMENT",
    "digest": "BINARY(32)",
    "identifier": "VARBINARY(1020)",
    "text": "LONGTEXT",
    "boolean": "BOOL",
    "double": "DOUBLE",
    "of_operations": " ON usage_operations",
    "options": " ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_bin",
    "if_lapsing": "",
    "day_of_operation": "DATE_ADD('1970-01-01', INTERVAL floor(created_at / 86400) DAY)",
    "no_model": "''",
    "false": "0",
}


def _first(connection: Connection) -> None:
    words = _words(connection)
    _create_table(connection, VERSION_TABLE, "version INTEGER NOT NULL, PRIMARY KEY (version)")
    _create_table(
        connection,
        "usage_tokens",
        "id {number}, hint VARCHAR(4) NOT NULL, name {text} NOT NULL, total_available BIGINT NOT NULL, "
        "total_used BIGINT NOT NULL, unlimited_quota {boolean} NOT NULL, model_limits {text} NOT NULL, "
        "model_limits_enabled {boolean} NOT NULL, expires_at BIGINT NOT NULL, enabled {boolean} NOT NULL, "
        "created_at BIGINT NOT NULL, digest {digest} NOT NULL, PRIMARY KEY (id), UNIQUE (digest)",
    )
    _create_table(connection, "usage_retired_keys", "digest {digest} NOT NULL, PRIMARY KEY (digest)")
    _create_table(
        connection,
        "usage_operations",
        "number {number}, id {identifier} NOT NULL, token_id BIGINT NOT NULL, kind VARCHAR(7) NOT NULL, "
        "amount BIGINT, model {identifier}, held BIGINT NOT NULL, unlimited {boolean} NOT NULL, expires_in {double}, "
        "expires_at {double}, final_amount BIGINT, refund_of {identifier}, created_at {double} NOT NULL, "
        "changed_at {double} NOT NULL, lapses_at {double}, PRIMARY KEY (number), UNIQUE (id)",
    )
    _create_table(
        connection,
        "usage_models",
        "token_id BIGINT NOT NULL, model {identifier} NOT NULL, used BIGINT NOT NULL, PRIMARY KEY (token_id, model)",
    )
    where = words["if_lapsing"]
    _create_index(connection, "usage_operations_of_token", "usage_operations", "(token_id, number)")
    _create_index(connection, "usage_lapsing_of_token", "usage_operations", f"(token_id, lapses_at){where}")
    _create_index(connection, "usage_lapsing", "usage_operations", f"(lapses_at){where}")


def _renewal_and_days(connection: Connection) -> None:
    """Add renewal, what is held, usage by day, and idempotency keys that belong to a token.

    Earlier operations had one id, the caller's or the store's own. It becomes their idempotency key too, so that a
    call that was made before the upgrade and is repeated after it is still found. Operations that are not pruned are
    booked by day, or a refund of one of them would make its day negative.
    """
    _add_columns(
        connection,
        "usage_tokens",
        {
            "renewal": "VARCHAR(7) NOT NULL DEFAULT ''",
            "renewal_quota": "BIGINT NOT NULL DEFAULT 0",
            "renews_at": "BIGINT NOT NULL DEFAULT 0",
            "held": "BIGINT NOT NULL DEFAULT 0",
        },
    )
    _add_columns(
        connection,
        "usage_operations",
        {
            "idempotency_key": "{identifier}",
            "at_least": "BIGINT",
            "input_tokens": "BIGINT NOT NULL DEFAULT 0",
            "output_tokens": "BIGINT NOT NULL DEFAULT 0",
        },
    )
    _create_table(
        connection,
        "usage_days",
        "token_id BIGINT NOT NULL, day DATE NOT NULL, model {identifier} NOT NULL, used BIGINT NOT NULL, "
        "requests BIGINT NOT NULL, input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, "
        "PRIMARY KEY (token_id, day, model)",
    )
    # On MySQL too, what follows is in one transaction with the record of the version.
    _execute(connection, "UPDATE usage_operations SET idempotency_key = id WHERE idempotency_key IS NULL")
    # Version 1 left what open reservations of deleted tokens held; nothing can release it.
    _execute(
        connection,
        "UPDATE usage_operations SET held = 0, lapses_at = NULL "
        "WHERE lapses_at IS NOT NULL AND token_id NOT IN (SELECT id FROM usage_tokens)",
    )
    _execute(
        connection,
        "UPDATE usage_tokens SET held = (SELECT coalesce(sum(o.held), 0) FROM usage_operations o "
        "WHERE o.token_id = usage_tokens.id AND o.lapses_at IS NOT NULL)",
    )
    _execute(connection, "DELETE FROM usage_days")
    _execute(
        connection,
        "INSERT INTO usage_days (token_id, day, model, used, requests, input_tokens, output_tokens) "
        "SELECT token_id, {day_of_operation}, coalesce(model, ''), sum(held), count(*), 0, 0 FROM usage_operations "
        "WHERE kind IN ('charge', 'reserve') AND token_id IN (SELECT id FROM usage_tokens) GROUP BY 1, 2, 3",
    )


def _unique_keys(connection: Connection) -> None:
    """Let a token have an idempotency key once. This is a step of its own, as MySQL commits when it makes an index."""
    _create_index(connection, "usage_operations_of_key", "usage_operations", "(token_id, idempotency_key)", unique=True)


def _log(connection: Connection) -> None:
    """Let a page of a token's log be found without reading the operations before it."""
    columns = "(token_id, number, kind, created_at)"
    _create_index(connection, "usage_operations_by_number", "usage_operations", columns)
    if "usage_operations_of_token" in _indexes(connection, "usage_operations"):
        _execute(connection, "DROP INDEX usage_operations_of_token{of_operations}")


def _version(connection: Connection) -> int:
    there = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in there:
        for name in sorted(there & TABLES):
            raise WrongTables(f"has a table {name!r} that usage-middleware did not make; choose another database")
        return 0
    return int(connection.execute(text(f"SELECT max(version) FROM {VERSION_TABLE}")).scalar() or 0)


def _record(connection: Connection, version: int) -> None:
    changed = connection.execute(text(f"UPDATE {VERSION_TABLE} SET version = :version"), {"version": version})
    if not changed.rowcount:
        connection.execute(text(f"INSERT INTO {VERSION_TABLE} VALUES (:version)"), {"version": version})
    if connection.dialect.name in MYSQL:
        connection.commit()


SCHEMA: Schema[Connection] = Schema(
    steps=(_first, _renewal_and_days, _unique_keys, _log), version=_version, record=_record
)


def is_current(connection: Connection) -> bool:
    """Return whether the database has every table in its newest form. Only read.

    :raises WrongTables: the database was made by a newer version, or by something else. The message does not name it.
    """
    return SCHEMA.is_current(connection)


def state(connection: Connection) -> TablesState:
    """Return whether the database has tables of ours, and whether they are those of this version. Only read.

    :raises WrongTables: as :func:`is_current`.
    """
    return SCHEMA.state(connection)


def migrate(connection: Connection) -> None:
    """Migrate the database to the newest version and commit, however many processes start at once.

    :raises WrongTables: as :func:`is_current`; or another process takes too long to migrate.
    """
    if connection.dialect.name in MYSQL:
        parameters = {"name": _LOCK_NAME, "seconds": _LOCK_SECONDS}
        if not connection.execute(text("SELECT GET_LOCK(:name, :seconds)"), parameters).scalar():
            raise WrongTables(f"is being prepared by another process for more than {_LOCK_SECONDS} s")
        try:
            SCHEMA.upgrade(connection)
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _LOCK_NAME})
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK_NUMBER})
        SCHEMA.upgrade(connection)
        connection.commit()


def _words(connection: Connection) -> Mapping[str, str]:
    return _MYSQL if connection.dialect.name in MYSQL else _POSTGRESQL


def _execute(connection: Connection, statement: str) -> None:
    connection.execute(text(statement.format_map(_words(connection))))


def _create_table(connection: Connection, name: str, columns: str) -> None:
    _execute(connection, f"CREATE TABLE IF NOT EXISTS {name} ({columns}){{options}}")


def _add_columns(connection: Connection, table: str, columns: Mapping[str, str]) -> None:
    there = {column["name"] for column in inspect(connection).get_columns(table)}
    for name, definition in columns.items():
        if name not in there:
            _execute(connection, f"ALTER TABLE {table} ADD COLUMN {name} {definition}")


def _create_index(connection: Connection, name: str, table: str, columns: str, *, unique: bool = False) -> None:
    if name not in _indexes(connection, table):
        _execute(connection, f"CREATE {'UNIQUE ' if unique else ''}INDEX {name} ON {table} {columns}")


def _indexes(connection: Connection, table: str) -> set[str | None]:
    return {index["name"] for index in inspect(connection).get_indexes(table)}
