"""Tokens, operations and usage as rows. A column has the name of its field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any, Final

from ..errors import DamagedToken
from ..operations import Operation
from ..tokens import BOOLEAN_FIELDS, Token, TokenRecord, encode_model_limits, id_of
from ..usage import DayUsage

#: The columns of a token after its ``id``, which the database assigns.
TOKEN_COLUMNS: Final = tuple(field.name for field in dataclasses.fields(Token) if field.name != "id")
#: The columns of an operation after its ``number``, which the database assigns.
OPERATION_COLUMNS: Final = tuple(
    field.name for field in dataclasses.fields(Operation) if field.name not in ("number", "replayed")
)
#: The columns of usage by day after its ``token_id``.
DAY_COLUMNS: Final = DayUsage._fields
#: Those of them that only grow, and stop at 2**63 - 1: a figure must not keep a charge from being made.
DAY_COUNTS: Final = ("requests", "input_tokens", "output_tokens")

_TOKEN_ROW: Final = ("id", *TOKEN_COLUMNS)
_OPERATION_ROW: Final = ("number", *OPERATION_COLUMNS)
# SQLite and MySQL have no other booleans than 0 and 1.
_BOOLEANS: Final = tuple(_TOKEN_ROW.index(name) for name in BOOLEAN_FIELDS)
_MODEL_LIMITS: Final = _TOKEN_ROW.index("model_limits")
_SET_FIELDS: Final = [getattr(Token, name).__set__ for name in _TOKEN_ROW]


def records_of(
    page: Sequence[tuple[Token, bytes]],
    model_usage: Iterable[Sequence[Any]],
    days: Iterable[tuple[int, DayUsage]],
) -> list[TokenRecord]:
    """Return the records of tokens.

    :param page: each token with its digest.
    :param model_usage: a token id, a model, and the units that it has used, for each model of these tokens.
    :param days: a token id and its usage, for each day and model of these tokens, by day and then model.
    """
    models_of: dict[int, dict[str, int]] = {}
    for token_id, model, used in model_usage:
        models_of.setdefault(token_id, {})[model] = used
    days_of: dict[int, list[DayUsage]] = {}
    for token_id, usage in days:
        days_of.setdefault(token_id, []).append(usage)
    return [
        TokenRecord(
            token=token,
            digest=digest,
            model_usage=models_of.get(id_of(token), {}),
            days=tuple(days_of.get(id_of(token), ())),
        )
        for token, digest in page
    ]


def token_of(row: Sequence[Any]) -> Token:
    """Return the token of a row that begins with its ``id`` and :data:`TOKEN_COLUMNS`.

    :raises DamagedToken: another program has written values that no token can have.
    """
    values = list(row)
    try:
        for place in _BOOLEANS:
            values[place] = values[place] == 1
        limits = values[_MODEL_LIMITS]
        values[_MODEL_LIMITS] = {} if limits == "{}" else json.loads(limits)
        # The same as Token(**fields), at two thirds of its time, as every look-up comes through here: a frozen
        # dataclass looks up object.__setattr__ for each field, and this sets the slots themselves.
        token = object.__new__(Token)
        for set_field, value in zip(_SET_FIELDS, values):  # noqa: B905 - a row may have more columns
            set_field(token, value)
        token.__post_init__()
        return token
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


def day_of(text: str, token_id: int) -> date:
    """Return the day of a token's usage by day.

    :raises DamagedToken: another program has written what is not a day.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise DamagedToken(token_id, f"its usage is booked on {text!r}, which is not a day") from None


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
