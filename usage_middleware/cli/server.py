"""A small HTTP server for the command line: werkzeug's, with log lines that never contain a key."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from werkzeug.serving import WSGIRequestHandler, make_server, select_address_family

from .formats import without_keys
from .printing import say
from .stopping import Stop
from .tables import printable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


class CannotListen(Exception):
    """An address on which this process cannot listen."""


class _RequestHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        # Leave out the query, which may contain a key although it should not, and the size, which is never known here.
        path = getattr(self, "path", "").partition("?")[0]
        method = self.command or "-"
        say(f'{self.address_string()} "{without_keys(printable(f"{method} {path}"))}" {int(code)}')

    def log_error(self, *_: Any) -> None:
        # The arguments quote what could not be parsed, which may be a key in the wrong place.
        say(f"{self.address_string()} sent a request that is not HTTP")


def serve(application: WSGIApplication, host: str, port: int, ready: Callable[[str], None], stop: Stop) -> None:
    """Serve until ``stop`` is requested.

    :param ready: called with the server's URL once requests are accepted.
    :raises CannotListen: the address cannot be used. The message says why, without the address.
    """
    with _listener(host, port) as listener:
        port = listener.getsockname()[1]
        server = make_server(
            host, port, application, threaded=True, request_handler=_RequestHandler, fd=listener.fileno()
        )
    shown = f"[{host}]" if ":" in host else host
    try:
        ready(f"http://{shown}:{port}")
        # If a stop was requested meanwhile, the loop below ends at its first check.
        stop.call(server.shutdown)
        server.serve_forever()
    finally:
        server.server_close()


def _listener(host: str, port: int) -> socket.socket:
    """Return a listening socket of our own: werkzeug ends the process if it cannot bind one."""
    try:
        return socket.create_server((host, port), family=select_address_family(host, port))
    except OSError as error:
        # Python adds the address to the system's text. A name that cannot be resolved has an errno of another kind.
        if error.errno is None or isinstance(error, socket.gaierror):
            raise CannotListen(error.strerror or str(error)) from None
        raise CannotListen(os.strerror(error.errno)) from None
