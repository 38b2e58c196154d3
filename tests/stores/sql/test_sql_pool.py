"""The pool of connections of stores that make their own engine. What it does is the same over any database."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from interrupts import count_steps, interrupted_at
from processes import in_a_process
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from usage_middleware.stores.sql.pool import ConnectionPool

MOST = 15


@pytest.fixture
def engine():
    engine = create_engine("sqlite://", poolclass=ConnectionPool)
    yield engine
    engine.dispose()


def use_at_once(engine, count):
    connections = [engine.connect() for _ in range(count)]
    for connection in connections:
        connection.close()


def test_each_use_beyond_the_most_waits_as_long_as_it_may(engine):
    engine.pool.wait = lambda: 0.05
    connections = [engine.connect() for _ in range(MOST)]
    begun = time.monotonic()
    with pytest.raises(PoolTimeoutError, match="all 15 connections are in use"):
        engine.connect()
    assert time.monotonic() - begun >= 0.05
    connections.pop().close()
    engine.connect().close()
    for connection in connections:
        connection.close()
    assert engine.pool.status() == "15 connections are idle, 15 more may be used"


@pytest.mark.slow
def test_a_connection_that_is_dropped_gives_its_place_back(engine):
    for _ in range(2 * MOST):
        engine.connect()
    gc.collect()
    use_at_once(engine, MOST)


def things_of_pools():
    gc.collect()
    return sum(type(thing).__module__ == ConnectionPool.__module__ for thing in gc.get_objects())


@pytest.mark.slow
def test_nothing_is_left_of_a_pool_that_is_freed():
    before = things_of_pools()
    engine = create_engine("sqlite://", poolclass=ConnectionPool)
    use_at_once(engine, 3)
    engine.dispose()  # which makes another pool
    use_at_once(engine, 3)
    assert things_of_pools() > before
    engine.dispose()
    del engine
    assert things_of_pools() <= before


def interrupt_each_step(stride):
    sys.unraisablehook = lambda unraisable: None  # of finalizers
    engine = create_engine("sqlite://", poolclass=ConnectionPool, connect_args={"check_same_thread": False})

    def use():
        with engine.connect():
            pass

    def interrupt():
        steps = count_steps(use)
        for count, number in enumerate(range(1, steps + 1, int(stride))):
            interrupted_at(number, use, lambda: None)
            if count % 10 == 0:
                gc.collect()  # SQLAlchemy's objects refer to each other
        print(steps)

    use()
    # In a thread of its own: an exception at an opcode that ends a handler leaves it with that handler until it ends.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(interrupt).result()
    gc.collect()
    use_at_once(engine, MOST)
    engine.dispose()


@pytest.mark.slow
def test_an_exception_at_any_step_loses_no_place(full):
    """Neither of the pool's own steps, nor of SQLAlchemy's."""
    assert int(in_a_process(interrupt_each_step, 1 if full else 7)) > 500
