"""Reading the query of a request. No message quotes a value: it may be a key in the wrong place."""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_DATE: Final = re.compile(r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})")
_WHOLE_NUMBER: Final = re.compile(r"[0-9]{1,18}")


def query_of(environ: WSGIEnvironment) -> dict[str, list[str]]:
    """Return every parameter of a request with its values in order. A value may be empty."""
    parameters: dict[str, list[str]] = {}
    for name, value in parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True):
        parameters.setdefault(name, []).append(value)
    return parameters


def whole_number(text: str) -> int | None:
    """Return the number that ASCII digits write, or ``None`` if ``text`` is not a number that a database could hold."""
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else None


def calendar_date(text: str) -> date | None:
    """Return the date of a text such as ``2026-11-04`` or ``2026-11-4``, or ``None`` if it is not a date."""
    match = _DATE.fullmatch(text)
    try:
        return date(*map(int, match.groups())) if match else None
    except ValueError:
        return None
