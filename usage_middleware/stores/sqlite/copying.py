"""A temporary copy of an SQLite database, which the caller may change."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager

from . import reading, sqlite_errors


@contextmanager
def temporary_copy(path: str) -> Iterator[str]:
    """Yield the path of a copy of the database. No other user can read the copy, and it is removed at the end.

    The database is read as one of another program. No file beside it changes, and one that is in use is copied as a
    consistent whole.

    :raises StoreError: it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        target = os.path.join(directory, os.path.basename(path))

        def copy(source: sqlite3.Connection) -> None:
            with closing(sqlite3.connect(target)) as connection:
                source.backup(connection)

        try:
            reading.look(path, copy)
        except sqlite3.Error as error:
            raise sqlite_errors.explained(path, error, "read") from error
        yield target
