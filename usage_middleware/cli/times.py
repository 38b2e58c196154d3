"""Times and days as a person writes and reads them. All are UTC."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Final

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_DURATION: Final = re.compile(r"([0-9]+)\s*([smhdwy])", re.IGNORECASE)
_INTEGER: Final = re.compile(r"-?[0-9]+")
# A smaller number is more likely "30d" without its unit than a time before September 2001.
_SMALLEST_TIME: Final = 10**9
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


def parse_expiry(text: str, now: float) -> int:
    """Parse a time as :func:`parse_time` does. ``never``, ``0`` and ``-1`` are 0."""
    return 0 if text.strip().lower() in ("never", "0", "-1") else parse_time(text, now)


def parse_time(text: str, now: float, *, past: bool = False) -> int:
    """Parse a time such as ``30d``, ``2027-01-01`` or ``2027-01-01 18:30``, and return Unix seconds.

    A time without a zone is UTC. Unix seconds are returned as they are.

    :param past: count a duration such as ``30d`` back from ``now``.
    :raises ValueError: the text is not a time; the message says what is.
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
            f"{text!r} is not a time; write 30d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), or Unix seconds"
        ) from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    # Subtraction is exact; the float that timestamp() returns may not be.
    return max((time - _EPOCH) // timedelta(seconds=1), 1)


def format_time(seconds: int, *, unset: str = "never") -> str:
    """Return Unix seconds as a date and a time in UTC; ``unset`` for 0 or less."""
    if seconds <= 0:
        return unset
    try:
        return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M UTC")
    except OverflowError:  # beyond the year 9999
        return str(seconds)
