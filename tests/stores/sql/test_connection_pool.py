"""The pool of a store on a server."""

import sqlite3

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from usage_middleware.stores.sql.pool import ConnectionPool

PLACES = 15


def use_every_place(pool):
    connections = [pool.connect() for _ in range(PLACES)]
    with pytest.raises(PoolTimeoutError):
        pool.connect()
    for connection in connections:
        connection.close()


def test_connections_that_could_not_be_made_take_no_places():
    is_down = True

    def connect():
        if is_down:
            raise OSError
        return sqlite3.connect(":memory:")

    pool = ConnectionPool(connect)
    errors = []
    for _ in range(2 * PLACES):
        try:
            pool.connect()
        except Exception as error:
            errors.append(error)  # A caller may keep it, with its traceback.
    assert [type(error) for error in errors] == [OSError] * 2 * PLACES
    is_down = False
    use_every_place(pool)
    use_every_place(pool)
    pool.dispose()
