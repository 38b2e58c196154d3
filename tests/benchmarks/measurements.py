"""What is measured, against what, and the budgets."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from wsgiref.util import FileWrapper

from charging import durable_charge, slowest_charge
from comparing import Contender, Table, compare
from flask import Flask, Response, request
from tokens_database import filled_database, key, random_keys
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from whitenoise import WhiteNoise

from usage_middleware import MemoryTokenStore, SQLiteTokenStore, UsageMiddleware

USAGE_PATH = "/api/usage/token"

# Two are as long as the usage path, with and without its slash: texts of another length are told apart sooner.
_OTHER_PATHS = ("/v1/chat/completions", "/v1/models/mini-1", "/api/usage/quota", "/static/app.css")
_MOST_IN_MEMORY = 100_000

# A GET request as a server behind a proxy passes it on.
_ENVIRON = {
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.input": io.BytesIO(),
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
    "wsgi.file_wrapper": FileWrapper,
    "SERVER_SOFTWARE": "server/1.0",
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": "127.0.0.1",
    "REMOTE_PORT": "50000",
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "",
    "QUERY_STRING": "",
    "RAW_URI": "/",
    "HTTP_HOST": "gateway.example",
    "HTTP_USER_AGENT": "client/1.0",
    "HTTP_ACCEPT": "application/json",
    "HTTP_ACCEPT_ENCODING": "gzip, deflate, br",
    "HTTP_ACCEPT_LANGUAGE": "en",
    "HTTP_CONNECTION": "close",
    "HTTP_X_FORWARDED_FOR": "192.0.2.1",
    "HTTP_X_FORWARDED_PROTO": "https",
    "HTTP_AUTHORIZATION": "",
}

# What the wire contract has on every answer, beside its content type and length.
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
}

# What a server does: it sends what it is given, and closes it.
_SERVE = """\
body = app(item, start_response)
for chunk in body:
    pass
if hasattr(body, "close"):
    body.close()
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    rounds: int
    tokens: int
    writers: int
    charges: int


def pass_through(options: Options) -> Iterator[Table]:
    """What a middleware adds to a call of the application that it wraps."""
    paths = itertools.cycle(_OTHER_PATHS)

    def contender(name: str, app: Any, *, budget: float | None = None) -> Contender:
        return Contender(
            name,
            "app(item, start_response)",
            lambda: _environ(next(paths), ""),
            app=app,
            start_response=_start_response,
            budget=budget,
        )

    yield compare(
        "A request for another path: what is added to a call of the wrapped application",
        contender("WhiteNoise, no files", WhiteNoise(_wrapped)),
        contender("UsageMiddleware", UsageMiddleware(_wrapped, {}), budget=0.5),
        contender("werkzeug DispatcherMiddleware, no mounts", DispatcherMiddleware(_wrapped)),
        contender("werkzeug ProxyFix", ProxyFix(_wrapped)),
        contender("a comparison in a closure", _closure(_wrapped)),
        baseline=contender("the wrapped application", _wrapped),
        rounds=options.rounds,
    )


def usage_request(options: Options) -> Iterator[Table]:
    """A whole usage request, against nothing but the work that it cannot do without, and against a Flask view."""
    make_key = random_keys(options.tokens)
    with (
        filled_database(options.tokens) as path,
        closing(sqlite3.connect(path, isolation_level=None)) as connection,
        SQLiteTokenStore(path) as store,
    ):
        by_hand = _hand_written(connection)
        view, bare_view = _flask_app(by_hand, _HEADERS).wsgi_app, _flask_app(by_hand, {}).wsgi_app
        app = UsageMiddleware(_wrapped, store)
        _check_same_answers(by_hand, view, bare_view, app)
        yield compare(
            "A usage request, against the same by hand",
            _by_hand(by_hand, make_key),
            _usage_request("UsageMiddleware, SQLiteTokenStore", app, make_key, budget=1.5),
            rounds=options.rounds,
        )
        yield compare(
            "A usage request, against a Flask view that gives the same answer, headers included",
            _usage_request("Flask view", view, make_key),
            _usage_request("UsageMiddleware, SQLiteTokenStore", app, make_key, budget=0.25),
            rounds=options.rounds,
        )
        yield compare(
            "A usage request, against a Flask view that leaves out all that it can",
            _usage_request("Flask view, bare", bare_view, make_key),
            _usage_request("UsageMiddleware, SQLiteTokenStore", app, make_key),
            rounds=options.rounds,
        )


