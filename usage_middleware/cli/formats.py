"""How tokens, times and amounts are written for a person, for a program, and read from either."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from itertools import chain, islice
from typing import Any, Final

from ..keys import KEY_PREFIX
from ..operations import Operation
from ..tokens import Token

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_DURATION: Final = re.compile(r"([0-9]+)\s*([smhdwy])", re.IGNORECASE)
_INTEGER: Final = re.compile(r"-?[0-9]+")
# A smaller number is rather a person's "30" than a second of the last century.
_SMALLEST_TIME: Final = 10**9
_KEY: Final = re.compile(rf"{KEY_PREFIX}[!-~]+")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)

STATES: Final = ("active", "exhausted", "expired", "disabled")
_TOKEN_HEADINGS: Final = ("ID", "KEY", "STATE", "AVAILABLE", "USED", "GRANTED", "EXPIRES", "NAME")
_OPERATION_HEADINGS: Final = ("WHEN", "KIND", "AMOUNT", "HELD", "NOTE", "MODEL", "OPERATION")
_RIGHT: Final = frozenset(("ID", "AVAILABLE", "USED", "GRANTED", "AMOUNT", "HELD"))
_BAR_CELLS: Final = 20
_SAMPLE: Final = 1000  # rows that decide how wide a column is


def parse_expiry(text: str, now: float) -> int:
    """Unix seconds of a time to come, as :func:`parse_time` reads it; ``never``, 0 and -1 are 0."""
    return 0 if text.strip().lower() in ("never", "0", "-1") else parse_time(text, now)


def parse_time(text: str, now: float, *, past: bool = False) -> int:
    """Unix seconds of a time as a person writes it: ``30d``, ``2027-01-01``, ``2027-01-01 18:30``.

    A time without a zone is UTC. Unix seconds are taken as they are.

    :param past: a duration such as ``30d`` is counted back.
    :raises ValueError: the text is no time; the message says what is.
    """
    text = text.strip()
    try:
        if match := _DURATION.fullmatch(text):
            duration = timedelta(seconds=int(match[1]) * _UNITS[match[2].lower()])
            time = datetime.fromtimestamp(int(now), timezone.utc) + (-duration if past else duration)
        elif _INTEGER.fullmatch(text):
            if int(text) < _SMALLEST_TIME:
                raise ValueError
            time = datetime.fromtimestamp(int(text), timezone.utc)
        else:
            time = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))  # Python 3.10 does not know Z
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is no time; write 30d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), or Unix seconds"
        ) from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    # Subtraction is exact where the float of timestamp() need not be.
    return max((time - _EPOCH) // timedelta(seconds=1), 1)


def format_time(seconds: int) -> str:
    """Unix seconds as a date and a time in UTC; ``never`` for 0 or less."""
    if seconds <= 0:
        return "never"
    try:
        return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M UTC")
    except OverflowError:  # beyond the year 9999
        return str(seconds)


def state(token: Token, now: float) -> str:
    """Whether the token's holder can use it, and if not, why: one of :data:`STATES`."""
    if not token.enabled:
        return "disabled"
    if 0 < token.expires_at <= now:
        return "expired"
    if token.total_available <= 0 and not token.unlimited_quota:
        return "exhausted"
    return "active"


