"""Metered applications for real servers to serve, and an endpoint that is free.

``TOKENS_DATABASE`` names the database, ``UPSTREAM`` the URL of the service behind ``/proxied``, and ``EXPIRES_IN`` is
the seconds that a reservation lasts. While a file named like the database with ``-broken`` exists, settling fails.
"""

from __future__ import annotations

import os
import time

from llm_answers import CHAT_STREAM, DONE
from metered_rows import EVENTS, FIXED, MOST, application
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from usage_middleware import FromHeader, LLMUsage, Proxy, SQLiteTokenStore, StoreError, UsageMeter, UsageMiddleware

database = os.environ["TOKENS_DATABASE"]


class Store(SQLiteTokenStore):
    def settle(self, operation, amount, **tokens):
        if os.path.exists(f"{database}-broken"):
            raise StoreError("the disk is full")
        return super().settle(operation, amount, **tokens)


def host(environ, start_response):
    """Return the wrapped application: rows of the table, and answers that tests control."""
    kind = environ["PATH_INFO"].lstrip("/")
    if kind == "echo":
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    if kind == "slow":
        start_response("200 OK", [EVENTS])
        return slow()
    if kind == "endless":
        start_response("200 OK", [EVENTS])
        return endless()
    if kind == "big":
        start_response("200 OK", [EVENTS])
        return big(int(environ["QUERY_STRING"]))
    if kind == "file":
        start_response("200 OK", [("Content-Type", "text/plain")])
        wrapper = environ.get("wsgi.file_wrapper", lambda file, size: iter(lambda: file.read(size), b""))
        return wrapper(open(__file__, "rb"), 1000)
    if kind == "write":
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(b"one ")
        return [b"two"]
    if kind == "hang":
        start_response("200 OK", [EVENTS])
        return hang()
    return application(environ, start_response)


def slow():
    for chunk in CHAT_STREAM:
        time.sleep(0.1)
        yield chunk


def hang():
    yield CHAT_STREAM[0]
    time.sleep(30)


def endless():
    """Yield content as long as there is a client, but for half a minute at most."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        yield CHAT_STREAM[0]
        time.sleep(0.002)


def big(mebibytes):
    piece = CHAT_STREAM[0] * (2**20 // len(CHAT_STREAM[0]))
    for _ in range(mebibytes):
        yield piece
    yield CHAT_STREAM[3]
    yield DONE


store = Store(database)
upstream = os.environ.get("UPSTREAM")
services = {"/direct": host, "/proxied": Proxy(upstream, read_timeout=30) if upstream else host}
costs = {
    "/fixed": FIXED,
    "/one": 1,
    "/header": FromHeader("X-Usage-Cost", most=MOST),
    "/llm": LLMUsage(most=MOST),
    "/ask": LLMUsage(most=MOST, ask=True),
}
meters = {
    place + name: UsageMeter(
        service, store, cost=cost, forward_key=False, expires_in=float(os.environ.get("EXPIRES_IN", 3600))
    )
    for place, service in services.items()
    for name, cost in costs.items()
}
app = UsageMiddleware(DispatcherMiddleware(host, meters), store)
