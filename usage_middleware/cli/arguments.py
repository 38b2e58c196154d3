"""Arguments and options that several commands share, each checked while it is parsed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from ..checks import MAX_INTEGER
from . import times

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: Numbers of quota units, with and without 0.
UNITS: Final = click.IntRange(0, MAX_INTEGER)
SOME_UNITS: Final = click.IntRange(1, MAX_INTEGER)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
limit_option = click.option("--limit", type=click.IntRange(0), help="Print at most this many.")


def token_id(text: str) -> int:
    """Parse the id of a token."""
    try:
        return int(text)
    except ValueError:
        # The message leaves out the text, which may be a key in the wrong place.
        raise click.BadParameter("an ID is a number; 'usage-middleware list' shows it") from None


def past_time(text: str) -> int:
    """Parse a time and return Unix seconds. A duration counts back from now."""
    try:
        return times.parse_time(text, time.time(), past=True)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def expiry(text: str) -> int:
    """Parse an expiry and return Unix seconds, 0 for never. A duration counts from now."""
    try:
        return times.parse_expiry(text, time.time())
    except ValueError as error:
        raise click.BadParameter(f"{error}, or never") from None


token_id_argument = click.argument("token_id", metavar="ID", type=token_id)


def time_option(name: str, help_text: str) -> Callable[[_Command], _Command]:
    """Return an option that takes a time. A duration counts back from now."""
    return click.option(name, metavar="TIME", type=past_time, help=help_text)


def idempotency_key_option(what: str) -> Callable[[_Command], _Command]:
    return click.option(
        "--idempotency-key",
        metavar="TEXT",
        help=f"Make the {what} only once, even if the command is repeated with the same text.",
    )


def line_of_standard_input(what: str) -> str:
    """Return the first line of standard input, without its line ending.

    :raises click.UsageError: it is not text.
    """
    try:
        return sys.stdin.readline().rstrip("\r\n")
    except UnicodeDecodeError:
        raise click.UsageError(f"standard input must be {what}, but it is not text") from None
