"""A database of the first version of this package, with a single token."""

import sqlite3
from contextlib import closing

from places import ROOT

from usage_middleware.keys import key_digest

KEY = "the-first-key"

# Its tables, and what test_first_version.py has in them.
TABLES = ROOT / "tests/stores/first_version/sqlite.sql"

# A token with a charge and an open reservation.
ROWS = """
INSERT INTO tokens VALUES (
    7, X'52C9B5F8E20E7EC3F2B8E5C7BF3EF72D1B1F4A1A0A9A1C1B5C9E3C0B2E8C5F11',
    '-key', 'First', 90, 10, 0, '{"gpt-4o":true}', 1, 4102444800, 1, 1700000000
);
INSERT INTO operations VALUES (1, 'mine', 7, 'charge', 6, 'gpt-4o', 6, 0, NULL, NULL, 6, NULL, 1.7e9, 1.7e9);
INSERT INTO operations VALUES (2, 'open', 7, 'reserve', 4, NULL, 4, 0, 600.0, 9e9, NULL, NULL, 1.7e9, 1.7e9);
INSERT INTO model_usage VALUES (7, 'gpt-4o', 6);
"""


def make_first_version(path):
    """Make an SQLite database of the first version, whose token has the key ``KEY``."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES.read_text(encoding="utf-8"))
        for table in ("tokens", "operations", "model_usage", "retired_keys", "sqlite_sequence"):
            connection.execute(f"DELETE FROM {table}")
        connection.commit()
        connection.executescript(ROWS)
        connection.execute("UPDATE tokens SET digest = ?", (key_digest(KEY),))
        connection.commit()
        connection.execute("PRAGMA journal_mode = WAL")
