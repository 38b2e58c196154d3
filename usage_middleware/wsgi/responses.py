"""Every body and header that the endpoint sends.

The answers that do not depend on the token are built once, when the middleware is constructed. A request chooses
one set of them by its ``Origin``, and one answer from the set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Final

from ..tokens import Token, wire_form

Header = tuple[str, str]

METHODS: Final = "GET, HEAD, OPTIONS"
RETRY_AFTER: Final = "5"  # seconds; a store that failed is worth another try soon

_EVERY_ANSWER: Final[tuple[Header, ...]] = (
    # Whose key it is decides what the answer says, and it is out of date with the next charge.
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)
_ALLOWED_REQUEST_HEADERS: Final = ("Authorization", "Content-Type")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2, token
# RFC 6454 section 6.2, as browsers serialise it: without capitals, and no pattern.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.\-]*://[^\s/?#,@*A-Z]+")


#: One answer: the status and the headers, as ``start_response`` takes them, and the body, which ``HEAD`` does not get.
Response = tuple[str, tuple[Header, ...], bytes]


class Responses:
    """Every answer, with the CORS headers that one origin gets.

    :param allow_origin: the value of ``Access-Control-Allow-Origin``, or ``None`` for no CORS header at all.
    :param vary: whether the value depends on the request's ``Origin``.
    """

    def __init__(self, allow_origin: str | None, *, vary: bool = False) -> None:
        self._allow_origin = allow_origin
        self._headers: tuple[Header, ...] = _EVERY_ANSWER
        if allow_origin is not None:
            self._headers += (("Access-Control-Allow-Origin", allow_origin),)
        if vary:
            self._headers += (("Vary", "Origin"),)
        self._body_headers = (("Content-Type", "application/json; charset=utf-8"), *self._headers)
        self.no_authorization = self._refusal(
            "401 Unauthorized", "No Authorization header", ("WWW-Authenticate", "Bearer")
        )
        # RFC 6750 section 3.1: invalid_token is also the error of a token that is expired, revoked or malformed.
        invalid_token = ("WWW-Authenticate", 'Bearer error="invalid_token"')
        self.invalid_bearer_token = self._refusal("401 Unauthorized", "Invalid Bearer token", invalid_token)
        self.token_not_found = self._refusal("401 Unauthorized", "token not found", invalid_token)
        self.method_not_allowed = self._refusal("405 Method Not Allowed", "Method Not Allowed", ("Allow", METHODS))
        self.service_unavailable = self._refusal(
            "503 Service Unavailable", "Service Unavailable", *self._retry_after(RETRY_AFTER)
        )

    def usage(self, token: Token) -> Response:
        """The answer 200 that describes ``token``."""
        return self._with_body("200 OK", '{"code":true,"message":"ok","data":%s}' % wire_form(token))

    def too_many_requests(self, seconds: int) -> Response:
        """The answer 429 to a client that may fail again after so many seconds."""
        return self._refusal("429 Too Many Requests", "Too Many Requests", *self._retry_after(str(seconds)))

    def preflight(self, requested_headers: str) -> Response:
        """The answer 204 to ``OPTIONS``.

        :param requested_headers: the value of ``Access-Control-Request-Headers``; names in it that are no valid
            header names are left out.
        """
        headers = (*self._headers, ("Allow", METHODS))
        if self._allow_origin is not None:
            headers += (
                ("Access-Control-Allow-Methods", METHODS),
                ("Access-Control-Allow-Headers", _allowed_headers(requested_headers)),
                ("Access-Control-Max-Age", "86400"),
            )
        return "204 No Content", headers, b""

    def _refusal(self, status: str, message: str, *headers: Header) -> Response:
        body = json.dumps({"success": False, "message": message}, separators=(",", ":"))
        return self._with_body(status, body, *headers)

    def _with_body(self, status: str, text: str, *headers: Header) -> Response:
        body = text.encode()
        return status, (("Content-Length", str(len(body))), *self._body_headers, *headers), body

    def _retry_after(self, seconds: str) -> tuple[Header, ...]:
        retry_after = ("Retry-After", seconds)
        if self._allow_origin is None:
            return (retry_after,)
        return (retry_after, ("Access-Control-Expose-Headers", "Retry-After"))


def responses_by_origin(allow_origins: str | Collection[str]) -> tuple[dict[str, Responses], Responses]:
    """The answers for each listed origin, and those for every other request.

    :param allow_origins: ``"*"``, a collection of origins such as ``"https://app.example"``, or ``()`` for no CORS.
    :raises TypeError: it is neither ``"*"`` nor a collection of ``str``.
    :raises ValueError: an item is no origin: a scheme and a host, with a port where it is not the default.
    """
    if allow_origins == "*":
        return {}, Responses("*")
    if isinstance(allow_origins, (str, bytes)) or not isinstance(allow_origins, Collection):
        raise TypeError(f"allow_origins must be '*', a collection of origins, or (), got {allow_origins!r}")
    for origin in allow_origins:
        if not isinstance(origin, str):
            raise TypeError(f"allow_origins must hold str, got {origin!r}")
        if origin != "null" and not (origin.isascii() and _ORIGIN.fullmatch(origin)):
            raise ValueError(f"allow_origins must hold origins such as 'https://app.example', got {origin!r}")
    # Vary stands on the answers to other origins too, or a cache would hand them to a listed one
    # (Fetch standard, "CORS protocol and HTTP caches").
    return {o: Responses(o, vary=True) for o in allow_origins}, Responses(None, vary=bool(allow_origins))


def _allowed_headers(requested: str) -> str:
    names = {name.lower(): name for name in _ALLOWED_REQUEST_HEADERS}
    for item in requested.split(","):
        name = item.strip(" \t")
        if _HEADER_NAME.fullmatch(name):
            names.setdefault(name.lower(), name)
    return ", ".join(names.values())
