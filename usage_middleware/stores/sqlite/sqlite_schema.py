"""Table definitions of a :class:`~usage_middleware.SQLiteTokenStore`, and their migrations.

A released version may have applied each step, so a step is never edited, only followed by another.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from sqlite_utils import Database

from ..migrations import Schema, TablesState, WrongTables

_TABLES = ("tokens", "retired_keys", "operations", "model_usage", "usage_by_day")
# Where the first two versions recorded themselves, by sqlite-utils: a row for each step.
_FIRST_RECORD = "_sqlite_migrations"
_LAST_WITHOUT_NUMBER = 2


def _tokens(connection: sqlite3.Connection) -> None:
    # AUTOINCREMENT: the id of a deleted token is never used again (sqlite.org/autoinc.html).
    connection.execute(
        """
        CREATE TABLE tokens (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            digest BLOB NOT NULL UNIQUE,
            hint TEXT NOT NULL,
            name TEXT NOT NULL,
            total_available INTEGER NOT NULL,
            total_used INTEGER NOT NULL,
            unlimited_quota INTEGER NOT NULL CHECK (unlimited_quota IN (0, 1)),
            model_limits TEXT NOT NULL,
            model_limits_enabled INTEGER NOT NULL CHECK (model_limits_enabled IN (0, 1)),
            expires_at INTEGER NOT NULL,
            enabled INTEGER NOT NULL CHECK (enabled IN (0, 1)),
            created_at INTEGER NOT NULL
        ) STRICT
        """
    )
    # The digests of deleted and rotated keys, so that none of them can return.
    connection.execute("CREATE TABLE retired_keys (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID")


def _operations(connection: sqlite3.Connection) -> None:
    connection.execute(
        """
        CREATE TABLE operations (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            token_id INTEGER NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('charge', 'reserve', 'refund', 'grant')),
            amount INTEGER,
            model TEXT,
            held INTEGER NOT NULL CHECK (held >= 0),
            unlimited INTEGER NOT NULL CHECK (unlimited IN (0, 1)),
            expires_in REAL,
            expires_at REAL,
            final_amount INTEGER,
            refund_of TEXT,
            created_at REAL NOT NULL,
            changed_at REAL NOT NULL
        ) STRICT
        """
    )
    connection.execute("CREATE INDEX operations_of_token ON operations (token_id, number)")
    connection.execute(
        "CREATE INDEX open_reservations ON operations (token_id, expires_at) WHERE final_amount IS NULL AND held > 0"
    )
    connection.execute(
        """
        CREATE TABLE model_usage (
            token_id INTEGER NOT NULL,
            model TEXT NOT NULL,
            used INTEGER NOT NULL,
            PRIMARY KEY (token_id, model)
        ) STRICT, WITHOUT ROWID
        """
    )


def _renewal_and_days(connection: sqlite3.Connection) -> None:
    """Add renewal, what is held, usage by day, and idempotency keys that belong to a token.

    Earlier operations had one id, the caller's or the store's own. It becomes their idempotency key too, so that a
    call that was made before the upgrade and is repeated after it is still found. Operations that are not pruned are
    booked by day, or a refund of one of them would make its day negative.
    """
    for column in (
        "renewal TEXT NOT NULL DEFAULT '' CHECK (renewal IN ('', 'daily', 'weekly', 'monthly'))",
        "renewal_quota INTEGER NOT NULL DEFAULT 0",
        "renews_at INTEGER NOT NULL DEFAULT 0",
        "held INTEGER NOT NULL DEFAULT 0",
    ):
        connection.execute(f"ALTER TABLE tokens ADD COLUMN {column}")
    # SQLite cannot change a CHECK, so the table is made again (sqlite.org/lang_altertable.html, section 7).
    connection.execute("ALTER TABLE operations RENAME TO operations_of_version_2")
    connection.execute("DROP INDEX operations_of_token")
    connection.execute("DROP INDEX open_reservations")
    connection.execute(
        """
        CREATE TABLE operations (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            token_id INTEGER NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('charge', 'reserve', 'refund', 'grant', 'renewal')),
            amount INTEGER,
            idempotency_key TEXT,
            model TEXT,
            held INTEGER NOT NULL CHECK (held >= 0),
            unlimited INTEGER NOT NULL CHECK (unlimited IN (0, 1)),
            at_least INTEGER,
            expires_in REAL,
            expires_at REAL,
            final_amount INTEGER,
            input_tokens INTEGER NOT NULL DEFAULT 0,
            output_tokens INTEGER NOT NULL DEFAULT 0,
            refund_of TEXT,
            created_at REAL NOT NULL,
            changed_at REAL NOT NULL
        ) STRICT
        """
    )
    connection.execute(
        """
        INSERT INTO operations (number, id, token_id, kind, amount, idempotency_key, model, held, unlimited,
            expires_in, expires_at, final_amount, refund_of, created_at, changed_at)
        SELECT number, id, token_id, kind, amount, id, model, held, unlimited,
            expires_in, expires_at, final_amount, refund_of, created_at, changed_at
        FROM operations_of_version_2 ORDER BY number
        """
    )
    # A number is never used again, even if its operation was pruned.
    connection.execute(
        "UPDATE sqlite_sequence SET seq = (SELECT max(seq) FROM sqlite_sequence"
        " WHERE name IN ('operations', 'operations_of_version_2')) WHERE name = 'operations'"
    )
    connection.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'operations', seq FROM sqlite_sequence"
        " WHERE name = 'operations_of_version_2' AND NOT EXISTS"
        " (SELECT 1 FROM sqlite_sequence WHERE name = 'operations')"
    )
    connection.execute("DROP TABLE operations_of_version_2")
    # Earlier versions left what open reservations of deleted tokens held; nothing can release it.
    connection.execute(
        "UPDATE operations SET held = 0 WHERE final_amount IS NULL AND held > 0 AND token_id NOT IN"
        " (SELECT id FROM tokens)"
    )
    connection.execute("CREATE INDEX operations_of_token ON operations (token_id, number)")
    connection.execute(
        "CREATE UNIQUE INDEX operations_of_key ON operations (token_id, idempotency_key)"
        " WHERE idempotency_key IS NOT NULL"
    )
    connection.execute(
        "CREATE INDEX open_reservations ON operations (token_id, expires_at) WHERE final_amount IS NULL AND held > 0"
    )
    connection.execute(
        "UPDATE tokens SET held = (SELECT coalesce(sum(held), 0) FROM operations"
        " WHERE token_id = tokens.id AND final_amount IS NULL AND operations.held > 0)"
    )
    connection.execute(
        """
        CREATE TABLE usage_by_day (
            token_id INTEGER NOT NULL,
            day TEXT NOT NULL,
            model TEXT NOT NULL,
            used INTEGER NOT NULL,
            requests INTEGER NOT NULL,
            input_tokens INTEGER NOT NULL,
            output_tokens INTEGER NOT NULL,
            PRIMARY KEY (token_id, day, model)
        ) STRICT, WITHOUT ROWID
        """
    )
    connection.execute(
        """
        INSERT INTO usage_by_day
        SELECT token_id, date(created_at, 'unixepoch'), coalesce(model, ''), sum(held), count(*), 0, 0
        FROM operations WHERE kind IN ('charge', 'reserve') AND token_id IN (SELECT id FROM tokens)
        GROUP BY 1, 2, 3
        """
    )
    connection.execute("CREATE TABLE usage_schema (version INTEGER NOT NULL) STRICT")
    connection.execute("INSERT INTO usage_schema VALUES (0)")
    # Without this record an earlier version refuses the file. With it, that version would write the file wrong.
    if _FIRST_RECORD in _database(connection).table_names():
        connection.execute(f"DELETE FROM {_FIRST_RECORD} WHERE migration_set = 'usage_middleware'")


def _log(connection: sqlite3.Connection) -> None:
    """Let a page of a token's log be found without reading the operations before it."""
    connection.execute("DROP INDEX operations_of_token")
    connection.execute("CREATE INDEX operations_of_token ON operations (token_id, number, kind, created_at)")
    # Refunds are few, and far apart.
    connection.execute("CREATE INDEX refunds ON operations (token_id, number, created_at) WHERE kind = 'refund'")


