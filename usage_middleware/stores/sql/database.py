"""How the stores over SQLAlchemy reach their database: connections, transactions, and their failures.

What happens after a failure depends on where the call was when it failed. Before COMMIT was sent, nothing has been
done, and the call may be retried. Between COMMIT and its answer, the outcome is unknown, and only the caller can decide
to retry. After the answer, the call has succeeded, whatever else fails.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable, Row, Select

from ...errors import StoreError, UsageMiddlewareError
from .attempts import Attempt, Stage
from .batches import Batches
from .dialects import check_timeout, manners, parse_url, split_timeout
from .engines import DEADLINE, engine_of_each_process
from .failures import Failures, has_rolled_back, is_refused
from .pool import IN_USE
from .session import Session
from .timeouts import deadline_setter

DEFAULT_TIMEOUT: Final = 10.0  # seconds
#: Seconds within which a server that is near answers a look-up. A key is not refused before, so that the time does not
#: show what was found.
ANSWERS_WITHIN: Final = 0.005

# Drivers whose cursors take names as %(name)s.
_PLAIN_CURSORS: Final = ("psycopg", "pymysql")
# What drivers raise for an option that they do not know or whose value is wrong, before they connect.
_OF_OPTIONS: Final = (TypeError, ValueError, AttributeError, RuntimeError, OSError)
_ATTEMPTS: Final = 10
_LONGEST_PAUSE: Final = 0.5  # seconds
# A step of a migration may rewrite a large table.
_PREPARING_SECONDS: Final = 600.0

_Result = TypeVar("_Result")


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
        self._engines = engine_of_each_process(
            url_or_engine if isinstance(url_or_engine, Engine) else url, self.timeout
        )
        engine = self._engine
        if engine.dialect.is_async:
            raise ValueError(f"{url.drivername} is an asynchronous driver; choose a synchronous one")
        self._manners = manners(engine, is_own=self._is_own)
        self._failures = Failures(engine, self.name, self.timeout)
        self._batches = Batches()
        self._has_cursors = engine.driver in _PLAIN_CURSORS and self._is_own
        self._closed = False

    @property
    def _engine(self) -> Engine:
        return self._engines.get()

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
        engine = self._engine
        proxied = engine.raw_connection()
        attempt.stage = Stage.WORKING
        info = proxied.info
        info[IN_USE] = True
        try:
            set_deadline = deadline_setter(proxied.dbapi_connection, is_own=True)
            set_deadline(attempt.until)
            cursor = proxied.cursor()
            cursor.execute(self._batches.prepare(statement, tuple(parameters), engine.dialect).text, parameters)
            row: Sequence[Any] | None = cursor.fetchone()
            cursor.close()
            set_deadline(None)
            del info[IN_USE]
        except BaseException:
            # Whatever the exception was, an answer may still be on its way.
            attempt.is_lost = True
            proxied.invalidate()
            raise
        finally:
            proxied.close()
        return row

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

    def look_at_one_moment(self, work: Callable[[Connection], _Result]) -> _Result:
        """Return what ``work`` returns, as :meth:`look` does. All that it reads is of one moment.

        :raises StoreError: the database failed.
        """

        def read(session: Session) -> _Result:
            session.begin_reading()
            result = work(session.connection)
            session.roll_back()
            return result

        return self._run(lambda attempt: self._read(attempt, read))

    def _look(self, attempt: Attempt, work: Callable[[Connection], _Result]) -> _Result:
        def read(session: Session) -> _Result:
            session.read()
            return work(session.connection)

        return self._read(attempt, read)

    def _read(self, attempt: Attempt, work: Callable[[Session], _Result]) -> _Result:
        connection = self._engine.connect()
        attempt.stage = Stage.WORKING
        try:
            session = self._session(connection, attempt, self.timeout)
            result = work(session)
        except BaseException as error:
            self._note_loss(attempt, error, connection)
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

    def _transact(self, attempt: Attempt, work: Callable[[Session], _Result]) -> _Result:
        connection = self._engine.connect()
        attempt.stage = Stage.WORKING
        try:
            session = self._session(connection, attempt, self.timeout)
            session.begin()
            result = work(session)
            session.commit()
        except UsageMiddlewareError:
            # A rule refused, between two statements.
            self._undo(session)
            raise
        except self._failures.caught as error:
            self._note_loss(attempt, error, connection)
            if self._failures.is_conflict(error) and not attempt.is_lost:
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
            session.commit()
        except self._failures.caught as error:
            self._note_loss(attempt, error, connection)
            raise
        finally:
            # Done once in the life of a process. What it set and locked in the session goes with the connection.
            _discard(connection)

    def _session(self, connection: Connection, attempt: Attempt, patience: float) -> Session:
        return Session(
            connection,
            self._manners,
            self._batches,
            attempt,
            patience=patience,
            is_own=self._is_own,
        )

    def _note_loss(self, attempt: Attempt, error: BaseException, connection: Connection) -> None:
        if not isinstance(error, self._failures.caught) or connection.invalidated:
            attempt.is_lost = connection.invalidated
            return
        attempt.is_lost = self._failures.is_lost(error, connection.connection.dbapi_connection)
        if attempt.is_lost:
            # SQLAlchemy has not seen it. When it does, it replaces the pool's other connections, which are as old.
            with suppress(*self._failures.caught):
                connection.exec_driver_sql("SELECT 1")

    def _undo(self, session: Session) -> None:
        """Roll back, and keep the connection if that succeeds."""
        try:
            session.roll_back()
            session.give_back()
        except BaseException as error:
            _discard(session.connection)
            if not isinstance(error, self._failures.caught):
                raise

    def _give_back(self, session: Session) -> None:
        """Return a connection to its pool. If that fails, the call has succeeded all the same."""
        try:
            session.give_back()
        except BaseException as error:
            _discard(session.connection)
            if not isinstance(error, self._failures.caught):
                raise

    def _run(self, once: Callable[[Attempt], _Result]) -> _Result:
        if self._closed:
            raise StoreError(f"the store of {self.name} is closed")
        until = time.monotonic() + self.timeout
        number = 1
        while True:
            attempt = Attempt(number, until)
            DEADLINE.until = until
            try:
                return once(attempt)
            except self._failures.caught as error:
                if not self._may_repeat(attempt, error):
                    raise self._told(attempt, error) from self._failures.cause(error)
            except _OF_OPTIONS as error:
                if attempt.stage is not Stage.CONNECTING or not self._is_own:
                    raise
                # The text of other errors may quote the value.
                reason = str(error) if isinstance(error, TypeError) else type(error).__name__
                raise StoreError(f"{self.name}: the driver does not take an option of the URL: {reason}") from None
            finally:
                DEADLINE.until = 0.0
            if number > 1:
                time.sleep(random.uniform(0, min(0.005 * 2**number, _LONGEST_PAUSE)))
            number += 1

    def _may_repeat(self, attempt: Attempt, error: Exception) -> bool:
        if attempt.number == _ATTEMPTS or time.monotonic() >= attempt.until:
            return False
        if attempt.stage is Stage.CONNECTING:
            return False  # A server that refuses a connection, or is not there, is not asked twice.
        if attempt.stage is Stage.COMMITTING:
            return has_rolled_back(error)
        return attempt.is_lost or self._failures.is_conflict(error)

    def _told(self, attempt: Attempt, error: Exception) -> StoreError:
        if attempt.stage is Stage.COMMITTING and not has_rolled_back(error) and not is_refused(error):
            return self._failures.unknown(error)
        return self._explained(error, attempt)

    def _explained(self, error: Exception, attempt: Attempt) -> StoreError:
        return self._failures.explained(error, is_late=time.monotonic() >= attempt.until)

    def close(self) -> None:
        """Close the connections of an engine that was made here."""
        self._closed = True
        if self._is_own:
            self._engines.close()

    def __repr__(self) -> str:
        return f"Database({self.name!r})"


def _discard(connection: Connection) -> None:
    """Close a connection and let its pool make another."""
    if not connection.closed:
        connection.invalidate()
        connection.close()
