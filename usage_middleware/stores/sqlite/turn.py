"""Whose turn it is to write: the threads of a process wait here for each other, so that only one of them asks SQLite
again and again. No exception, wherever it arrives, makes the others wait for ever."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from itertools import starmap
from typing import Final

from .handle import Box, close_all

_LOOK_INTERVAL: Final = 1.0  # seconds after which one who waits looks whether the turn is still anyone's
_NO_ARGUMENTS: Final = ((),)


class WriteLock:
    """Makes threads take turns. It only saves work: that one transaction writes at a time is SQLite's own to see to."""

    __slots__ = ("lock", "owner")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: weakref.ref[Turn] | None = None


class Turn:
    """One call's turn to write, and the box for the connection that it writes with. Whatever happens inside of it, at
    its end the box is empty and the lock is free.

    It is entered twice, ``with turn, turn:``. An exception may arrive when the end of a ``with`` has begun and has not
    yet done its work, or in the middle of it; then the outer one does it. Ending twice is fine.
    """

    __slots__ = ("__weakref__", "_lock", "_steps", "box")

    def __init__(self, lock: WriteLock) -> None:
        self.box: Box = []
        self._lock = lock
        # What acquire() and release() have returned. They are called by a C function that notes it: there is no step
        # of Python between having the lock and knowing it.
        self._steps: list[bool | None] = []

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def take(self, timeout: float) -> bool:
        """Wait for the lock. Return whether this turn has it."""
        deadline = time.monotonic() + timeout
        while True:
            seconds = max(0.0, min(_LOOK_INTERVAL, deadline - time.monotonic()))
            self._steps.extend(map(self._lock.lock.acquire, (True,), (seconds,)))
            if self._steps[-1]:
                self._lock.owner = weakref.ref(self)
                return True
            if time.monotonic() >= deadline:
                return False
            # Several exceptions at once may have kept the owner from its end. It has gone with the last of them.
            owner = self._lock.owner
            if owner is not None and owner() is None:
                with suppress(RuntimeError):
                    self._lock.lock.release()

    def end(self) -> None:
        """Close the connection, if it was not given back, which undoes its transaction; release the lock."""
        close_all(self.box)
        if self._steps and self._steps[-1]:
            with suppress(RuntimeError):  # another thread took the lock for a dead owner's
                self._steps.extend(starmap(self._lock.lock.release, _NO_ARGUMENTS))
