"""How long a driver waits for its server.

A server that stops answering (it is stopped, or a network drops its packets) closes no connection, and TCP itself waits
for many minutes. Even ``tcp_user_timeout`` does not notice a stopped process, as its kernel still acknowledges what is
sent. So the driver's own wait has to end.
"""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ... import forks

#: Sets the time (of :func:`time.monotonic`) at which a connection stops waiting; ``None``: use its owner's setting.
SetDeadline = Callable[[float | None], None]

_SHORTEST: Final = 0.001  # seconds; a driver takes 0 for "no timeout"
_HAVE_CONNECT_TIMEOUT: Final = ("psycopg", "psycopg2", "pymysql", "mysqldb")


def deadline_setter(connection: Any, *, is_own: bool) -> SetDeadline:
    """Return a function that bounds the waits of a driver's connection. For a driver without such a setting, it does
    nothing.

    :param is_own: whether the connection has only our timeouts. Another owner's timeouts still hold.
    """
    module = type(connection).__module__.partition(".")[0]
    if module == "psycopg":
        wait = connection.__dict__.get("wait")
        if not isinstance(wait, _Wait):
            wait = connection.wait = _Wait(connection)
        return wait.set_deadline
    if hasattr(connection, "_read_timeout") and hasattr(connection, "_write_timeout"):
        return _SocketTimeouts(connection, is_own).set_deadline  # PyMySQL
    return _ignore


def _ignore(until: float | None) -> None:
    pass


class _Wait:
    """``psycopg.Connection.wait`` with a deadline.

    psycopg waits in turns of a tenth of a second, so that it notices Ctrl-C. After a turn in which the server sent
    nothing, it resumes the generator with 0.
    """

    __slots__ = ("_connection", "_until")

    def __init__(self, connection: Any) -> None:
        # A strong reference would be a cycle, and keep a dropped connection open until the garbage collector runs.
        self._connection = weakref.ref(connection)
        self._until: float | None = None

    def set_deadline(self, until: float | None) -> None:
        self._until = until

    def __call__(self, generator: Generator[Any, Any, Any], *args: Any, **options: Any) -> Any:
        connection = self._connection()
        return type(connection).wait(connection, self._bounded(generator), *args, **options)  # type: ignore[union-attr]

    def _bounded(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = next(generator)
            while True:
                ready = yield wanted
                if not ready and self._until is not None and time.monotonic() >= self._until:
                    self._give_up()
                wanted = generator.send(ready)
        except StopIteration as end:
            return end.value

    def _give_up(self) -> None:
        from psycopg import OperationalError

        connection = self._connection()
        if connection is not None:
            # By this psycopg and SQLAlchemy both know that the connection cannot be used any more.
            connection.close()
        raise OperationalError("the server did not answer in time")


class _SocketTimeouts:
    """The socket timeouts of PyMySQL, which it reads before it waits. After connecting they have no public name."""

    __slots__ = ("_connection", "_owners")

    def __init__(self, connection: Any, is_own: bool) -> None:
        self._connection = connection
        self._owners = (None, None) if is_own else (connection._read_timeout, connection._write_timeout)

    def set_deadline(self, until: float | None) -> None:
        read, write = self._owners
        if until is not None:
            left = max(until - time.monotonic(), _SHORTEST)
            read, write = min(left, read or left), min(left, write or left)
        self._connection._read_timeout, self._connection._write_timeout = read, write


class _Connecting:
    """A thread that connects: a fork waits for it.

    It may be inside OpenSSL, for one, and hold a lock there. In a child nobody would ever release that lock.
    """

    __slots__ = ("__weakref__",)


def limit_connecting(engine: Engine, seconds_left: Callable[[], float | None]) -> None:
    """Let an engine spend no more seconds on a new connection than the thread that needs it has left, and let no other
    thread fork meanwhile.

    :param seconds_left: returns ``None`` if no call of ours runs in the thread. An owner's engine then connects with
        its owner's timeout.
    """

    def connect(dialect: Any, entry: object, arguments: list[Any], parameters: dict[str, Any]) -> Any:
        left = seconds_left()
        if left is None:
            return None
        if left <= 0:  # A place in the pool became free too late. A driver takes 0 for "no timeout".
            raise PoolTimeoutError("no time is left to connect")
        if engine.driver in _HAVE_CONNECT_TIMEOUT:
            parameters.setdefault("connect_timeout", _each_attempt(parameters, left))
        limits = {}
        if engine.driver == "pymysql":
            # It waits for a greeting as it waits for an answer. What is added here ends when it is connected.
            limits = {name: left for name in ("read_timeout", "write_timeout") if name not in parameters}
        connecting = _Connecting()
        try:
            forks.hold(connecting)
            connection = dialect.connect(*arguments, **parameters, **limits)
        finally:
            forks.release(connecting)
        for name in limits:
            setattr(connection, f"_{name}", None)
        return connection

    event.listen(engine, "do_connect", connect)


def _each_attempt(parameters: dict[str, Any], seconds: float) -> int:
    """Return how long each attempt may take, so that all of them together take no longer than ``seconds``.

    Drivers try hosts and their addresses one after the other, each with the whole timeout. PostgreSQL's drivers take
    several hosts, and a name such as ``localhost`` often has two addresses.
    """
    hosts = str(parameters.get("host") or "").split(",")
    addresses = sum(_count_addresses(host) for host in hosts)
    # Whole seconds, as libpq has it, which takes 1 for 2.
    return max(int(seconds / addresses), 1)


def _count_addresses(host: str) -> int:
    if host and not host.startswith("/"):
        with suppress(OSError):  # The driver reports what is wrong with the name.
            return len({found[4] for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    return 1
