"""The page on which the holder of a key sees what is left, where it went, and why it stopped.

It is one static document, :file:`page.html`: its figures come from the endpoint and its ``/days``. The server fills in
their paths relative to the page, so that it works under any prefix.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from werkzeug.http import parse_etags

from ..refusals import METHOD, METHODS, Header, Refused
from ..responses import Response, Responses

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_PLACE: Final = "../api/usage/token"  # in page.html in the repository, which can be opened there and tried
_DOCUMENT: Final = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


class PageEndpoint:
    """Answer ``GET`` and ``HEAD`` with the page.

    :param path: the page's own path, in the form of ``PATH_INFO``, without a slash at the end.
    :param endpoint: the path of the endpoint that it asks, in the same form.
    """

    def __init__(self, path: str, endpoint: str) -> None:
        # A browser resolves "a/b" to "/a/b" from "/usage", and to "/usage/a/b" from "/usage/". The page's script always
        # resolves it as from "/usage/", so one relative path is right for both.
        up = "../" * path.count("/")
        place = up + quote(endpoint.lstrip("/"), encoding="latin-1")
        self._body = _DOCUMENT.replace(f'content="{_PLACE}"', f'content="{escape(place)}"').encode()
        self._etag = hashlib.sha256(self._body).hexdigest()[:32]
        self._headers: tuple[Header, ...] = (
            ("Cache-Control", "no-cache"),
            ("ETag", f'"{self._etag}"'),
            ("Content-Security-Policy", _policy(_DOCUMENT)),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        )
        # Without CORS: other pages have nothing to read here.
        self._refusal = Responses(None).refusal(Refused(METHOD))

    def __call__(self, environ: WSGIEnvironment) -> Response:
        method = environ["REQUEST_METHOD"]
        if method == "OPTIONS":
            return "204 No Content", (*self._headers, ("Allow", METHODS)), b""
        if method != "GET" and method != "HEAD":
            return self._refusal
        if parse_etags(environ.get("HTTP_IF_NONE_MATCH")).contains_weak(self._etag):
            return "304 Not Modified", self._headers, b""
        content = (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(self._body))))
        return "200 OK", (*content, *self._headers), self._body


def _policy(document: str) -> str:
    """Return the policy that lets the document's own script and style run, and nothing else."""
    script, style = (_hash(document, tag) for tag in ("script", "style"))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{script}'",
            f"style-src '{style}'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def _hash(document: str, tag: str) -> str:
    """Return the hash of the one element of its kind (Content Security Policy Level 3, section 2.3.1)."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", document, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
