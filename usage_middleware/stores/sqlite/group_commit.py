"""Group commit: the call that has the write lock also does the work of the calls that wait for it.

A durable transaction waits for the disk, and only one thread can write at a time. So the call that has the write lock
runs the work of the waiting calls too, each in a savepoint of its own, and commits all of it at once. Each call gets
its own result or error.

This stays exact wherever an exception arrives. The first entry of a unit's ``claims`` decides which call or transaction
may run it. The list ``committed``, which all units of a transaction share, decides whether they were committed. C
functions add to both lists, so no exception can arrive between a step and its record.
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

_LOOK_INTERVAL: Final = 0.1  # seconds after which a waiting thread checks for itself, if nothing has woken it
_MOST_TOGETHER: Final = 64  # units of other calls in one transaction
_LONGEST: Final = 0.02  # seconds after which a transaction takes on no more units: another process may wait for it

# What the work of a call raises itself. Any other exception was meant for the thread that happens to run the work.
_OF_THE_WORK: Final = (sqlite3.Error, UsageMiddlewareError, ValueError, TypeError, ArithmeticError, LookupError)


class NoTurn(Exception):
    """The time is up and no thread will run the unit, or this is a child process, which has no other thread."""


class Disturbed(Exception):
    """The work of another call has failed, so the transaction cannot commit. Each call then runs its work by itself."""


class Unit:
    """The work of one call. Its own thread runs it, or another one that has the lock."""

    __slots__ = ("claims", "committed", "error", "result", "wake", "work")

    wake: threading.Lock  # created when the call has to wait

    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.work = work
        #: The first entry may run it. Each entry is a list that stands for its owner: ``Turn._acquired`` for the call
        #: itself, which may also have given up, or ``committed`` for a transaction.
        self.claims: list[object] = []
        #: The list of the transaction in which it was run. It is not empty once that transaction is committed.
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
        #: The turn that has the lock. If it is gone, the first entry of the list may release the lock.
        self.owner: tuple[weakref.ref[Turn], list[object]] | None = None
        self.waiting: deque[Unit] = deque()

    def do_others(self, turn: Turn, committed: list[object]) -> None:
        """Run the waiting units in the transaction of the turn that has the lock.

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
        """Wake up the calls whose units a turn has run, and the next one."""
        if self.waiting:
            with suppress(ValueError):
                self.waiting.remove(turn.unit)
            # This comes after the release of the lock: a thread adds its unit before it tries the lock for the last
            # time, so one that found the lock taken is in the queue.
            following = [unit for unit in list(self.waiting) if not unit.committed]
            for unit in turn.others + following[:1]:
                unit.wake_up()

    def free_if_abandoned(self) -> None:
        """Release the lock if its owner was freed without doing so, which takes several exceptions at once."""
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

    Whatever happens, at its end the box is empty, the lock is released, and no other thread runs its unit any more.

    Enter it twice, ``with turn, turn:``. If an exception interrupts the end of the inner ``with``, the outer one
    finishes it. Ending twice is allowed.
    """

    __slots__ = ("__weakref__", "_acquired", "_process", "_queue", "_released", "box", "others", "unit")

    def __init__(self, queue: WriteQueue, unit: Unit) -> None:
        self.box: Box = []
        self.unit = unit
        #: The units of other calls that it has run. These calls are woken up at the end, whatever the outcome is.
        self.others: list[Unit] = []
        self._queue = queue
        self._process = os.getpid()
        # What acquire() and release() returned. A C function calls them and stores the result, so no exception can
        # arrive between taking the lock and recording it.
        self._acquired: list[bool] = []
        self._released: list[object] = []  # gevent's release() returns a number

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def take(self, timeout: float) -> bool:
        """Wait until this turn has the lock or its unit is committed. Return whether the unit still has to be run.

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
                left = math.inf  # another thread is running it
            self._wait(left)
        return not self.unit.committed

    def end(self) -> None:
        """Close the connection if it was not returned, which rolls back its transaction, and release the lock."""
        if not self._give_up() and self._acquired[-1:] == [False]:
            # Another thread runs the unit or has run it. Wait until it is known whether it was committed.
            while not self.unit.committed and not self._acquire():
                self._wait(math.inf)
        close_all(self.box)
        if self._acquired[-1:] == [True] and not self._released:
            self._queue.owner = None
            self._released.extend(starmap(self._queue.lock.release, ((),)))
        self._queue.leave(self)

    def _wait(self, seconds: float) -> None:
        if self._process != os.getpid():
            raise NoTurn  # the thread that runs it exists only in the parent
        self.unit.wake.acquire(True, min(seconds, _LOOK_INTERVAL))
        self._queue.free_if_abandoned()

    def _acquire(self) -> bool:
        self._acquired.extend(map(self._queue.lock.acquire, (False,)))
        if self._acquired[-1]:
            self._queue.owner = weakref.ref(self), []
            # A transaction that has claimed the unit has ended by now. If it has not committed the unit, it never will.
            self.unit.claims.append(self._acquired)
        return self._acquired[-1]

    def _give_up(self) -> bool:
        """Claim the unit. Return whether no other thread will run it."""
        self.unit.claims.append(self._acquired)
        return self.unit.claims[0] is self._acquired
