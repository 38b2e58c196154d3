"""The statements of SQLite connections, and errors that some of them raise."""

import sqlite3
from contextlib import contextmanager

import pytest

from usage_middleware import StoreError


class Statements:
    """The statements of all connections, in order, and the errors that some of them raise."""

    def __init__(self):
        self.seen = []
        self._errors = {}

    @contextmanager
    def watched(self, errors=()):
        """:param errors: functions that return the error to raise, or None, by the statement's number, from 1, and
        whether they are called ``"before"`` or ``"after"`` it is done; or of a rollback, by that word."""
        self.seen = seen = []
        self._errors = dict(errors)
        try:
            yield seen
        finally:
            self.__init__()

    def reach(self, place):
        error = self._errors[place]() if place in self._errors else None
        if error is not None:
            raise error


@contextmanager
def watched_statements():
    """Watch the connections that are opened from now on. When the test is done with them, all are closed."""
    statements = Statements()
    opened = []

    class Cursor(sqlite3.Cursor):
        def execute(self, sql, *parameters):
            statements.seen.append(sql)
            number = len(statements.seen)
            statements.reach((number, "before"))
            super().execute(sql, *parameters)
            try:
                statements.reach((number, "after"))
            except BaseException:
                self.close()  # the traceback has it
                raise
            return self

    class Connection(sqlite3.Connection):
        is_closed = False

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(self)

        def close(self):
            super().close()
            self.is_closed = True

        def cursor(self):
            return super().cursor(Cursor)

        def execute(self, *arguments):
            return self.cursor().execute(*arguments)

        def rollback(self):
            statements.reach("rollback")
            super().rollback()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "Connection", Connection)
        yield statements
    assert opened
    left = [connection for connection in opened if not connection.is_closed]
    for connection in left:
        connection.close()
    assert not left, "connections that were not closed"


def disk_full():
    return sqlite3.OperationalError("database or disk is full")


def io_error():
    return sqlite3.OperationalError("disk I/O error")


def locked():
    return sqlite3.OperationalError("database is locked")


each_error = pytest.mark.parametrize(
    ("error", "raised"),
    [
        pytest.param(disk_full, StoreError, id="disk full"),
        pytest.param(io_error, StoreError, id="I-O error"),
        pytest.param(locked, StoreError, id="locked"),
        pytest.param(KeyboardInterrupt, KeyboardInterrupt, id="interrupted"),
        pytest.param(MemoryError, MemoryError, id="no memory"),
    ],
)
