"""How the stores over SQLAlchemy reach their database: connections, transactions, and their failures.

What happens after a failure depends on where the call was when it failed. Before COMMIT was sent, nothing has been
done, and the call may be retried. Between COMMIT and its answer, the outcome is unknown, and only the caller can decide
to retry. After the answer, the call has succeeded, whatever else fails.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from enum import Enum, auto
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable, Row, Select, event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ...errors import StoreError, UsageMiddlewareError
from .dialects import (
    check_timeout,
    has_rolled_back,
    is_answered,
    make_engine,
    manners,
    parse_url,
    split_timeout,
)
from .pool import IN_USE, ConnectionPool, replace_interrupted
from .session import Session
from .timeouts import deadline_setter, limit_connecting

DEFAULT_TIMEOUT: Final = 10.0  # seconds

# Drivers whose cursors take names as %(name)s, and any bytes for a binary string.
_PLAIN_CURSORS: Final = ("psycopg", "pymysql")
_ATTEMPTS: Final = 10
_LONGEST_PAUSE: Final = 0.5  # seconds
# A step of a migration may rewrite a large table.
_PREPARING_SECONDS: Final = 600.0

_Result = TypeVar("_Result")


class Stage(Enum):
    """How far a call has got."""

    CONNECTING = auto()
    WORKING = auto()
    COMMITTING = auto()


class Attempt:
    """One try of a call.

    :param until: the time (of :func:`time.monotonic`) at which the call stops waiting for a first answer.
    """

    __slots__ = ("number", "stage", "until")

    def __init__(self, number: int, until: float) -> None:
        self.number = number
        self.until = until
        self.stage = Stage.CONNECTING


class _Deadline(threading.local):
    """When a call of this thread stops waiting for a connection."""

    until = 0.0

    def seconds_left(self) -> float:
        return self.until - time.monotonic()


class Database:
    """A database server that SQLAlchemy connects to.

    :param url_or_engine: a URL, as text or as SQLAlchemy's, for which an engine is made here; or the caller's engine,
        which keeps its options and is not disposed of here.
    :param dialects: which databases can be used.
    :param timeout: how many seconds a call waits for a server that does not answer: for a free connection, for a new
        connection, and for the first answer, together; and then for each further answer. A ``timeout`` in the query of
        the URL comes first.
    :raises TypeError, ValueError: an argument cannot be used.
    """

    def __init__(
        self, url_or_engine: str | URL | Engine, dialects: Collection[str], *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        if not isinstance(url_or_engine, (str, URL, Engine)):
            raise TypeError(f"a URL or an SQLAlchemy Engine is needed, got {type(url_or_engine).__name__}")
        self.timeout = check_timeout(timeout)
        self._is_own = not isinstance(url_or_engine, Engine)
        if isinstance(url_or_engine, Engine):
            url = url_or_engine.url
        else:
            url, self.timeout = split_timeout(parse_url(url_or_engine), self.timeout)
        self.dialect = url.get_backend_name()
        self.name = url.set(query={}).render_as_string(hide_password=True)
        if self.dialect not in dialects:
            remedy = "; SQLite has SQLiteTokenStore" if self.dialect == "sqlite" else ""
            raise ValueError(f"{self.dialect} is not one of {', '.join(dialects)}, which this store is for{remedy}")
        self._deadline = _Deadline()
        engine = url_or_engine if isinstance(url_or_engine, Engine) else self._make_engine(url)
        if engine.dialect.is_async:
            raise ValueError(f"{url.drivername} is an asynchronous driver; choose a synchronous one")
        self._engine = engine
        replace_interrupted(engine)
        limit_connecting(engine, self._deadline.seconds_left)
        self._manners = manners(engine, is_own=self._is_own)
        self._driver_error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._failures = (SQLAlchemyError, self._driver_error)
        # Errors whose text comes from the driver and quotes values.
        self._quoting = (engine.dialect.loaded_dbapi.DataError, engine.dialect.loaded_dbapi.IntegrityError)
        self._has_cursors = engine.driver in _PLAIN_CURSORS and self._is_own
        self._texts: dict[Select[Any], str] = {}
        self._process = os.getpid()
        self._inherited: list[object] = []
        self._closed = False

    def _make_engine(self, url: URL) -> Engine:
        engine = make_engine(url, self.timeout)
        deadline = self._deadline
        assert isinstance(engine.pool, ConnectionPool)
        engine.pool.wait = deadline.seconds_left

        # Before SQLAlchemy's own listener, which asks a new server for its version.
        @event.listens_for(engine, "connect", insert=True)
        def limit(connection: Any, entry: object) -> None:
            deadline_setter(connection, is_own=True)(deadline.until)

        return engine

    def look_up(self, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Any] | None:
        """Return the first row of one statement, as the driver gives it.

        This is what :meth:`read` returns, at a third of the cost: only the engine's pool is between the driver and the
        caller.
        """

        def once(attempt: Attempt) -> Sequence[Any] | None:
            if self._has_cursors and attempt.number == 1:
                return self._fetch(attempt, statement, parameters)
            # read() finds out whether the failure lasts, and says what it is.
            rows = self._look(attempt, lambda connection: connection.execute(statement, parameters).all())
            return rows[0] if rows else None

        return self._run(once)

    def _fetch(self, attempt: Attempt, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Any] | None:
        proxied = self._engine.raw_connection()
        attempt.stage = Stage.WORKING
        info = proxied.info
        info[IN_USE] = True
        try:
            set_deadline = deadline_setter(proxied.dbapi_connection, is_own=True)
            set_deadline(attempt.until)
            cursor = proxied.cursor()
            cursor.execute(self._text(statement), parameters)
            row: Sequence[Any] | None = cursor.fetchone()
            cursor.close()
            set_deadline(None)
            del info[IN_USE]
        except BaseException:
            # Whatever the exception was, an answer may still be on its way.
            proxied.invalidate()
            raise
        finally:
            proxied.close()
        return row

    def _text(self, statement: Select[Any]) -> str:
        text = self._texts.get(statement)
        if text is None:
            text = self._texts[statement] = str(statement.compile(dialect=self._engine.dialect))
        return text

    def read(self, statement: Executable, parameters: dict[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Return the rows of one statement. A connection that has died is replaced.

        :raises StoreError: the database failed.
        """
        return self.look(lambda connection: connection.execute(statement, parameters).all())

    def look(self, work: Callable[[Connection], _Result]) -> _Result:
        """Return what ``work`` returns, which only reads. It may be called again, on another connection.

        :raises StoreError: the database failed.
        """
        return self._run(lambda attempt: self._look(attempt, work))

    def _look(self, attempt: Attempt, work: Callable[[Connection], _Result]) -> _Result:
        connection = self._engine.connect()
        attempt.stage = Stage.WORKING
        try:
            session = self._session(connection, attempt, self.timeout)
            session.read()
            result = work(connection)
        except BaseException:
            _discard(connection)
            raise
        self._give_back(session)
        return result

    def transact(self, work: Callable[[Session], _Result]) -> _Result:
        """Return what ``work`` returns, once its transaction is committed.

        The transaction is retried if the database asks for that, and if its connection died before COMMIT was sent.

        :raises StoreError: the database failed. If the connection is lost during COMMIT, the outcome is unknown; the
            message says so.
        """
        return self._run(lambda attempt: self._transact(attempt, work))

    def prepare(self, work: Callable[[Connection], None]) -> None:
        """Let ``work`` make or change tables, in a transaction as far as the database supports that."""
        self._run(lambda attempt: self._prepare(attempt, work))

    def _prepare(self, attempt: Attempt, work: Callable[[Connection], None]) -> None:
        connection = self._engine.connect()
        attempt.stage = Stage.WORKING
        try:
            session = self._session(connection, attempt, _PREPARING_SECONDS)
            session.begin_preparing()
            work(connection)
            attempt.stage = Stage.COMMITTING
            session.commit()
        finally:
            # Done once in the life of a process. What it set and locked in the session goes with the connection.
            _discard(connection)

    def _transact(self, attempt: Attempt, work: Callable[[Session], _Result]) -> _Result:
        connection = self._engine.connect()
        attempt.stage = Stage.WORKING
        try:
            session = self._session(connection, attempt, self.timeout)
            session.begin()
            result = work(session)
            attempt.stage = Stage.COMMITTING
            session.commit()
        except UsageMiddlewareError:
            # A rule refused, between two statements.
            self._undo(session)
            raise
        except self._failures as error:
            if is_answered(_original(error)) and not _is_lost(error):
                self._undo(session)
            else:
                _discard(connection)
            raise
        except BaseException:
            # The origin of this exception is unknown, so an answer may still be on its way.
            _discard(connection)
            raise
        self._give_back(session)
        return result

    def _session(self, connection: Connection, attempt: Attempt, patience: float) -> Session:
        return Session(connection, self._manners, attempt.until, patience, is_own=self._is_own)

    def _undo(self, session: Session) -> None:
        """Roll back, and keep the connection if that succeeds."""
        try:
            session.roll_back()
            session.give_back()
        except BaseException as error:
            _discard(session.connection)
            if not isinstance(error, self._failures):
                raise

    def _give_back(self, session: Session) -> None:
        """Return a connection to its pool. If that fails, the call has succeeded all the same."""
        try:
            session.give_back()
        except BaseException as error:
            _discard(session.connection)
            if not isinstance(error, self._failures):
                raise

    def _run(self, once: Callable[[Attempt], _Result]) -> _Result:
        self._check_usable()
        until = time.monotonic() + self.timeout
        number = 1
        while True:
            attempt = Attempt(number, until)
            self._deadline.until = until
            try:
                return once(attempt)
            except self._failures as error:
                if attempt.stage is Stage.COMMITTING and not has_rolled_back(_original(error)):
                    raise self._unknown(error) from self._shown(error)
                if not self._may_repeat(attempt, error):
                    raise self._explained(error, attempt) from self._shown(error)
            finally:
                self._deadline.until = 0.0
            if number > 1:
                time.sleep(random.uniform(0, min(0.005 * 2**number, _LONGEST_PAUSE)))
            number += 1

    def _may_repeat(self, attempt: Attempt, error: Exception) -> bool:
        # A server that refuses a connection, or is not there, is not asked twice.
        if attempt.stage is Stage.CONNECTING or attempt.number == _ATTEMPTS or time.monotonic() >= attempt.until:
            return False
        # If two calls add the same row, the other call's row is there when this one is retried.
        return _is_lost(error) or isinstance(error, IntegrityError) or has_rolled_back(_original(error))

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"the store of {self.name} is closed")
        if self._process != os.getpid():
            self._leave_inherited()

    def _leave_inherited(self) -> None:
        """Neither use nor close the parent's connections after a fork (SQLAlchemy, "Using Connection Pools with
        Multiprocessing or os.fork()"). They are kept, because an object that is freed closes its connection."""
        self._inherited.append(self._engine.pool)
        self._engine.dispose(close=False)
        self._process = os.getpid()

    def _unknown(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.name} was lost while a transaction was to be committed, and it is not known whether it was; "
            "a call with an idempotency_key is safe to repeat with the same one"
        )

    def _explained(self, error: Exception, attempt: Attempt) -> StoreError:
        """Return what the operator needs to know of an error. Leave out what may quote a value, such as a digest."""
        original = _original(error)
        reason = type(original).__name__
        if isinstance(original, self._driver_error) and not isinstance(original, self._quoting):
            # The driver's text is the last argument. Only its first line is shown: the others are details.
            text = str(original.args[-1]) if original.args else ""
            reason = f"{reason}: {text.partition(chr(10))[0]}"
        if time.monotonic() >= attempt.until:
            return StoreError(f"{self.name} did not answer within {self.timeout:g} s: {reason}")
        return StoreError(f"{self.name} failed: {reason}")

    def _shown(self, error: Exception) -> Exception | None:
        """Return the error in a form whose traceback shows no parameters, to chain as a cause."""
        if isinstance(_original(error), self._quoting):
            return None
        if isinstance(error, DBAPIError):
            error.hide_parameters = True
        return error

    def close(self) -> None:
        """Close the connections of an engine that was made here."""
        self._closed = True
        if self._is_own and self._process == os.getpid():
            self._engine.dispose()

    def __repr__(self) -> str:
        return f"Database({self.name!r})"


def _discard(connection: Connection) -> None:
    """Close a connection and let its pool make another."""
    if not connection.closed:
        connection.invalidate()
        connection.close()


def _original(error: Exception) -> BaseException:
    """Return the driver's error, which SQLAlchemy's wraps."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def _is_lost(error: Exception) -> bool:
    """Return whether an error means that the connection cannot be used any more."""
    # An error that SQLAlchemy has not wrapped came from the driver directly. Drivers have no common way to say this.
    return error.connection_invalidated if isinstance(error, DBAPIError) else not isinstance(error, SQLAlchemyError)
