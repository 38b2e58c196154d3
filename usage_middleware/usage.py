"""Usage by day and model: what a token used on each UTC day, and how it adds up."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timezone
from typing import NamedTuple

from .checks import MAX_INTEGER


class DayUsage(NamedTuple):
    """What one token used on one UTC day with one model.

    An operation is booked on the day on which it was made, and so is every change of it: what a settle adds, and what
    a refund or a lapsed reservation returns. So ``used`` is never negative.
    """

    day: date
    #: The model's name; empty for charges without a model.
    model: str
    #: Quota units.
    used: int
    #: How many charges and reservations were made.
    requests: int
    input_tokens: int
    output_tokens: int


def day_of(time: float) -> date:
    """Return the UTC day of a Unix time in seconds."""
    return datetime.fromtimestamp(time, timezone.utc).date()


def add_up(days: Iterable[DayUsage]) -> list[DayUsage]:
    """Return one entry for each day and model, by day and then model, with the figures of its entries added up."""
    sums: dict[tuple[date, str], DayUsage] = {}
    for entry in days:
        place = (entry.day, entry.model)
        other = sums.get(place)
        sums[place] = entry if other is None else _sum(entry, other)
    return [sums[place] for place in sorted(sums)]


def _sum(a: DayUsage, b: DayUsage) -> DayUsage:
    return DayUsage(
        day=a.day,
        model=a.model,
        used=a.used + b.used,
        requests=min(a.requests + b.requests, MAX_INTEGER),
        input_tokens=min(a.input_tokens + b.input_tokens, MAX_INTEGER),
        output_tokens=min(a.output_tokens + b.output_tokens, MAX_INTEGER),
    )
