"""Read an SQLite database that another program may own, without changing its file or its directory.

``mode=ro`` alone is not enough. If a database is in WAL mode and no program has it open, even a reader creates the
files ``-wal`` and ``-shm`` beside it, and leaves them there (sqlite.org/wal.html, "Read-Only Databases"). They belong
to the reader then, and a program that runs as another user can no longer write to its own database.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

from ... import forks
from ...errors import StoreError
from .handle import Box, Handle, close_all, open_handle
from .shared_lock import SharedLock, is_wal

_Result = TypeVar("_Result")

_TIMEOUT: Final = 5.0  # seconds within which a writer should have finished its commit

# The most seconds for which a program that opens or closes a database has a log without its index.
_TRANSITION: Final = 1.0
_PAUSE: Final = 0.001  # seconds between two attempts
# The most seconds between two times that a kernel gives to files: a tick of its clock (Linux before 6.13). A file
# system may have coarser ones: some only whole seconds, FAT two of them.
_TICK: Final = 0.02
_COARSE_TICK: Final = 2.0

# Options of an SQLite URI (sqlite.org/uri.html).
_LIVE: Final = "mode=ro"
# SQLite takes no lock on an immutable file and looks for no files beside it. The file is not really immutable. But as
# long as there is no log, no program writes, and has_changed() notices a log that appears later.
_FROZEN: Final = "mode=ro&immutable=1"

_COLUMNS: Final = (
    "SELECT columns.name FROM sqlite_master, pragma_table_info(sqlite_master.name) AS columns"
    " WHERE sqlite_master.type = 'table' AND lower(sqlite_master.name) = lower(?)"
)


def open_reader(box: Box, path: str, *, timeout: float = 0.0, epoch: object = None) -> sqlite3.Connection:
    """Open the database at ``path`` into a box, to read it. Never create a file.

    :raises OSError: the file cannot be read.
    :raises StoreError: only a program that may write can read it.
    :raises sqlite3.Error: it cannot be opened. Many faults show only at the first read.
    """
    file = os.path.realpath(path)  # SQLite looks for the log beside the file that a symbolic link leads to
    deadline = time.monotonic() + _TRANSITION
    while True:
        frozen = _frozen_state(file)
        if frozen is not None:
            _wait_until_old(frozen)
            return open_handle(box, file, _FROZEN, timeout=timeout, epoch=epoch, frozen=frozen)
        if not is_wal(file):
            return open_handle(box, file, _LIVE, timeout=timeout, epoch=epoch)
        lock = SharedLock(file)
        with lock, lock:
            is_held = lock.take()
            if is_held and os.path.exists(f"{file}-wal") and os.path.exists(f"{file}-shm"):
                connection = open_handle(box, file, _LIVE, timeout=timeout, epoch=epoch)
                # From its first statement on, SQLite holds a lock of its own.
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
                return connection
        if time.monotonic() >= deadline:
            if not is_held:
                raise sqlite3.OperationalError("database is locked")
            raise StoreError(
                f"{path} has a write-ahead log ({os.path.basename(file)}-wal) without its index (-shm), as after a "
                "crash or a copy; open it once for writing"
            )
        time.sleep(_PAUSE)


def has_changed(reader: Handle) -> bool:
    """Return whether another program has written since the reader was opened, and no lock prevented that.

    If so, what was read may be wrong. Open the file and read it again.
    """
    try:
        return reader.frozen is not None and reader.frozen != _frozen_state(reader.path)
    except OSError:  # the file was taken away
        return True


def is_wrong(reader: Handle, error: Exception) -> bool:
    """Return whether an error may only mean that another program wrote, opened or closed the database meanwhile."""
    if reader.frozen is not None:
        # A file that is half old and half new may look damaged.
        return has_changed(reader)
    if "unable to open" in str(error):
        return _may_read(f"{reader.path}-wal") and _may_read(f"{reader.path}-shm")
    # In WAL mode, another program is making the index of the log. In other modes a journal was left behind, and stays
    # until a program writes.
    return "readonly" in str(error) and _was_wal(reader.path)


def _was_wal(path: str) -> bool:
    try:
        return is_wal(path)
    except OSError:  # the file was taken away
        return True


def _may_read(file: str) -> bool:
    """Return whether this process may read a file, or the file does not exist. It may appear or vanish meanwhile."""
    return any(os.access(file, os.R_OK) or not os.path.exists(file) for _ in range(5))


def look(path: str, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
    """Return what ``work`` reads in the database of another program. ``work`` may be called more than once.

    :raises StoreError: the file cannot be opened.
    """
    if forks.inherited(Handle):
        raise StoreError(f"{path} cannot be read: an SQLite database was in use when this process was forked")
    box: Box = []
    deadline = time.monotonic() + _TIMEOUT
    try:
        while True:
            try:
                connection = open_reader(box, path, timeout=_TIMEOUT)
                # Decode leniently, so that one name that is not UTF-8 does not fail the whole query.
                connection.text_factory = _decode
                result = work(connection)
                if not has_changed(box[0]):
                    close_all(box)
                    return result
            except FileNotFoundError:
                raise StoreError(f"there is no file {path}") from None
            except OSError as error:
                raise StoreError(f"{path} cannot be opened: {error.strerror}") from None
            except Exception as error:
                if not box or time.monotonic() >= deadline or not is_wrong(box[0], error):
                    raise
            close_all(box)
    except BaseException:
        close_all(box)
        raise


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _frozen_state(path: str) -> tuple[int, int, int, int] | None:
    """Return a value that changes when the database is written, or ``None`` if a reader needs locks.

    A reader needs no locks if the database is in WAL mode and no program has it open. A program that writes has a log
    as long as it has the database open, and changes the file before it removes the log.
    """
    status = os.stat(path)
    if os.path.exists(f"{path}-wal") or not is_wal(path):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _wait_until_old(frozen: tuple[int, int, int, int]) -> None:
    """Wait until a file that is changed now would get another time than the one it has."""
    changed = frozen[-1] / 1e9
    age = time.time() - changed
    tick = _COARSE_TICK if changed.is_integer() else _TICK
    if 0 <= age < tick:
        time.sleep(tick - age)


def columns(path: str, table: str) -> set[str]:
    """Return the names of a table's columns: none if there is no such table, or ``path`` is not a database.

    A view is not a table: reading a view may take forever.

    :raises StoreError: the file cannot be opened.
    """
    try:
        rows = look(path, lambda connection: connection.execute(_COLUMNS, (table,)).fetchall())
    except sqlite3.Error as error:
        if "not a database" in str(error):
            return set()
        raise StoreError(f"{path} failed: {error}") from error
    return {name for (name,) in rows}
