"""The cost of a request to an LLM service: the tokens that the service states it used, each at its price."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Final

from ...checks import MAX_INTEGER
from .asking import UsageFilter, ask_for_usage
from .costs import Cost, CostReader, FixedReader, Headers, Usage, check_bounds
from .figures import Figures, TokenCounts
from .request_body import request_body
from .streams import EventStream, Gunzipped, JSONBody

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: Quota units for a token: an ``int``, or a :class:`fractions.Fraction` such as :func:`per_million` returns.
Price = int | Fraction

# What services append to the name of a model to identify its version.
_EDITION: Final = re.compile(r"[-@](?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|\d{3}|latest)")


def per_million(units: int) -> Fraction:
    """Return the price of a token if a million tokens cost ``units`` quota units.

    :raises TypeError, ValueError: it is not a number of units.
    """
    return Fraction(_checked_price("units", units), 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The quota units that the tokens of a model cost.

    :param input: for each token of the request.
    :param output: for each token of the answer.
    :param cached: for each token of the request that the service took from its cache; left out: as ``input``.
    :raises TypeError, ValueError: a price is not an ``int`` or a ``Fraction``, or is negative.
    """

    input: Price = 1
    output: Price = 1
    cached: Price | None = None

    def __post_init__(self) -> None:
        _checked_price("input", self.input)
        _checked_price("output", self.output)
        if self.cached is not None:
            _checked_price("cached", self.cached)


