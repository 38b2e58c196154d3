"""The engine of a store: one that is made for its URL, or its owner's; in each process with connections of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from sqlalchemy import URL, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from ... import forks
from .dialects import make_engine, refuse_encoding
from .pool import SET_DEADLINE, ConnectionPool, end_deadline, watch_connections
from .timeouts import SetDeadline, deadline_setter, limit_connecting


class Deadline(threading.local):
    """When a call of this thread stops waiting for a connection."""

    until = 0.0  # no call runs in this thread

    def seconds_left(self) -> float | None:
        return self.until - time.monotonic() if self.until else None

    def wait(self) -> float:
        return self.seconds_left() or 0.0


#: Of all stores, as a thread runs one call at a time.
DEADLINE: Final = Deadline()


def engine_of_each_process(url_or_engine: URL | Engine, timeout: float) -> forks.PerProcess[Engine]:
    """Return the engine by process.

    After a fork, the parent's connections are neither used nor closed (SQLAlchemy, "Using Connection Pools with
    Multiprocessing or os.fork()").
    """
    if isinstance(url_or_engine, Engine):
        _watch(url_or_engine, is_own=False)
        return forks.PerProcess(partial(_owners, url_or_engine, os.getpid()))
    return forks.PerProcess(partial(_made, url_or_engine, timeout), Engine.dispose)


def _made(url: URL, timeout: float) -> Engine:
    """Return the engine of this process."""
    engine = make_engine(url, timeout)
    assert isinstance(engine.pool, ConnectionPool)
    engine.pool.wait = DEADLINE.wait
    _watch(engine, is_own=True)
    return engine


def _watch(engine: Engine, *, is_own: bool) -> None:
    watch_connections(engine)
    limit_connecting(engine, DEADLINE.seconds_left)
    # Before SQLAlchemy's own listener, which asks a new server for its version.
    event.listen(engine, "connect", _limit_own if is_own else _limit_owners, insert=True)
    event.listen(engine, "connect", end_deadline)
    if not isinstance(engine.dialect.do_ping, _Ping):
        engine.dialect.do_ping = _Ping(engine.dialect.do_ping)  # type: ignore[method-assign, assignment]
    refuse_encoding(engine, DEADLINE.seconds_left)


def _limit_own(connection: Any, entry: ConnectionPoolEntry) -> None:
    _begin_deadline(entry, deadline_setter(connection, is_own=True))


def _limit_owners(connection: Any, entry: ConnectionPoolEntry) -> None:
    if DEADLINE.until:  # Otherwise it is its owner who connects.
        _begin_deadline(entry, deadline_setter(connection, is_own=False))


def _begin_deadline(entry: ConnectionPoolEntry, set_deadline: SetDeadline) -> None:
    entry.info[SET_DEADLINE] = set_deadline
    set_deadline(DEADLINE.until)


class _Ping:
    """How an owner's pool tests a connection before it hands it out (``pool_pre_ping``), with our deadline."""

    __slots__ = ("_ping",)

    def __init__(self, ping: Callable[[Any], bool]) -> None:
        self._ping = ping

    def __call__(self, connection: Any) -> bool:
        if not DEADLINE.until:
            return self._ping(connection)
        set_deadline = deadline_setter(connection, is_own=False)
        set_deadline(DEADLINE.until)
        try:
            return self._ping(connection)
        finally:
            set_deadline(None)


def _owners(engine: Engine, process: int) -> Engine:
    """Return an owner's engine, in a child without the connections of its parent."""
    if os.getpid() != process:
        forks.keep(engine.pool)
        engine.dispose(close=False)
    return engine
