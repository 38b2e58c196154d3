"""The rows of a new-api database, as tokens and as log entries. What a row lacks has its default."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import RowMapping

from ...errors import DamagedToken, StoreError
from ...keys import KEY_PATTERN, key_digest, key_hint
from ...log import LogEntry, LogKind
from ...tokens import Token, TokenRecord

_DISABLED: Final = 2  # 3 (expired) and 4 (exhausted) follow from the token's own numbers.
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "t", "true", "\x01"), True),
    **dict.fromkeys(("0", "f", "false", "\x00", ""), False),
}
#: What new-api writes for the kinds of entries in a log.
LOG_TYPES: Final[dict[LogKind, int]] = {"charge": 2, "refund": 6}
_KINDS: Final = {number: kind for kind, number in LOG_TYPES.items()}

#: Match a key that a client can send.
can_be_sent: Final = re.compile(KEY_PATTERN).fullmatch


def record_of(row: RowMapping, key: str) -> TokenRecord | DamagedToken:
    """Return the token of a row for another store, or the reason why the row is not a token."""
    if not can_be_sent(key):
        return DamagedToken(row["id"], "it has no key that a client can send")
    try:
        return TokenRecord(token=token_of(row, key), digest=key_digest(key))
    except DamagedToken as error:
        return error


def token_of(row: RowMapping, key: str) -> Token:
    """Return the token of a row.

    :raises DamagedToken: the row holds what no token can have.
    """
    try:
        return Token(
            id=row["id"],
            name=text_of(row.get("name")),
            total_available=_integer(row, "remain_quota"),
            total_used=_integer(row, "used_quota"),
            unlimited_quota=_boolean(row, "unlimited_quota"),
            model_limits={model: True for model in text_of(row.get("model_limits")).split(",") if model},
            model_limits_enabled=_boolean(row, "model_limits_enabled"),
            expires_at=max(_integer(row, "expired_time"), 0),
            enabled=bool(row["owned"]) and _integer(row, "status") != _DISABLED,
            hint=key_hint(key),
            created_at=_integer(row, "created_time"),
        )
    except (TypeError, ValueError) as error:
        raise DamagedToken(row["id"], str(error)) from error


def entry_of(row: RowMapping) -> LogEntry:
    """Return a row of the log as an entry.

    :raises StoreError: the row holds what no entry can have.
    """
    try:
        return LogEntry(
            kind=_KINDS[_integer(row, "type")],
            created_at=_integer(row, "created_at"),
            units=_integer(row, "quota"),
            model=_valid(row.get("model_name")),
            input_tokens=_integer(row, "prompt_tokens"),
            output_tokens=_integer(row, "completion_tokens"),
            id=_valid(row.get("request_id")),
            seconds=_integer(row, "use_time"),
            is_stream=_boolean(row, "is_stream"),
        )
    except (TypeError, ValueError) as error:
        raise StoreError(f"row {row['id']} of the table 'logs' is damaged: {error}") from error


def text_of(value: Any) -> str:
    """Return a text. A database without an encoding returns bytes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)


def _valid(value: Any) -> str:
    # Decode leniently, so one name with invalid UTF-8 does not fail all the other rows.
    return text_of(value).encode("utf-8", "replace").decode()


def _integer(row: RowMapping, name: str) -> int:
    value = row.get(name)
    if value is None:
        return 0
    if isinstance(value, (float, Decimal)) and value == value // 1:  # a column of another type
        return int(value)
    if not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value


def _boolean(row: RowMapping, name: str) -> bool:
    """Return a boolean, which databases hold as a number, as a bit (PyMySQL makes bytes of it), or as text."""
    value = row.get(name)
    if value is None or isinstance(value, (int, float, Decimal)):
        return bool(value)
    try:
        return _BOOLEANS[text_of(value).lower()]
    except KeyError:
        raise ValueError(f"{name} must be a boolean, got {value!r}") from None