def _version(connection: sqlite3.Connection) -> int:
    database = _database(connection)
    tables = database.table_names()
    # A table, whatever the file contains: reading a view of this name may take for ever.
    _refuse("view", database.view_names())
    if "usage_schema" in tables:
        row = connection.execute("SELECT max(version) FROM usage_schema").fetchone()
        return int(row[0] or 0)
    if _FIRST_RECORD in tables:
        query = f"SELECT count(*) FROM {_FIRST_RECORD} WHERE migration_set = 'usage_middleware'"
        applied = int(connection.execute(query).fetchone()[0])
        if applied:
            return applied
    _refuse("table", tables)
    return 0


def _refuse(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if name.lower() in _TABLES:
            raise WrongTables(f"has a {kind} {name!r} that usage-middleware did not make; choose another file")


def _record(connection: sqlite3.Connection, version: int) -> None:
    if version > _LAST_WITHOUT_NUMBER:
        connection.execute("UPDATE usage_schema SET version = ?", (version,))


def _database(connection: sqlite3.Connection) -> Database:
    return Database(connection, recursive_triggers=False, execute_plugins=False)


SCHEMA: Schema[sqlite3.Connection] = Schema(
    steps=(_tokens, _operations, _renewal_and_days, _log), version=_version, record=_record
)


def state(connection: sqlite3.Connection) -> TablesState:
    """Return whether the database has tables of ours, and whether they are those of this version. Only read.

    :raises WrongTables: the database was made by a newer version, or by something else.
    """
    # This takes two reads, and another process may migrate between them.
    connection.execute("BEGIN")
    try:
        return SCHEMA.state(connection)
    finally:
        connection.execute("ROLLBACK")


def migrate(connection: sqlite3.Connection) -> None:
    """Migrate the database to the newest version or not at all, however many processes start at once."""
    connection.execute("BEGIN IMMEDIATE")
    # Another process may have migrated first. No other process can migrate during this transaction.
    SCHEMA.upgrade(connection)
    connection.execute("COMMIT")
