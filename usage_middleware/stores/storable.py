"""What every store can hold, whatever its database: 64-bit integers, and text without NUL, which PostgreSQL refuses."""

from __future__ import annotations

from datetime import date
from typing import Final

from ..checks import MAX_INTEGER, check_amount, check_text
from ..keys import HINT_LENGTH
from ..tokens import Token, TokenRecord

_INTEGERS: Final = {
    "total_available": "quota units",
    "total_used": "quota units",
    "total_granted": "quota units",
    "expires_at": "Unix seconds",
    "created_at": "Unix seconds",
    "renewal_quota": "quota units",
}
_LATEST: Final = 253_402_300_799  # the end of the year 9999, the last year of datetime
_DIGEST_SIZE: Final = 32


def check_record(record: TokenRecord) -> TokenRecord:
    """Return the record itself, if every store can hold it.

    :raises TypeError, ValueError: a store cannot hold it. The message names the field.
    """
    token = record.token
    check_storable(token)
    if token.total_used < 0:
        raise ValueError(f"total_used must not be negative, got {token.total_used}")
    if len(token.hint) > HINT_LENGTH or "\0" in token.hint:
        raise ValueError(f"hint must be the last {HINT_LENGTH} characters of a key")
    if not isinstance(record.digest, bytes) or len(record.digest) != _DIGEST_SIZE:
        raise ValueError(f"a digest must be the {_DIGEST_SIZE} bytes of SHA-256")
    for model, used in record.model_usage.items():
        check_text("a model in model_usage", model)
        check_amount(used)
    seen = set()
    for entry in record.days:
        if type(entry.day) is not date:  # a datetime is a date too, but not a day
            raise TypeError(f"a day in days must be a datetime.date, got {type(entry.day).__name__}")
        if entry.model != "":
            check_text("a model in days", entry.model)
        for name in ("used", "requests", "input_tokens", "output_tokens"):
            check_amount(getattr(entry, name), f"{name} in days", unit="units")
        seen.add((entry.day, entry.model))
    if len(seen) < len(record.days):
        raise ValueError("days must have each day and model once")
    return record


def check_storable(token: Token) -> None:
    """:raises ValueError: a database cannot hold the token; the message names the field."""
    # Many tokens are restored at once, so an ordinary token costs only this one expression.
    if not (
        -MAX_INTEGER <= token.total_available <= MAX_INTEGER
        and -MAX_INTEGER <= token.total_used <= MAX_INTEGER
        and -MAX_INTEGER <= token.total_used + token.total_available <= MAX_INTEGER
        and -MAX_INTEGER <= token.expires_at <= MAX_INTEGER
        and -MAX_INTEGER <= token.created_at <= MAX_INTEGER
        and -MAX_INTEGER <= token.renewal_quota <= MAX_INTEGER
    ):
        for field, unit in _INTEGERS.items():
            if abs(getattr(token, field)) > MAX_INTEGER:
                raise ValueError(f"{field} must be 0 to 2**63 - 1 {unit}, got {getattr(token, field)}")
    if token.renewal and token.renewal_quota < 1:
        raise ValueError(f"renewal_quota must be 1 to 2**63 - 1 quota units, got {token.renewal_quota}")
    if not token.renewal and token.renewal_quota:
        raise ValueError("renewal_quota needs a renewal: 'daily', 'weekly' or 'monthly'")
    if not 0 <= token.renews_at <= _LATEST:
        raise ValueError(f"renews_at must be 0 to {_LATEST} Unix seconds, got {token.renews_at}")
    if "\0" in token.name:
        raise ValueError("name must not contain NUL characters")
    for model, limit in token.model_limits.items():
        if not model or "\0" in model:
            raise ValueError(f"a model in model_limits must be a name without NUL characters, got {model!r}")
        if limit > MAX_INTEGER:
            raise ValueError(f"model_limits[{model!r}] must be 0 to 2**63 - 1 quota units or True, got {limit}")