def printable(text: str) -> str:
    """``text`` without characters that would act on a terminal instead of being shown by it."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def without_keys(text: str) -> str:
    """``text`` without what looks like a key, which people paste where it does not belong."""
    return _KEY.sub(f"{KEY_PREFIX}…", text)


def as_object(token: Token) -> dict[str, Any]:
    """The token for a program: what is on the wire, and what its operator knows beyond it."""
    return {
        "id": token.id,
        "name": token.name,
        "hint": token.hint,
        "enabled": token.enabled,
        "total_granted": token.total_granted,
        "total_used": token.total_used,
        "total_available": token.total_available,
        "unlimited_quota": token.unlimited_quota,
        "model_limits": dict(token.model_limits),
        "model_limits_enabled": token.model_limits_enabled,
        "expires_at": max(token.expires_at, 0),
        "created_at": token.created_at,
    }


def operation_as_object(operation: Operation) -> dict[str, Any]:
    """An operation for a program."""
    return dataclasses.asdict(operation)


def describe(token: Token, model_usage: Mapping[str, int], now: float) -> Iterator[str]:
    """Lines that tell a person all about one token."""
    for label, value in (
        ("Token", str(token.id)),
        ("Name", printable(token.name)),
        ("Key", _key(token)),
        ("State", state(token, now)),
        ("Granted", f"{token.total_granted:,}"),
        ("Used", _used(token.total_used, None if token.unlimited_quota else token.total_granted)),
        ("Available", _available(token)),
        ("Expires", format_time(token.expires_at)),
        ("Created", format_time(token.created_at)),
        ("Models", _models_in_short(token)),
    ):
        yield f"{label:<10} {value}".rstrip()
    models = {**token.model_limits, **{model: True for model in model_usage if model not in token.model_limits}}
    width = max(map(_width, models), default=0)
    for model in models:
        limit = token.model_limits.get(model)
        shown = printable(model)
        used = _used(model_usage.get(model, 0), None if limit is None or limit is True else limit)
        yield f"  {shown}{' ' * (width - _width(shown))}  {used}"


def token_table(tokens: Iterable[Token], now: float) -> Iterator[str]:
    """Lines of a table of tokens, under a line of headings."""
    return _table(_TOKEN_HEADINGS, (_token_row(token, now) for token in tokens))


def operation_table(operations: Iterable[Operation]) -> Iterator[str]:
    """Lines of a table of operations, under a line of headings."""
    return _table(_OPERATION_HEADINGS, map(_operation_row, operations))


def _table(headings: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Rows are taken as they come, never all at once: the first ones decide how wide a column is."""
    sample = list(islice(rows, _SAMPLE))
    widths = [max(map(_width, column)) for column in zip(headings, *sample, strict=True)]
    for row in chain([headings], sample, rows):
        yield "  ".join(map(_cell, headings, row, widths)).rstrip()


def _operation_row(operation: Operation) -> Sequence[str]:
    amount = operation.amount if operation.final_amount is None else operation.final_amount
    return (
        format_time(int(operation.created_at)),
        operation.kind,
        f"{amount:,}",
        f"{operation.held:,}" if operation.kind in ("charge", "reserve") else "",
        "open" if operation.is_open else f"of {printable(operation.refund_of)}" if operation.refund_of else "",
        printable(operation.model or ""),
        printable(operation.id),
    )


def _token_row(token: Token, now: float) -> Sequence[str]:
    return (
        str(token.id),
        _key(token),
        state(token, now),
        _available(token),
        f"{token.total_used:,}",
        f"{token.total_granted:,}",
        format_time(token.expires_at),
        printable(token.name),
    )


def _cell(heading: str, text: str, width: int) -> str:
    padding = " " * (width - _width(text))
    return padding + text if heading in _RIGHT else text + padding


def _width(text: str) -> int:
    """Columns of a terminal: East Asian wide characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _key(token: Token) -> str:
    return f"…{printable(token.hint)}"


def _available(token: Token) -> str:
    return "unlimited" if token.unlimited_quota else f"{token.total_available:,}"


def _used(used: int, limit: int | None) -> str:
    """How much is used, and of a limit a bar that shows it at a glance. It is only empty or full where that is true."""
    if limit is None:
        return f"{used:,}"
    part = used * _BAR_CELLS // limit if limit > 0 else _BAR_CELLS
    cells = max(min(part, _BAR_CELLS), 1 if used > 0 else 0)
    percent = f"{used * 100 // limit} %" if limit > 0 else "none left"
    return f"{'█' * cells}{'░' * (_BAR_CELLS - cells)}  {used:,} of {limit:,} ({percent})"


def _models_in_short(token: Token) -> str:
    if not token.model_limits_enabled:
        return "any; the limits below are not enabled" if token.model_limits else "any"
    return "only those below" if token.model_limits else "none"
