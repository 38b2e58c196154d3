"""One SQLite connection and the list that owns it, so that no exception and no fork leaves it behind.

An exception may arrive between any two steps of a program: a signal handler raises, a worker's time is up, a greenlet
is killed. So a connection is always in a list, a *box*: the box of the call that uses it, or the idle list of a pool.
It enters the box before SQLite is called, and the call always closes what is left in its box. A connection moves from
one list to another by ``other.append(box.pop())``. If an exception arrives in between, only the interpreter's stack
holds the handle, so it is freed, which closes the connection.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from ... import forks


class Handle:
    """The owner of a connection, which is freed together with it. A connection alone is part of a reference cycle with
    its cache of statements, and would wait for the garbage collector.

    For :mod:`usage_middleware.forks` it counts as open from before SQLite is called until SQLite has closed it.
    """

    _may_be_open = False

    def __init__(self, path: str, *, epoch: object, frozen: object) -> None:
        #: Not open yet. It is made first, so that no step lies between opening it and storing it.
        self.connection: Final = sqlite3.Connection.__new__(sqlite3.Connection)
        self.path: Final = path
        #: The epoch of its pool at that time. A pool does not take back a connection from before its file was replaced.
        self.epoch: Final = epoch
        #: The state of a file that is read as if it did not change; see :mod:`.reading`.
        self.frozen: Final = frozen
        self._process = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether a process that forked this one has opened it."""
        return self._process != os.getpid()

    def open(self, options: str, timeout: float) -> None:
        self._may_be_open = True
        forks.hold(self)
        initialise: Any = partial(_initialise, self.connection)  # a factory need not be a class
        sqlite3.connect(
            f"{Path(self.path).as_uri()}?{options}",
            uri=True,
            timeout=timeout,
            isolation_level=None,  # transactions begin where this package begins them
            check_same_thread=False,  # used by one thread at a time
            factory=initialise,
        )
        #: For one query after the other. A cursor for each would cost what a column costs.
        self.cursor = self.connection.cursor()

    def close(self) -> None:
        """Close the connection. Calling it again is fine. If it is inherited, leave it alone and never free it."""
        if self.is_inherited:
            forks.keep(self)
            return
        with suppress(sqlite3.ProgrammingError):  # if SQLite was not reached
            self.connection.close()
        forks.release(self)
        self._may_be_open = False

    def __del__(self) -> None:
        if self._may_be_open:
            self.close()


Box = list[Handle]


def _initialise(connection: sqlite3.Connection, *arguments: Any, **options: Any) -> sqlite3.Connection:
    """Initialise a connection, as the ``sqlite3`` module would do."""
    sqlite3.Connection.__init__(connection, *arguments, **options)
    return connection


def open_handle(
    box: Box, path: str, options: str, *, timeout: float = 0.0, epoch: object = None, frozen: object = None
) -> sqlite3.Connection:
    """Open the database at ``path`` into a box.

    :param options: of an SQLite URI (sqlite.org/uri.html).
    :param timeout: how many seconds SQLite itself waits for a lock.
    """
    box.append(Handle(path, epoch=epoch, frozen=frozen))
    box[0].open(options, timeout)
    return box[0].connection


def close_all(box: Box) -> None:
    """Close the connections in a box, and empty it. It can be called again if an exception has interrupted it."""
    while box:
        box[-1].close()
        box.pop()
