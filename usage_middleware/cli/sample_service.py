"""A small service for the demonstration, charged by the meter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ..stores.base import QuotaStore
from ..wsgi.meter.usage_meter import UsageMeter

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_MOST_CHARACTERS: Final = 1000


def sample_service(store: QuotaStore) -> UsageMeter:
    """Return a service that answers in capitals and costs a quota unit for each character."""
    return UsageMeter(_shout, store, cost=_MOST_CHARACTERS, model="gpt-4o-mini")


def _shout(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    length = environ.get("CONTENT_LENGTH") or "0"
    size = min(int(length), _MOST_CHARACTERS) if length.isdecimal() else 0
    text = environ["wsgi.input"].read(size).decode("utf-8", "replace").upper()
    environ["usage_middleware.charge"](len(text))
    body = f"{text}\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]
