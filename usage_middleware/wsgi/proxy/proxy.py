"""A WSGI application that forwards every request to an HTTP service.

.. code-block:: python

    application = UsageMiddleware(Proxy("http://127.0.0.1:3000"), SQLiteTokenStore("tokens.db"))

Bodies are streamed in both directions, and each request has a connection of its own. When the client leaves, the server
in front closes the answer, the answer closes that connection, and the service can stop its work.
"""

from __future__ import annotations

import logging
import math
import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPSConnection
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

from ...errors import UpstreamError, UpstreamTimeout
from ..refusals import Header, Refused
from ..responses import send
from .answers import Answer
from .forwarding import (
    FRAMING,
    HEADER_NAME,
    HEADER_VALUE,
    PATH_SAFE,
    RequestBody,
    answer_headers,
    check_request,
    request_headers,
    request_target,
)
from .proxy_refusals import BAD_GATEWAY, GATEWAY_TIMEOUT, RESPONSES
from .upstream import Exchange

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("usage_middleware")

_PORTS: Final = {"http": 80, "https": 443}
_BASE: Final = re.compile(r"(?:/(?:[!$&'()*+,;=:@\-._~0-9A-Za-z]|%[0-9A-Fa-f]{2})*)*")


class Proxy:
    """Forward each request to an HTTP service, and stream its answer back.

    :param url: where the service listens: scheme, host, and perhaps a port and a base path, which is put before the
        path of every request. An ``https`` certificate is verified. The environment variables ``SSL_CERT_FILE`` and
        ``SSL_CERT_DIR`` name other authorities than those of the system.
    :param headers: request headers to send whatever the client sent, such as credentials for the service. Their values
        are in no ``repr`` and no log line.
    :param connect_timeout: how many seconds opening the connection may take, to each address of the host.
    :param read_timeout: how many seconds the service may be silent while the proxy waits for it.
    :raises TypeError, ValueError: an argument cannot be used.

    The service gets the path as the client wrote it, if that decodes to ``PATH_INFO``, and the query string unchanged.
    ``Host`` is the host of ``url``, so that a client cannot choose among the hosts of the service; ``headers`` can set
    another. The client's ``Host`` is in ``X-Forwarded-Host``, its address is appended to ``X-Forwarded-For``, and
    ``X-Forwarded-Proto`` and ``X-Forwarded-Prefix`` are set (the prefix is ``SCRIPT_NAME``, under which the
    proxy is mounted). Behind another proxy, put werkzeug's ``ProxyFix`` around the whole application. A ``Location``
    that begins with the service's own URL is rewritten to a path that the client can follow.

    Requests that cannot be forwarded are answered here, with the JSON errors that clients of OpenAI and Anthropic read:

    ======  ===================  ===================================================================================
    status  code                 when
    ======  ===================  ===================================================================================
    400     ``bad_request``      the length of the body is ambiguous, or the path or a header is malformed
    411     ``length_required``  the body is chunked, and the WSGI server does not decode it
    501     ``not_implemented``  ``Upgrade`` (a WebSocket), ``CONNECT``, ``TRACE``, an unknown transfer coding
    502     ``bad_gateway``      the service cannot be reached, or its answer is not valid HTTP
    504     ``gateway_timeout``  the service does not answer in time
    ======  ===================  ===================================================================================

    A server learns that its client has left only when it sends something, so a silent service works on until then.

    If the service breaks off or falls silent after its answer has begun, iterating over the answer raises
    :exc:`UpstreamError`, and the server closes the client's connection. An answer with neither ``Content-Length`` nor
    ``Transfer-Encoding: chunked`` ends when the service closes the connection, so it cannot be distinguished from one
    that was cut off. Trailers are dropped, as WSGI has none.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
    ) -> None:
        self.url = url
        scheme, self._hostname, self._port, self._base = _split(url)
        self._connect_timeout = _seconds("connect_timeout", connect_timeout)
        self._read_timeout = _seconds("read_timeout", read_timeout)
        self._replacements = _by_name({} if headers is None else headers)
        self._tls = _tls_context() if scheme == "https" else None

        authority = f"[{self._hostname}]" if ":" in self._hostname else self._hostname
        port = "" if self._port == _PORTS[scheme] else f":{self._port}"
        self._host = authority + port
        hosts = {self._host, f"{authority}:{self._port}", self._replacements.get("host", ("", self._host))[1]}
        origin = "|".join(re.escape(f"{scheme}://{host}") for host in hosts)
        self._own_location = re.compile(rf"(?i:{origin}){re.escape(self._base)}(?=[/?#]|\Z)")
        # wsgiref and granian copy the process's environment into each request's. An HTTP_PROXY from there is not a
        # header.
        self._ignored = {name: value for name, value in os.environ.items() if name.startswith("HTTP_")}

    def __repr__(self) -> str:
        return f"Proxy({self.url!r})"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            exchange, answer = self._ask(environ)
        except Refused as refused:
            return send(RESPONSES.refusal(refused), environ, start_response)
        try:
            start_response(f"{answer.status} {answer.reason or _phrase(answer.status)}", self._headers(answer, environ))
        except BaseException:
            exchange.close()
            raise
        if answer.has_body:
            return _Body(exchange)
        exchange.close()
        return []

    def _ask(self, environ: WSGIEnvironment) -> tuple[Exchange, Answer]:
        check_request(environ)
        method: str = environ["REQUEST_METHOD"]
        body = RequestBody(environ)
        lines = [f"{method} {request_target(environ, self._base)} HTTP/1.1"]
        headers = request_headers(environ, self._host, self._replacements, self._ignored) + body.framing
        lines += [f"{name}: {value}" for name, value in headers]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        try:
            exchange = Exchange(self._connection(), self._read_timeout)
            try:
                return exchange, exchange.ask(method, head, body)
            except BaseException:
                exchange.close()
                raise
        except UpstreamTimeout as error:
            logger.error("%s does not answer: %s", self.url, error)
            raise Refused(GATEWAY_TIMEOUT) from error
        except UpstreamError as error:
            logger.error("%s cannot be used: %s", self.url, error)
            raise Refused(BAD_GATEWAY) from error

    def _connection(self) -> HTTPConnection:
        if self._tls is None:
            return HTTPConnection(self._hostname, self._port, timeout=self._connect_timeout)
        return HTTPSConnection(self._hostname, self._port, timeout=self._connect_timeout, context=self._tls)

    def _headers(self, answer: Answer, environ: WSGIEnvironment) -> list[Header]:
        headers = answer_headers(answer.version, answer.headers)
        if answer.status == 204:  # RFC 9110 section 8.6
            headers = [header for header in headers if header[0].lower() != "content-length"]
        for number, (name, value) in enumerate(headers):
            if name.lower() == "location" and (match := self._own_location.match(value)):
                path = quote(environ.get("SCRIPT_NAME", ""), safe=PATH_SAFE, encoding="latin-1") + value[match.end() :]
                # A path that begins with two slashes would name another host.
                if not path.startswith("//"):
                    headers[number] = (name, path if path.startswith("/") else f"/{path}")
        return headers


class _Body:
    """The body of an answer. This is a class, because closing a generator that has not begun runs none of its code."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece = self._exchange.read()
        except BaseException:
            self.close()
            raise
        if not piece:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        self._exchange.close()


