"""Statuses, headers and bodies, and CORS: the parts that the answers of all endpoints share.

A request chooses one :class:`Responses` by its ``Origin``. The endpoint writes the body of a success. A
refusal is rendered here, with the endpoint's table of problems and its form of an error body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from json import JSONEncoder
from typing import TYPE_CHECKING, Final

from .refusals import METHODS, PROBLEMS, Header, Problem, Refused

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_EVERY_ANSWER: Final[tuple[Header, ...]] = (
    # The answer depends on the key, and the next charge makes it out of date.
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)
_JSON: Final[Header] = ("Content-Type", "application/json; charset=utf-8")
_ALLOWED_REQUEST_HEADERS: Final = ("Authorization", "Content-Type")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2, token
# RFC 6454 section 6.2, as browsers serialise it: without capitals, and no pattern.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.\-]*://[^\s/?#,@*A-Z]+")


#: Return compact JSON. Text that is not ASCII is not escaped.
to_json: Final = JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

#: One answer: the status and the headers, as ``start_response`` takes them, and the body, which ``HEAD`` does not get.
Response = tuple[str, tuple[Header, ...], bytes]
#: Returns an error body for the kind of a refusal and its message.
ErrorBody = Callable[[str, str], str]


def error_body(kind: str, message: str) -> str:
    """Return the error body of the wire contract: it has no code, so the kind shows in the status and the message."""
    return to_json({"success": False, "message": message})


def sdk_error_body(error_type: str, code: str, message: str) -> str:
    """Return the body of an error with all that OpenAI's SDK reads and all that Anthropic's reads."""
    return to_json({"type": "error", "error": {"message": message, "type": error_type, "param": None, "code": code}})


def send(response: Response, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a WSGI request with ``response``; return what a WSGI application returns."""
    status, headers, body = response
    # A list of its own: PEP 3333 lets the server and other middleware change it.
    start_response(status, list(headers))
    return [body] if body and environ["REQUEST_METHOD"] != "HEAD" else []


class Responses:
    """The answers of one family of endpoints, with the CORS headers that one origin gets.

    :param allow_origin: the value of ``Access-Control-Allow-Origin``, or ``None`` for no CORS header at all.
    :param vary: whether the value depends on the request's ``Origin``.
    :param problems: what each kind of refusal looks like.
    :param error_body: how a refusal is written.
    """

    def __init__(
        self,
        allow_origin: str | None,
        *,
        vary: bool = False,
        problems: Mapping[str, Problem] = PROBLEMS,
        error_body: ErrorBody = error_body,
    ) -> None:
        self._problems = problems
        self._error_body = error_body
        headers = _EVERY_ANSWER
        if allow_origin is not None:
            headers += (("Access-Control-Allow-Origin", allow_origin),)
        if vary:
            headers += (("Vary", "Origin"),)
        self._json_headers = (_JSON, *headers)
        self._preflight_headers = (*headers, ("Allow", METHODS))
        self._has_cors = allow_origin is not None

    def ok(self, body: bytes) -> Response:
        """Return the answer 200 with a JSON body."""
        return "200 OK", (("Content-Length", str(len(body))), *self._json_headers), body

    def refusal(self, refused: Refused) -> Response:
        """Return the answer to a request that is refused."""
        status, message, headers = self._problems[refused.kind]
        body = self._error_body(refused.kind, refused.message or message).encode()
        if refused.retry_after:
            headers += (("Retry-After", str(refused.retry_after)),)
            if self._has_cors:
                headers += (("Access-Control-Expose-Headers", "Retry-After"),)
        return status, (("Content-Length", str(len(body))), *self._json_headers, *headers), body

    def preflight(self, requested_headers: str) -> Response:
        """Return the answer 204 to ``OPTIONS``.

        :param requested_headers: the value of ``Access-Control-Request-Headers``; items that are not valid header
            names are left out.
        """
        headers = self._preflight_headers
        if self._has_cors:
            headers += (
                ("Access-Control-Allow-Methods", METHODS),
                ("Access-Control-Allow-Headers", _allowed_headers(requested_headers)),
                ("Access-Control-Max-Age", "86400"),
            )
        return "204 No Content", headers, b""


class ResponsesByOrigin:
    """Choose the :class:`Responses` of a request by its ``Origin``.

    :param allow_origins: ``"*"``, a collection of origins such as ``"https://app.example"``, or ``()`` for no CORS.
    :param problems, error_body: as :class:`Responses` takes them.
    :raises TypeError: ``allow_origins`` is neither ``"*"`` nor a collection of ``str``.
    :raises ValueError: an item is not an origin: a scheme and a host, with a port if it is not the default.
    """

    def __init__(
        self,
        allow_origins: str | Collection[str],
        *,
        problems: Mapping[str, Problem] = PROBLEMS,
        error_body: ErrorBody = error_body,
    ) -> None:
        def responses(allow_origin: str | None, vary: bool) -> Responses:
            return Responses(allow_origin, vary=vary, problems=problems, error_body=error_body)

        listed = _checked_origins(allow_origins)
        # The answers to other origins have Vary too, or a cache would return them to a listed origin
        # (Fetch standard, "CORS protocol and HTTP caches").
        self._listed = {origin: responses(origin, True) for origin in listed}
        self._others = responses("*" if allow_origins == "*" else None, bool(listed))

    def of(self, environ: WSGIEnvironment) -> Responses:
        """Return the answers that the request's origin may get."""
        return self._listed.get(environ.get("HTTP_ORIGIN", ""), self._others)


def _checked_origins(allow_origins: str | Collection[str]) -> Collection[str]:
    if allow_origins == "*":
        return ()
    if isinstance(allow_origins, (str, bytes)) or not isinstance(allow_origins, Collection):
        raise TypeError(f"allow_origins must be '*', a collection of origins, or (), got {allow_origins!r}")
    for origin in allow_origins:
        if not isinstance(origin, str):
            raise TypeError(f"allow_origins must hold str, got {origin!r}")
        if origin != "null" and not (origin.isascii() and _ORIGIN.fullmatch(origin)):
            raise ValueError(f"allow_origins must hold origins such as 'https://app.example', got {origin!r}")
    return allow_origins


def _allowed_headers(requested: str) -> str:
    names = {name.lower(): name for name in _ALLOWED_REQUEST_HEADERS}
    for item in requested.split(","):
        name = item.strip(" \t")
        if _HEADER_NAME.fullmatch(name):
            names.setdefault(name.lower(), name)
    return ", ".join(names.values())
