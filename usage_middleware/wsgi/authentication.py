"""The ``Authorization`` header: from a request to the caller's key, or to the reason why there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ..keys import KEY_PATTERN, strip_prefix

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# RFC 9110 section 11.4: the scheme is case-insensitive, one or more spaces follow it.
_BEARER: Final = re.compile(rf"(?i:bearer) +({KEY_PATTERN})")


def bearer_key(environ: WSGIEnvironment) -> str | None:
    """The key that a request carries as ``Authorization: Bearer KEY``, as the endpoint itself reads it.

    A host application uses it to charge the key that it serves. One leading ``sk-`` is stripped, which is the form
    that stores take.

    :param environ: the request's WSGI environment (Flask: ``request.environ``).
    :return: the key, or ``None`` where the header is absent, malformed, or of another scheme.
    """
    match = _BEARER.fullmatch(_header(environ))
    return (strip_prefix(match[1]) or None) if match else None


def has_authorization(environ: WSGIEnvironment) -> bool:
    """Whether the request carries an ``Authorization`` header that is not empty."""
    return bool(_header(environ))


def _header(environ: WSGIEnvironment) -> str:
    # Only optional white space (RFC 9110 section 5.6.3): str.strip() would also take control characters and U+00A0,
    # which make the value malformed.
    value: str = environ.get("HTTP_AUTHORIZATION", "")
    return value.strip(" \t")
