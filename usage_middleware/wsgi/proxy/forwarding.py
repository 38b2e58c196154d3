"""What a proxy changes in a message: its target, its headers, and how its body is framed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

from ..refusals import Header, Refused
from .proxy_refusals import BAD_REQUEST, LENGTH_REQUIRED, NOT_IMPLEMENTED

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Small, so that a slow upload keeps moving.
_BLOCK_SIZE: Final = 16_384

_METHOD: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2, token
HEADER_NAME: Final = _METHOD
HEADER_VALUE: Final = re.compile(r"[\t -~\x80-\xff]*")  # RFC 9110 section 5.5
_CONTENT_LENGTH: Final = re.compile(r"[0-9]{1,18}")

# RFC 9110 section 7.6.1, and what PEP 3333 forbids an application to send.
_HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authentication-info", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "trailers", "transfer-encoding", "upgrade"),
    }
)
#: Request headers that depend only on the request and its connection.
FRAMING: Final = _HOP_BY_HOP | {"content-length", "expect"}
# Written by this module. Also "Proxy", which CGI programs would find as HTTP_PROXY and take for the address of the
# proxy that they have to use (CVE-2016-5385).
_NOT_COPIED: Final = FRAMING | {
    *("content-type", "host", "proxy", "via"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-prefix", "x-forwarded-proto"),
}

# RFC 3986 section 3.3: what a path may hold beside letters, digits and escapes.
PATH_SAFE: Final = "/!$&'()*+,;=:@-._~"
_PATH_UNITS: Final = re.compile(r"%[0-9A-Fa-f]{2}|.", re.DOTALL)  # each stands for one character of PATH_INFO
_PATH_UNSAFE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})|[^%/!$&'()*+,;=:@\-._~0-9A-Za-z]")
_QUERY_UNSAFE: Final = re.compile(r"[^!-~]|#")
_SLASH: Final = re.compile("%2F", re.IGNORECASE)
_ODD_SEGMENT: Final = re.compile(r"//|/\.{1,2}(?:[/;]|$)|\\")
# Some services take a backslash for a slash, and Tomcat ignores what follows a semicolon in a segment.
_LEAVES_BASE: Final = re.compile(r"[/\\]\.\.(?:[/\\;]|$)")

_PSEUDONYM: Final = "usage-middleware"  # in Via


class RequestBody:
    """The body of a request, read in blocks and never past its end.

    :ivar framing: the header that says where it ends, if there is one.
    :ivar ended: whether all of it has been read.
    :raises Refused: the request does not say where its body ends, or says it in two ways, which would let an attacker
        smuggle requests past a proxy (RFC 9112 section 11.2).
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        coding: str = environ.get("HTTP_TRANSFER_ENCODING", "").strip(" \t").lower()
        length: str = environ.get("CONTENT_LENGTH", "")
        body = environ["wsgi.input"]
        # PEP 3333 requires only read(), which on most servers waits for a whole block. Some have a better method.
        self._input: Callable[[int], bytes] = getattr(body, "read1", body.read)
        self._left: int | None = 0  # None: up to the end of the input
        self._block = b""
        self.framing: list[Header] = []
        if coding and length:
            raise Refused(BAD_REQUEST, message="The request has both a Content-Length and a Transfer-Encoding.")
        if length:
            if not _CONTENT_LENGTH.fullmatch(length):
                raise Refused(BAD_REQUEST, message="The Content-Length of the request is not a number.")
            self._left = int(length)
            self.framing = [("Content-Length", str(self._left))]
        elif coding:
            if coding != "chunked":
                raise Refused(NOT_IMPLEMENTED, message="The request has a Transfer-Encoding other than 'chunked'.")
            if not environ.get("wsgi.input_terminated"):
                raise Refused(LENGTH_REQUIRED)
            self._left = None
        elif self._is_framed_by_protocol(environ):
            self._left = None
        elif environ["REQUEST_METHOD"] in ("POST", "PUT", "PATCH"):
            # RFC 9110 section 8.6 asks for it if the method usually has a body.
            self.framing = [("Content-Length", "0")]
        if self._left is None:
            self.framing = [("Transfer-Encoding", "chunked")]
        self.ended = self._left == 0

    def read(self) -> bytes:
        """Return the next block in the form in which it is sent. This may wait for the client."""
        if self._left is None:
            block: bytes = self._block or self._input(_BLOCK_SIZE)
            self._block = b""
            self.ended = not block
            return b"%x\r\n%b\r\n" % (len(block), block)  # the last chunk, and no trailers, if it is empty
        block = self._input(min(self._left, _BLOCK_SIZE))
        if not block:
            raise Refused(BAD_REQUEST, message="The body of the request ended early.")
        self._left -= len(block)
        self.ended = not self._left
        return block

    def _is_framed_by_protocol(self, environ: WSGIEnvironment) -> bool:
        """Return whether the request has a body although no header says so, as HTTP/2 and newer allow."""
        if environ["SERVER_PROTOCOL"].startswith("HTTP/1.") or not environ.get("wsgi.input_terminated"):
            return False
        self._block = self._input(_BLOCK_SIZE)
        return bool(self._block)


