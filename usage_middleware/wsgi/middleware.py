"""The WSGI middleware: it answers requests for the endpoints' paths and passes every other request through unchanged.

.. code-block:: python

    app.wsgi_app = UsageMiddleware(app.wsgi_app, SQLiteTokenStore("tokens.db"))

This passes a request to an endpoint, which authenticates it, asks the store, and writes the response.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from ..stores.base import QuotaStore, TokenStore
from .authentication import Authentication
from .endpoints.billing import openai_error
from .endpoints.days import DaysEndpoint
from .endpoints.new_api import NewAPI, new_api_endpoints
from .endpoints.token import UsageEndpoint
from .responses import Response, ResponsesByOrigin, send
from .throttle import Throttle

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_DAYS: Final = "/days"


class UsageMiddleware:
    """Answer ``GET /api/usage/token`` from a token store; pass any other request to the wrapped application.

    :param app: the WSGI application to wrap.
    :param store: where tokens are looked up: anything with a method ``get(key)`` that returns a :class:`Token` or
        ``None``, a plain ``dict`` among them. The key is the one that :func:`bearer_key` returns.
    :param path: the path to answer, with and without a slash at its end, compared with ``PATH_INFO`` (so below
        ``SCRIPT_NAME``, if the application is mounted under a prefix). If the store is a :class:`QuotaStore`, the path
        followed by ``/days`` is answered too, with what was used on each UTC day by each model.
    :param page: a path, such as ``"/usage"``, at which a page shows the holder of a key what is left of it and where
        it went. It asks the endpoint from the browser. ``None``: no page.
    :param new_api: with a :class:`NewAPI`, new-api's other endpoints are answered at new-api's paths, whatever ``path``
        is. With ``None``, those paths are the application's.
    :param allow_origins: which web pages may read the answers (CORS): ``"*"`` for all, a collection of origins such
        as ``"https://app.example"``, or ``()`` for none. All is a safe default: a key travels in a header that a
        page must set itself, never in a cookie.
    :param throttle: how often one client may send a wrong key, in the notation of the package ``limits``
        (``pip install limits``), such as ``"20 per 20 minutes"``; ``None``: without a limit.
    :param throttle_storage: where failures are counted: a storage URI of ``limits``. ``memory://`` counts in each
        process by itself, ``redis://host:6379`` and ``memcached://host:11211`` over all of them.
    :raises TypeError, ValueError: an argument cannot be used.
    :raises ImportError: ``throttle`` is given and ``limits`` is not installed.

    Past the limit, a 401 becomes a 429 until the window of time is over. A client is the IPv4 address or the 64-bit
    IPv6 network in ``REMOTE_ADDR``, so behind a proxy put werkzeug's ``ProxyFix`` around this. Keys that are unknown,
    deleted or disabled count, and so do malformed headers. A request without a header is not a guess: a page sends it
    before its user has entered a key, or a monitor does. It is not counted, and stays a 401. Valid keys are still
    answered, as their holders may share the address; so a client that guesses right still learns it. A valid key does
    not reset the count, or a guesser would send one in between.

    What the store raises becomes a 503 and a line of the logger ``usage_middleware``, never an exception in the
    host. That line holds the text of a :class:`StoreError`. For any other exception it holds only the type and the
    place, as the text may quote the key.
    """

    def __init__(
        self,
        app: WSGIApplication,
        store: TokenStore,
        *,
        path: str = "/api/usage/token",
        page: str | None = None,
        new_api: NewAPI | None = None,
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
        path = _raw_path("path", path)
        responses = ResponsesByOrigin(allow_origins)
        authentication = Authentication(
            store, throttle=None if throttle is None else Throttle(throttle, throttle_storage)
        )
        endpoints: dict[str, Callable[[WSGIEnvironment], Response]] = {}
        if new_api is not None:
            if not isinstance(new_api, NewAPI):
                raise TypeError(f"new_api must be a NewAPI or None, got {type(new_api).__name__}")
            billing_responses = ResponsesByOrigin(allow_origins, error_body=openai_error)
            endpoints |= new_api_endpoints(new_api, store, authentication, responses, billing_responses)
        if path in endpoints or path + _DAYS in endpoints:
            raise ValueError(f"path must not be one of new-api's other endpoints, got {path!r}")
        endpoints[path] = UsageEndpoint(responses, authentication)
        if isinstance(store, QuotaStore):
            endpoints[path + _DAYS] = DaysEndpoint(responses, authentication, store)
        if page is not None:
            from .endpoints.page import PageEndpoint  # loads werkzeug, which a service without a page does not need

            page = _raw_path("page", page)
            if page in endpoints:
                raise ValueError(f"page must not be the path of an endpoint, got {page!r}")
            endpoints[page] = PageEndpoint(page, path)
        self._endpoints = _with_and_without_slash(endpoints)
        self._first_path, self._last_path = min(self._endpoints), max(self._endpoints)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            path = environ["PATH_INFO"]
        except KeyError:
            path = ""  # PEP 3333: it may be absent if it would be empty.
        # A server makes a new str for each request, and hashing it costs more than the rest of this method. So a
        # comparison sorts out most requests first; the look-up alone would give the same result.
        if path > self._last_path or path < self._first_path or (endpoint := self._endpoints.get(path)) is None:
            app = self.app  # CPython 3.11 calls a local faster than an attribute.
            return app(environ, start_response)

        return send(endpoint(environ), environ, start_response)


def _raw_path(what: str, path: str) -> str:
    """Return a path without a slash at its end, in the form of ``PATH_INFO`` (PEP 3333, "Unicode Issues")."""
    if not isinstance(path, str):
        raise TypeError(f"{what} must be a str, got {path!r}")
    if not path.startswith("/") or "?" in path or "#" in path:
        raise ValueError(f"{what} must begin with '/' and have no query, such as '/api/usage/token', got {path!r}")
    try:
        return path.encode("utf-8").decode("latin-1").rstrip("/")
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text that UTF-8 can carry, got {path!r}") from None


def _with_and_without_slash(
    endpoints: Mapping[str, Callable[[WSGIEnvironment], Response]],
) -> dict[str, Callable[[WSGIEnvironment], Response]]:
    """Return the endpoints by all their paths. There is no redirect, on which a client may lose its header."""
    return {path + end: endpoint for path, endpoint in endpoints.items() for end in ("", "/")}
