"""Pools of connections that an exception from outside can neither drain nor poison.

A signal handler that raises, a worker's timeout or a killed greenlet can interrupt any line: ours, SQLAlchemy's, or
the driver's. Two things must hold wherever that is. A connection with half an answer on its way must not be used again,
or the next caller reads that answer as its own. And the pool must not count a lost connection as in use for ever.
"""

from __future__ import annotations

import random
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Engine, Pool, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

#: A key of a connection's ``info`` dictionary. It is there from before a store first uses the connection until all
#: answers have been read and no transaction is open.
IN_USE: Final = "usage_middleware.in_use"

#: A key of that dictionary: the function that sets the connection's deadline. The deadline ends in the pool.
SET_DEADLINE: Final = "usage_middleware.set_deadline"

# As many as SQLAlchemy's own pool allows by default: 5 that stay and 10 more.
_MOST_CONNECTIONS: Final = 15
_PAUSE: Final = 0.002  # average seconds between two attempts at a place


class ConnectionPool(Pool):
    """Keep up to 15 connections; the one that was returned last is used first.

    SQLAlchemy's ``QueuePool`` counts connections and locks a queue in Python. An exception between two of its lines
    loses a place for ever, or leaves the lock held. Here a place is an object that its holder has, and those that exist
    are counted.
    """

    #: Returns how many seconds a caller may wait for a place.
    wait: Callable[[], float]

    def __init__(self, creator: Any, **options: Any) -> None:
        super().__init__(creator, **options)
        self.wait = lambda: 0.0
        self._idle: deque[ConnectionPoolEntry] = deque()
        self._places: set[weakref.ref[_Place]] = set()

    def _do_get(self) -> ConnectionPoolEntry:
        place = self._take_place()
        try:
            entry = self._idle_or_new()
        except BaseException:
            del place  # The traceback would keep it, for as long as a caller keeps the error.
            raise
        entry.__dict__["place"] = place
        return entry

    def _idle_or_new(self) -> ConnectionPoolEntry:
        with suppress(IndexError):
            return self._idle.pop()
        return self._create_connection()

    def _take_place(self) -> _Place:
        deadline = time.monotonic() + self.wait()
        while True:
            place = _Place()
            # The callback is a C function, so that no exception can arrive between freeing the place and this.
            self._places.add(weakref.ref(place, self._places.discard))
            if len(self._places) <= _MOST_CONNECTIONS:
                return place
            del place
            if time.monotonic() >= deadline:
                raise PoolTimeoutError(f"all {_MOST_CONNECTIONS} connections are in use")
            # All that wait ask equally often, so each has the same chance.
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))

    def _do_return_conn(self, entry: ConnectionPoolEntry) -> None:
        place = entry.__dict__.pop("place", None)
        self._idle.append(entry)
        del place

    def recreate(self) -> ConnectionPool:
        made = ConnectionPool(
            self._creator,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        made.wait = self.wait
        return made

    def dispose(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def status(self) -> str:
        return f"{len(self._idle)} connections are idle, {_MOST_CONNECTIONS - len(self._places)} more may be used"


class _Place:
    """The right to use one connection, for as long as it exists."""

    __slots__ = ("__weakref__",)


def watch_connections(engine: Engine) -> None:
    """Let ``engine`` replace a connection on which a store was interrupted, whichever way it came back to the pool, and
    end the deadline of one that comes back in order.

    Listeners that are registered twice are called once, so several stores may share an engine.
    """
    event.listen(engine, "reset", _close_interrupted)
    event.listen(engine, "checkout", _refuse_interrupted)
    event.listen(engine, "checkin", end_deadline)


def _close_interrupted(dbapi_connection: Any, entry: ConnectionPoolEntry, state: Any) -> None:
    if IN_USE in entry.info:
        # The pool's ROLLBACK would read another statement's answer, or wait for it. When this listener fails, the pool
        # discards the connection.
        dbapi_connection.close()


def _refuse_interrupted(dbapi_connection: Any, entry: ConnectionPoolEntry, proxied: Any) -> None:
    if IN_USE in entry.info:
        raise DisconnectionError("a store was interrupted while it used this connection")


def end_deadline(dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
    set_deadline = entry.info.pop(SET_DEADLINE, None)
    if set_deadline is not None:
        set_deadline(None)
