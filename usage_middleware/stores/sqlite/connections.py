"""SQLite connections for a store: opened when needed, lent to one thread at a time, never used across a fork."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from ... import forks
from ...errors import QuotaError, StoreError
from . import reading, sqlite_errors
from .database_file import identity, make_file, use_write_ahead_log
from .group_commit import Disturbed, NoTurn, Turn, Unit, WriteQueue
from .handle import Box, Handle, close_all, open_handle

_MINIMUM_VERSION: Final = (3, 37)  # STRICT tables (sqlite.org/stricttables.html)
_MOST_IDLE: Final = 64  # any further connection is closed when its thread has finished with it
_CHECK_INTERVAL: Final = 1.0  # seconds between two checks by readers that the file is still the same
# Average seconds between two attempts at a lock. If many processes wait, shorter pauses cost more than they gain.
_PAUSE: Final = 0.004

_NOT_READABLE: Final = {
    "none": "has no tables of usage-middleware; it may be another program's",
    "earlier": "has the tables of an earlier version of usage-middleware; open it once for writing",
}

_Result = TypeVar("_Result")


class _Pool:
    """The connections of one process to the file at a path."""

    __slots__ = ("check_at", "epoch", "existed", "file", "idle", "process", "queue")

    def __init__(self) -> None:
        self.process = os.getpid()
        self.idle: Box = []
        self.queue = WriteQueue()
        self.file: tuple[int, int] | None = None  # the file that the connections have open
        self.existed = False
        self.epoch = object()
        self.check_at = 0.0  # time.monotonic()

    def take_back(self, box: Box) -> None:
        """Take the connection back from the box of a call that has finished."""
        if box[0].epoch is self.epoch and len(self.idle) < _MOST_IDLE:
            self.idle.append(box.pop())
        else:
            close_all(box)

    def close(self) -> None:
        """Close the idle connections. A connection that is lent out is closed when it comes back."""
        self.file = None
        self.check_at = 0.0
        self.epoch = object()
        box: Box = []
        try:
            while True:
                box.append(self.idle.pop())
                close_all(box)
        except IndexError:
            pass
        finally:
            close_all(box)


class Connections:
    """The connections to one database file.

    Nothing is opened before the first use, so that a server may construct a store and then fork. Idle connections are
    closed before a fork. A child may still inherit a connection, if another thread used it for long or if C code forked
    without Python. That child gets a :class:`StoreError`; see :mod:`usage_middleware.forks`.

    An exception may arrive anywhere; :mod:`.handle` describes how no connection is left behind. After an unknown
    exception a connection is closed, as its state is unknown.
    """

    def __init__(self, path: str, *, timeout: float, synchronous: str, read_only: bool) -> None:
        self._path = path
        self._timeout = timeout
        self._synchronous = synchronous
        self._read_only = read_only
        self._closed = False
        # Closed when the interpreter exits too, so that SQLite can remove its write-ahead log.
        self._pools = forks.PerProcess(_Pool, _Pool.close)
        forks.close_before_fork(self)

    def read(self, sql: str, parameters: Sequence[Any], work: Callable[[sqlite3.Connection], Any] | None = None) -> Any:
        """Return all rows of a query. All are fetched, as a query under way would keep SQLite from checkpointing.

        :param work: is called in place of the query; see :meth:`look_at_one_moment`.
        """
        pool = self._pools.get()
        box: Box = []
        since = 0.0
        try:
            while True:
                try:
                    self._lend(pool, box)
                    # No variable refers to the handle: with a traceback it would outlive its box.
                    result = (
                        _at_one_moment(box[0].connection, work)
                        if work
                        else box[0].cursor.execute(sql, parameters).fetchall()
                    )
                    if box[0].frozen is None or not reading.has_changed(box[0]):
                        pool.take_back(box)
                        return result
                    close_all(box)
                except sqlite3.Error as error:
                    is_transient = self._is_transient(error, box)
                    close_all(box)
                    since = self._wait(error, since, is_transient=is_transient)
        except BaseException:
            close_all(box)
            raise

    def look_at_one_moment(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Return what ``work`` returns. It only reads, all of one moment, and may be called again."""
        result: _Result = self.read("", (), work)
        return result

    def transact(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Return what ``work`` returns, once its transaction is committed.

        An exception that ``work`` raises, or that arrives before the commit, rolls back. After the commit none does.
        """
        if self._read_only:
            raise StoreError(f"{self._path} was opened read-only")
        if self._closed:
            raise self._is_closed()
        pool = self._pools.get()
        turn = Turn(pool.queue, Unit(work))
        with turn, turn:
            result: _Result = self._transact(pool, turn)
            return result

    # transact() and _transact() have no `try` of their own, and call methods that have: an exception that arrives at
    # the beginning of a `try` is not caught by it.

    def _transact(self, pool: _Pool, turn: Turn) -> Any:
        if not self._take(turn):
            if turn.unit.error is not None:
                raise turn.unit.error
            return turn.unit.result
        self._begin(pool, turn.box)
        result = self._work(pool, turn.box, turn.unit.work)
        committed: list[object] = []
        if pool.queue.waiting and not self._do_others(pool, turn, committed):
            committed = []  # another transaction
            self._begin(pool, turn.box)
            result = self._work(pool, turn.box, turn.unit.work)
        self._commit(pool, turn.box, committed)
        pool.take_back(turn.box)
        return result

    def _take(self, turn: Turn) -> bool:
        try:
            return turn.take(self._timeout)
        except NoTurn:
            raise sqlite_errors.locked(self._path, self._timeout) from None

    def _do_others(self, pool: _Pool, turn: Turn, committed: list[object]) -> bool:
        """Run the units of waiting calls. Return whether the transaction goes on: if not, it was rolled back."""
        try:
            pool.queue.do_others(turn, committed)
        except (Disturbed, sqlite3.Error):
            close_all(turn.box)
            return False
        return True

    def _work(self, pool: _Pool, box: Box, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        try:
            return work(box[0].connection)
        except QuotaError:  # a refusal is an answer, so the connection can be used again
            self._check_process(pool)
            with suppress(sqlite3.Error):
                box[0].connection.rollback()
                pool.take_back(box)
            raise
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def close_idle(self) -> None:
        """Close this process's idle connections. The next use opens one again."""
        pool = self._pools.peek()
        if pool is not None:
            pool.close()

    def close(self) -> None:
        """Close this process's connections. Those lent out are closed when they come back."""
        self._closed = True
        self._pools.close()

    def _is_closed(self) -> StoreError:
        return StoreError(f"the store of {self._path} is closed")

    def _begin(self, pool: _Pool, box: Box) -> None:
        """Put a connection into a box and begin a transaction on it."""
        since = 0.0
        while True:
            is_lent = False
            try:
                self._lend(pool, box, write=True)
                is_lent = True
                self._check_process(pool)  # or the child would have the lock until it exits
                # IMMEDIATE, because a deferred transaction that turns into a write fails at once if another has written
                # meanwhile, whatever the timeout is (sqlite.org/lang_transaction.html, section 2.2).
                box[0].connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.Error as error:
                is_transient = sqlite_errors.is_busy(error)
                if is_lent and is_transient:
                    pool.take_back(box)  # so that a fork need not wait for it
                close_all(box)
                since = self._wait(error, since, is_transient=is_transient)

    def _commit(self, pool: _Pool, box: Box, committed: list[object]) -> None:
        """Commit, and add an entry to ``committed`` in the same step."""
        self._check_process(pool)
        since = 0.0
        while True:
            try:
                committed.extend(map(box[0].connection.execute, ("COMMIT",)))
                return
            except sqlite3.Error as error:
                since = self._wait(error, since, is_transient=sqlite_errors.is_busy(error))

    def _lend(self, pool: _Pool, box: Box, *, write: bool = False) -> None:
        """Put a connection into a box."""
        if self._closed:
            raise self._is_closed()
        if write or time.monotonic() >= pool.check_at:
            self._check_file(pool, box)
        while not box:
            try:
                box.append(pool.idle.pop())
            except IndexError:
                self._open(pool, box)
            else:
                if box[0].epoch is not pool.epoch:  # it came back while another thread closed the pool
                    close_all(box)

    def _check_file(self, pool: _Pool, box: Box) -> None:
        """Make sure that the connections of a pool have the file open that is at the path now.

        A file that is removed or replaced lives on for a process that has it open. What is written there is lost, and
        SQLite does not report it (sqlite.org/howtocorrupt.html, section 2.4).
        """
        self._check_process(pool)
        if pool.file is None or pool.file != identity(self._path):
            pool.close()
            inherited = forks.inherited(Handle)
            if inherited:
                raise StoreError(
                    f"{inherited[0].path} was open when this process was forked, and SQLite cannot be used safely "
                    "here: use the store first after the fork, and fork while no other thread uses it for long"
                )
            self._prepare(pool, box)
        pool.check_at = time.monotonic() + _CHECK_INTERVAL

    def _check_process(self, pool: _Pool) -> None:
        """Make sure that the call began in this process: a call that a child goes on with would be made twice."""
        if pool.process != os.getpid():
            raise StoreError(f"{self._path} was in use when this process was forked; its parent goes on with the call")

    def _prepare(self, pool: _Pool, box: Box) -> None:
        """Put the first connection into a box. Create or upgrade the tables, or check them if it is read-only."""
        if sqlite3.sqlite_version_info < _MINIMUM_VERSION:
            raise StoreError(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
        from . import sqlite_schema  # loads sqlite-utils, which a service that never uses its store does not need

        # A database that existed and was removed is not created again: an operator may be about to restore it.
        if not self._read_only and not pool.existed:
            make_file(self._path)
        file = identity(self._path)
        self._open(pool, box)
        connection = box[0].connection
        try:
            state = sqlite_schema.state(connection)
            if state != "current":
                if self._read_only:
                    raise StoreError(_NOT_READABLE[state])
                use_write_ahead_log(connection)
                sqlite_schema.migrate(connection)
        except StoreError as error:
            if self._read_only and reading.has_changed(box[0]):
                raise sqlite3.OperationalError("database is locked") from error
            raise StoreError(f"{self._path} {error}") from error.__cause__
        pool.existed = True
        pool.file = file

    def _open(self, pool: _Pool, box: Box) -> None:
        try:
            if self._read_only:
                reading.open_reader(box, self._path, epoch=pool.epoch)
            else:
                connection = open_handle(box, self._path, "mode=rw", epoch=pool.epoch)
                connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        except OSError as error:
            raise self._explained(error) from error

    def _is_transient(self, error: sqlite3.Error, box: Box) -> bool:
        """Return whether another attempt may succeed."""
        is_wrong = self._read_only and bool(box) and reading.is_wrong(box[0], error)
        return is_wrong or sqlite_errors.is_busy(error)

    def _wait(self, error: sqlite3.Error, since: float, *, is_transient: bool) -> float:
        """Pause until the next attempt. Return the time at which the first one failed.

        SQLite's own busy handler asks less often the longer it waits, down to ten times a second. So newcomers go
        first, and with many writers some wait for seconds. Here all writers ask equally often, so each has the same
        chance whenever the lock is free.

        :raises StoreError: another attempt would not help, or the time is up.
        """
        if not is_transient:
            raise self._explained(error) from error
        now = time.monotonic()
        since = since or now
        if now - since >= self._timeout:
            is_busy = sqlite_errors.is_busy(error)
            raise (sqlite_errors.locked(self._path, self._timeout) if is_busy else self._explained(error)) from error
        time.sleep(_PAUSE * random.uniform(0.5, 1.5))
        return since

    def _explained(self, error: Exception) -> StoreError:
        pool = self._pools.peek()
        intent: sqlite_errors.Intent = "write" if pool is not None and pool.existed else "make"
        return sqlite_errors.explained(self._path, error, "read" if self._read_only else intent)


def _at_one_moment(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
    # Within a transaction, SQLite reads one state of the database (sqlite.org/isolation.html).
    connection.execute("BEGIN")
    result = work(connection)
    connection.execute("COMMIT")
    return result
