"""What a metered request costs: a fixed amount, or what the service states in a header of its answer.

For the tokens of an LLM service, see :mod:`usage_middleware.wsgi.meter.llm_usage`. For anything else, a host writes a
class with the methods of :class:`Cost`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from ...checks import MAX_INTEGER, check_amount

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

logger = logging.getLogger("usage_middleware")

Headers = Sequence[tuple[str, str]]

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2, token
_UNITS: Final = re.compile(r"[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request came to.

    :param units: quota units.
    :raises TypeError, ValueError: a value is not a number from 0 to 2**63 - 1.
    """

    units: int
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        for value in (self.units, self.input_tokens, self.output_tokens):
            check_amount(value)


class CostReader(Protocol):
    """Read what one answer costs, while the answer passes.

    A reader may also have these attributes:

    - ``final``: a ``bool``, whether the cost is known although the answer has not ended;
    - ``failed``: a ``bool``, whether the service has reported in its answer that it failed;
    - ``answer_headers``: the headers that the client gets instead of the service's;
    - ``pass_on(data)``, which is called instead of ``feed(data)`` and returns what the client gets instead of ``data``;
    - ``rest()``, which is called at the end and returns what the client gets after the last chunk.
    """

    @property
    def complete(self) -> bool:
        """Whether the cost is final: an event that ends the stream was seen, or the head has stated it.

        This may be a plain attribute.
        """

    def feed(self, data: bytes, /) -> None:
        """Read the next chunk of the body, before it is passed on."""

    def result(self, *, ended: bool) -> Usage | None:
        """Return what the answer costs, or ``None`` if that is unknown.

        :param ended: whether the answer has come to its end. If not, return what was measured so far.
        """


class Cost(Protocol):
    """What the requests to a service cost.

    A cost may also have a method ``prepare(environ)``, which is called before :meth:`most`, may change the request,
    and returns the :class:`Cost` of this request.
    """

    def most(self, environ: WSGIEnvironment, /) -> int:
        """Return the units to reserve: the most that the request can cost."""

    def least(self, environ: WSGIEnvironment, /) -> int:
        """Return the fewest units that will do if fewer than ``most`` are left. ``most`` itself: accept no fewer."""

    def reader(self, status: int, headers: Headers, /) -> CostReader:
        """Return a reader for an answer that begins with this status and these headers."""


class FixedReader:
    """A reader that does not need the body.

    :param usage: what the answer costs at its end; ``None``: unknown.
    :param stated: whether the service has stated it. Then it also applies to an answer that fails.
    :param answer_headers: the headers that the client gets; left out: those of the service.
    """

    def __init__(self, usage: Usage | None, *, stated: bool = False, answer_headers: Headers | None = None) -> None:
        self._usage = usage
        self.complete = stated
        if answer_headers is not None:
            self.answer_headers = answer_headers

    def feed(self, data: bytes, /) -> None:
        """Read nothing."""

    def result(self, *, ended: bool) -> Usage | None:
        """Return the usage that was given."""
        return self._usage if ended or self.complete else None


class PerRequest:
    """The same cost for each request. ``UsageMeter(cost=1)`` is short for ``cost=PerRequest(1)``.

    :param units: quota units.
    :raises TypeError, ValueError: it is not a number of units.
    """

    def __init__(self, units: int) -> None:
        check_amount(units)
        self._units = units
        self._reader = FixedReader(Usage(units))

    def most(self, environ: WSGIEnvironment, /) -> int:
        """Return the fixed amount."""
        return self._units

    least = most

    def reader(self, status: int, headers: Headers, /) -> CostReader:
        """Return a reader that knows the amount."""
        return self._reader


class FromHeader:
    """The cost that the service states in a header of its answer: a decimal integer of quota units.

    The client does not get the header. The service does not get one that a client has sent under this name. If an
    answer lacks the header, has it twice, or has anything else in it, it costs the amount reserved.

    :param name: the name of the header, such as ``"X-Usage-Cost"``.
    :param most: the units to reserve: the most that a request can cost. One that costs more overdraws its token.
    :param least: accept a reservation of fewer units, down to this, if no more are left. Left out: never fewer.
    :raises TypeError, ValueError: an argument cannot be used.
    """

    def __init__(self, name: str, *, most: int, least: int | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str such as 'X-Usage-Cost', got {type(name).__name__}")
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"name must be a header name such as 'X-Usage-Cost', got {name!r}")
        self._name = name
        self._folded = _folded(name)
        # CGI makes the same variable of a name with hyphens and the name with underscores.
        self._variable = "HTTP_" + name.upper().replace("-", "_")
        self._most = most
        self._least = most if least is None else least
        check_bounds(self._most, self._least)

    def prepare(self, environ: WSGIEnvironment, /) -> Cost:
        """Remove the header from the request."""
        environ.pop(self._variable, None)
        return self

    def most(self, environ: WSGIEnvironment, /) -> int:
        """Return the most that a request can cost."""
        return self._most

    def least(self, environ: WSGIEnvironment, /) -> int:
        """Return the fewest units that a reservation may have."""
        return self._least

    def reader(self, status: int, headers: Headers, /) -> CostReader:
        """Return a reader that knows what the headers state."""
        values = [value for name, value in headers if _folded(name) == self._folded]
        if not values:
            return FixedReader(None)
        handed_on = [header for header in headers if _folded(header[0]) != self._folded]
        text = values[0].strip(" \t")
        if len(values) == 1 and _UNITS.fullmatch(text) and int(text) <= MAX_INTEGER:
            return FixedReader(Usage(int(text)), stated=True, answer_headers=handed_on)
        logger.error(
            "the answer's header %s must be one decimal integer of quota units, got %.80s: the cost is unknown",
            self._name,
            ", ".join(map(repr, values)),
        )
        return FixedReader(None, answer_headers=handed_on)


def check_bounds(most: int, least: int) -> None:
    """Check the bounds of a reservation.

    :raises TypeError, ValueError: they are not numbers of units, or the least is more than the most.
    """
    check_amount(most, "most")
    check_amount(least, "least")
    if least > most:
        raise ValueError(f"least must be at most {most}, as most is, got {least}")


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")