class LLMUsage:
    """The tokens that an LLM service states it used, in JSON or in an event stream.

    These answers are read: OpenAI's chat, completions, embeddings and responses; Anthropic's messages; Gemini's
    content; and what is compatible with one of them. An answer that states no usage costs the amount reserved.

    :param most: the units to reserve: the most that a request can cost. One that costs more overdraws its token.
    :param least: accept a reservation of fewer units, down to this, if no more are left. Left out: never fewer.
    :param input: the quota units for each token of the request: an ``int``, or ``per_million(150)``.
    :param output: the quota units for each token of the answer.
    :param cached: the quota units for each token of the request that the service took from its cache; left out: as
        ``input``. The sum for a request is rounded up once to a whole unit.
    :param models: separate prices for some models, by the name that the service states or the client asks for.
    :param ask: ask OpenAI-compatible services to state the usage of a stream, which they do only if asked. A client
        that did not ask for it does not see it.
    :raises TypeError, ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        *,
        most: int,
        least: int | None = None,
        input: Price = 1,  # noqa: A002 - the name that the services use
        output: Price = 1,
        cached: Price | None = None,
        models: Mapping[str, Prices] | None = None,
        ask: bool = False,
    ) -> None:
        self._most = most
        self._least = most if least is None else least
        check_bounds(self._most, self._least)
        self._price = _pricing(Prices(input=input, output=output, cached=cached))
        self._models = {}
        for model, prices in (models or {}).items():
            if not isinstance(model, str) or not isinstance(prices, Prices):
                raise TypeError(f"models must map the name of a model to its Prices, got {model!r}: {prices!r}")
            self._models[model] = _pricing(prices)
        self._ask = ask

    def prepare(self, environ: WSGIEnvironment, /) -> Cost:
        """Ask the service for the usage of a stream, if this is an OpenAI-compatible request for one."""
        asked = self._ask and ask_for_usage(environ)
        requested = request_body(environ).members.get("model") if self._models else None
        if not asked and requested is None:
            return self
        return _LLMRequest(self, requested.value if requested else None, asked)

    def most(self, environ: WSGIEnvironment, /) -> int:
        """Return the most that a request can cost."""
        return self._most

    def least(self, environ: WSGIEnvironment, /) -> int:
        """Return the fewest units that a reservation may have."""
        return self._least

    def reader(self, status: int, headers: Headers, /) -> CostReader:
        """Return a reader for JSON or for an event stream. The cost of any other answer is unknown."""
        return self.reader_of_request(headers, None, asked=False)

    def reader_of_request(self, headers: Headers, requested: object, *, asked: bool) -> CostReader:
        """Return the reader for the answer to a request.

        :param requested: the model that the client asked for.
        :param asked: whether :func:`ask_for_usage` asked for the usage.
        """
        figures = Figures()
        body: EventStream | JSONBody
        kind = _field(headers, "content-type").partition(";")[0].strip(" \t")
        coding = _field(headers, "content-encoding")
        if kind == "text/event-stream":
            body = EventStream(figures)
        elif kind == "" or kind.endswith("json"):
            body = JSONBody(figures)
        else:
            return FixedReader(None)

        def usage() -> Usage | None:
            return self._usage(figures, requested)

        if coding in ("gzip", "x-gzip"):
            return _LLMReader(figures, body, Gunzipped(body.feed).feed, usage)
        if coding not in ("", "identity"):
            return FixedReader(None)
        if asked and isinstance(body, EventStream):
            return _AskingReader(figures, body, headers, usage)
        return _LLMReader(figures, body, body.feed, usage)

    def _usage(self, figures: Figures, requested: object) -> Usage | None:
        """Return what the figures cost, or ``None`` if they hold nothing that can be charged."""
        counts = figures.counts
        if counts is None:
            return Usage(0) if figures.failed else None
        price = self._price
        for model in (figures.model, requested) if self._models else ():
            if isinstance(model, str) and (of_model := self._price_of(model)):
                price = of_model
                break
        units = price(counts)
        return None if max(units, *counts) > MAX_INTEGER else Usage(units, counts.input, counts.output)

    def _price_of(self, model: str) -> Callable[[TokenCounts], int] | None:
        if model in self._models:
            return self._models[model]
        edition = _EDITION.search(model)
        return self._models.get(model[: edition.start()]) if edition and edition.end() == len(model) else None


class _LLMRequest:
    """The cost of one request whose body was read."""

    def __init__(self, cost: LLMUsage, model: object, asked: bool) -> None:
        self._cost = cost
        self._model = model
        self._asked = asked
        self.most = cost.most
        self.least = cost.least

    def reader(self, status: int, headers: Headers, /) -> CostReader:
        return self._cost.reader_of_request(headers, self._model, asked=self._asked)


class _LLMReader:
    """Read the figures of an answer and price them."""

    def __init__(
        self,
        figures: Figures,
        body: EventStream | JSONBody,
        feed: Callable[[bytes], None],
        usage: Callable[[], Usage | None],
    ) -> None:
        self._figures = figures
        self._body = body
        self._usage = usage
        self.feed = feed

    @property
    def complete(self) -> bool:
        return self._figures.complete

    @property
    def final(self) -> bool:
        return self._figures.final

    @property
    def failed(self) -> bool:
        return self._figures.failed

    def result(self, *, ended: bool) -> Usage | None:
        self._body.end()
        return self._usage()


class _AskingReader(_LLMReader):
    """Remove the event with the usage from a stream, as the client did not ask for it."""

    def __init__(
        self, figures: Figures, body: EventStream, headers: Headers, usage: Callable[[], Usage | None]
    ) -> None:
        super().__init__(figures, body, body.feed, usage)
        usage_filter = UsageFilter(body, figures)
        self.pass_on = usage_filter.pass_on
        self.rest = usage_filter.rest
        # The client gets less than the service counted.
        self.answer_headers = [header for header in headers if header[0].lower() != "content-length"]


def _pricing(prices: Prices) -> Callable[[TokenCounts], int]:
    """Return a function that prices tokens with integers only, and rounds up once."""
    cached_price = prices.input if prices.cached is None else prices.cached
    fractions = [Fraction(price) for price in (prices.input, cached_price, prices.output)]
    divisor = lcm(*(price.denominator for price in fractions))
    input_, cached, output = (int(price * divisor) for price in fractions)

    def price(counts: TokenCounts) -> int:
        fresh = counts.input - counts.cached
        return -(-(fresh * input_ + counts.cached * cached + counts.output * output) // divisor)

    return price


def _checked_price(name: str, price: Price) -> Price:
    if not isinstance(price, (int, Fraction)) or isinstance(price, bool):
        raise TypeError(
            f"{name} must be an int of quota units for a token, or per_million() of them, got {type(price).__name__}"
        )
    if price < 0:
        raise ValueError(f"{name} must not be negative, got {price}")
    return price


def _field(headers: Headers, name: str) -> str:
    """Return the value of a header in lower case, the values of several joined (RFC 9110 section 5.3)."""
    return ", ".join(value for header, value in headers if header.lower() == name).strip(" \t").lower()
