"""How the stores over SQLAlchemy reach their database: connections, transactions, and what can go wrong with both."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable, Row, Select, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError

from ...errors import StoreError
from ...extras import how_to_install
from .sql_schema import MYSQL

POSTGRESQL: Final = ("postgresql", "cockroachdb")

# The driver that the extra "sql" installs, where an URL names none.
_DRIVERS: Final = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
# Those whose cursors take names as %(name)s, and any bytes for a binary string.
_PLAIN_CURSORS: Final = ("psycopg", "pymysql")
_CONNECT_SECONDS: Final = 10
_ATTEMPTS: Final = 10
_LONGEST_PAUSE: Final = 0.5  # seconds

# "Begin again": serialization_failure and deadlock_detected, in which the server has undone the transaction
# (PostgreSQL's manual, 13.5; MySQL's, 17.7.5.3 "How to Minimize and Handle Deadlocks").
_REPEATED_STATES: Final = ("40001", "40P01")
_REPEATED_NUMBERS: Final = (1213,)

# Errors whose text, the driver's own, quotes values.
_QUOTING: Final = (DataError, IntegrityError)

_Result = TypeVar("_Result")


class Database:
    """A database server that SQLAlchemy connects to.

    :param url_or_engine: an URL, as text or as SQLAlchemy's, for which an engine is made here; or an engine, whose
        options are its owner's, and which is not disposed of here.
    :param dialects: which databases will do.
    :raises TypeError, ValueError: it is none of them.
    """

    def __init__(self, url_or_engine: str | URL | Engine, dialects: Collection[str]) -> None:
        if not isinstance(url_or_engine, (str, URL, Engine)):
            raise TypeError(f"an URL or an SQLAlchemy Engine is needed, got {type(url_or_engine).__name__}")
        self._is_own = not isinstance(url_or_engine, Engine)
        url = url_or_engine.url if isinstance(url_or_engine, Engine) else _url(url_or_engine)
        self.dialect = url.get_backend_name()
        self.name = url.set(query={}).render_as_string(hide_password=True)
        if self.dialect not in dialects:
            remedy = "; SQLite has SQLiteTokenStore" if self.dialect == "sqlite" else ""
            raise ValueError(f"{self.dialect} is not one of {', '.join(dialects)}, which this store is for{remedy}")
        engine = url_or_engine if isinstance(url_or_engine, Engine) else _engine(url)
        if engine.dialect.is_async:
            raise ValueError(f"{url.drivername} is an asynchronous driver; choose one that is not")
        self._engine = engine
        # READ COMMITTED, so that what is read behind a lock is what others have committed before it was had; and no
        # transaction around a single statement. PostgreSQL's drivers just send another BEGIN, or none; MySQL has to be
        # told of a change, which costs more than the ROLLBACK that it saves.
        is_mysql = self.dialect in MYSQL
        self._reading = engine if self._is_own or is_mysql else engine.execution_options(isolation_level="AUTOCOMMIT")
        self._writing = (
            engine if self._is_own and is_mysql else engine.execution_options(isolation_level="READ COMMITTED")
        )
        self._driver_error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._has_cursors = engine.driver in _PLAIN_CURSORS and self._is_own
        self._texts: dict[Select[Any], str] = {}
        self._process = os.getpid()
        self._inherited: list[object] = []
        self._closed = False

    def look_up(self, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Any] | None:
        """The first row of one statement, as the driver gives it. It is what :meth:`read` returns at a third of the
        cost, as only the engine's pool stands between the driver and the caller."""
        if not self._has_cursors:
            return self._first(statement, parameters)
        self._check_usable()
        try:
            connection = self._engine.raw_connection()
            try:
                cursor = connection.cursor()
                cursor.execute(self._text(statement), parameters)
                row: Sequence[Any] | None = cursor.fetchone()
                cursor.close()
            except BaseException:
                # Whatever it was, an answer may still be on its way.
                connection.invalidate()
                raise
            finally:
                connection.close()
        except (self._driver_error, SQLAlchemyError):
            # The long way finds out whether that lasts, and says what it is.
            return self._first(statement, parameters)
        return row

    def _first(self, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Any] | None:
        rows = self.read(statement, parameters)
        return rows[0] if rows else None

    def _text(self, statement: Select[Any]) -> str:
        text = self._texts.get(statement)
        if text is None:
            text = self._texts[statement] = str(statement.compile(dialect=self._engine.dialect))
        return text

    def read(self, statement: Executable, parameters: dict[str, Any] | None = None) -> Sequence[Row[Any]]:
        """The rows of one statement. A connection that has died is replaced.

        :raises StoreError: the database failed.
        """
        return self.look(lambda connection: connection.execute(statement, parameters).all())

    def look(self, work: Callable[[Connection], _Result]) -> _Result:
        """What ``work`` returns, which only reads. It may be called again, on another connection.

        :raises StoreError: the database failed.
        """
        return self._run(lambda: self._look(work))

    def _look(self, work: Callable[[Connection], _Result]) -> _Result:
        with self._reading.connect() as connection:
            return work(connection)

    def transact(self, work: Callable[[Connection], _Result]) -> _Result:
        """What ``work`` returns, when all that it did in a transaction is committed.

        The transaction is begun again where the database asks for that, and where its connection has died before it
        was to be committed.

        :raises StoreError: the database failed. Where that was while it was to be committed, nobody knows whether it
            was; the message says so.
        """
        return self._run(lambda: self._transact(work))

    def _transact(self, work: Callable[[Connection], _Result]) -> _Result:
        with self._writing.connect() as connection:
            result = work(connection)
            try:
                connection.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise StoreError(
                        f"{self.name} was lost while a transaction was to be committed, and it is not known whether "
                        "it was; what has an operation id is safe to repeat"
                    ) from _without_values(error)
                raise
            return result

    def _run(self, action: Callable[[], _Result]) -> _Result:
        self._check_usable()
        attempt = 1
        while True:
            try:
                return action()
            except SQLAlchemyError as error:
                if attempt == _ATTEMPTS or not _may_repeat(error):
                    raise self._explained(error) from _without_values(error)
            except self._driver_error as error:
                # MySQL's isolation level was to be set on a connection that had died, where SQLAlchemy takes no note of
                # that. Nothing was begun; the pool's other connections are as old.
                if attempt == _ATTEMPTS:
                    raise StoreError(f"{self.name} failed: {type(error).__name__}") from error
                self._engine.dispose()
            if attempt > 1:
                time.sleep(random.uniform(0, min(0.005 * 2**attempt, _LONGEST_PAUSE)))
            attempt += 1

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"the store of {self.name} is closed")
        if self._process != os.getpid():
            self._leave_inherited()

    def _leave_inherited(self) -> None:
        """After a fork: the parent's connections are neither used nor closed here (SQLAlchemy, "Using Connection Pools
        with Multiprocessing or os.fork()"). They are kept, as an object that is freed closes its connection."""
        self._inherited.append(self._engine.pool)
        self._engine.dispose(close=False)
        self._process = os.getpid()

    def _explained(self, error: SQLAlchemyError) -> StoreError:
        """What the operator needs to know of an error. What may quote a value, such as a digest, is left out."""
        reason = type(error).__name__
        if isinstance(error, DBAPIError):
            reason = type(error.orig).__name__
            if not isinstance(error, _QUOTING):
                # The driver's text is the last argument; its first line, as what follows are details.
                text = str(error.orig.args[-1]) if error.orig is not None and error.orig.args else ""
                reason = f"{reason}: {text.partition(chr(10))[0]}"
        return StoreError(f"{self.name} failed: {reason}")

    def close(self) -> None:
        """Closes the connections of an engine that was made here."""
        self._closed = True
        if self._is_own and self._process == os.getpid():
            self._engine.dispose()

    def __repr__(self) -> str:
        return f"Database({self.name!r})"


