"""Tokens, operations and usage as rows. A column has the name of its field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Final

from ..errors import DamagedToken
from ..operations import Operation
from ..tokens import Token, encode_model_limits
from ..usage import DayUsage


def _token(
    id: int,  # noqa: A002 - the name of the column
    name: str,
    total_available: int,
    total_used: int,
    unlimited_quota: int,
    model_limits: str,
    model_limits_enabled: int,
    expires_at: int,
    enabled: int,
    hint: str,
    created_at: int,
    renewal: str,
    renewal_quota: int,
    renews_at: int,
    held: int,
    *_: object,
) -> Token:
    # Written out, as every look-up comes through here: by a dict of the columns it takes a third longer.
    return Token(
        id=id,
        name=name,
        total_available=total_available,
        total_used=total_used,
        unlimited_quota=unlimited_quota == 1,  # SQLite and MySQL have no other booleans than 0 and 1
        model_limits={} if model_limits == "{}" else json.loads(model_limits),
        model_limits_enabled=model_limits_enabled == 1,
        expires_at=expires_at,
        enabled=enabled == 1,
        hint=hint,
        created_at=created_at,
        renewal=renewal,
        renewal_quota=renewal_quota,
        renews_at=renews_at,
        held=held,
    )


#: The columns of a token after its ``id``, which the database assigns.
TOKEN_COLUMNS: Final = _token.__code__.co_varnames[1 : _token.__code__.co_argcount]
#: The columns of an operation after its ``number``, which the database assigns.
OPERATION_COLUMNS: Final = tuple(
    field.name for field in dataclasses.fields(Operation) if field.name not in ("number", "replayed")
)
#: The columns of usage by day after its ``token_id``.
DAY_COLUMNS: Final = DayUsage._fields
#: Those of them that only grow, and stop at 2**63 - 1: a figure must not keep a charge from being made.
DAY_COUNTS: Final = ("requests", "input_tokens", "output_tokens")

_OPERATION_ROW: Final = ("number", *OPERATION_COLUMNS)


def token_of(row: Sequence[Any]) -> Token:
    """Return the token of a row that begins with its ``id`` and :data:`TOKEN_COLUMNS`.

    :raises DamagedToken: another program has written values that no token can have.
    """
    try:
        return _token(*row)
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedToken(row[0], str(error)) from error


def token_values(token: Token) -> dict[str, Any]:
    """Return the values of :data:`TOKEN_COLUMNS`, by column."""
    return {name: _value(token, name) for name in TOKEN_COLUMNS}


def changed_values(before: Token, after: Token) -> dict[str, Any]:
    """Return the values of those columns in which two tokens differ, by column."""
    return {name: _value(after, name) for name in TOKEN_COLUMNS if getattr(before, name) != getattr(after, name)}


def _value(token: Token, name: str) -> Any:
    return encode_model_limits(token.model_limits) if name == "model_limits" else getattr(token, name)


def operation_of(row: Sequence[Any]) -> Operation:
    """Return the operation of a row that is its ``number`` and :data:`OPERATION_COLUMNS`."""
    fields = dict(zip(_OPERATION_ROW, row, strict=True))
    fields["unlimited"] = fields["unlimited"] == 1
    return Operation(**fields)


def operation_values(operation: Operation) -> dict[str, Any]:
    """Return the values of :data:`OPERATION_COLUMNS`, by column."""
    return {name: getattr(operation, name) for name in OPERATION_COLUMNS}


def changed_operation_values(before: Operation, after: Operation) -> dict[str, Any]:
    """Return the values of those columns in which two operations differ, by column."""
    return {name: getattr(after, name) for name in OPERATION_COLUMNS if getattr(before, name) != getattr(after, name)}
