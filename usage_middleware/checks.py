"""Checks of arguments that several packages share. Each raises an error that says what the argument must be."""

from __future__ import annotations

import sys
from typing import Final

MAX_INTEGER: Final = 2**63 - 1  # what a 64-bit column holds
TEXT_MAX_LENGTH: Final = 255  # characters of an identifier


def check_amount(amount: object, what: str = "an amount", *, unit: str = "quota units", negative: bool = False) -> None:
    """:raises TypeError, ValueError: ``amount`` is not a number of units that a database holds."""
    if not isinstance(amount, int) or isinstance(amount, bool):
        # Without the value, here and below: what is not an amount may be a key in the wrong place.
        raise TypeError(f"{what} must be an int of {unit}, got {type(amount).__name__}")
    if not (-MAX_INTEGER if negative else 0) <= amount <= MAX_INTEGER:
        least = "-(2**63 - 1)" if negative else "0"
        raise ValueError(f"{what} must be {least} to 2**63 - 1 {unit}, got {amount}")


def check_text(what: str, text: object) -> None:
    """:raises TypeError, ValueError: ``text`` is not an identifier that every database can hold."""
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, got {type(text).__name__}")
    if not 1 <= len(text) <= TEXT_MAX_LENGTH or "\0" in text:
        raise ValueError(f"{what} must be 1 to {TEXT_MAX_LENGTH} characters without NUL, got {text[:40]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text that UTF-8 can carry, got {text[:40]!r}") from None


def check_seconds(what: str, seconds: object) -> None:
    """:raises TypeError, ValueError: ``seconds`` is not a duration."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, got {type(seconds).__name__}")
    if not 0 < seconds <= sys.float_info.max:
        raise ValueError(f"{what} must be more than 0 seconds, got {seconds!r}")


def check_time(what: str, time: object) -> None:
    """:raises TypeError, ValueError: ``time`` is not a Unix time."""
    if not isinstance(time, (int, float)) or isinstance(time, bool):
        raise TypeError(f"{what} must be a number of Unix seconds, got {type(time).__name__}")
    if not -sys.float_info.max <= time <= sys.float_info.max:
        raise ValueError(f"{what} must be a number of Unix seconds, got {time!r}")


def can_exist(token_id: object) -> bool:
    """Return whether there could be a token of that id. A database would raise an error for other ids.

    :raises TypeError: it is not an ``int``.
    """
    if not isinstance(token_id, int) or isinstance(token_id, bool):
        # Without the value, which may be a key in the wrong place.
        raise TypeError(f"a token id must be an int, got {type(token_id).__name__}")
    return 0 < token_id <= MAX_INTEGER
