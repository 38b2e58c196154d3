"""Whose turn it is to write, and what it writes for others.

A durable transaction waits for the disk, and threads wait for each other. So the call that has the write lock also does
the work of those that wait for it, each in a savepoint of its own, and commits all at once. Each gets its own answer.

It stays exact wherever an exception arrives. Who does a unit of work is decided by the first entry of its ``claims``.
Whether it was committed is decided by ``committed``, for all units of a transaction at once. C functions add to both.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import starmap
from typing import Any, Final

from ...errors import QuotaError, UsageMiddlewareError
from .handle import Box, close_all

_LOOK_INTERVAL: Final = 0.1  # seconds after which a thread that waits looks for itself, if nothing has woken it
_MOST_TOGETHER: Final = 64
_LONGEST: Final = 0.02  # seconds after which a transaction takes no more work in: another process may wait for it

# What a call's work raises for reasons of its own. Anything else was meant for the thread that happens to do it.
_OF_THE_WORK: Final = (sqlite3.Error, UsageMiddlewareError, ValueError, TypeError, ArithmeticError, LookupError)


class NoTurn(Exception):
    """The time is up, and no thread will do the unit; or this is a child, in which there is no other thread."""


class Disturbed(Exception):
    """The work of another call has failed, and the transaction with it. Each call does its work by itself then."""


class Unit:
    """The work of one call, for whichever thread does it."""

    __slots__ = ("claims", "committed", "error", "result", "wake", "work")

    wake: threading.Lock  # made when it has to wait

    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.work = work
        #: Who may do it: the call itself, which may also have given up, or a transaction. Each is known by a list.
        self.claims: list[object] = []
        #: That of the transaction in which it was done. It is not empty once that transaction is committed.
        self.committed: Sequence[object] = ()
        self.result: Any = None
        self.error: QuotaError | None = None

    def wake_up(self) -> None:
        with suppress(RuntimeError):  # it was woken already
            self.wake.release()


class WriteQueue:
    """The write lock of a process, and the units of the calls that wait for it."""

    __slots__ = ("lock", "owner", "waiting")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: tuple[weakref.ref[Turn], list[object]] | None = None
        self.waiting: deque[Unit] = deque()

    def do_others(self, turn: Turn, committed: list[object]) -> None:
        """Do the work of those that wait, in the transaction of the owner of the lock.

        :raises Disturbed, sqlite3.Error: the transaction cannot be committed.
        """
        deadline = time.monotonic() + _LONGEST
        for unit in list(self.waiting):
            if len(turn.others) == _MOST_TOGETHER or time.monotonic() > deadline:
                return
            if not unit.claims:
                unit.claims.append(committed)
                if unit.claims[0] is committed:
                    turn.others.append(unit)
                    _do(unit, turn.box[0].connection)
                    unit.committed = committed

    def leave(self, turn: Turn) -> None:
        """Wake up the calls whose work a turn has done, and the one that is next."""
        if self.waiting:
            with suppress(ValueError):
                self.waiting.remove(turn.unit)
            # Now, because a thread that has found the lock taken has added its unit before.
            following = [unit for unit in list(self.waiting) if not unit.committed]
            for unit in turn.others + following[:1]:
                unit.wake_up()

    def free_if_abandoned(self) -> None:
        """Release the lock if several exceptions at once have kept its owner from it. The owner is gone then."""
        owner = self.owner
        if owner is not None and owner[0]() is None:
            heir = object()
            owner[1].append(heir)
            if owner[1][0] is heir:
                self.lock.release()


def _do(unit: Unit, connection: sqlite3.Connection) -> None:
    connection.execute("SAVEPOINT unit")
    try:
        unit.result = unit.work(connection)
    except QuotaError as error:
        unit.error = error.with_traceback(None)
        connection.execute("ROLLBACK TO unit")
    except _OF_THE_WORK as error:
        raise Disturbed from error
    connection.execute("RELEASE unit")


class Turn:
    """One call's turn to write: its unit of work, and the box for the connection that it writes with.

    Whatever happens, at its end the box is empty, the lock is free, and no other thread is doing its work or will.

    It is entered twice, ``with turn, turn:``. An exception may arrive before the inner ``with`` has finished its end;
    then the outer one does it. Ending twice is fine.
    """

    __slots__ = ("__weakref__", "_acquired", "_process", "_queue", "_released", "box", "others", "unit")

    def __init__(self, queue: WriteQueue, unit: Unit) -> None:
        self.box: Box = []
        self.unit = unit
        #: Those of other calls. They are woken up at the end, whatever has become of them.
        self.others: list[Unit] = []
        self._queue = queue
        self._process = os.getpid()
        # What acquire() and release() returned. A C function calls them and stores the result, so no Python step lies
        # between taking the lock and recording that.
        self._acquired: list[bool] = []
        self._released: list[object] = []  # gevent's release() returns a number

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def take(self, timeout: float) -> bool:
        """Wait until this turn has the lock, or its unit is committed. Return whether the unit has yet to be done.

        :raises NoTurn: neither happened in time.
        """
        if self._acquire():
            return True
        self.unit.wake = threading.Lock()
        self.unit.wake.acquire()
        self._queue.waiting.append(self.unit)
        deadline = time.monotonic() + timeout
        while not self.unit.committed and not self._acquire():
            left = deadline - time.monotonic()
            if left <= 0:
                if self._give_up():
                    raise NoTurn
                left = math.inf  # it is being done
            self._wait(left)
        return not self.unit.committed

    def end(self) -> None:
        """Close the connection if it was not returned, which rolls back its transaction, and release the lock."""
        if not self._give_up() and self._acquired[-1:] == [False]:
            # Another thread does it, or has done it. When this returns, it is known whether it was committed.
            while not self.unit.committed and not self._acquire():
                self._wait(math.inf)
        close_all(self.box)
        if self._acquired[-1:] == [True] and not self._released:
            self._queue.owner = None
            self._released.extend(starmap(self._queue.lock.release, ((),)))
        self._queue.leave(self)

    def _wait(self, seconds: float) -> None:
        if self._process != os.getpid():
            raise NoTurn  # the thread that does it is the parent's
        self.unit.wake.acquire(True, min(seconds, _LOOK_INTERVAL))
        self._queue.free_if_abandoned()

    def _acquire(self) -> bool:
        self._acquired.extend(map(self._queue.lock.acquire, (False,)))
        if self._acquired[-1]:
            self._queue.owner = weakref.ref(self), []
            # If a transaction has claimed the unit, it was not committed, or it will never be.
            self.unit.claims.append(self._acquired)
        return self._acquired[-1]

    def _give_up(self) -> bool:
        """Return whether no other thread will do the unit."""
        self.unit.claims.append(self._acquired)
        return self.unit.claims[0] is self._acquired