def _url(text: str | URL) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # SQLAlchemy's messages quote it, and with it a password.
        raise ValueError("the URL of a database has the form postgresql://user:password@host/name") from None
    if isinstance(text, str) and "@" in f"{url.host}{url.database}":
        # Half a password is taken for a host or a name then, and would be shown.
        raise ValueError("the password in the URL of a database must be quoted: @ as %40, / as %2F, : as %3A")
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def _engine(url: URL) -> Engine:
    arguments: dict[str, Any] = {}
    is_mysql = url.get_backend_name() in MYSQL
    if not is_mysql and "connect_timeout" not in url.query:
        # libpq would wait for as long as TCP does: minutes.
        arguments["connect_timeout"] = _CONNECT_SECONDS
    try:
        return create_engine(
            url,
            isolation_level="READ COMMITTED" if is_mysql else "AUTOCOMMIT",
            connect_args=arguments,
            hide_parameters=True,
            pool_use_lifo=True,
        )
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{url.drivername} needs the package {error.name}; {how_to_install('sql')} brings psycopg and PyMySQL"
        ) from None
    except SQLAlchemyError as error:
        raise ValueError(f"{url.drivername} is no driver that SQLAlchemy knows: {error}") from None


def _may_repeat(error: SQLAlchemyError) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    # Where two add the same row, the other one's is there when it is begun again.
    if error.connection_invalidated or isinstance(error, IntegrityError):
        return True
    state = getattr(error.orig, "sqlstate", None)
    number = error.orig.args[0] if error.orig is not None and error.orig.args else None
    return state in _REPEATED_STATES or number in _REPEATED_NUMBERS


def _without_values(error: SQLAlchemyError) -> SQLAlchemyError | None:
    """The error as the cause of another, whose traceback shows no parameters."""
    if isinstance(error, DBAPIError):
        error.hide_parameters = True
        if isinstance(error, _QUOTING):
            return None
    return error
