"""The file of a database: create it, switch it to WAL mode, and tell it from a later file of the same name."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import suppress
from typing import Final

from ...errors import StoreError

_NEW_FILE: Final = stat.S_IFREG | 0o660


def make_file(path: str) -> None:
    """Create an empty file that other users cannot read, unless there is one.

    SQLite gives ``-wal`` and ``-shm`` the mode of this file.
    """
    target = os.path.realpath(path)
    with suppress(OSError):  # the file exists, or SQLite will report why it cannot be created
        try:
            # mknod does not open the file. Closing it would release the locks that another thread may have by then.
            os.mknod(target, _NEW_FILE)
        except (AttributeError, PermissionError):  # on some systems only the administrator may call mknod
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IMODE(_NEW_FILE)))


def use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL mode, which it keeps. In WAL mode, readers and the writer do not wait for each other."""
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
