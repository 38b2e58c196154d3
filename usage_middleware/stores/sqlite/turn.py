"""The turn to write: the threads of a process wait here for each other, so that only one of them polls SQLite for its
lock. Wherever an exception arrives, the other threads do not wait for ever."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from itertools import starmap
from typing import Final

from .handle import Box, close_all

_LOOK_INTERVAL: Final = 1.0  # seconds after which a waiting thread checks that the turn still has an owner
_NO_ARGUMENTS: Final = ((),)


class WriteLock:
    """Make threads take turns. This only saves work: SQLite itself lets one transaction write at a time."""

    __slots__ = ("lock", "owner")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: weakref.ref[Turn] | None = None


class Turn:
    """One call's turn to write, and the box for the connection that it writes with.

    Whatever happens during a turn, at its end the box is empty and the lock is free.

    It is entered twice, ``with turn, turn:``. An exception may arrive before the inner ``with`` has finished its
    end; then the outer one does it. Ending twice is fine.
    """

    __slots__ = ("__weakref__", "_lock", "_steps", "box")

    def __init__(self, lock: WriteLock) -> None:
        self.box: Box = []
        self._lock = lock
        # What acquire() and release() returned. A C function calls them and stores the result, so no Python step lies
        # between taking the lock and recording that.
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
            # Several exceptions at once may have kept the owner from ending. Then the owner has been freed with the
            # last of them.
            owner = self._lock.owner
            if owner is not None and owner() is None:
                with suppress(RuntimeError):
                    self._lock.lock.release()

    def end(self) -> None:
        """Close the connection if it was not returned, which rolls back its transaction, and release the lock."""
        close_all(self.box)
        if self._steps and self._steps[-1]:
            with suppress(RuntimeError):  # another thread took the lock for a dead owner's
                self._steps.extend(starmap(self._lock.lock.release, _NO_ARGUMENTS))
