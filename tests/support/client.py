"""Call a WSGI application directly, as a server does."""

from __future__ import annotations

import io
import json
from typing import NamedTuple
from wsgiref.validate import validator

PATH = "/api/usage/token"


class Answer(NamedTuple):
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    def header(self, name):
        """Return the one value of a header, or None."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, f"{name} is sent more than once"
        return values[0] if values else None


def environ(method="GET", path=PATH, **variables):
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        **variables,
    }


def wrapped(environ, start_response):
    """Answer as the application that the middleware wraps, unless a test needs another."""
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"the wrapped application"]


def ask(app, method="GET", path=PATH, *, authorization=None, **variables):
    """Return the answer of ``app``. The standard library checks the exchange against PEP 3333."""
    if authorization is not None:
        variables["HTTP_AUTHORIZATION"] = authorization
    return call(validator(app), environ(method, path, **variables))


def call(app, environ):
    """Return the answer of ``app`` to an environment that the standard library's validator might not accept."""
    started = []

    def start_response(status, headers, exc_info=None):
        started.append((status, headers))
        return lambda data: None

    result = app(environ, start_response)
    try:
        body = b"".join(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    ((status, headers),) = started
    code, _, reason = status.partition(" ")
    return Answer(int(code), reason, headers, body)
