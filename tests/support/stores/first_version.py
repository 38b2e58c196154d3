"""A database of the first version of this package. It must not change, as such databases exist."""

import sqlite3
from contextlib import closing

from usage_middleware.keys import key_digest

KEY = "the-first-key"

# A token with a charge and an open reservation.
SQLITE = """
CREATE TABLE "_sqlite_migrations" ("id" INTEGER PRIMARY KEY, "migration_set" TEXT, "name" TEXT, "applied_at" TEXT);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name" ON "_sqlite_migrations" ("migration_set", "name");
INSERT INTO "_sqlite_migrations" VALUES (1, 'usage_middleware', 'tokens', '2026-11-23 00:47:26.044889+00:00');
INSERT INTO "_sqlite_migrations" VALUES (2, 'usage_middleware', 'operations', '2026-11-23 00:47:26.045473+00:00');
CREATE TABLE model_usage (
    token_id INTEGER NOT NULL,
    model TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (token_id, model)
) STRICT, WITHOUT ROWID;
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
) STRICT;
CREATE INDEX operations_of_token ON operations (token_id, number);
CREATE INDEX open_reservations ON operations (token_id, expires_at) WHERE final_amount IS NULL AND held > 0;
CREATE TABLE retired_keys (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
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
) STRICT;
INSERT INTO tokens VALUES (
    7, X'52C9B5F8E20E7EC3F2B8E5C7BF3EF72D1B1F4A1A0A9A1C1B5C9E3C0B2E8C5F11',
    '-key', 'First', 90, 10, 0, '{"gpt-4o":true}', 1, 4102444800, 1, 1700000000
);
INSERT INTO operations VALUES (1, 'mine', 7, 'charge', 6, 'gpt-4o', 6, 0, NULL, NULL, 6, NULL, 1.7e9, 1.7e9);
INSERT INTO operations VALUES (2, 'open', 7, 'reserve', 4, NULL, 4, 0, 600.0, 9e9, NULL, NULL, 1.7e9, 1.7e9);
INSERT INTO model_usage VALUES (7, 'gpt-4o', 6);
PRAGMA journal_mode = WAL;
"""


def make_first_version(path):
    """Make an SQLite database of the first version, whose token has the key ``KEY``."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SQLITE)
        connection.execute("UPDATE tokens SET digest = ?", (key_digest(KEY),))
        connection.commit()
