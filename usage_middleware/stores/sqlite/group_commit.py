"""Group commit: the call that has the write lock also does the work of the calls that wait for it.

A durable transaction waits for the disk, and only one thread can write at a time. So the call that has the write lock
runs the work of the waiting calls too, each in a savepoint of its own, and commits all of it at once. Each call gets
its own result or error.

This stays exact wherever an exception arrives. The first entry of a unit's ``claims`` decides which call or transaction
may run it. The list ``committed``, which all units of a transaction share, decides whether they were committed. The
first entry of ``writing`` decides which turn has the lock. C functions add to these lists, so no exception can arrive
between a step and its record.

A ``threading.Lock`` would not do: while it is locked, it does not tell whether its owner still exists. Turns are in
lists by weak references. If several exceptions at once keep a turn from its end, the turn is freed, and any other turn
that finds its reference dead removes it.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
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
        #: The first entry may run it. Each entry stands for its owner: ``Turn.reference`` for the call itself, which
        #: may also have given up, or ``committed`` for a transaction.
        self.claims: list[object] = []
        #: The list of the transaction in which it was run. It is not empty once that transaction is committed.
        self.committed: Sequence[object] = ()
        self.result: Any = None
        self.error: QuotaError | None = None

    def wake_up(self) -> None:
        with suppress(RuntimeError):  # it was woken already
            self.wake.release()


class WriteQueue:
    """The write lock of a process, and the calls that wait for it."""

    __slots__ = ("waiting", "writing")

    def __init__(self) -> None:
        #: The first turn has the lock. Any other has only asked for it, and is about to leave the list again.
        self.writing: list[weakref.ref[Turn]] = []
        self.waiting: list[weakref.ref[Turn]] = []

    def acquire(self, turn: weakref.ref[Turn]) -> bool:
        """Return whether the turn has the lock. Do not wait for it."""
        while True:
            self.writing.append(turn)
            first = self.writing[0]
            if first is turn:
                return True
            _remove(self.writing, turn)
            if first() is None:
                _remove(self.writing, first)
            elif self.writing:
                return False
            # Otherwise the lock has become free meanwhile. Its last owner may not have seen this turn wait.

    def do_others(self, turn: Turn, committed: list[object]) -> None:
        """Run the waiting units in the transaction of the turn that has the lock.

        :raises Disturbed, sqlite3.Error: the transaction cannot be committed.
        """
        deadline = time.monotonic() + _LONGEST
        for unit in self._waiting_units():
            if len(turn.others) == _MOST_TOGETHER or time.monotonic() > deadline:
                return
            if not unit.claims:
                unit.claims.append(committed)
                if unit.claims[0] is committed:
                    turn.others.append(unit)
                    _do(unit, turn.box[0].connection)
                    unit.committed = committed

    def leave(self, turn: Turn) -> None:
        """Release the lock if the turn has it. Wake up the calls whose units it has run, and the next one."""
        while turn.reference in self.writing:
            _remove(self.writing, turn.reference)
        if self.waiting:
            _remove(self.waiting, turn.reference)
            # This comes after the release of the lock: a thread adds its turn before it tries the lock for the last
            # time, so one that found the lock taken is in the queue.
            following = [unit for unit in self._waiting_units() if not unit.committed]
            for unit in turn.others + following[:1]:
                unit.wake_up()

    def _waiting_units(self) -> Iterator[Unit]:
        for reference in list(self.waiting):
            turn = reference()
            if turn is None:
                _remove(self.waiting, reference)
            else:
                yield turn.unit


def _remove(references: list[weakref.ref[Turn]], reference: weakref.ref[Turn]) -> None:
    with suppress(ValueError):  # another thread has removed it
        references.remove(reference)


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

    __slots__ = ("__weakref__", "_process", "_queue", "box", "others", "reference", "unit")

    def __init__(self, queue: WriteQueue, unit: Unit) -> None:
        self.box: Box = []
        self.unit = unit
        #: The units of other calls that it has run. These calls are woken up at the end, whatever the outcome is.
        self.others: list[Unit] = []
        self._queue = queue
        self._process = os.getpid()
        self.reference: Final = weakref.ref(self)

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
        self._queue.waiting.append(self.reference)
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
        if not self._give_up() and self._queue.writing[:1] != [self.reference]:
            # Another thread runs the unit or has run it. Wait until it is known whether it was committed.
            with suppress(NoTurn):  # a child has no other thread
                while not self.unit.committed and not self._acquire():
                    self._wait(math.inf)
        close_all(self.box)
        self._queue.leave(self)

    def _wait(self, seconds: float) -> None:
        if self._process != os.getpid():
            raise NoTurn  # the thread that runs it exists only in the parent
        self.unit.wake.acquire(True, min(seconds, _LOOK_INTERVAL))

    def _acquire(self) -> bool:
        if not self._queue.acquire(self.reference):
            return False
        # A transaction that has claimed the unit has ended by now. If it has not committed the unit, it never will.
        self.unit.claims.append(self.reference)
        return True

    def _give_up(self) -> bool:
        """Claim the unit. Return whether no other thread will run it."""
        self.unit.claims.append(self.reference)
        return self.unit.claims[0] is self.reference
