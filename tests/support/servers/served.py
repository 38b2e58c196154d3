"""The application that real servers serve for test_servers.py and test_soak.py, in processes of their own.

``TOKENS_DATABASE`` names the database. If ``KEY_ASKED_AT_IMPORT`` is set, the store is asked for that key while this
module is imported, so a server that imports it before it forks has an open connection then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from usage_middleware import SQLiteTokenStore, UsageMiddleware, bearer_key

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class Stream:
    """A response of unknown length that writes a line, in a file beside the database, each time it is closed."""

    def __iter__(self) -> Iterator[bytes]:
        yield from (b"one, ", b"two, ", b"three")

    def close(self) -> None:
        with open(f"{database}-closed", "a") as log:
            log.write("closed\n")


def host(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer as the wrapped application. The answer to an unknown path repeats the request."""
    method, prefix, path = environ["REQUEST_METHOD"], environ["SCRIPT_NAME"], environ["PATH_INFO"]
    headers = [("Content-Type", "text/plain")]
    if path == "/stream":
        start_response("200 OK", headers)
        return Stream()
    if path == "/body":
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    elif path == "/create":
        body = store.create()[0].encode()
    elif path == "/charge":
        key = bearer_key(environ)
        assert key is not None
        store.charge(key, 1, idempotency_key=environ["HTTP_X_REQUEST_ID"])
        body = b"charged"
    else:
        body = f"{method} [{prefix}] {path}".encode("latin-1")
    start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
    return [body]


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Add a header to every response that names its process."""

    def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        return start_response(status, [*headers, ("Served-By", str(os.getpid()))], *exc_info)

    return mounted(environ, start)


database = os.environ["TOKENS_DATABASE"]
store = SQLiteTokenStore(database)
wrapped = UsageMiddleware(host, store)
mounted = DispatcherMiddleware(wrapped, {"/prefix": wrapped})

if "KEY_ASKED_AT_IMPORT" in os.environ:
    assert store.get(os.environ["KEY_ASKED_AT_IMPORT"]) is not None
