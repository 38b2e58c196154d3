"""How several statements are sent in one round trip, by the drivers that can.

SQLAlchemy waits for each statement's answer before it sends the next. A transaction of the ledger reads from several
tables and writes to several, all behind one row's lock, so those waits are what a busy token spends its time on.
psycopg's pipeline mode sends statements without waiting. PyMySQL sends several as one text, if its connection was made
with ``MULTI_STATEMENTS``. Both servers stop at the first error, so nothing after it is executed, a COMMIT included.

What a transaction writes is sent together with its COMMIT. So its row stays locked for one round trip, in which the
caller applies the rules to what it has read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Executable, Select
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import ClauseElement
from sqlalchemy.types import TypeDecorator

#: A statement and its parameters.
Request = tuple[Executable, Mapping[str, Any]]
Rows = Sequence[Sequence[Any]]

_Statement = tuple[str, "Mapping[str, Any] | None"]
_COMMIT: Final[_Statement] = ("COMMIT", None)

_Convert = Callable[[Any], Any]

# MySQL's "Capabilities Flags": several statements in one text; an UPDATE counts the rows that it has found.
MULTI_STATEMENTS: Final = 1 << 16
FOUND_ROWS: Final = 1 << 1
# MariaDB's ER_CONNECTION_KILLED. MaxScale answers it too, if it has lost the server and knows nothing of the COMMIT.
_CONNECTION_KILLED: Final = 1927


class BeforeCommit(Exception):
    """The server refused a statement that was sent together with a COMMIT, so it has not executed the COMMIT."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class PreparedStatement:
    """A statement as a driver's cursor takes it. Its text is made once, and its values are converted as SQLAlchemy
    converts them."""

    __slots__ = ("_defaults", "_from_database", "_to_database", "text")

    def __init__(self, statement: Any, names: tuple[str, ...], dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(names))
        self.text = str(compiled)
        self._defaults: dict[str, Any] = dict(compiled.params)
        self._to_database: list[tuple[str, _Convert]] = [
            (name, convert)
            for bind, name in compiled.bind_names.items()
            if (convert := bind.type.dialect_impl(dialect).bind_processor(dialect)) is not None
        ]
        self._from_database: list[tuple[int, _Convert]] = []
        if isinstance(statement, Select):
            self._from_database = [
                (place, convert)
                for place, column in enumerate(statement.selected_columns)
                # The drivers themselves give integers, floats, dates and text; ours are bytes on MySQL.
                if isinstance(column.type, TypeDecorator)
                and (convert := column.type.dialect_impl(dialect).result_processor(dialect, None)) is not None
            ]

    def parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        values = {**self._defaults, **given}
        for name, convert in self._to_database:
            values[name] = convert(values[name])
        return values

    def rows(self, fetched: Rows) -> Rows:
        if not self._from_database or not fetched:
            return fetched
        rows = [list(row) for row in fetched]
        for row in rows:
            for place, convert in self._from_database:
                row[place] = convert(row[place])
        return rows


class Batches:
    """Sends several statements over one connection."""

    def __init__(self) -> None:
        self._prepared: dict[tuple[ClauseElement, tuple[str, ...]], PreparedStatement] = {}

    def prepare(self, statement: Any, names: tuple[str, ...], dialect: Dialect) -> PreparedStatement:
        """Return a statement for the parameters of these names."""
        prepared = self._prepared.get((statement, names))
        if prepared is None:
            prepared = self._prepared[statement, names] = PreparedStatement(statement, names, dialect)
        return prepared

    def can_send(self, connection: Connection) -> bool:
        """Return whether the driver can send several statements in one round trip.

        SQLAlchemy does not see them. So an engine that logs its statements, or has listeners for them (for traces, for
        instance), gets them one by one.
        """
        seen = connection.dispatch
        if connection.engine.echo or seen.before_cursor_execute or seen.after_cursor_execute:
            return False
        driver = connection.dialect.driver
        if driver == "psycopg":
            return _has_pipelines()
        return driver == "pymysql" and bool(connection.connection.client_flag & MULTI_STATEMENTS)

    def send(
        self, connection: Connection, begin: Sequence[str], requests: Sequence[Request], *, commit: bool = False
    ) -> list[Rows]:
        """Send all statements, and return the rows of each request.

        :param commit: whether a COMMIT follows them.
        :raises BeforeCommit: the server refused one of them, and the transaction is still open.
        :raises Exception: the driver's error, of the first statement that failed.
        """
        dialect = connection.dialect
        prepared = [self.prepare(statement, tuple(parameters), dialect) for statement, parameters in requests]
        statements: list[_Statement] = [
            (each.text, each.parameters(parameters)) for each, (_, parameters) in zip(prepared, requests, strict=True)
        ]
        send = _by_pipeline if dialect.driver == "psycopg" else _as_one_text
        fetched = send(
            connection.connection.dbapi_connection,
            [*((text, None) for text in begin), *statements, *([_COMMIT] if commit else ())],
            commit,
        )
        return [each.rows(rows) for each, rows in zip(prepared, fetched[len(begin) :], strict=False)]


def _has_pipelines() -> bool:
    from psycopg import Pipeline

    return Pipeline.is_supported()  # libpq before 14 has none


def _by_pipeline(connection: Any, statements: Sequence[_Statement], commit: bool) -> list[Rows]:
    outside = sys.exc_info()[1]  # what the caller is handling already
    # An exception from outside may keep psycopg from releasing its lock, for which the end of the pipeline would wait
    # for ever. No other thread uses the connection meanwhile.
    lock, connection.lock = connection.lock, threading.RLock()
    try:
        with connection.pipeline():
            cursors = [connection.execute(text, values) for text, values in statements]
    except Exception as error:
        # If an exception from outside interrupts psycopg in the pipeline, leaving the pipeline fails too, and only that
        # is raised.
        interrupt = error.__context__
        while isinstance(interrupt, Exception) and interrupt is not outside:
            interrupt = interrupt.__context__
        if interrupt is not None and interrupt is not outside:
            raise interrupt from None
        if commit and _is_in_transaction(connection):
            raise BeforeCommit(error) from None
        raise
    finally:
        connection.lock = lock
    return [cursor.fetchall() if cursor.description else () for cursor in cursors]


def _is_in_transaction(connection: Any) -> bool:
    from psycopg.pq import TransactionStatus

    return connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)


def _as_one_text(connection: Any, statements: Sequence[_Statement], commit: bool) -> list[Rows]:
    cursor = connection.cursor()
    text = ";".join(cursor.mogrify(text, values) for text, values in statements)
    fetched: list[Rows] = []
    try:
        cursor.execute(text)
        fetched.append(cursor.fetchall() if cursor.description else ())
        while cursor.nextset():
            fetched.append(cursor.fetchall() if cursor.description else ())
    except Exception as error:
        if commit and len(fetched) < len(statements) - 1 and _is_refusal(error):
            raise BeforeCommit(error) from None
        raise
    cursor.close()
    return fetched


def _is_refusal(error: Exception) -> bool:
    """Return whether an error is MySQL's answer to a statement. PyMySQL's own errors begin at 2000."""
    number = error.args[0] if error.args else None
    return isinstance(number, int) and 1000 <= number < 2000 and number != _CONNECTION_KILLED
