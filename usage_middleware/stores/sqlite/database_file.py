"""The file of a database: made, told from another of its name, and given a write-ahead log."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import suppress
from typing import Final

from ...errors import StoreError

_NEW_FILE: Final = stat.S_IFREG | 0o660


def make_file(path: str) -> None:
    """Make an empty file that others cannot read, if there is none. SQLite gives ``-wal`` and ``-shm`` its mode."""
    target = os.path.realpath(path)
    with suppress(OSError):  # the file exists, or SQLite will report why it cannot be made
        try:
            # mknod opens nothing. Closing a file would release the locks that another thread has on it by then.
            os.mknod(target, _NEW_FILE)
        except (AttributeError, PermissionError):  # on some systems only the administrator may call mknod
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IMODE(_NEW_FILE)))


def use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL for good. In WAL mode, readers and the writer do not wait for each other."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"cannot have a write-ahead log (journal mode is {mode!r}); use a local file system")


def identity(path: str) -> tuple[int, int] | None:
    """Return what distinguishes a file from a later one of the same name."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
