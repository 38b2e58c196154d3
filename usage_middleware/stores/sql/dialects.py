"""What differs between databases and drivers: URLs, engines, how a transaction begins, and what an error means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ...errors import StoreError
from ...extras import how_to_install
from .batches import FOUND_ROWS, MULTI_STATEMENTS
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

_TIMEOUT: Final = "timeout"
_READ_COMMITTED: Final = "ISOLATION LEVEL READ COMMITTED"
_REPEATABLE_READ: Final = "ISOLATION LEVEL REPEATABLE READ"


@dataclass(frozen=True, slots=True)
class Manners:
    """How an engine's connections are used.

    Transactions are READ COMMITTED, so what is read after taking a lock is what other transactions had committed when
    the lock was granted.
    """

    #: The isolation level that SQLAlchemy sets on a connection, if it must. PostgreSQL's drivers only remember it.
    isolation_level: str | None = None
    #: The statements that begin a transaction, beyond what the driver sends.
    begin: tuple[str, ...] = ()
    #: The statements that begin a transaction that changes tables. MySQL commits after each such change, and what
    #: follows must be in a transaction again.
    begin_preparing: tuple[str, ...] = ()
    #: The statements that begin a transaction that reads all of one moment.
    begin_reading: tuple[str, ...] = ()
    #: Whether COMMIT and ROLLBACK are sent as statements, because in autocommit mode a driver, or SQLAlchemy with
    #: ``skip_autocommit_rollback``, may not send them.
    is_explicit: bool = False


def manners(engine: Engine, *, is_own: bool) -> Manners:
    """Return how to use the connections of an engine.

    :param is_own: whether :func:`make_engine` made it; otherwise it is the caller's.
    """
    if engine.dialect.name in MYSQL:
        # For the next transaction alone. SQLAlchemy would change the session, and change it back for the pool.
        isolation = () if is_own else (f"SET TRANSACTION {_READ_COMMITTED}",)
        return Manners(
            begin=(*isolation, "START TRANSACTION"),
            begin_preparing=("SET SESSION autocommit = 0",),
            begin_reading=(f"SET TRANSACTION {_REPEATABLE_READ}", "START TRANSACTION READ ONLY"),
            is_explicit=not is_own,
        )
    if engine.dialect.name not in POSTGRESQL:
        return Manners()
    # In autocommit mode, psycopg sends BEGIN together with what follows. By itself it waits for the answer.
    begin = (f"BEGIN {_READ_COMMITTED}",)
    return Manners(
        isolation_level=None if is_own else "AUTOCOMMIT",
        begin=begin,
        begin_preparing=begin,
        begin_reading=(f"BEGIN {_REPEATABLE_READ} READ ONLY",),
        is_explicit=True,
    )


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
        return {"autocommit": True, "client_flag": MULTI_STATEMENTS | FOUND_ROWS}
    if driver == "mysqldb":
        # This driver's timeouts cannot be changed once it is connected.
        seconds = max(round(timeout), 1)
        return {"autocommit": True, "read_timeout": seconds, "write_timeout": seconds}
    return {}


def _read_committed(connection: Any, entry: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET SESSION TRANSACTION {_READ_COMMITTED}")
    cursor.close()


def refuse_encoding(engine: Engine, seconds_left: Callable[[], float | None]) -> None:
    """Let no call of ours use a database of PostgreSQL that does not know what its bytes mean.

    With the encoding SQL_ASCII, psycopg returns text as bytes, on which even SQLAlchemy fails.
    """
    if engine.driver != "psycopg":
        return

    # Before SQLAlchemy's own listener, and not for what an engine's owner does with it.
    @event.listens_for(engine, "connect", insert=True)
    def check(connection: Any, entry: object) -> None:
        # The server states it when it is connected to.
        if seconds_left() is not None and connection.info.parameter_status("server_encoding") == "SQL_ASCII":
            name = engine.url.set(query={}).render_as_string(hide_password=True)
            raise StoreError(
                f"{name} has the encoding SQL_ASCII, in which text is only bytes; make another database, "
                "with CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"
            )
