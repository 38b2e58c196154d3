"""The tables of a :class:`~usage_middleware.SQLiteTokenStore`, and how a database comes by them.

Each migration is a step that some released version may have taken, so it is never edited, only followed by another.
sqlite-utils records in the database itself which have been applied.
"""

from __future__ import annotations

import sqlite3

from sqlite_utils import Database, Migrations

from ...errors import StoreError


def tokens(db: Database) -> None:
    # AUTOINCREMENT: the id of a deleted token is never given again (sqlite.org/autoinc.html).
    db.execute(
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
    db.execute("CREATE TABLE retired_keys (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID")


def operations(db: Database) -> None:
    db.execute(
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
    db.execute("CREATE INDEX operations_of_token ON operations (token_id, number)")
    db.execute(
        "CREATE INDEX open_reservations ON operations (token_id, expires_at) WHERE final_amount IS NULL AND held > 0"
    )
    db.execute(
        """
        CREATE TABLE model_usage (
            token_id INTEGER NOT NULL,
            model TEXT NOT NULL,
            used INTEGER NOT NULL,
            PRIMARY KEY (token_id, model)
        ) STRICT, WITHOUT ROWID
        """
    )


_STEPS = (tokens, operations)
_NAMES = ("tokens", "retired_keys", "operations", "model_usage")
_migrations = Migrations("usage_middleware")
for _step in _STEPS:
    _migrations()(_step)


def is_current(connection: sqlite3.Connection) -> bool:
    """Whether the database has every table in its newest form. Reads only.

    :param connection: has a transaction open, as it takes two reads, and another process may migrate between them.
    :raises StoreError: the database was made by a newer version, or by something else; without the file's name.
    """
    db = _database(connection)
    applied = {migration.name for migration in _migrations.applied(db)}
    unknown = applied - {step.__name__ for step in _STEPS}
    if unknown:
        raise StoreError(
            f"was made by a newer version of usage-middleware (it has {', '.join(sorted(unknown))}); update this one"
        )
    if not applied:
        for (name,) in db.execute("SELECT name FROM sqlite_master").fetchall():
            if name.lower() in _NAMES:
                raise StoreError(f"has a table {name!r} that usage-middleware did not make; choose another file")
    return len(applied) == len(_STEPS)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the database to the newest schema, whole or not at all, however many processes start at once."""
    connection.execute("BEGIN IMMEDIATE")
    # Another process may have been first; inside of the transaction nobody is any more.
    if not is_current(connection):
        # sqlite-utils begins a deferred transaction of its own, but not where one is open: then it makes savepoints.
        _migrations.apply(_database(connection))
    connection.execute("COMMIT")


def _database(connection: sqlite3.Connection) -> Database:
    return Database(connection, recursive_triggers=False, execute_plugins=False)
