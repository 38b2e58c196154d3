"""One transaction on one connection: what has been sent, what has been answered, and how long to wait."""

from __future__ import annotations

import time
from typing import Any, Final

from sqlalchemy import Connection, Executable

from .dialects import Manners
from .pool import IN_USE
from .timeouts import SetDeadline, deadline_setter


class Session:
    """A connection for as long as one call uses it.

    :param until: the time (of :func:`time.monotonic`) at which the call stops waiting for its first answer.
    :param patience: how many seconds it waits for each further one.
    """

    def __init__(
        self, connection: Connection, manners: Manners, until: float, patience: float, *, is_own: bool
    ) -> None:
        self.connection: Final = connection
        self._manners = manners
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
        if self._manners.reading is not None:
            self.connection.execution_options(isolation_level=self._manners.reading)

    def begin(self) -> None:
        """Begin a transaction, with the first statement."""
        self._isolate()
        self._begin = self._manners.begin

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        """Execute one statement and return SQLAlchemy's result."""
        self._send_begin()
        result = self.connection.execute(statement, parameters)
        self._set_deadline(time.monotonic() + self._patience)
        return result

    def begin_preparing(self) -> None:
        """Begin a transaction that changes tables through :attr:`connection`."""
        self._isolate()
        self._begin = self._manners.begin_preparing
        self._send_begin()
        self._set_deadline(time.monotonic() + self._patience)

    def _isolate(self) -> None:
        if self._manners.writing is not None:
            self.connection.execution_options(isolation_level=self._manners.writing)

    def _send_begin(self) -> None:
        for text in self._begin:
            self.connection.exec_driver_sql(text)
        self._begin = ()

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
        self._set_deadline(None)
        del self._info[IN_USE]
        self.connection.close()
