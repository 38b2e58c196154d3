"""The engine of a store: one that is made for its URL, or its owner's; in each process with connections of its own."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from typing import Any

from sqlalchemy import URL, Engine, event

from ... import forks
from .dialects import make_engine, refuse_encoding
from .pool import ConnectionPool, watch_connections
from .timeouts import deadline_setter, limit_connecting


class Deadline(threading.local):
    """When a call of this thread stops waiting for a connection."""

    until = 0.0  # no call runs in this thread

    def seconds_left(self) -> float | None:
        return self.until - time.monotonic() if self.until else None

    def wait(self) -> float:
        return self.seconds_left() or 0.0


def engine_of_each_process(url_or_engine: URL | Engine, timeout: float, deadline: Deadline) -> forks.PerProcess[Engine]:
    """Return the engine by process.

    After a fork, the parent's connections are neither used nor closed (SQLAlchemy, "Using Connection Pools with
    Multiprocessing or os.fork()").
    """
    if isinstance(url_or_engine, Engine):
        _watch(url_or_engine, deadline)
        return forks.PerProcess(partial(_owners, url_or_engine, os.getpid()))
    return forks.PerProcess(partial(_made, url_or_engine, timeout, deadline), Engine.dispose)


def _made(url: URL, timeout: float, deadline: Deadline) -> Engine:
    """Return the engine of this process."""
    engine = make_engine(url, timeout)
    assert isinstance(engine.pool, ConnectionPool)
    engine.pool.wait = deadline.wait
    _watch(engine, deadline)

    # Before SQLAlchemy's own listener, which asks a new server for its version.
    @event.listens_for(engine, "connect", insert=True)
    def limit(connection: Any, entry: object) -> None:
        deadline_setter(connection, is_own=True)(deadline.until)

    return engine


def _watch(engine: Engine, deadline: Deadline) -> None:
    watch_connections(engine)
    limit_connecting(engine, deadline.seconds_left)
    refuse_encoding(engine, deadline.seconds_left)


def _owners(engine: Engine, process: int) -> Engine:
    """Return an owner's engine, in a child without the connections of its parent."""
    if os.getpid() != process:
        forks.keep(engine.pool)
        engine.dispose(close=False)
    return engine
