"""Call an application as a server does, with a request as a server behind a proxy receives it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any
from wsgiref.util import FileWrapper

from comparing import Contender
from tokens_database import key

USAGE_PATH = "/api/usage/token"

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

# The same request as an ASGI server passes it on. The Authorization header is added in front.
_HEADERS = [
    (name.removeprefix("HTTP_").lower().replace("_", "-").encode(), str(value).encode())
    for name, value in _ENVIRON.items()
    if name.startswith("HTTP_") and name != "HTTP_AUTHORIZATION"
]
_SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": USAGE_PATH,
    "raw_path": USAGE_PATH.encode(),
    "root_path": "",
    "query_string": b"",
    "client": ("127.0.0.1", 50000),
    "server": ("127.0.0.1", 8000),
}

# The work of a server: it sends the chunks of a body, and closes it.
SERVE = """\
body = app(item, start_response)
for chunk in body:
    pass
if hasattr(body, "close"):
    body.close()
"""


def environ(path: str, authorization: str = "") -> dict[str, Any]:
    # A server decodes the path of each request. So it is a new object here too, whose hash is not computed yet.
    return _ENVIRON | {"PATH_INFO": path.encode().decode("latin-1"), "HTTP_AUTHORIZATION": authorization}


def usage_environ(key: str) -> dict[str, Any]:
    return environ(USAGE_PATH, f"Bearer sk-{key}")


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    pass


def answer_of(app: Any, environ: dict[str, Any]) -> bytes:
    """Return the whole body that a WSGI application answers with."""
    body = app(environ, start_response)
    try:
        return b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


def by_hand(answer: Callable[[str], str], make_key: Callable[[], str], name: str = "") -> Contender:
    return Contender(name or "by hand: one look-up, one json.dumps", "answer(item)", make_key, answer=answer)


def usage_request(name: str, app: Any, make_key: Callable[[], str], **settings: Any) -> Contender:
    """Return a usage request that a WSGI application answers."""

    def make_environ() -> dict[str, Any]:
        return usage_environ(make_key())

    return Contender(name, SERVE, make_environ, app=app, start_response=start_response, **settings)


def asgi_usage_request(name: str, app: Any, run: Any, make_key: Callable[[], str], **settings: Any) -> Contender:
    """Return a usage request that an ASGI application answers.

    One task awaits all requests of a turn, so the cost of starting the loop hardly counts.
    """

    def make_scope() -> dict[str, Any]:
        return _scope(make_key())

    async def send(message: dict[str, Any]) -> None:
        pass

    async def serve(scopes: list[dict[str, Any]]) -> None:
        for scope in scopes:
            await app(scope, _receive, send)

    return Contender(name, "run(serve(items))", make_scope, each=False, run=run, serve=serve, **settings)


def check_same_answer(answer: Callable[[str], str], app: Any, run: Callable[[Any], Any] | None = None) -> None:
    """End the program if an application's answer differs from the one that it is compared with.

    :param run: what runs a coroutine to its end, if it is an ASGI application.
    """
    expected = json.loads(answer(key(0)))
    told = json.loads(answer_of(app, usage_environ(key(0))) if run is None else run(_asgi_answer_of(app)))
    if told != expected:
        raise SystemExit(f"{app!r} answers {told!r} where {expected!r} was expected: nothing to compare")


async def _asgi_answer_of(app: Any) -> bytes:
    parts = []

    async def send(message: dict[str, Any]) -> None:
        parts.append(message.get("body", b""))

    await app(_scope(key(0)), _receive, send)
    return b"".join(parts)


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def _scope(key: str) -> dict[str, Any]:
    return _SCOPE | {"headers": [(b"authorization", f"Bearer sk-{key}".encode()), *_HEADERS]}
