"""``GET /dashboard/billing/…``: answers that OpenAI's dashboard once gave, and that many clients of gateways
still ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...stores.base import QuotaStore, TokenStore
from ...tokens import Token
from ...usage import day_of
from ..authentication import Authentication
from ..responses import ResponsesByOrigin, to_json
from .endpoint import TokenEndpoint
from .query import calendar_date, query_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_UNLIMITED: Final = 100_000_000  # what new-api answers for a token without a limit


def openai_error(kind: str, message: str) -> str:
    """Return the error body of these endpoints, which is OpenAI's with a type of new-api."""
    return to_json({"error": {"message": message, "type": "new_api_error", "param": "", "code": ""}})


class SubscriptionEndpoint(TokenEndpoint):
    """Answer with what was granted, and until when it can be used.

    :param divisor: how many quota units are one unit of what clients show.
    """

    def __init__(self, responses: ResponsesByOrigin, authentication: Authentication, divisor: int) -> None:
        super().__init__(responses, authentication)
        self._divisor = divisor

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        limit = _UNLIMITED if token.unlimited_quota else _quotient(token.total_granted, self._divisor)
        return to_json(
            {
                "object": "billing_subscription",
                "has_payment_method": True,
                "soft_limit_usd": limit,
                "hard_limit_usd": limit,
                "system_hard_limit_usd": limit,
                "access_until": max(token.expires_at, 0),
            }
        )


class UsedEndpoint(TokenEndpoint):
    """Answer with what was used, in hundredths: in all, or on the days from ``start_date`` to ``end_date``.

    A query that is not two dates is ignored; new-api ignores every query. Clients of this endpoint still send what they
    always sent, and would show an error as a balance of nothing.
    """

    def __init__(
        self, responses: ResponsesByOrigin, authentication: Authentication, divisor: int, store: TokenStore
    ) -> None:
        super().__init__(responses, authentication)
        self._divisor = divisor
        self._store = store

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        # Divide first, as new-api does, because clients compare and subtract the results.
        total_usage = _whole(_quotient(self._used(token, environ), self._divisor) * 100)
        return to_json({"object": "list", "total_usage": total_usage})

    def _used(self, token: Token, environ: WSGIEnvironment) -> int:
        query = query_of(environ)
        first, last = (calendar_date(query.get(name, [""])[0]) for name in ("start_date", "end_date"))
        if first is None or last is None or token.id is None or not isinstance(self._store, QuotaStore):
            return token.total_used
        # If the dates cover all of the token's life, the total: usage from before there was usage by day has no day.
        if first <= day_of(token.created_at) and self._store.today() <= last:
            return token.total_used
        return sum(usage.used for usage in self._store.usage_by_day(token.id, first, last))


def _quotient(units: int, divisor: int) -> int | float:
    """Convert quota units to what clients show. A whole number is an ``int``, exact however large."""
    whole, rest = divmod(units, divisor)
    return _whole(units / divisor) if rest else whole


def _whole(number: int | float) -> int | float:
    """Return the number as an ``int`` if it is whole: JSON then has no ``.0``, as with new-api."""
    return int(number) if number == number // 1 else number
