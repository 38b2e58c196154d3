"""SQLite connections for a store: opened when they are needed, lent to one thread at a time, never used over a fork."""

from __future__ import annotations

import os
import random
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import StoreError

_MINIMUM_VERSION: Final = (3, 37)  # STRICT tables (sqlite.org/stricttables.html)
_MOST_IDLE: Final = 32  # a connection more than these is closed when its thread is done with it
# Seconds between two attempts at a lock: about what a durable transaction takes.
_LONGEST_PAUSE: Final = 0.004
_SHORTEST_PAUSE: Final = 0.0005

_Result = TypeVar("_Result")


class Connections:
    """The connections to one database file.

    Nothing is opened before the first use, so that a server may construct a store and then fork. SQLite forbids to
    carry a connection over a fork (sqlite.org/howtocorrupt.html, section 2.6), even to close it. So each process has
    idle connections of its own, told apart by the process id: that holds where C code forks behind Python's back.
    """

    def __init__(self, path: str, *, timeout: float, synchronous: str, read_only: bool) -> None:
        self._path = path
        self._timeout = timeout
        self._synchronous = synchronous
        self._read_only = read_only
        self._closed = False
        self._idle: dict[int, list[sqlite3.Connection]] = {}
        # It runs at the exit of the interpreter too, so that SQLite can take its write-ahead log away.
        weakref.finalize(self, _finish, self._idle)

    def read(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        """All rows of a query. No cursor stays open, which would keep SQLite from checkpointing."""
        connection, idle = self._acquire()
        try:
            rows = self._patiently(lambda: connection.execute(sql, parameters).fetchall())
        except sqlite3.Error as error:
            connection.close()
            raise self._explained(error) from error
        except BaseException:
            connection.close()
            raise
        self._release(connection, idle)
        return rows

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction: committed at the end, undone by an exception."""
        if self._read_only:
            raise StoreError(f"{self._path} was opened read-only")
        connection, idle = self._acquire()
        try:
            # IMMEDIATE, as a deferred transaction that turns into a write fails at once where somebody else has
            # written meanwhile, however long one waits (sqlite.org/lang_transaction.html, section 2.2).
            self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            yield connection
            self._patiently(lambda: connection.execute("COMMIT"))
        except sqlite3.Error as error:
            connection.close()  # which rolls back
            raise self._explained(error) from error
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            self._release(connection, idle)
            raise
        self._release(connection, idle)

    def close(self) -> None:
        """Closes this process's connections; those lent out follow as they come back."""
        self._closed = True
        _finish(self._idle)

    def _acquire(self) -> tuple[sqlite3.Connection, list[sqlite3.Connection]]:
        """A connection, and the list to which it goes back."""
        if self._closed:
            raise StoreError(f"the store of {self._path} is closed")
        idle = self._idle.get(os.getpid())
        try:
            if idle is None:
                # Several threads may come here at once: the later ones find nothing left to prepare.
                connection = self._patiently(self._prepare)
                return connection, self._idle.setdefault(os.getpid(), [])
            try:
                return idle.pop(), idle
            except IndexError:
                return self._patiently(lambda: self._open("ro" if self._read_only else "rw")), idle
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _release(self, connection: sqlite3.Connection, idle: list[sqlite3.Connection]) -> None:
        if len(idle) >= _MOST_IDLE or connection.in_transaction or self._closed:
            connection.close()
        else:
            idle.append(connection)

    def _open(self, mode: str) -> sqlite3.Connection:
        """Opens a connection in an SQLite URI's ``mode``. Only ``rwc`` makes a file that is not there."""
        connection = sqlite3.connect(
            f"{Path(self._path).as_uri()}?mode={mode}",
            uri=True,
            timeout=0,  # _patiently waits instead
            isolation_level=None,  # transactions begin where this package begins them
            check_same_thread=False,  # lent to one thread at a time
        )
        try:
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self) -> sqlite3.Connection:
        """The first connection of a process, to a database whose tables are there."""
        if sqlite3.sqlite_version_info < _MINIMUM_VERSION:
            raise StoreError(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
        from . import sqlite_schema  # loads sqlite-utils, which a service that only passes through does without

        connection = self._open("ro" if self._read_only else "rwc")
        try:
            if not sqlite_schema.is_current(connection):
                if self._read_only:
                    raise StoreError("has not all tables of this version; open it once for writing")
                _use_write_ahead_log(connection)
                sqlite_schema.migrate(connection)
        except StoreError as error:
            connection.close()
            raise StoreError(f"{self._path} {error}") from error.__cause__
        except BaseException:
            connection.close()
            raise
        return connection

    def _patiently(self, action: Callable[[], _Result]) -> _Result:
        """Repeats what another process's lock keeps from being done, until the timeout.

        SQLite's own busy handler asks the less often the longer it waits, up to ten times a second, and so lets
        newcomers go first: with many writers, some wait for seconds. Here who waits longest asks most often.
        """
        begun = None
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                now = time.monotonic()
                begun = begun or now
                if now - begun >= self._timeout:
                    raise
            time.sleep(max(_LONGEST_PAUSE / (1 + 10 * (now - begun)), _SHORTEST_PAUSE) * random.uniform(0.5, 1.5))

    def _explained(self, error: sqlite3.Error) -> StoreError:
        """What the operator needs to know of an error. SQLite's texts hold names of tables and columns, no values."""
        text = str(error)
        if "locked" in text:
            reason = f"is locked: another process held it for longer than the timeout of {self._timeout:g} s"
        elif "not a database" in text:
            reason = "is not an SQLite database"
        elif "unable to open" in text:
            reason = f"cannot be opened: {_why_not_openable(Path(self._path), self._read_only)}"
        elif "readonly" in text:
            reason = "cannot be written: the file or its folder is read-only"
        else:
            reason = f"failed: {text}"
        return StoreError(f"{self._path} {reason}")


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switches the file to WAL, which lasts: readers and the writer do not wait for each other then."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"cannot have a write-ahead log (journal mode is {mode!r}); use a local file system")


def _why_not_openable(path: Path, read_only: bool) -> str:
    if path.is_dir():
        return "it is a directory"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    if read_only and not path.exists():
        return "there is no such file"
    return "this process may not read and write the file and its folder"


def _finish(idle: dict[int, list[sqlite3.Connection]]) -> None:
    """Closes the connections of this process, and gives up those inherited over a fork without closing them."""
    for connection in idle.pop(os.getpid(), []):
        connection.close()
    inherited = [connection for connections in idle.values() for connection in connections]
    if inherited:
        import ctypes

        for connection in inherited:
            # An object that is freed closes its connection. One reference that nobody gives back keeps it from that.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
