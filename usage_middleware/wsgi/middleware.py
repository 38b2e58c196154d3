"""The WSGI middleware: every request passes through as it came, but those for one path, which are answered here.

.. code-block:: python

    app.wsgi_app = UsageMiddleware(app.wsgi_app, SQLiteTokenStore("tokens.db"))

The order is the one in which a request goes through the package: authorization, store, token, response.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from ..errors import StoreError
from ..stores.base import TokenStore
from ..tokens import Token
from .authentication import bearer_key, has_authorization
from .responses import Response, Responses, responses_by_origin
from .throttle import Throttle

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("usage_middleware")

# A key is refused no sooner than so many seconds after the store was asked for it, or the time would tell a disabled
# key, whose row is found and read, from an unknown one. By then a store in memory or on a local disk has answered.
_REFUSED_AFTER: Final = 0.0005
# What repr() and JSON put before or around the characters of a key.
_QUOTING: Final = str.maketrans("", "", "\\'\"")


class UsageMiddleware:
    """Answers ``GET /api/usage/token`` from a token store; any other request goes to the wrapped application.

    :param app: the WSGI application to wrap.
    :param store: where tokens are looked up: anything with a method ``get(key)`` that returns a :class:`Token` or
        ``None``, a plain ``dict`` among them. It is asked with the key as :func:`bearer_key` gives it.
    :param path: the path to answer, with and without a slash at its end, compared with ``PATH_INFO`` (so below
        ``SCRIPT_NAME``, if the application is mounted under a prefix).
    :param allow_origins: which web pages may read the answers (CORS): ``"*"`` for all, a collection of origins such
        as ``"https://app.example"``, or ``()`` for none. All is a safe default: a key travels in a header that a
        page must set itself, never in a cookie.
    :param throttle: how often one client may send a wrong key, in the notation of the package ``limits``
        (``pip install 'usage-middleware[throttle]'``), such as ``"20 per 20 minutes"``; ``None``: as often as it likes.
    :param throttle_storage: where failures are counted: a storage URI of ``limits``. ``memory://`` counts in each
        process by itself, ``redis://host:6379`` and ``memcached://host:11211`` over all of them.
    :raises TypeError, ValueError: an argument cannot be what it is meant to be.
    :raises ImportError: there is a ``throttle``, and ``limits`` is not installed.

    Past the limit, what would be a 401 is a 429 until the window of time is over. A client is the IPv4 address or the
    IPv6 network of 64 bits in ``REMOTE_ADDR``, so behind a proxy werkzeug's ``ProxyFix`` belongs around this. What
    counts is a key that is unknown, deleted or disabled, and a malformed header. A request without a header is no
    guess, but what a page sends before its user has entered a key, or a monitor: it is not counted, and stays a 401.
    Valid keys are answered all the while, as their holders may share the address; so one who guesses right still
    learns it. They reset nothing either, or a guesser would send one in between.

    What the store raises becomes a 503 and a line of the logger ``usage_middleware``, never an exception in the
    host. That line holds the text of a :class:`StoreError`, and of any other exception its type and place alone,
    as its text may quote the key.
    """

    def __init__(
        self,
        app: WSGIApplication,
        store: TokenStore,
        *,
        path: str = "/api/usage/token",
        allow_origins: str | Collection[str] = "*",
        throttle: str | None = None,
        throttle_storage: str = "memory://",
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {type(app).__name__}")
        if not callable(getattr(store, "get", None)):
            raise TypeError(f"store must have a method get(key), got {type(store).__name__}")
        self.app = app
        self.store = store
        self._paths = _raw_paths(path)
        self._responses, self._other_responses = responses_by_origin(allow_origins)
        self._throttle = None if throttle is None else Throttle(throttle, throttle_storage)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # PEP 3333: PATH_INFO may be absent where it would be empty.
        if environ.get("PATH_INFO", "") not in self._paths:
            return self.app(environ, start_response)

        status, headers, body = self._respond(environ)
        # A list of its own: PEP 3333 lets the server and other middleware change it.
        start_response(status, list(headers))
        return [body] if body and environ["REQUEST_METHOD"] != "HEAD" else []

    def _respond(self, environ: WSGIEnvironment) -> Response:
        responses = self._responses.get(environ.get("HTTP_ORIGIN", ""), self._other_responses)
        method = environ["REQUEST_METHOD"]
        if method == "OPTIONS":
            return responses.preflight(environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", ""))
        if method != "GET" and method != "HEAD":
            return responses.method_not_allowed
        key = bearer_key(environ)
        if key is None:
            if not has_authorization(environ):
                return responses.no_authorization
            return self._refuse(environ, responses, responses.invalid_bearer_token)
        asked_at = time.perf_counter()
        try:
            token = self.store.get(key)
            if token is not None:
                if not isinstance(token, Token):
                    raise StoreError(f"get() returned {type(token).__name__}, which is no Token")
                if token.enabled:
                    return responses.usage(token)
        except Exception as error:
            logger.error("%s", _failure(self.store, error, key))
            return responses.service_unavailable
        time.sleep(max(asked_at + _REFUSED_AFTER - time.perf_counter(), 0))
        return self._refuse(environ, responses, responses.token_not_found)

    def _refuse(self, environ: WSGIEnvironment, responses: Responses, refusal: Response) -> Response:
        """``refusal``, or the answer to a client that was refused too often."""
        seconds = self._throttle.failed(environ) if self._throttle else 0
        return responses.too_many_requests(seconds) if seconds else refusal


def _raw_paths(path: str) -> tuple[str, str]:
    """``path`` without and with a slash at its end, in the form of ``PATH_INFO`` (PEP 3333, "Unicode Issues")."""
    if not isinstance(path, str):
        raise TypeError(f"path must be a str, got {path!r}")
    if not path.startswith("/") or "?" in path or "#" in path:
        raise ValueError(f"path must begin with '/' and have no query, such as '/api/usage/token', got {path!r}")
    try:
        raw = path.encode("utf-8").decode("latin-1").rstrip("/")
    except UnicodeEncodeError:
        raise ValueError(f"path must be text that UTF-8 can carry, got {path!r}") from None
    return raw, raw + "/"


def _failure(store: object, error: Exception, key: str) -> str:
    """What a store raised, as a text that does not hold ``key``, whatever the exception quotes."""
    text = f"{type(store).__name__} failed: {type(error).__qualname__}"
    if isinstance(error, StoreError):
        text += _without(key, error)
    # Places, without source lines, values or the texts of chained exceptions.
    places = (f"\n  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__))
    return text + "".join(places)


def _without(key: str, error: StoreError) -> str:
    """What the log says of an error beyond its type: its text, unless that holds ``key``, quoted in whatever way."""
    try:
        text = str(error)
    except Exception:
        return ""
    return "" if key.translate(_QUOTING) in text.translate(_QUOTING) else f": {text}"
