"""Quotas that renew: when a period begins, and what a token has then. Pure functions of a token and the time.

A period is a UTC day, a week from Monday, or a month of the calendar.
"""

from __future__ import annotations

import calendar
import dataclasses
from datetime import datetime, timezone
from typing import Final

from .checks import MAX_INTEGER
from .tokens import Token

_DAY: Final = 86_400  # seconds: Unix time has no leap seconds
_EPOCH_WEEKDAY: Final = 3  # 1 January 1970 was a Thursday, and Monday is 0


def next_renewal(renewal: str, now: float) -> int:
    """Return the Unix time at which the first period after ``now`` begins."""
    return _begin(renewal, _period(renewal, now) + 1)


def first_renewal(renewal: str, now: float) -> int:
    """Return the ``renews_at`` of a quota that begins to renew at ``now``; 0 if it does not renew."""
    return next_renewal(renewal, now) if renewal else 0


def is_due(token: Token, now: float) -> bool:
    """Return whether a period has begun that the token does not record yet."""
    return 0 < token.renews_at <= now and token.renewal != ""


def renewed(token: Token, now: float) -> Token:
    """Return the token as it is at ``now``: in a new period, if one has begun.

    Debt is not forgiven, and what is left over is not carried over. What open reservations hold is taken from the new
    quota, as they are not final, so that a release after midnight cannot carry quota over. The quota is reduced if a
    total, or its change, would not fit into a 64-bit integer.
    """
    if not is_due(token, now):
        return token
    periods = 1 + _period(token.renewal, now) - _period(token.renewal, token.renews_at)
    debt = min(token.total_available + token.held, 0)
    room = MAX_INTEGER + min(token.total_available, -token.total_used) + token.held
    return dataclasses.replace(
        token,
        total_available=min(token.renewal_quota, debt + periods * token.renewal_quota, room) - token.held,
        renews_at=next_renewal(token.renewal, now),
    )


def _period(renewal: str, time: float) -> int:
    """Return the number of the period that ``time`` is in."""
    day = int(time // _DAY)
    if renewal == "daily":
        return day
    if renewal == "weekly":
        return (day + _EPOCH_WEEKDAY) // 7
    date = datetime.fromtimestamp(time, timezone.utc)
    return date.year * 12 + date.month - 1


def _begin(renewal: str, period: int) -> int:
    """Return the Unix time at which a period begins, by its number."""
    if renewal == "daily":
        return period * _DAY
    if renewal == "weekly":
        return (period * 7 - _EPOCH_WEEKDAY) * _DAY
    year, month = divmod(period, 12)
    return calendar.timegm((year, month + 1, 1, 0, 0, 0))
