"""From a request to the token of its key, or to a refusal. Every endpoint and the meter use this."""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import StoreError
from ..keys import KEY_PATTERN, strip_prefix
from ..stores.base import TokenStore
from ..tokens import Token
from .refusals import MALFORMED, NO_KEY, THROTTLED, UNAVAILABLE, UNKNOWN, Refused
from .throttle import Throttle

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

logger = logging.getLogger("usage_middleware")

_Answer = TypeVar("_Answer")

# RFC 9110 section 11.4: the scheme is case-insensitive, one or more spaces follow it. Optional white space around a
# value (section 5.6.3) is not part of it.
_BEARER: Final = re.compile(rf"[ \t]*(?i:bearer) +({KEY_PATTERN})[ \t]*")
_KEY: Final = re.compile(KEY_PATTERN)
_AUTHORIZATION: Final = "HTTP_AUTHORIZATION"
#: The headers that :func:`llm_key` reads, as WSGI names them.
KEY_HEADERS: Final = (_AUTHORIZATION, "HTTP_X_API_KEY", "HTTP_X_GOOG_API_KEY")
_LONG: Final = 16  # characters of a key that do not occur in a header by chance
# The least seconds between asking the store for a key and refusing it, if the store has no ``answers_within``.
# Otherwise the time would distinguish a disabled key, whose row is found and read, from an unknown one. A store in
# memory or on a local disk answers within it.
_REFUSED_AFTER: Final = 0.0005
_RETRY_AFTER: Final = 5  # seconds; a store that failed may soon work again
# What repr() and JSON put before or around the characters of a key.
_QUOTING: Final = str.maketrans("", "", "\\'\"")


def bearer_key(environ: WSGIEnvironment) -> str | None:
    """Return the key that a request carries as ``Authorization: Bearer KEY``, as the endpoint itself reads it.

    A host application uses it to charge the key of a request. The ``sk-`` in front is stripped, as stores expect.

    :param environ: the request's WSGI environment (Flask: ``request.environ``).
    :return: the key, or ``None`` if the header is absent, malformed, or of another scheme.
    """
    match = _BEARER.fullmatch(environ.get(_AUTHORIZATION, ""))
    return (strip_prefix(match[1]) or None) if match else None


def llm_key(environ: WSGIEnvironment) -> str | None:
    """Return the key that a request carries as clients of LLM services send it, for ``UsageMeter(key=llm_key)``.

    That is ``Authorization: Bearer KEY`` (OpenAI), or else ``X-Api-Key: KEY`` (Anthropic), or else
    ``X-Goog-Api-Key: KEY`` (Gemini).

    :param environ: the request's WSGI environment.
    :return: the key without the ``sk-`` in front, or ``None`` if the first of these headers that the request has is
        malformed, or it has none of them.
    """
    if has_credentials(environ):
        return bearer_key(environ)
    for name in KEY_HEADERS[1:]:
        if value := _header(environ, name):
            return (strip_prefix(value) or None) if _KEY.fullmatch(value) else None
    return None


def has_credentials(environ: WSGIEnvironment, headers: Iterable[str] = (_AUTHORIZATION,)) -> bool:
    """Return whether the request carries one of these headers, and it is not empty."""
    return any(_header(environ, name) for name in headers)


def remove_key(environ: WSGIEnvironment, key: str | None) -> None:
    """Remove every header that holds the key, so that an application which forwards headers does not forward it.

    :param key: the request's key, as the function that found it returned it.
    """
    if key is None:
        return
    # A long key is searched for anywhere in a header. A short key may occur in a header by chance, so it must be the
    # whole value, or all that follows the scheme.
    holders = [
        name
        for name, value in environ.items()
        if name.startswith("HTTP_")
        and (key in value if len(key) >= _LONG else strip_prefix(value.strip(" \t").rpartition(" ")[2]) == key)
    ]
    for name in holders:
        del environ[name]


