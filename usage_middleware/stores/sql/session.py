"""One use of a connection: what has been sent, what has been answered, and how long to wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Executable

from .attempts import Attempt, Stage
from .batches import Batches, BeforeCommit, Request, Rows
from .dialects import Manners
from .pool import IN_USE, SET_DEADLINE
from .timeouts import SetDeadline, deadline_setter


class Session:
    """A connection for as long as one call uses it.

    :param attempt: says how long to wait for the first answer.
    :param patience: how many seconds to wait for each further one.
    """

    def __init__(
        self,
        connection: Connection,
        manners: Manners,
        batches: Batches,
        attempt: Attempt,
        *,
        patience: float,
        is_own: bool,
    ) -> None:
        self.connection: Final = connection
        self._manners = manners
        self._batches = batches
        self._attempt = attempt
        # What has yet to be sent: how the transaction begins, and what it writes.
        self._begin: tuple[str, ...] = ()
        self._writes: list[Request] = []
        self._patience = patience
        self._info = connection.info
        # If an exception arrives after this line, the mark stays and the connection is not used again.
        self._info[IN_USE] = True
        self._set_deadline: SetDeadline = deadline_setter(connection.connection.dbapi_connection, is_own=is_own)
        self._set_deadline(attempt.until)

    @property
    def dialect(self) -> str:
        return self.connection.dialect.name

    def read(self) -> None:
        """Prepare to read, outside of a transaction if the driver can."""
        if self._manners.isolation_level is not None:
            self.connection.execution_options(isolation_level=self._manners.isolation_level)

    def begin(self) -> None:
        """Begin a transaction, with the first statement."""
        self.read()
        self._begin = self._manners.begin

    def begin_preparing(self) -> None:
        """Begin a transaction that changes tables through :attr:`connection`."""
        self._begin_at_once(self._manners.begin_preparing)

    def begin_reading(self) -> None:
        """Begin a transaction that reads all of one moment through :attr:`connection`."""
        self._begin_at_once(self._manners.begin_reading)

    def _begin_at_once(self, statements: tuple[str, ...]) -> None:
        self.read()
        self._begin = statements
        self._send_begin()
        self._renew_deadline()

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        """Execute one statement and return SQLAlchemy's result."""
        self._send_writes()
        return self._execute(statement, parameters)

    def read_together(self, requests: Sequence[Request]) -> Sequence[Callable[[], Rows]]:
        """Return a function for each request that returns its rows.

        They are read in one round trip if the driver can. If not, each is read when its function is called, so what is
        never asked for costs nothing.
        """
        self._send_writes()
        if self._batches.can_send(self.connection):
            return [partial(_identity, rows) for rows in self._send(requests)]
        return [partial(self._rows, *request) for request in requests]

    def write(self, requests: Sequence[Request]) -> None:
        """Execute statements in their order: before the next one, or with COMMIT."""
        self._writes += requests

    def _send_writes(self) -> None:
        writes, self._writes = self._writes, []
        if len(writes) > 1 and self._batches.can_send(self.connection):
            self._send(writes)
        else:
            for statement, parameters in writes:
                self._execute(statement, parameters)

    def _execute(self, statement: Executable, parameters: Any) -> Any:
        self._send_begin()
        result = self.connection.execute(statement, parameters)
        self._renew_deadline()
        return result

    def _send(self, requests: Sequence[Request], *, commit: bool = False) -> list[Rows]:
        begin, self._begin = self._begin, ()
        answers = self._batches.send(self.connection, begin, requests, commit=commit)
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
        """Send what has yet to be written and COMMIT, together if the driver can, and wait for the answers."""
        if self._writes and self._batches.can_send(self.connection):
            self._attempt.stage = Stage.COMMITTING
            try:
                self._send(self._writes, commit=True)
            except BeforeCommit as refused:
                self._attempt.stage = Stage.WORKING
                raise refused.error from None
        else:
            self._send_writes()
            self._attempt.stage = Stage.COMMITTING
            self._end("COMMIT")

    def roll_back(self) -> None:
        """Send ROLLBACK and wait for its answer."""
        self._end("ROLLBACK")

    def _end(self, statement: str) -> None:
        if self._begin:
            self._begin = ()  # Nothing was sent.
        elif self._manners.is_explicit:
            self.connection.exec_driver_sql(statement)
        else:
            # SQLAlchemy ends only what it knows to be begun, and it does not see what is sent in batches.
            transaction = self.connection if self.connection.in_transaction() else self.connection.connection
            end = transaction.commit if statement == "COMMIT" else transaction.rollback
            end()

    def give_back(self) -> None:
        """Return the connection to its pool. All answers have been read, and no transaction is open."""
        # SQLAlchemy may send a ROLLBACK all the same. The deadline holds for its answer, too.
        self._info[SET_DEADLINE] = self._set_deadline
        del self._info[IN_USE]
        self.connection.close()


def _identity(rows: Rows) -> Rows:
    return rows
