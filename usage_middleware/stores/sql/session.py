"""One use of a connection: what has been sent, what has been answered, and how long to wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Executable

from .batches import Batches, Request, Rows
from .dialects import Manners
from .pool import IN_USE, SET_DEADLINE
from .timeouts import SetDeadline, deadline_setter


class Session:
    """A connection for as long as one call uses it.

    :param until: the time (of :func:`time.monotonic`) at which the call stops waiting for its first answer.
    :param patience: how many seconds it waits for each further one.
    """

    def __init__(
        self, connection: Connection, manners: Manners, batches: Batches, *, until: float, patience: float, is_own: bool
    ) -> None:
        self.connection: Final = connection
        self._manners = manners
        self._batches = batches
        self._begin: tuple[str, ...] = ()
        self._patience = patience
        self._info = connection.info
        # If an exception arrives after this line, the mark stays and the connection is not used again.
        self._info[IN_USE] = True
        self._set_deadline: SetDeadline = deadline_setter(connection.connection.dbapi_connection, is_own=is_own)
        self._set_deadline(until)

    @property
    def dialect(self) -> str:
        return self.connection.dialect.name

    def read(self) -> None:
        """Prepare to read, outside of a transaction if the driver can."""
        if self._manners.isolation_level is not None:
            self.connection.execution_options(isolation_level=self._manners.isolation_level)

    def begin(self) -> None:
        """Begin a transaction, with the first statement."""
        self._isolate()
        self._begin = self._manners.begin

    def begin_preparing(self) -> None:
        """Begin a transaction that changes tables through :attr:`connection`."""
        self._begin_at_once(self._manners.begin_preparing)

    def begin_reading(self) -> None:
        """Begin a transaction that reads all of one moment through :attr:`connection`."""
        self._begin_at_once(self._manners.begin_reading)

    def _begin_at_once(self, statements: tuple[str, ...]) -> None:
        self._isolate()
        self._begin = statements
        self._send_begin()
        self._renew_deadline()

    def _isolate(self) -> None:
        self.read()
        # SQLAlchemy commits only what it knows to be begun, and it does not see what is sent in batches.
        self.connection.begin()

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        """Execute one statement and return SQLAlchemy's result."""
        self._send_begin()
        result = self.connection.execute(statement, parameters)
        self._renew_deadline()
        return result

    def read_together(self, requests: Sequence[Request]) -> Sequence[Callable[[], Rows]]:
        """Return a function for each request that returns its rows.

        They are read in one round trip if the driver can. If not, each is read when its function is called, so what is
        never asked for costs nothing.
        """
        if self._batches.can_send(self.connection):
            return [partial(_identity, rows) for rows in self._send(requests)]
        return [partial(self._rows, *request) for request in requests]

    def write_together(self, requests: Sequence[Request]) -> None:
        """Execute statements in their order, in one round trip if the driver can."""
        if len(requests) > 1 and self._batches.can_send(self.connection):
            self._send(requests)
        else:
            for statement, parameters in requests:
                self.execute(statement, parameters)

    def _send(self, requests: Sequence[Request]) -> list[Rows]:
        begin, self._begin = self._begin, ()
        answers = self._batches.send(self.connection, begin, requests)
        self._renew_deadline()
        return answers

    def _rows(self, statement: Executable, parameters: Any) -> Rows:
        rows: Rows = self.execute(statement, parameters).all()
        return rows

    def _send_begin(self) -> None:
        for text in self._begin:
            self.connection.exec_driver_sql(text)
        self._begin = ()

    def _renew_deadline(self) -> None:
        self._set_deadline(time.monotonic() + self._patience)

    def commit(self) -> None:
        """Send COMMIT and wait for its answer."""
        self._end("COMMIT")

    def roll_back(self) -> None:
        """Send ROLLBACK and wait for its answer."""
        self._end("ROLLBACK")

    def _end(self, statement: str) -> None:
        if self._begin:
            self._begin = ()  # Nothing was sent.
        elif self._manners.is_explicit:
            self.connection.exec_driver_sql(statement)
        elif statement == "COMMIT":
            self.connection.commit()
        else:
            self.connection.rollback()

    def give_back(self) -> None:
        """Return the connection to its pool. All answers have been read, and no transaction is open."""
        # SQLAlchemy may send a ROLLBACK all the same. The deadline holds for its answer, too.
        self._info[SET_DEADLINE] = self._set_deadline
        del self._info[IN_USE]
        self.connection.close()


def _identity(rows: Rows) -> Rows:
    return rows