class Authentication:
    """Find the key of a request and ask the store about it.

    :param store: where tokens are looked up. A key is refused when ``store.answers_within`` seconds have passed since
        the store was asked, or half a millisecond, so that the time does not show what was found.
    :param key: a function that returns the key of a request, or ``None`` if the request does not carry a possible key.
    :param throttle: counts failures, so that clients that guess keys are slowed down; or ``None``.

    A refusal is a :class:`~.refusals.Refused` of the kinds ``NO_KEY``, ``MALFORMED``, ``UNKNOWN``, ``THROTTLED`` and
    ``UNAVAILABLE``; the caller decides what they look like. A client that fails too often gets ``THROTTLED`` in
    place of ``MALFORMED`` and ``UNKNOWN``. ``NO_KEY`` is not a guess and is never counted.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        key: Callable[[WSGIEnvironment], str | None] = bearer_key,
        throttle: Throttle | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._throttle = throttle
        self._refused_after: float = getattr(store, "answers_within", _REFUSED_AFTER)
        self._headers = KEY_HEADERS if key is llm_key else KEY_HEADERS[:1]

    def key(self, environ: WSGIEnvironment) -> str:
        """Return the request's key.

        :raises Refused: there is none, or the value cannot be a key.
        """
        key = self._key(environ)
        if key is None:
            raise self._guessed(environ, MALFORMED) if has_credentials(environ, self._headers) else Refused(NO_KEY)
        return key

    def ask(self, environ: WSGIEnvironment, question: Callable[[str], _Answer], key: str | None = None) -> _Answer:
        """Return what ``question`` returns for the request's key.

        Everything that may ask the store belongs in the question. An exception that it raises is logged without the key
        and becomes ``UNAVAILABLE``; only a :class:`Refused` passes as it is. A question that finds the key unknown or
        disabled raises ``Refused(UNKNOWN)``. Neither the bytes nor the time of the answer show which of them it was.

        :param key: what :meth:`key` returned for this request, if it was called.
        :raises Refused: there is no key, or it is refused.
        """
        if key is None:
            key = self.key(environ)
        asked_at = time.perf_counter()
        try:
            return question(key)
        except Refused as refused:
            if refused.kind != UNKNOWN:
                raise
        except Exception as error:
            logger.error("%s", _failure(self._store, error, key))
            raise Refused(UNAVAILABLE, retry_after=_RETRY_AFTER) from None
        time.sleep(max(asked_at + self._refused_after - time.perf_counter(), 0))
        raise self._guessed(environ, UNKNOWN)

    def token(self, key: str) -> Token:
        """Return the token of a key. Most questions begin with this.

        :raises Refused: the key is unknown, or its token is disabled.
        :raises StoreError: the store returned something other than a token.
        """
        token = self._store.get(key)
        if token is None:
            raise Refused(UNKNOWN)
        if not isinstance(token, Token):
            raise StoreError(f"get() returned {type(token).__name__}, which is not a Token")
        if not token.enabled:
            raise Refused(UNKNOWN)
        return token

    def _guessed(self, environ: WSGIEnvironment, kind: str) -> Refused:
        seconds = self._throttle.failed(environ) if self._throttle else 0
        return Refused(THROTTLED, retry_after=seconds) if seconds else Refused(kind)


def _header(environ: WSGIEnvironment, name: str) -> str:
    # Only optional white space (RFC 9110 section 5.6.3): str.strip() would also take control characters and U+00A0,
    # which make the value malformed.
    value: str = environ.get(name, "")
    return value.strip(" \t")


def _failure(store: object, error: Exception, key: str) -> str:
    """Return a text about what a store raised. It does not hold ``key``, whatever the exception quotes."""
    text = f"{type(store).__name__} failed: {type(error).__qualname__}"
    if isinstance(error, StoreError):
        text += _without(key, error)
    # Places, without source lines, values or the texts of chained exceptions.
    places = (f"\n  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__))
    return text + "".join(places)


def _without(key: str, error: StoreError) -> str:
    """Return what the log says about an error beyond its type: its text, unless that holds ``key``, however quoted."""
    try:
        text = str(error)
    except Exception:
        return ""
    return "" if key.translate(_QUOTING) in text.translate(_QUOTING) else f": {text}"
