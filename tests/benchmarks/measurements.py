"""The parts: what is measured, against what, and the budgets."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calling import (
    USAGE_PATH,
    asgi_usage_request,
    by_hand,
    check_same_answer,
    environ,
    start_response,
    usage_request,
)
from charges.busy_keys import busy_keys
from charges.charging import charges_by_threads, durable_charge, slowest_charge
from comparing import Contender, Result, compare
from database_servers import store_on_servers
from histories import days_of_a_year, pages_of_a_log
from importing import import_of_a_file
from metered import metered_events, metered_request
from peers import BARE_FLASK, DJANGO, FASTAPI, FASTAPI_ASYNC, FLASK, FLASK_SQLALCHEMY, OURS, hand_written, present
from proxying import through_proxies
from scaling import by_number_of_threads, by_number_of_tokens
from serving import over_http
from tokens_database import filled_database, key, random_keys
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from usage_middleware import MemoryTokenStore, UsageMiddleware

# Two are as long as the usage path, with and without a slash at its end: comparing texts of other lengths is faster.
_OTHER_PATHS = ("/v1/chat/completions", "/v1/models/mini-1", "/api/usage/quota", "/static/app.css")
_MOST_IN_MEMORY = 100_000


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    rounds: int
    long_rounds: int
    tokens: int
    tokens_most: int
    at_once: int
    server: tuple[str, ...]
    charging_threads: int
    writers: int
    charges: int
    import_tokens: int
    operations: int


def _pass_through(options: Options) -> Iterator[Result]:
    """Measure what a middleware adds to a call of the application that it wraps."""
    paths = itertools.cycle(_OTHER_PATHS)

    def contender(name: str, app: Any, *, budget: float | None = None) -> Contender:
        return Contender(
            name,
            "app(item, start_response)",
            lambda: environ(next(paths)),
            app=app,
            start_response=start_response,
            budget=budget,
        )

    contenders = [
        contender("werkzeug DispatcherMiddleware, no mounts", DispatcherMiddleware(_wrapped)),
        contender("werkzeug ProxyFix", ProxyFix(_wrapped)),
        contender("a comparison in a closure", _closure(_wrapped)),
    ]
    try:
        from whitenoise import WhiteNoise
    except ImportError:
        yield "WhiteNoise: left out, whitenoise is not installed; the budget is a multiple of it"
        contenders.append(contender("UsageMiddleware", UsageMiddleware(_wrapped, {})))
    else:
        contenders.insert(0, contender("WhiteNoise, no files", WhiteNoise(_wrapped)))
        contenders.insert(1, contender("UsageMiddleware", UsageMiddleware(_wrapped, {}), budget=0.4))
    yield compare(
        "A request for another path: what is added to a call of the wrapped application",
        *contenders,
        baseline=contender("the wrapped application", _wrapped),
        rounds=options.rounds,
    )


def _usage(options: Options) -> Iterator[Result]:
    """Compare a whole usage request with the least work that it needs, and with frameworks."""
    make_key = random_keys(options.tokens)
    with filled_database(options.tokens) as path, ExitStack() as stack:
        answer = hand_written(stack.enter_context(closing(sqlite3.connect(path, isolation_level=None))))
        ours = stack.enter_context(OURS.make(path))
        check_same_answer(answer, ours)
        yield compare(
            "A usage request, against the same by hand",
            by_hand(answer, make_key),
            usage_request(OURS.name, ours, make_key, budget=1.3),
            rounds=options.rounds,
        )
        flask_views, lines = present((FLASK, BARE_FLASK))
        yield from lines
        for peer in flask_views:
            view = stack.enter_context(peer.make(path))
            check_same_answer(answer, view)
            told = "gives the same answer, headers included" if peer is FLASK else "leaves out all that it can"
            yield compare(
                f"A usage request, against a Flask view that {told}",
                usage_request(peer.name, view, make_key),
                usage_request(OURS.name, ours, make_key, budget=0.25 if peer is FLASK else None),
                rounds=options.rounds,
            )
        yield from _frameworks(path, answer, make_key, options.long_rounds)


def _frameworks(path: Path, answer: Callable[[str], str], make_key: Callable[[], str], rounds: int) -> Iterator[Result]:
    peers, lines = present((OURS, FLASK, FLASK_SQLALCHEMY, DJANGO, FASTAPI, FASTAPI_ASYNC))
    yield from lines
    contenders = []
    with ExitStack() as stack:
        run = stack.enter_context(closing(asyncio.new_event_loop())).run_until_complete
        for peer in peers:
            app = stack.enter_context(peer.make(path))
            # FastAPI answers in another thread, whose time counts as well.
            settings = {"clock": time.process_time, "calls": peer.calls}
            check_same_answer(answer, app, run if peer.is_asgi else None)
            if peer.is_asgi:
                contenders.append(asgi_usage_request(peer.name, app, run, make_key, **settings))
            else:
                contenders.append(usage_request(peer.name, app, make_key, **settings))
        yield compare(
            "A usage request, as frameworks answer it: processor time of all threads, ASGI called plainly by asyncio",
            *contenders,
            rounds=rounds,
        )


def _usage_in_memory(options: Options) -> Iterator[Result]:
    """Measure the same with stores that are not databases. It has no budget: it shows how much the database costs."""
    count = min(options.tokens, _MOST_IN_MEMORY)
    make_key = random_keys(count)
    with (
        filled_database(count) as path,
        closing(sqlite3.connect(path, isolation_level=None)) as connection,
        MemoryTokenStore() as memory,
    ):
        plain = {}
        for number in range(count):
            _, token = memory.create(key=key(number), name=f"Token {number}", total_available=1_000_000)
            plain[key(number)] = token
        yield compare(
            f"A usage request with tokens in memory ({count:,}), against the SQLite look-up by hand",
            by_hand(hand_written(connection), make_key),
            usage_request("UsageMiddleware, MemoryTokenStore", UsageMiddleware(_wrapped, memory), make_key),
            usage_request("UsageMiddleware, dict", UsageMiddleware(_wrapped, plain), make_key),
            rounds=options.rounds,
        )


# By the names that the option --only takes.
PARTS: dict[str, tuple[Callable[[Options], Iterator[Result]], ...]] = {
    "pass-through": (_pass_through,),
    "usage": (_usage, _usage_in_memory),
    "tokens": (lambda options: by_number_of_tokens(options.tokens_most, options.long_rounds),),
    "threads": (lambda options: by_number_of_threads(options.tokens, options.at_once, options.long_rounds),),
    "http": (lambda options: over_http(options.server, options.tokens, options.at_once, options.long_rounds),),
    "proxies": (lambda options: through_proxies(options.at_once, options.long_rounds),),
    "charges": (
        lambda options: durable_charge(options.rounds),
        lambda options: charges_by_threads(options.charging_threads, options.long_rounds),
        lambda options: slowest_charge(options.writers, options.charges),
    ),
    "metered": (
        lambda options: metered_request(options.rounds),
        lambda options: metered_events(options.rounds),
    ),
    "histories": (
        lambda options: days_of_a_year(options.long_rounds),
        lambda options: pages_of_a_log(options.operations, options.long_rounds),
    ),
    "servers": (lambda options: store_on_servers(options.tokens, options.long_rounds),),
    "busy keys": (lambda options: busy_keys(options.long_rounds),),
    "import": (lambda options: import_of_a_file(options.import_tokens),),
}


def _wrapped(environ: Any, start_response: Any) -> list[bytes]:
    return [b""]


def _closure(app: Any) -> Callable[[Any, Any], Any]:
    def middleware(environ: Any, start_response: Any) -> Any:
        if environ.get("PATH_INFO") == USAGE_PATH:
            return []
        return app(environ, start_response)

    return middleware