def check_request(environ: WSGIEnvironment) -> None:
    """Raise :exc:`Refused` for a request that is never forwarded, whatever the service.

    ``TRACE`` would return the headers that :class:`Proxy` adds, which may be credentials.
    """
    method: str = environ["REQUEST_METHOD"]
    if method in ("CONNECT", "TRACE") or not _METHOD.fullmatch(method):
        raise Refused(NOT_IMPLEMENTED, message="The method of the request is not supported.")
    protocols = {protocol.strip(" \t").lower() for protocol in environ.get("HTTP_UPGRADE", "").split(",")}
    # A server may ignore an Upgrade (RFC 9110 section 7.8). Java's HttpClient asks for h2c in every first request and
    # goes on with HTTP/1.1; a WebSocket cannot go on.
    if protocols - {"", "h2c"}:
        raise Refused(NOT_IMPLEMENTED, message="The connection cannot be upgraded to another protocol.")


def request_target(environ: WSGIEnvironment, base: str) -> str:
    """Return the target of the forwarded request: ``base``, the path and the query string.

    :param base: the path of the service's URL, without a slash at its end.

    The path decodes to ``PATH_INFO``, which the middleware in front has checked. It keeps the client's own escapes, if
    the server provides them.
    """
    path: str = environ.get("PATH_INFO", "")
    if path == "*" and environ["REQUEST_METHOD"] == "OPTIONS" and not base:
        return path
    if path and not path.startswith("/"):
        raise Refused(BAD_REQUEST, message="The path of the request does not begin with a slash.")
    if base and _LEAVES_BASE.search(path):
        raise Refused(BAD_REQUEST, message="The path of the request has a '..' segment.")
    try:
        query = _QUERY_UNSAFE.sub(_escape, environ.get("QUERY_STRING", ""))
        target = base + _as_written(environ, path) or "/"
    except UnicodeEncodeError:
        raise Refused(BAD_REQUEST, message="The path of the request is not valid.") from None
    return f"{target}?{query}" if query else target


def _as_written(environ: WSGIEnvironment, path: str) -> str:
    target: str = environ.get("REQUEST_URI") or environ.get("RAW_URI") or ""
    units = _PATH_UNITS.findall(target.partition("?")[0])
    # What comes before is the prefix under which the application is mounted, or a scheme and a host.
    written = "".join(units[-len(path) :])
    if unquote(written, "latin-1") == path:
        return _PATH_UNSAFE.sub(_escape, written)
    # cheroot decodes all but slashes. They must not hide a segment from the code that checked the path.
    written = "".join(units[-len(path) + 2 * path.count("%2F") :])
    if unquote(_SLASH.sub("%252F", written), "latin-1") == path and not _ODD_SEGMENT.search(unquote(written)):
        return _PATH_UNSAFE.sub(_escape, written)
    return quote(path, safe=PATH_SAFE, encoding="latin-1")


def _escape(match: re.Match[str]) -> str:
    return quote(match[0], safe="", encoding="latin-1")


def request_headers(
    environ: WSGIEnvironment, host: str, replacements: Mapping[str, Header], ignored: Mapping[str, str]
) -> list[Header]:
    """Return the headers of the forwarded request, without those that frame its body.

    :param host: the value of ``Host``.
    :param replacements: headers to send, whatever the client sent, by their names in lower case.
    :param ignored: variables that do not belong to the request.
    """
    ours = [
        ("Host", host),
        ("Connection", "close"),
        ("Via", _append(environ.get("HTTP_VIA", ""), _via(environ["SERVER_PROTOCOL"]))),
        ("X-Forwarded-For", _append(environ.get("HTTP_X_FORWARDED_FOR", ""), environ.get("REMOTE_ADDR") or "")),
        ("X-Forwarded-Host", environ.get("HTTP_HOST") or environ["SERVER_NAME"]),
        ("X-Forwarded-Proto", environ["wsgi.url_scheme"]),
        ("X-Forwarded-Prefix", quote(environ.get("SCRIPT_NAME", ""), safe=PATH_SAFE, encoding="latin-1")),
        ("Content-Type", environ.get("CONTENT_TYPE", "")),
    ]
    headers = [header for header in ours if header[1] and header[0].lower() not in replacements]
    not_copied = _NOT_COPIED | replacements.keys() | _connection_options([environ.get("HTTP_CONNECTION", "")])
    for variable, value in environ.items():
        if variable.startswith("HTTP_"):
            name, folded = _header_name(variable)
            if folded not in not_copied and ignored.get(variable) != value:
                headers.append((name, value))
    for name, value in headers:
        if not HEADER_NAME.fullmatch(name) or not HEADER_VALUE.fullmatch(value):
            raise Refused(BAD_REQUEST, message="The request has a malformed header.")
    return [*headers, *replacements.values()]


@lru_cache(maxsize=256)
def _header_name(variable: str) -> tuple[str, str]:
    """Return the name of the header that a variable holds, as it is written and in lower case."""
    name = variable.removeprefix("HTTP_").replace("_", "-")
    return name.title(), name.lower()


def answer_headers(version: str, received: Collection[Header]) -> list[Header]:
    """Return the headers of an answer as they are passed on.

    :param version: the version of HTTP in which it came, such as ``"1.1"``.
    """
    options = _connection_options(value for name, value in received if name.lower() == "connection")
    dropped = _HOP_BY_HOP | options
    return [*(header for header in received if header[0].lower() not in dropped), ("Via", _via(version))]


def _connection_options(values: Iterable[str]) -> set[str]:
    """Return the names, in lower case, of the headers that ``Connection`` limits to one connection."""
    return {option.strip(" \t").lower() for value in values for option in value.split(",")} - {""}


def _append(value: str, item: str) -> str:
    return f"{value}, {item}" if value and item else value or item


def _via(protocol: str) -> str:
    return f"{protocol.removeprefix('HTTP/') or '1.1'} {_PSEUDONYM}"
