"""The rows of the meter's table, for real servers to serve: answers of a service, and what each is charged.

A WSGI application gives these answers, and so does a service behind :class:`Proxy` with a socket of its own.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NamedTuple

from llm_answers import ANTHROPIC_STREAM, CHAT_BODY, CHAT_STREAM, compact, event

FIXED, MOST, STATED, CHAT = 3, 500, 7, 29
JSON = ("Content-Type", "application/json")
EVENTS = ("Content-Type", "text/event-stream")
COST = ("X-Usage-Cost", str(STATED))
KEEP_OPEN = b": still there\n\n"
LONGEST = 2.0  # seconds that an answer is kept open for a client that does not leave


class Row(NamedTuple):
    cost: str  # the meter to ask: "fixed", "header" or "llm"
    #: The units that it is charged.
    units: int
    chunks: tuple[bytes, ...] = (b"one ", b"two")
    headers: tuple[tuple[str, str], ...] = ()
    status: str = "200 OK"
    method: str = "GET"
    #: How it ends: "whole", "before" (an exception before the head), "cut" (one after it), "open" (until it is closed).
    end: str = "whole"
    #: The bytes of the body after which the client leaves.
    leaves_after: int | None = None
    #: Whether the body is a list, whose length is known, or an iterator.
    is_list: bool = False

    @property
    def body(self):
        return b"".join(self.chunks)


def size_of(*chunks):
    return len(b"".join(chunks))


JSON_HALVES = (compact(CHAT_BODY)[:40], compact(CHAT_BODY)[40:])
JSON_LENGTH = (JSON, ("Content-Length", str(size_of(*JSON_HALVES))))
ERROR = event({"error": {"message": "overloaded"}})

ROWS = {
    # 1xx-3xx, complete
    "list": Row("fixed", FIXED, is_list=True),
    "chunks": Row("fixed", FIXED),
    "redirect": Row("fixed", FIXED, status="302 Found", headers=(("Location", "/x"),)),
    "stated": Row("header", STATED, headers=(COST,)),
    "stated-list": Row("header", STATED, headers=(COST,), is_list=True),
    "not-stated": Row("header", MOST),
    "stated-twice": Row("header", MOST, headers=(COST, COST)),
    "json": Row("llm", CHAT, JSON_HALVES, (JSON,)),
    "json-length": Row("llm", CHAT, JSON_HALVES, JSON_LENGTH),
    "json-list": Row("llm", CHAT, JSON_HALVES, (JSON,), is_list=True),
    "events": Row("llm", CHAT, tuple(CHAT_STREAM), (EVENTS,)),
    "anthropic": Row("llm", 77, tuple(ANTHROPIC_STREAM), (EVENTS,)),
    "no-usage": Row("llm", MOST, (b"{}",), (JSON,)),
    # 4xx, 5xx
    "404": Row("fixed", 0, status="404 Not Found"),
    "500": Row("fixed", 0, status="500 Internal Server Error"),
    "stated-404": Row("header", STATED, status="404 Not Found", headers=(COST,)),
    "stated-503": Row("header", STATED, status="503 Service Unavailable", headers=(COST,)),
    "json-429": Row("llm", 0, JSON_HALVES, (JSON,), "429 Too Many Requests"),
    # The service fails
    "before": Row("fixed", 0, end="before"),
    "cut": Row("fixed", 0, end="cut"),
    "stated-cut": Row("header", STATED, headers=(COST,), end="cut"),
    "json-cut": Row("llm", 0, JSON_HALVES[:1], JSON_LENGTH, end="cut"),
    "events-cut": Row("llm", 0, tuple(CHAT_STREAM[:2]), (EVENTS,), end="cut"),
    "anthropic-cut": Row("llm", 63, tuple(ANTHROPIC_STREAM[:3]), (EVENTS,), end="cut"),
    "error-event": Row("llm", 0, (CHAT_STREAM[0], ERROR), (EVENTS,)),
    # The client leaves
    "left": Row("fixed", FIXED, end="open", leaves_after=4),
    "stated-left": Row("header", STATED, headers=(COST,), end="open", leaves_after=4),
    "json-left": Row("llm", CHAT, JSON_HALVES, JSON_LENGTH, leaves_after=10),
    "events-left": Row("llm", MOST, tuple(CHAT_STREAM[:2]), (EVENTS,), end="open", leaves_after=60),
    "usage-left": Row(
        "llm", CHAT, tuple(CHAT_STREAM[:4]), (EVENTS,), end="open", leaves_after=size_of(*CHAT_STREAM[:4])
    ),
    "done-left": Row("llm", CHAT, tuple(CHAT_STREAM), (EVENTS,), end="open", leaves_after=size_of(*CHAT_STREAM)),
    # HEAD, 204, 304
    "head": Row("fixed", FIXED, (), method="HEAD"),
    "stated-head": Row("header", STATED, (), (COST,), method="HEAD"),
    "llm-head": Row("llm", 0, (), JSON_LENGTH, method="HEAD"),
    "204": Row("fixed", FIXED, (), status="204 No Content"),
    "stated-204": Row("header", STATED, (), (COST,), "204 No Content"),
    "llm-304": Row("llm", 0, (), (), "304 Not Modified"),
    # More than was reserved
    "much": Row("header", 900, headers=(("X-Usage-Cost", "900"),)),
}


def application(environ, start_response):
    """Answer with the row that the path names."""
    row = ROWS[environ["PATH_INFO"].rpartition("/")[2]]
    if row.end == "before":
        raise RuntimeError("before the head")
    start_response(row.status, [*row.headers])
    if row.is_list:
        return list(row.chunks)
    return _chunks(row)


def _chunks(row):
    yield from row.chunks
    if row.end == "cut":
        raise RuntimeError("after the head")
    if row.end == "open":
        until = time.monotonic() + LONGEST
        while time.monotonic() < until:
            time.sleep(0.01)
            yield KEEP_OPEN


def serve(connection):
    """Answer on a connection with the row that the path names: the service behind the proxy."""
    start, _ = connection.head()
    row = ROWS[start.split()[1].rpartition("/")[2]]
    if row.end == "before":
        return
    headers = [f"{name}: {value}" for name, value in row.headers]
    has_length = any(name == "Content-Length" for name, _ in row.headers)
    has_body = row.method != "HEAD" and not row.status.startswith(("204", "304"))
    if row.is_list:
        headers.append(f"Content-Length: {len(row.body)}")
    elif has_body and not has_length:
        headers.append("Transfer-Encoding: chunked")
    connection.send("\r\n".join([f"HTTP/1.1 {row.status}", *headers, "", ""]).encode())
    if not has_body:
        return

    def send(data):
        connection.send(data if has_length or row.is_list else b"%x\r\n%b\r\n" % (len(data), data))

    with suppress(BrokenPipeError, ConnectionResetError):
        for chunk in row.chunks:
            send(chunk)
        until = time.monotonic() + LONGEST
        while row.end == "open" and time.monotonic() < until:
            time.sleep(0.01)
            send(KEEP_OPEN)
        if row.end != "cut" and not has_length and not row.is_list:
            connection.send(b"0\r\n\r\n")
