"""The service behind the proxies that are compared, and the WSGI applications that forward to it.

``python proxied_service.py PORT`` runs the service. A WSGI server serves :func:`application`: ``PROXY`` names the way
of forwarding, and ``UPSTREAM`` is the service's URL.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

EVENTS = 100  # of a stream
PAUSE = 0.02  # seconds after the first event of a stream that pauses

_EVENT = b'data: {"id":"0123456789","choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}]}\n\n'
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"data":"%b"}' % (b"x" * 1000)
_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


class _Service(asyncio.Protocol):
    """Answer a GET: JSON, or for ``/stream`` and ``/pause`` an event stream, each event sent by itself."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            is_last = b"connection: close" in head.lower()
            if head.startswith(b"GET /pause"):
                self._transport.write(_STREAM)
                self._transport.write(_CHUNK)
                asyncio.get_running_loop().call_later(PAUSE, self._end, is_last)
            elif head.startswith(b"GET /stream"):
                self._transport.write(_STREAM)
                for _ in range(EVENTS):
                    self._transport.write(_CHUNK)
                self._end(is_last)
            else:
                self._transport.write(_JSON)
                if is_last:
                    self._transport.close()

    def _end(self, is_last: bool) -> None:
        self._transport.write(b"0\r\n\r\n")
        if is_last:
            self._transport.close()


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", port)
    await server.serve_forever()


def application() -> Any:
    """Return an application that forwards to the service, or that answers itself, without a proxy."""
    name, url = os.environ["PROXY"], os.environ["UPSTREAM"]
    if name == "Proxy":
        from usage_middleware import Proxy

        return Proxy(url)
    if name == "ProxyMiddleware":
        from werkzeug.exceptions import NotFound
        from werkzeug.middleware.http_proxy import ProxyMiddleware

        # It forwards the paths below a prefix that is followed by a slash.
        targets = {f"/{path}": {"target": url, "remove_prefix": False} for path in ("json", "stream", "pause")}
        return ProxyMiddleware(NotFound(), targets)
    return _bare


def _bare(environ: Any, start_response: Any) -> Any:
    if environ["PATH_INFO"].startswith("/json"):
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))])
        return [BODY]
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    return iter([_EVENT] * EVENTS)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
