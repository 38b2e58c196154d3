"""Failures between a store and its server, caused at a chosen moment.

A trigger of the database causes them, or a hook of the store's engine.
"""

from __future__ import annotations

import time
from contextlib import contextmanager

from sqlalchemy import create_engine, event

from usage_middleware import (
    SQLAlchemyTokenStore,
)


@contextmanager
def hooked_store(database, beginning, hook, **options):
    """Yield a store that calls ``hook`` once, before it sends a statement that begins with ``beginning``."""
    engine = create_engine(database.url, **options)
    hooks = [hook]

    @event.listens_for(engine, "before_cursor_execute")
    def before(connection, cursor, statement, *rest):
        if hooks and statement.startswith(beginning):
            hooks.pop()()

    try:
        with SQLAlchemyTokenStore(engine) as store:
            yield store
        assert not hooks
    finally:
        engine.dispose()


# Triggers that take an action the first times an operation is inserted. A sequence counts outside of transactions.
TRIGGERS = {
    "postgresql": (
        "CREATE SEQUENCE attempts",
        (
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF nextval('attempts') <= {times} THEN {action}; END IF; RETURN NEW; END $$"
        ),
        "CREATE {kind} fail {when} INSERT ON usage_operations {deferred} FOR EACH ROW EXECUTE FUNCTION fail()",
    ),
    "mariadb": (
        "CREATE SEQUENCE attempts",
        (
            "CREATE TRIGGER fail BEFORE INSERT ON usage_operations FOR EACH ROW "
            "IF NEXTVAL(attempts) <= {times} THEN {action}; END IF"
        ),
    ),
}


AGAIN = {
    "postgresql": "RAISE EXCEPTION 'again' USING ERRCODE = '{state}'",
    "mariadb": "SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}",
}


DIE = {"postgresql": "PERFORM pg_terminate_backend(pg_backend_pid())", "mariadb": "KILL CONNECTION_ID()"}


@contextmanager
def failing(database, action, times, *, deferred=False):
    """Take an action the first ``times`` that an operation is inserted.

    Yield a function that returns how often that was attempted.
    """
    name = "mariadb" if database.is_mysql else "postgresql"
    fields = {
        "times": times,
        "action": action[name],
        "kind": "CONSTRAINT TRIGGER" if deferred else "TRIGGER",
        "when": "AFTER" if deferred else "BEFORE",
        "deferred": "DEFERRABLE INITIALLY DEFERRED" if deferred else "",
    }
    database.server.execute(
        *(["SET GLOBAL log_bin_trust_function_creators = 1"] if database.is_mysql else []),
    )
    database.execute(*(statement.format(**fields) for statement in TRIGGERS[name]))
    try:
        yield (
            lambda: (
                database.execute("SELECT nextval(attempts)" if database.is_mysql else "SELECT nextval('attempts')")[0][
                    0
                ]
                - 1
            )
        )
    finally:
        if database.is_mysql:
            database.execute("DROP TRIGGER fail", "DROP SEQUENCE attempts")
        else:
            database.execute("DROP TRIGGER fail ON usage_operations", "DROP FUNCTION fail", "DROP SEQUENCE attempts")


def again(state, number):
    return {name: action.format(state=state, number=number) for name, action in AGAIN.items()}


def waits(database):
    """Return the transactions that wait for a lock."""
    if database.is_mysql:
        # The contents of this table are updated only if it has not been read for a tenth of a second.
        time.sleep(0.15)
        return database.server.execute("SELECT * FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
    return database.server.execute("SELECT * FROM pg_locks WHERE NOT granted")