def _split(url: str) -> tuple[str, str, int, str]:
    """Return the scheme, the host, the port and the base path of a service's URL."""
    if not isinstance(url, str):
        raise TypeError(f"url must be a str such as 'http://127.0.0.1:3000', got {type(url).__name__}")
    try:
        parts = urlsplit(url)
        port = parts.port
        # Host and the TLS handshake have the ASCII form of an international name.
        hostname = (parts.hostname or "").encode("idna").decode()
    except ValueError:
        raise ValueError("url must be a URL such as 'http://127.0.0.1:3000'") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("url must hold no user name and password; pass them as headers={'Authorization': ...}")
    base = parts.path.rstrip("/")
    if (
        parts.scheme not in _PORTS
        or not hostname
        or parts.query
        or parts.fragment
        or not _BASE.fullmatch(base)
        or not url.isprintable()
        or " " in url
    ):
        raise ValueError(f"url must have the scheme http or https, a host, and at most a port and a path, got {url!r}")
    return parts.scheme, hostname, _PORTS[parts.scheme] if port is None else port, base


def _by_name(headers: Mapping[str, str]) -> dict[str, Header]:
    """Return checked headers by their names in lower case. No error quotes a value, which may be a credential."""
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping of names to values, got {type(headers).__name__}")
    by_name = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("headers must have names and values that are str")
        if not HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers has {name!r}, which is not the name of a header")
        if name.lower() in FRAMING:
            raise ValueError(f"headers cannot set {name}, which depends on each request and its connection")
        if not HEADER_VALUE.fullmatch(value):
            raise ValueError(f"headers has a value for {name} with control characters, or others that are not Latin-1")
        by_name[name.lower()] = (name, value.strip(" \t"))
    return by_name


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number of seconds above 0, got {value!r}")
    return value


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