def usage_request_in_memory(options: Options) -> Iterator[Table]:
    """The same with the stores that are no database. No budget: it tells what the database's part is."""
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
            _by_hand(_hand_written(connection), make_key),
            _usage_request("UsageMiddleware, MemoryTokenStore", UsageMiddleware(_wrapped, memory), make_key),
            _usage_request("UsageMiddleware, dict", UsageMiddleware(_wrapped, plain), make_key),
            rounds=options.rounds,
        )


MEASUREMENTS: tuple[Callable[[Options], Iterator[Table]], ...] = (
    pass_through,
    usage_request,
    usage_request_in_memory,
    lambda options: durable_charge(options.rounds),
    lambda options: slowest_charge(options.writers, options.charges),
)


def _by_hand(answer: Callable[[str], str], make_key: Callable[[], str]) -> Contender:
    return Contender("by hand: one look-up, one json.dumps", "answer(item)", make_key, answer=answer)


def _usage_request(name: str, app: Any, make_key: Callable[[], str], *, budget: float | None = None) -> Contender:
    def make_environ() -> dict[str, Any]:
        return _environ(USAGE_PATH, f"Bearer sk-{make_key()}")

    return Contender(name, _SERVE, make_environ, app=app, start_response=_start_response, budget=budget)


def _wrapped(environ: Any, start_response: Any) -> list[bytes]:
    return [b""]


def _start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    pass


def _closure(app: Any) -> Callable[[Any, Any], Any]:
    def middleware(environ: Any, start_response: Any) -> Any:
        if environ.get("PATH_INFO") == USAGE_PATH:
            return []
        return app(environ, start_response)

    return middleware


def _environ(path: str, authorization: str) -> dict[str, Any]:
    # Servers decode a path from what they received. So it is a new object, whose hash nobody has computed yet.
    return _ENVIRON | {"PATH_INFO": path.encode().decode("latin-1"), "HTTP_AUTHORIZATION": authorization}


def _hand_written(connection: sqlite3.Connection) -> Callable[[str], str]:
    def answer(key: str) -> str:
        row = connection.execute(
            "SELECT name, total_used, total_available, unlimited_quota, model_limits, model_limits_enabled, expires_at"
            " FROM tokens WHERE digest = ?",
            (hashlib.sha256(key.encode()).digest(),),
        ).fetchone()
        return json.dumps(
            {
                "code": True,
                "message": "ok",
                "data": {
                    "object": "token_usage",
                    "name": row[0],
                    "total_granted": row[1] + row[2],
                    "total_used": row[1],
                    "total_available": row[2],
                    "unlimited_quota": row[3] == 1,
                    "model_limits": {} if row[4] == "{}" else json.loads(row[4]),
                    "model_limits_enabled": row[5] == 1,
                    "expires_at": row[6],
                },
            }
        )

    return answer


def _flask_app(answer: Callable[[str], str], headers: dict[str, str]) -> Flask:
    flask_app = Flask(__name__, static_folder=None)

    @flask_app.get(USAGE_PATH)
    def usage() -> Response:
        key = request.headers["Authorization"].removeprefix("Bearer ").removeprefix("sk-")
        return Response(answer(key), headers=headers, content_type="application/json; charset=utf-8")

    return flask_app


def _check_same_answers(by_hand: Callable[[str], str], *apps: Any) -> None:
    expected = json.loads(by_hand(key(0)))
    for app in apps:
        body = app(_environ(USAGE_PATH, f"Bearer sk-{key(0)}"), _start_response)
        answer = json.loads(b"".join(body))
        if hasattr(body, "close"):
            body.close()
        if answer != expected:
            raise SystemExit(f"{app!r} answers {answer!r} where {expected!r} was expected: nothing to compare")
