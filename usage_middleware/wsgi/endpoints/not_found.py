"""The application behind the endpoints if there is none to wrap: a 404 that every client can read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..refusals import NOT_FOUND, Refused
from ..responses import ResponsesByOrigin, send

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class NotFound:
    """A WSGI application that answers every path with 404, in JSON and with CORS.

    To a page's script, a browser reports a 404 without CORS, or a preflight without an answer, as a network error.

    :param allow_origins: as :class:`~usage_middleware.UsageMiddleware` takes it.
    """

    def __init__(self, allow_origins: str | Collection[str] = "*") -> None:
        self._responses = ResponsesByOrigin(allow_origins)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        responses = self._responses.of(environ)
        # Fetch standard, "CORS-preflight request": only such an OPTIONS has this header.
        if environ["REQUEST_METHOD"] == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
            response = responses.preflight(environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", ""))
        else:
            response = responses.refusal(Refused(NOT_FOUND))
        return send(response, environ, start_response)
