"""Tokens and operations as rows: one order of columns in queries, in what they give, and in what is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from ..errors import DamagedToken
from ..operations import Operation
from ..tokens import Token, encode_model_limits

#: The columns of a token behind its ``id``.
TOKEN_COLUMNS: Final = (
    "hint",
    "name",
    "total_available",
    "total_used",
    "unlimited_quota",
    "model_limits",
    "model_limits_enabled",
    "expires_at",
    "enabled",
    "created_at",
)
#: The columns of an operation behind its ``number``.
OPERATION_COLUMNS: Final = (
    "id",
    "token_id",
    "kind",
    "amount",
    "model",
    "held",
    "unlimited",
    "expires_in",
    "expires_at",
    "final_amount",
    "refund_of",
    "created_at",
    "changed_at",
)


def token_of(row: Sequence[Any]) -> Token:
    """The token of a row that begins with its ``id`` and :data:`TOKEN_COLUMNS`.

    :raises DamagedToken: somebody else has written it.
    """
    try:
        return Token(
            id=row[0],
            hint=row[1],
            name=row[2],
            total_available=row[3],
            total_used=row[4],
            unlimited_quota=row[5] == 1,  # SQLite and MySQL have no other booleans than 0 and 1
            model_limits={} if row[6] == "{}" else json.loads(row[6]),
            model_limits_enabled=row[7] == 1,
            expires_at=row[8],
            enabled=row[9] == 1,
            created_at=row[10],
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedToken(row[0], str(error)) from error


def token_values(token: Token) -> tuple[Any, ...]:
    """The values of :data:`TOKEN_COLUMNS`."""
    return (
        token.hint,
        token.name,
        token.total_available,
        token.total_used,
        token.unlimited_quota,
        encode_model_limits(token.model_limits),
        token.model_limits_enabled,
        token.expires_at,
        token.enabled,
        token.created_at,
    )


def operation_of(row: Sequence[Any]) -> Operation:
    """The operation of a row that is its ``number`` and :data:`OPERATION_COLUMNS`."""
    number, *values = row
    fields = dict(zip(OPERATION_COLUMNS, values, strict=True))
    fields["unlimited"] = fields["unlimited"] == 1
    return Operation(number=number, **fields)


def operation_values(operation: Operation) -> tuple[Any, ...]:
    """The values of :data:`OPERATION_COLUMNS`."""
    return tuple(getattr(operation, name) for name in OPERATION_COLUMNS)
