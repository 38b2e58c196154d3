"""What differs between databases and drivers: URLs, engines, how a transaction begins, and what an error means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ...extras import how_to_install
from .pool import ConnectionPool
from .sql_schema import MYSQL

POSTGRESQL: Final = ("postgresql", "cockroachdb")

# The driver that the extra "sql" installs, for a URL that does not name one.
_DRIVERS: Final = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}

# Errors after which the server has rolled the transaction back: serialization_failure and deadlock_detected
# (PostgreSQL's manual, 13.5; MySQL's, 17.7.5.3 "How to Minimize and Handle Deadlocks").
_ROLLED_BACK_STATES: Final = ("40001", "40P01")
_ROLLED_BACK_NUMBERS: Final = (1213,)
# The server has refused a row. Its answer is complete with these errors too.
_INTEGRITY_CLASS: Final = "23"
_DUPLICATE: Final = 1062

_TIMEOUT: Final = "timeout"
_READ_COMMITTED: Final = "ISOLATION LEVEL READ COMMITTED"


@dataclass(frozen=True, slots=True)
class Manners:
    """How an engine's connections are used.

    Transactions are READ COMMITTED, so what is read after taking a lock is what other transactions had committed when
    the lock was granted.
    """

    #: The isolation levels that SQLAlchemy sets on a connection to read and to write, if it must. PostgreSQL's drivers
    #: only remember them.
    reading: str | None = None
    writing: str | None = None
    #: The statements that begin a transaction, beyond what the driver sends.
    begin: tuple[str, ...] = ()
    #: The statements that begin a transaction that changes tables. MySQL commits after each such change, and what
    #: follows must be in a transaction again.
    begin_preparing: tuple[str, ...] = ()
    #: Whether COMMIT and ROLLBACK are sent as statements, because a driver in autocommit mode may not send them.
    is_explicit: bool = False


def manners(engine: Engine, *, is_own: bool) -> Manners:
    """Return how to use the connections of an engine.

    :param is_own: whether :func:`make_engine` made it; otherwise it is the caller's.
    """
    if engine.dialect.name in MYSQL:
        # For the next transaction alone. SQLAlchemy would change the session, and change it back for the pool.
        isolation = () if is_own else (f"SET TRANSACTION {_READ_COMMITTED}",)
        return Manners(begin=(*isolation, "START TRANSACTION"), begin_preparing=("SET SESSION autocommit = 0",))
    if engine.dialect.name not in POSTGRESQL:
        return Manners()
    if is_own:
        begin = (f"BEGIN {_READ_COMMITTED}",)
        return Manners(begin=begin, begin_preparing=begin, is_explicit=True)
    return Manners(reading="AUTOCOMMIT", writing="READ COMMITTED")


def parse_url(text: str | URL) -> URL:
    """Return the URL of a database, with its driver.

    :raises ValueError: it is not one. The message does not quote it, as it may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("the URL of a database has the form postgresql://user:password@host/name") from None
    if isinstance(text, str) and "@" in f"{url.host}{url.database}":
        # Part of the password would be taken for a host or a name, and shown.
        raise ValueError("the password in the URL of a database must be quoted: @ as %40, / as %2F, : as %3A")
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def split_timeout(url: URL, default: float) -> tuple[URL, float]:
    """Return the URL without its ``timeout``, and that number of seconds, or ``default``.

    :raises ValueError: it is not a number of seconds.
    """
    value = url.query.get(_TIMEOUT)
    if value is None:
        return url, default
    try:
        return url.difference_update_query([_TIMEOUT]), check_timeout(float(str(value)))
    except ValueError:
        raise ValueError(f"timeout in the URL of a database must be a number of seconds, got {value!r}") from None


def check_timeout(seconds: object) -> float:
    """:raises TypeError, ValueError: ``seconds`` is not a number of seconds."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"timeout must be a number of seconds, got {type(seconds).__name__}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"timeout must be more than 0 seconds, got {seconds!r}")
    return float(seconds)


def make_engine(url: URL, timeout: float) -> Engine:
    """Make an engine whose connections are in autocommit mode, so a query is a single statement.

    :raises ImportError: the driver is not installed.
    :raises ValueError: SQLAlchemy does not know the driver.
    """
    is_mysql = url.get_backend_name() in MYSQL
    try:
        driver = url.get_dialect().driver
        engine = create_engine(
            url,
            connect_args={k: v for k, v in _connect_arguments(driver, timeout).items() if k not in url.query},
            hide_parameters=True,
            poolclass=ConnectionPool,
            # A connection that comes back has no open transaction, or it is not used again: see pool.IN_USE.
            pool_reset_on_return=None,
            **({} if is_mysql else {"isolation_level": "AUTOCOMMIT"}),
        )
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{url.drivername} needs the package {error.name}; {how_to_install('sql')} brings psycopg and PyMySQL"
        ) from None
    except SQLAlchemyError as error:
        raise ValueError(f"{url.drivername} is not a driver that SQLAlchemy knows: {error}") from None
    if is_mysql:
        event.listen(engine, "connect", _read_committed)
    return engine


def _connect_arguments(driver: str, timeout: float) -> dict[str, Any]:
    if driver == "psycopg":
        # A statement that is prepared on one of PgBouncer's connections is unknown on the next one. And with a
        # SQL_ASCII database, psycopg returns bytes before a check of ours can say what is wrong.
        return {"prepare_threshold": None, "client_encoding": "utf8"}
    if driver == "pymysql":
        return {"autocommit": True}
    if driver == "mysqldb":
        # This driver's timeouts cannot be changed once it is connected.
        seconds = max(round(timeout), 1)
        return {"autocommit": True, "read_timeout": seconds, "write_timeout": seconds}
    return {}


def _read_committed(connection: Any, entry: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET SESSION TRANSACTION {_READ_COMMITTED}")
    cursor.close()


def has_rolled_back(error: BaseException | None) -> bool:
    """Return whether the server has rolled the transaction back, so that it can be retried."""
    return _state(error) in _ROLLED_BACK_STATES or _number(error) in _ROLLED_BACK_NUMBERS


def is_answered(error: BaseException | None) -> bool:
    """Return whether an error is the server's complete answer, after which the connection can be used again."""
    return has_rolled_back(error) or (_state(error) or "").startswith(_INTEGRITY_CLASS) or _number(error) == _DUPLICATE


def _state(error: BaseException | None) -> str | None:
    # psycopg has sqlstate, psycopg2 has pgcode.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _number(error: BaseException | None) -> object:
    return error.args[0] if error is not None and error.args else None
