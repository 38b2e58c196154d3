"""How many charges of one key a database server on a network can serve, and how many round trips a call takes.

A charge holds the lock on its token's row for a round trip, and on PostgreSQL also until its COMMIT is on the disk. So
the duration of these limits the charges of one key, however fast the server is.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from charges.at_once import MODEL, Charges, charge_at_once, charges_table, make_keys
from comparing import Result, Row, Table, in_turn
from database_servers import running_servers

_ROUND_TRIPS = (0.0, 0.001, 0.005)  # seconds
_THREADS = 8
_KEYS = 1_000
_ASKS = 200  # in a turn
_MULTI_STATEMENTS = 1 << 16  # MySQL's "Capabilities Flags": several statements in one text
_WARM_UP = 10  # calls; psycopg prepares a statement when it is executed for the fifth time

# The budgets: the most round trips, and the fewest charges to one key in the time of a round trip.
_MOST = {
    "PostgreSQL": {"look-up": 1, "charge": 3, "reserve and settle": 6},
    "MariaDB": {"look-up": 1, "charge": 5, "reserve and settle": 10},
}
_LEAST = {"PostgreSQL": 0.25, "MariaDB": 0.15}


def busy_keys(rounds: int) -> Iterator[Result]:
    """Count the round trips of calls, and charge one key and many, near and far away, on each server."""
    for running in running_servers():
        if isinstance(running, str):
            yield running
            continue
        server, url = running
        name = type(server).__name__
        yield from _round_trips(name, server.port, url)
        for seconds in _ROUND_TRIPS:
            with _away(server.port, seconds) as port:
                yield _charges(name, seconds, _at(url, port), rounds)


def _round_trips(server: str, port: int, url: str) -> Iterator[Table]:
    from proxies import Proxy
    from sqlalchemy import create_engine, make_url

    with closing(Proxy(port)) as proxy:
        away = _at(url, proxy.port)
        engines = {"an engine of the host": create_engine(away)}
        if server == "MariaDB":
            several = make_url(away).update_query_dict({"client_flag": str(_MULTI_STATEMENTS)})
            engines["the same with client_flag in its URL"] = create_engine(several)
        for how, url_or_engine in {"a URL": away, **engines}.items():
            taken = _taken(url_or_engine, lambda: proxy.round_trips)
            budgets = _MOST[server] if how == "a URL" else {}
            rows = [Row(call, count, *[float(count)] * 3, budgets.get(call)) for call, count in taken.items()]
            yield Table(f"Round trips to {server}, {how}", [Row("a query", 1), *rows], "round trips")
        for engine in engines.values():
            engine.dispose()


def _taken(url_or_engine: Any, count: Callable[[], int]) -> dict[str, int]:
    from usage_middleware import SQLAlchemyTokenStore

    with SQLAlchemyTokenStore(url_or_engine) as store:
        (key,) = make_keys(store, 1)
        calls: dict[str, Callable[[str], Any]] = {
            "look-up": lambda _: store.get(key),
            "charge": lambda name: store.charge(key, 1, model=MODEL, idempotency_key=f"charge {name}"),
            "reserve and settle": lambda name: store.settle(
                store.reserve(key, 2, model=MODEL, idempotency_key=f"reserve {name}"), 1
            ),
        }
        taken = {}
        for name, call in calls.items():
            for number in range(_WARM_UP):
                call(str(number))
            before = count()
            call("counted")
            taken[name] = count() - before
    return taken


def _charges(server: str, seconds: float, url: str, rounds: int) -> Table:
    from usage_middleware import SQLAlchemyTokenStore

    reference = "queries, one after the other"
    with SQLAlchemyTokenStore(url) as store:
        keys = make_keys(store, _KEYS)
        at_once = {
            "one key, 1 thread": [keys[:1]],
            f"one key, {_THREADS} threads": [keys[:1]] * _THREADS,
            f"{_KEYS:,} keys, {_THREADS} threads": [keys] * _THREADS,
        }
        for each in at_once.values():
            charge_at_once(store, each, seconds=0.1)  # connects
        charges: dict[str, list[Charges]] = {name: [] for name in (reference, *at_once)}
        with _asking(url) as ask:
            for turn in range(rounds):
                for name in in_turn(list(charges), turn):
                    charges[name].append(charge_at_once(store, at_once[name]) if name in at_once else ask())
    return charges_table(
        f"Charges to {server}, {seconds * 1e3:g} ms away",
        charges,
        {f"one key, {_THREADS} threads": _LEAST[server]} if seconds == 0.001 else {},
    )


@contextmanager
def _asking(url: str) -> Iterator[Callable[[], Charges]]:
    """Yield a function that measures what the bare driver needs for a query."""
    from sqlalchemy import create_engine

    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:

        def ask() -> Charges:
            latencies = []
            for _ in range(_ASKS):
                begun = time.perf_counter()
                connection.exec_driver_sql("SELECT 1").all()
                latencies.append(time.perf_counter() - begun)
            return Charges(1 / median(latencies), sorted(latencies), [_ASKS])

        yield ask
    engine.dispose()


@contextmanager
def _away(port: int, round_trip: float) -> Iterator[int]:
    """Yield the port of a server as if a round trip to it took that many seconds.

    The proxy runs in a process of its own. In this one, its threads would slow down those that charge.
    """
    if not round_trip:
        yield port
        return
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_forward, args=(port, round_trip / 2, ours, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("end")
        process.join()


def _forward(port: int, delay: float, parent: Connection, told: Connection) -> None:
    from proxies import Proxy

    parent.close()  # so that this process notices if its parent ends
    with closing(Proxy(port, delay=delay)) as proxy, suppress(EOFError):
        told.send(proxy.port)
        told.recv()


def _at(url: str, port: int) -> str:
    from sqlalchemy import make_url

    return make_url(url).set(port=port).render_as_string(hide_password=False)
