"""SQLite connections for a store: opened when they are needed, lent to one thread at a time, never used over a fork."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from ...errors import StoreError

_MINIMUM_VERSION: Final = (3, 37)  # STRICT tables (sqlite.org/stricttables.html)
_MOST_IDLE: Final = 64  # a connection more than these is closed when its thread is done with it
_CHECK_INTERVAL: Final = 1.0  # seconds in which readers do not look whether the file is still the same
# Seconds between two attempts at a lock, on the average. Shorter ones cost more, with many who wait, than they gain.
_PAUSE: Final = 0.004

_Result = TypeVar("_Result")


class _Pool:
    """The connections of one process to one file."""

    __slots__ = ("check_at", "closed", "file", "idle", "open", "writing")

    def __init__(self, file: tuple[int, int] | None) -> None:
        self.idle: list[sqlite3.Connection] = []
        self.open: set[sqlite3.Connection] = set()  # those that are lent out, too
        # Threads of one process wait here for each other, so that only one of them asks SQLite again and again.
        self.writing = threading.Lock()
        self.file = file
        self.check_at = time.monotonic() + _CHECK_INTERVAL
        self.closed = False

    def close(self) -> None:
        """Closes what is idle; a connection that is lent out is closed when it comes back."""
        self.closed = True
        self.file = None
        self.check_at = 0.0
        while self.idle:
            self.discard(self.idle.pop())

    def discard(self, connection: sqlite3.Connection) -> None:
        """Closes a connection that does not come back."""
        connection.close()
        self.open.discard(connection)


class Connections:
    """The connections to one database file.

    Nothing is opened before the first use, so that a server may construct a store and then fork. SQLite forbids to
    carry a connection over a fork (sqlite.org/howtocorrupt.html, section 2.6), even to close it, and more: its record
    of the locks that a process has on a file lies in the process's memory, and a child that inherits it takes none of
    its own, so that others undo what it writes. So idle connections are closed before a fork. Where one was open all
    the same, in use by another thread or at a fork that Python was not told of, the child is refused: each process
    has a pool of its own, told apart by the process id.
    """

    def __init__(self, path: str, *, timeout: float, synchronous: str, read_only: bool) -> None:
        self._path = path
        self._timeout = timeout
        self._synchronous = synchronous
        self._read_only = read_only
        self._closed = False
        # Both by process id. A lock that some thread holds at a fork is nobody's in the child.
        self._pools: dict[int, _Pool] = {}
        self._locks: dict[int, threading.Lock] = {}
        _all_connections.add(self)
        # It runs at the exit of the interpreter too, so that SQLite can take its write-ahead log away.
        weakref.finalize(self, _finish, self._pools)

    def read(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        """All rows of a query. No cursor stays open, which would keep SQLite from checkpointing."""
        connection, pool = self._acquire()
        try:
            rows = self._patiently(lambda: connection.execute(sql, parameters).fetchall())
        except sqlite3.Error as error:
            pool.discard(connection)
            raise self._explained(error) from error
        except BaseException:
            pool.discard(connection)
            raise
        self._release(connection, pool)
        return rows

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction: committed at the end, undone by an exception."""
        if self._read_only:
            raise StoreError(f"{self._path} was opened read-only")
        connection, pool = self._acquire(write=True)
        if not pool.writing.acquire(timeout=self._timeout):
            self._release(connection, pool)
            raise self._locked()
        try:
            # IMMEDIATE, as a deferred transaction that turns into a write fails at once where somebody else has
            # written meanwhile, however long one waits (sqlite.org/lang_transaction.html, section 2.2).
            self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            yield connection
            self._patiently(lambda: connection.execute("COMMIT"))
        except sqlite3.Error as error:
            pool.discard(connection)  # closing rolls back
            raise self._explained(error) from error
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            self._release(connection, pool)
            raise
        finally:
            pool.writing.release()
        self._release(connection, pool)

    def close_idle(self) -> None:
        """Closes what this process has idle; the next use opens anew."""
        pool = self._pools.get(os.getpid())
        if pool is not None:
            pool.close()

    def close(self) -> None:
        """Closes this process's connections; those lent out follow as they come back."""
        self._closed = True
        _finish(self._pools)

    def _acquire(self, *, write: bool = False) -> tuple[sqlite3.Connection, _Pool]:
        """A connection, and the pool to which it goes back."""
        if self._closed:
            raise StoreError(f"the store of {self._path} is closed")
        pool = self._pools.get(os.getpid())
        try:
            if pool is None or write or time.monotonic() >= pool.check_at:
                pool = self._checked(pool)
            try:
                return pool.idle.pop(), pool
            except IndexError:
                connection = self._patiently(lambda: self._open("ro" if self._read_only else "rw"))
                pool.open.add(connection)
                return connection, pool
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _checked(self, pool: _Pool | None) -> _Pool:
        """A pool of connections to the file that is at the path now: ``pool`` itself, where that is still so.

        A file that is removed or replaced lives on for who has it open. What is written there is lost, and SQLite
        does not tell (sqlite.org/howtocorrupt.html, section 2.4).
        """
        if pool is not None and pool.file is not None and pool.file == _identity(self._path):
            pool.check_at = time.monotonic() + _CHECK_INTERVAL
            return pool
        if pool is not None:
            pool.close()
        elif any(inherited.open for inherited in self._pools.values()):
            raise StoreError(
                f"{self._path} was open when this process was forked, and SQLite cannot be used safely here: "
                "use the store first after the fork, and fork while no other thread uses it"
            )
        # A database that was there is not made anew: somebody is about to put it back.
        connection = self._patiently(lambda: self._prepare(create=pool is None))
        new = _Pool(_identity(self._path))
        # Several threads may come here at once; the first one's pool is that of all.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            current = self._pools.get(os.getpid())
            if current is pool or current is None:
                current = self._pools[os.getpid()] = new
        current.open.add(connection)
        self._release(connection, current)
        return current

    def _release(self, connection: sqlite3.Connection, pool: _Pool) -> None:
        if len(pool.idle) >= _MOST_IDLE or connection.in_transaction or pool.closed:
            pool.discard(connection)
        else:
            pool.idle.append(connection)

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

    def _prepare(self, *, create: bool) -> sqlite3.Connection:
        """The first connection of a pool, to a database whose tables are there."""
        if sqlite3.sqlite_version_info < _MINIMUM_VERSION:
            raise StoreError(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
        from . import sqlite_schema  # loads sqlite-utils, which a service that only passes through does without

        connection = self._open("ro" if self._read_only else "rwc" if create else "rw")
        try:
            connection.execute("BEGIN")
            current = sqlite_schema.is_current(connection)
            connection.execute("ROLLBACK")
            if not current:
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

        SQLite's own busy handler asks the less often the longer it waits, down to ten times a second, and so lets
        newcomers go first: with many writers, some wait for seconds. Here all ask equally often, so that each time
        the lock is free everybody has the same chance.
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
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))

    def _explained(self, error: sqlite3.Error) -> StoreError:
        """What the operator needs to know of an error. SQLite's texts hold no keys and no digests."""
        text = str(error)
        if "locked" in text:
            return self._locked()
        if "not a database" in text:
            reason = "is not an SQLite database"
        elif "unable to open" in text:
            reason = f"cannot be opened: {self._why_not_openable()}"
        elif "readonly" in text:
            reason = "cannot be written: the file or its folder is read-only"
        else:
            reason = f"failed: {text}"
        return StoreError(f"{self._path} {reason}")

    def _locked(self) -> StoreError:
        return StoreError(f"{self._path} is locked: others held it for longer than the timeout of {self._timeout:g} s")

    def _why_not_openable(self) -> str:
        folder = os.path.dirname(self._path)
        if os.path.isdir(self._path):
            return "it is a directory"
        if not os.path.isdir(folder):
            return f"there is no directory {folder}"
        if not os.path.exists(self._path) and (self._read_only or os.getpid() in self._pools):
            return "there is no such file"
        return "this process may not read and write the file and its folder"


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switches the file to WAL, which lasts: readers and the writer do not wait for each other then."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"cannot have a write-ahead log (journal mode is {mode!r}); use a local file system")


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another that has its name later."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


_all_connections: weakref.WeakSet[Connections] = weakref.WeakSet()


def _before_fork() -> None:
    for connections in list(_all_connections):
        connections.close_idle()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(before=_before_fork)


def _finish(pools: dict[int, _Pool]) -> None:
    """Closes the connections of this process, and gives up those inherited over a fork without closing them."""
    own = pools.pop(os.getpid(), None)
    if own is not None:
        own.close()
    inherited = [connection for pool in pools.values() for connection in pool.open]
    if inherited:
        import ctypes

        for connection in inherited:
            # An object that is freed closes its connection. One reference that nobody gives back keeps it from that.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
