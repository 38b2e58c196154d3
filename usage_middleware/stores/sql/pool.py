"""Pools of connections that an exception from outside can neither drain nor poison.

A signal handler that raises, a worker's timeout or a killed greenlet can interrupt any line: ours, SQLAlchemy's, or
the driver's. Two things must hold wherever that is. A connection with half an answer on its way must not be used again,
or the next caller reads that answer as its own. And the pool must not count a lost connection as in use for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final

from sqlalchemy import Engine, Pool, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

#: A key of a connection's ``info`` dictionary. It is there from before a store first uses the connection until all
#: answers have been read and no transaction is open.
IN_USE: Final = "usage_middleware.in_use"

# As many as SQLAlchemy's own pool allows by default: 5 that stay and 10 more.
_MOST_CONNECTIONS: Final = 15


class ConnectionPool(Pool):
    """Keep up to 15 connections; the one that was returned last is used first.

    SQLAlchemy's ``QueuePool`` counts connections and locks a queue in Python. An exception between two of its lines
    loses a place for ever, or leaves the lock held. Here a place is an object: when its holder is freed, the
    interpreter returns the place.

    """

    #: Returns how many seconds a caller may wait for a place.
    wait: Callable[[], float]

    def __init__(self, creator: Any, **options: Any) -> None:
        super().__init__(creator, **options)
        self.wait = lambda: 0.0
        self._idle: deque[ConnectionPoolEntry] = deque()
        # C code takes from it and adds to it in one step, even within a destructor (documentation of SimpleQueue).
        self._places: SimpleQueue[_Place] = SimpleQueue()
        for _ in range(_MOST_CONNECTIONS):
            self._places.put(_Place(self._places))

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            place = self._places.get(timeout=max(self.wait(), 0))
        except Empty:
            raise PoolTimeoutError(f"all {_MOST_CONNECTIONS} connections are in use") from None
        try:
            entry = self._idle.pop()
        except IndexError:
            entry = self._create_connection()
        entry.__dict__["place"] = place
        return entry

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
        return f"{len(self._idle)} connections are idle, {self._places.qsize()} more may be used"


class _Place:
    """The right to use one connection."""

    __slots__ = ("_places",)

    def __init__(self, places: SimpleQueue[_Place]) -> None:
        self._places = places

    def __del__(self) -> None:
        self._places.put(_Place(self._places))


def replace_interrupted(engine: Engine) -> None:
    """Let ``engine`` replace a connection on which a store was interrupted, whichever way it came back to the pool.

    Listeners that are registered twice are called once, so several stores may share an engine.
    """
    event.listen(engine, "reset", _close_interrupted)
    event.listen(engine, "checkout", _refuse_interrupted)


def _close_interrupted(dbapi_connection: Any, entry: ConnectionPoolEntry, state: Any) -> None:
    if IN_USE in entry.info:
        # The pool's ROLLBACK would read another statement's answer, or wait for it. When this listener fails, the pool
        # discards the connection.
        dbapi_connection.close()


def _refuse_interrupted(dbapi_connection: Any, entry: ConnectionPoolEntry, proxied: Any) -> None:
    if IN_USE in entry.info:
        raise DisconnectionError("a store was interrupted while it used this connection")
