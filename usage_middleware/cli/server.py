"""A small HTTP server for the command line: werkzeug's, with log lines that can hold no key."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from werkzeug.serving import WSGIRequestHandler, make_server, select_address_family
from werkzeug.utils import ImportStringError, import_string

from .formats import printable, without_keys

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


class _RequestHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        # Without the query, where a key may stand although it should not, and without the size, which says nothing.
        path = getattr(self, "path", "").partition("?")[0]
        method = self.command or "-"
        click.echo(f'{self.address_string()} "{without_keys(printable(f"{method} {path}"))}" {int(code)}', err=True)

    def log_error(self, *_: Any) -> None:
        # The arguments quote what could not be understood, which may be a key in the wrong place.
        click.echo(f"{self.address_string()} sent a request that is no HTTP", err=True)


def load_application(name: str) -> WSGIApplication:
    """The WSGI application that ``module:attribute`` names, looked for in the working directory too.

    :raises ValueError: there is none; the message says why in one line.
    """
    if not all(name.partition(":")[::2]):
        raise ValueError(f"{name!r} is not of the form module:attribute, such as wsgi:application")
    sys.path.insert(0, os.getcwd())
    try:
        application = import_string(name)
    except ImportStringError as error:
        reason = error.exception
    except Exception as error:
        reason = error
    else:
        if not callable(application):
            raise ValueError(f"{name} is {type(application).__name__}, which is no WSGI application")
        return application  # type: ignore[no-any-return]
    text = str(reason).partition("\n")[0]
    raise ValueError(f"cannot import {name}: {type(reason).__name__}: {text}") from None


def serve(application: WSGIApplication, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until the process is interrupted or asked to terminate. To be called by the main thread.

    :param ready: is called with the server's URL when requests are taken.
    :raises OSError: the address cannot be had.
    """
    family = select_address_family(host, port)
    # A socket of our own: werkzeug ends the process where it cannot bind one.
    with socket.create_server((host, port), family=family) as listener:
        port = listener.getsockname()[1]
        server = make_server(
            host, port, application, threaded=True, request_handler=_RequestHandler, fd=listener.fileno()
        )

    def stop(*_: object) -> None:
        # An exception that a handler raises is lost where Python ignores exceptions, in a finalizer say. It waits for
        # the loop that this thread is in, so another has to ask for it.
        threading.Thread(target=server.shutdown, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    shown = f"[{host}]" if ":" in host else host
    try:
        ready(f"http://{shown}:{port}")
        server.serve_forever()
    finally:
        server.server_close()
