"""``GET /api/usage/token/days``: what was used on which UTC day, by which model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from ...stores.base import QuotaStore
from ...tokens import Token, id_of
from ...usage import DayUsage
from ..authentication import Authentication
from ..refusals import PARAMETER, Refused
from ..responses import ResponsesByOrigin, to_json
from .endpoint import TokenEndpoint
from .query import calendar_date, query_of, whole_number

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_DAYS: Final = 30
_MOST_DAYS: Final = 366
_MOST_MODELS: Final = 50  # in a day; the usage of the others is summed
_OTHERS: Final = "(other)"
# The fields of a DayUsage after its day and model.
_FIGURES: Final = '"used":%d,"requests":%d,"input_tokens":%d,"output_tokens":%d'
_MODEL: Final = f"%s:{{{_FIGURES}}}"

_NOTHING: Final = (0, 0, 0, 0)

_used = attrgetter("used")


class DaysEndpoint(TokenEndpoint):
    """Answer with what a token used, by day and model.

    :param store: keeps usage by day. Its clock also says what day it is, as usage is booked by it.
    """

    def __init__(self, responses: ResponsesByOrigin, authentication: Authentication, store: QuotaStore) -> None:
        super().__init__(responses, authentication)
        self._store = store

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        today = self._store.today()
        first, last = _period(query_of(environ), today)
        by_day: dict[date, list[DayUsage]] = {}
        for usage in self._store.usage_by_day(id_of(token), first, last):
            by_day.setdefault(usage.day, []).append(usage)
        # With a dict for each of 18,300 models, the encoder would need more time than all the rest.
        names = _Names()
        sums, days = {}, []
        for day in sorted(by_day):
            _, models, *figures = zip(*_most_used(by_day[day]), strict=True)
            sums[day] = tuple(map(sum, figures))
            entries = map(_MODEL.__mod__, zip(map(names.__getitem__, models), *figures, strict=True))
            days.append('{"date":"%s",%s,"models":{%s}}' % (day, _FIGURES % sums[day], ",".join(entries)))
        if first <= today <= last:
            used_today = sums.get(today, _NOTHING)[0]
        else:
            used_today = sum(usage.used for usage in self._store.usage_by_day(id_of(token), today, today))
        return (
            '{"code":true,"message":"ok","data":{"object":"token_usage_days","start_date":"%s","end_date":"%s",%s,'
            '"used_today":%d,"held":%d,"renewal":"%s","renewal_quota":%d,"renews_at":%d,"days":[%s]}}'
        ) % (
            first,
            last,
            _FIGURES % tuple(map(sum, zip(_NOTHING, *sums.values(), strict=True))),
            used_today,
            token.held,
            token.renewal,
            token.renewal_quota,
            token.renews_at,
            ",".join(days),
        )


class _Names(dict[str, str]):
    """Names of models as JSON. Most names occur on every day."""

    def __missing__(self, name: str) -> str:
        self[name] = to_json(name)
        return self[name]


def _period(query: dict[str, list[str]], today: date) -> tuple[date, date]:
    """Return the first and the last day that a query asks for.

    :raises Refused: the query is not a period. The message names the parameter.
    """
    for name, values in query.items():
        if name not in ("days", "start_date", "end_date"):
            raise _refused("the query takes days, or start_date and end_date, and no other parameter")
        if len(values) > 1:
            raise _refused(f"{name} must be given once")
    if "start_date" in query or "end_date" in query:
        if "days" in query:
            raise _refused("days must not be given together with start_date and end_date")
        first, last = _date(query, "start_date"), _date(query, "end_date")
        if last < first:
            raise _refused("end_date must not be before start_date")
        if last - first >= timedelta(_MOST_DAYS):
            raise _refused(f"start_date and end_date must be at most {_MOST_DAYS} days, both included")
        return first, last
    days = whole_number(query["days"][0]) if "days" in query else _DAYS
    if days is None or not 1 <= days <= _MOST_DAYS:
        raise _refused(f"days must be a whole number from 1 to {_MOST_DAYS}")
    return today - timedelta(days - 1), today


def _date(query: dict[str, list[str]], name: str) -> date:
    if name not in query:
        raise _refused(f"{name} is missing: start_date and end_date must be given together")
    day = calendar_date(query[name][0])
    if day is None:
        raise _refused(f"{name} must be a date such as 2026-11-24")
    return day


def _refused(message: str) -> Refused:
    return Refused(PARAMETER, message=message)


def _most_used(models: Sequence[DayUsage]) -> Sequence[DayUsage]:
    """Return the models of a day, those that used most first. Models past the limit are summed.

    :param models: sorted by name. Models that used the same stay in this order.
    """
    models = sorted(models, key=_used, reverse=True)
    others = models[_MOST_MODELS:]
    if not others:
        return models
    # A model may itself have that name.
    others += [usage for usage in models[:_MOST_MODELS] if usage.model == _OTHERS]
    named = [usage for usage in models[:_MOST_MODELS] if usage.model != _OTHERS]
    _, _, *figures = zip(*others, strict=True)
    return [*named, DayUsage(models[0].day, _OTHERS, *map(sum, figures))]
