"""A database with many tokens, which are inserted directly into a store's tables, faster than the store would do it."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from usage_middleware import SQLiteTokenStore

_CHUNK = 100_000  # tokens in a transaction
_INSERT = """
    INSERT INTO tokens (digest, hint, name, total_available, total_used, unlimited_quota,
                        model_limits, model_limits_enabled, expires_at, enabled, created_at)
    VALUES (?, ?, ?, 987655, 12345, 0, '{}', 0, 0, 1, 1700000000)
"""


@contextmanager
def filled_database(count: int) -> Iterator[Path]:
    """Yield a temporary database with the tokens of the first ``count`` keys."""
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        path = Path(directory, "tokens.db")
        with SQLiteTokenStore(path) as store:
            store.create(name="not one of those that are asked for")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(
                "PRAGMA cache_size = -500000"
            )  # digests come in random order, so each page is needed often
            for start in range(0, count, _CHUNK):
                end = min(start + _CHUNK, count)
                connection.execute("BEGIN")
                connection.executemany(_INSERT, map(_values, range(start, end)))
                connection.execute("COMMIT")
                if end % 1_000_000 == 0:
                    click.echo(f"{end:,} of {count:,} tokens are in the database", err=True)
            # Readers should find the tokens in the database, not in its write-ahead log.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield path


def key(number: int) -> str:
    """Return a key of 48 characters, without the prefix. It is computed, so ten million of them need no memory."""
    return hashlib.sha384(b"%d" % number).hexdigest()[:48]


def random_keys(count: int) -> Callable[[], str]:
    """Return a function that returns one of the first ``count`` keys, in an order that is the same in every run."""
    numbers = random.Random(count)
    return lambda: key(numbers.randrange(count))


def _values(number: int) -> tuple[bytes, str, str]:
    written = key(number)
    return hashlib.sha256(written.encode()).digest(), written[-4:], f"Token {number}"
