"""The options of a service: for the endpoint, the application or HTTP service behind it, and what requests cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, TypeVar

import click

from ..checks import MAX_INTEGER

_Command = TypeVar("_Command", bound=Callable[..., Any])
_UNITS: Final = click.IntRange(0, MAX_INTEGER)
_PATH: Final = "/api/usage/token"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """The values of the options. Each field has the name that click gives its option."""

    application: str | None = None
    upstream: str | None = None
    upstream_headers: tuple[str, ...] = ()
    upstream_timeout: float | None = None
    keep_key: bool = False
    cost: int | None = None
    cost_header: str | None = None
    llm: bool = False
    reserve: int | None = None
    input_price: int | Fraction | None = None
    output_price: int | Fraction | None = None
    exempt: tuple[str, ...] = ()
    metrics_path: str | None = None
    path: str = _PATH
    page: str | None = None
    origins: tuple[str, ...] = ()
    no_cors: bool = False
    throttle: str | None = None
    throttle_storage: str | None = None
    with_new_api: bool | None = None
    quota_per_unit: int | None = None
    display: str | None = None
    system_name: str | None = None


def price(text: str) -> int | Fraction:
    """Parse a price in quota units: ``3`` for each token, or ``150/M`` for each million tokens."""
    number, separator, million = text.partition("/")
    if not (number.isascii() and number.isdigit()) or int(number) > MAX_INTEGER or (separator and million != "M"):
        raise click.BadParameter(f"{text!r} is not a price; write 3 for each token, or 150/M for each million tokens")
    return Fraction(int(number), 1_000_000) if separator else int(number)


_BEHIND: Final = (
    click.option(
        "--app", "application", metavar="MODULE:ATTRIBUTE", help="A WSGI application to put the endpoint in front of."
    ),
    click.option("--upstream", metavar="URL", help="An HTTP service to put the endpoint and the meter in front of."),
    click.option(
        "--upstream-header",
        "upstream_headers",
        metavar="'NAME: ${VARIABLE}'",
        multiple=True,
        help="A header to send to the service, with a secret from the environment. Repeatable.",
    ),
    click.option(
        "--upstream-timeout",
        metavar="SECONDS",
        type=click.FloatRange(0, min_open=True),
        help="How long the service may be silent.  [default: 300]",
    ),
    click.option(
        "--keep-key", is_flag=True, help="Send the caller's key on to the service.  [default: remove it from requests]"
    ),
)
_METER: Final = (
    click.option(
        "--cost",
        metavar="UNITS",
        type=_UNITS,
        help="Charge this many quota units for each request.  [default: 1 with --upstream; with --app, nothing]",
    ),
    click.option("--cost-header", metavar="NAME", help="Charge what the answer states in this header."),
    click.option("--llm", is_flag=True, help="Charge the tokens that the answer of an LLM service states."),
    click.option(
        "--reserve",
        metavar="UNITS",
        type=_UNITS,
        help="The most that a request can cost; needed with --cost-header and --llm.",
    ),
    click.option(
        "--input-price", metavar="UNITS", type=price, help="The price of an input token: 3, or 150/M.  [default: 1]"
    ),
    click.option(
        "--output-price", metavar="UNITS", type=price, help="The price of an output token: 3, or 150/M.  [default: 1]"
    ),
    click.option(
        "--exempt", metavar="PREFIX", multiple=True, help="Paths that are free, such as /static/. Repeatable."
    ),
    click.option(
        "--metrics-path",
        metavar="PATH",
        help="Where Prometheus finds metrics, such as /metrics. It needs no key: keep it from the internet.",
    ),
)
_ENDPOINT: Final = (
    click.option("--path", default=_PATH, show_default=True, help="The path of the endpoint."),
    click.option(
        "--page",
        metavar="PATH",
        help="Where a page shows the holder of a key what is left.  [default: / without --app and --upstream]",
    ),
    click.option(
        "--allow-origin",
        "origins",
        metavar="ORIGIN",
        multiple=True,
        help="A web origin whose pages may ask. Repeatable.",
    ),
    click.option("--no-cors", is_flag=True, help="Let no web page of another origin ask.  [default: any may]"),
    click.option(
        "--throttle", metavar="LIMIT", help="How often one client may send a wrong key, such as '20 per 20 minutes'."
    ),
    click.option(
        "--throttle-storage",
        metavar="URI",
        help="Where failures are counted, such as redis://localhost:6379.  [default: memory://]",
    ),
)
_NEW_API: Final = (
    click.option(
        "--new-api/--no-new-api",
        "with_new_api",
        default=None,
        help="Also answer new-api's other endpoints.  [default: unless there is an --app or --upstream]",
    ),
    click.option(
        "--quota-per-unit",
        type=click.IntRange(min=1),
        help="How many quota units are one US dollar to clients of new-api.  [default: 500000]",
    ),
    click.option(
        "--display",
        type=click.Choice(["USD", "TOKENS"]),
        help="What clients of new-api show: US dollars, or quota units as they are.  [default: USD]",
    ),
    click.option(
        "--system-name",
        metavar="NAME",
        help="What clients of new-api call this service.  [default: usage-middleware]",
    ),
)


def service_options(command: _Command) -> _Command:
    """Add the options to a command, which gets them as the fields of :class:`ServiceOptions`."""
    for option in reversed((*_BEHIND, *_METER, *_ENDPOINT, *_NEW_API)):
        command = option(command)
    return command
