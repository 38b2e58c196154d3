"""Tokens and operations as text for a person, and as objects for JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from ..keys import KEY_PREFIX
from ..operations import Operation
from ..tokens import Token, token_state
from .tables import bar, pad, printable, table, width
from .times import format_time

# Match a key that was pasted where it does not belong. "disk-1" is a word and not a key, and "sk-" followed only by a
# quotation mark comes from this package's own messages.
_KEY: Final = re.compile(rf"(?<![A-Za-z]){KEY_PREFIX}(?=[!-~]*[0-9A-Za-z])[!-~]+")

OPERATION_STATES: Final = ("open", "lapsed", "final")

_TOKEN_HEADINGS: Final = ("ID", "KEY", "STATE", "AVAILABLE", "USED", "GRANTED", "EXPIRES", "NAME")
_OPERATION_HEADINGS: Final = ("WHEN", "KIND", "AMOUNT", "HELD", "NOTE", "MODEL", "OPERATION")
_RIGHT: Final = frozenset(("ID", "AVAILABLE", "USED", "GRANTED", "AMOUNT", "HELD"))


def operation_state(operation: Operation, now: float) -> Literal["open", "lapsed", "final"]:
    """Return whether an operation is ``"open"``, ``"lapsed"`` (a reservation whose time has passed) or ``"final"``."""
    if not operation.is_open:
        return "final"
    return "lapsed" if operation.has_lapsed(now) else "open"


def without_keys(text: str) -> str:
    """Replace everything that looks like a key by ``sk-…``."""
    return _KEY.sub(f"{KEY_PREFIX}…", text)


def as_object(token: Token) -> dict[str, Any]:
    """Return the token for JSON: all its fields, and ``total_granted``."""
    fields = {field.name: getattr(token, field.name) for field in dataclasses.fields(token)}
    return {
        "id": token.id,
        "total_granted": token.total_granted,
        **fields,
        "model_limits": dict(token.model_limits),
        "expires_at": max(token.expires_at, 0),
    }


def operation_as_object(operation: Operation) -> dict[str, Any]:
    """Return the operation for JSON."""
    return dataclasses.asdict(operation)


def describe(token: Token, now: float, model_usage: Mapping[str, int] | None = None) -> Iterator[str]:
    """Yield the lines that describe one token.

    :param model_usage: what each model has used. Without it, only the limits of the models are shown.
    """
    for label, value in (
        ("Token", str(token.id)),
        ("Name", printable(token.name)),
        ("Key", _key(token)),
        ("State", token_state(token, now)),
        ("Granted", f"{token.total_granted:,}"),
        ("Used", _used(token.total_used, None if token.unlimited_quota else token.total_granted)),
        ("Available", _available(token)),
        ("Held", f"{token.held:,} by open reservations; part of what is used" if token.held else ""),
        ("Renews", _renewal(token)),
        ("Expires", format_time(token.expires_at)),
        ("Created", format_time(token.created_at, unset="unknown")),
        ("Models", _models_in_short(token)),
    ):
        if value or label == "Name":
            yield f"{label:<10} {value}".rstrip()
    usage = model_usage or {}
    models = {**token.model_limits, **{model: True for model in usage if model not in token.model_limits}}
    size = max(map(width, map(printable, models)), default=0)
    for model in models:
        limit = token.model_limits.get(model)
        number = None if limit is None or limit is True else limit
        shown = _limit(number) if model_usage is None else _used(usage.get(model, 0), number)
        yield f"  {pad(printable(model), size)}  {shown}"


def token_table(tokens: Iterable[Token], now: float) -> Iterator[str]:
    """Yield the lines of a table of tokens, under a line of headings."""
    return table(_TOKEN_HEADINGS, (_token_row(token, now) for token in tokens), right=_RIGHT)


def operation_table(operations: Iterable[Operation], now: float) -> Iterator[str]:
    """Yield the lines of a table of operations, under a line of headings."""
    return table(_OPERATION_HEADINGS, (_operation_row(operation, now) for operation in operations), right=_RIGHT)


def _operation_row(operation: Operation, now: float) -> Sequence[str]:
    amount = operation.amount if operation.final_amount is None else operation.final_amount
    state = operation_state(operation, now)
    note = f"of {printable(operation.refund_of)}" if operation.refund_of else "" if state == "final" else state
    return (
        format_time(int(operation.created_at)),
        operation.kind,
        f"{amount:,}",
        f"{operation.held:,}" if operation.kind in ("charge", "reserve") else "",
        note,
        printable(operation.model or ""),
        printable(operation.id),
    )


def _token_row(token: Token, now: float) -> Sequence[str]:
    return (
        str(token.id),
        _key(token),
        token_state(token, now),
        _available(token),
        f"{token.total_used:,}",
        f"{token.total_granted:,}",
        format_time(token.expires_at),
        printable(token.name),
    )


def _key(token: Token) -> str:
    return f"…{printable(token.hint)}"


def _available(token: Token) -> str:
    return "unlimited" if token.unlimited_quota else f"{token.total_available:,}"


def _renewal(token: Token) -> str:
    if not token.renewal:
        return ""
    return f"{token.renewal}, {token.renewal_quota:,} quota units; next on {format_time(token.renews_at)}"


def _used(used: int, limit: int | None) -> str:
    """Return how much is used; with a limit, also a bar and a percentage."""
    if limit is None:
        return f"{used:,}"
    percent = f"{used * 100 // limit} %" if limit > 0 else "none left"
    return f"{bar(used, limit)}  {used:,} of {limit:,} ({percent})"


def _limit(limit: int | None) -> str:
    return "no limit of its own" if limit is None else f"up to {limit:,}"


def _models_in_short(token: Token) -> str:
    if not token.model_limits_enabled:
        return "any; the limits below are not enabled" if token.model_limits else "any"
    return "only those below" if token.model_limits else "none"
