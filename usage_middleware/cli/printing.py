"""Printing: results on standard output, everything else on standard error.

After a commit, the result is printed at once, from what the call returned and without reading the database again. If
it cannot be printed, the error says what was committed.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final

import click

from ..errors import StoreError
from ..tokens import Token
from . import formats
from .db_option import typed_database

_NAME: Final = "usage-middleware"


def echo(text: str) -> None:
    """Print a line of the result on standard output."""
    if sys.stdout is None:  # click would drop the line
        raise _CannotPrint(OSError(errno.EBADF, os.strerror(errno.EBADF)))
    try:
        click.echo(text)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has closed the pipe: click exits quietly
            raise
        raise _CannotPrint(error) from None


def say(text: object) -> None:
    """Print a line for a person on standard error. Ignore a failure: there is nowhere left to report it."""
    with suppress(OSError):
        click.echo(text, err=True)


class _CannotPrint(click.ClickException):
    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")


def print_json(value: Any) -> None:
    echo(json.dumps(value, ensure_ascii=False))


def print_json_array(objects: Iterable[Any]) -> None:
    """Print a JSON array, one object on each line, without collecting them first."""
    line = None
    for item in objects:
        if line is not None:
            echo(f"{line},")
        line = f"{'[' if line is None else ' '}{json.dumps(item, ensure_ascii=False)}"
    echo("[]" if line is None else f"{line}]")


@contextmanager
def committed(what: str) -> Iterator[None]:
    """If the result cannot be printed within the context, raise an error that says what was committed.

    :param what: a sentence without its full stop. It also says how to get what was not printed.
    """
    try:
        yield
    except (OSError, _CannotPrint) as error:
        reason = error if isinstance(error, _CannotPrint) else _CannotPrint(error)
        raise click.ClickException(f"{reason.message}; but {what}") from None


@contextmanager
def advise(advice: str) -> Iterator[None]:
    """If a call fails or is interrupted, add advice to the error: the call may have been committed all the same.

    :param advice: a sentence without its full stop.
    """
    try:
        yield
    except StoreError as error:
        raise click.ClickException(f"{error}. {advice}") from None
    except KeyboardInterrupt:
        raise click.ClickException(f"stopped. {advice}") from None


def repeatable(*words: object) -> AbstractContextManager[None]:
    """If a call fails or is interrupted, print a command that repeats it and cannot take effect twice.

    :param words: the command's name, arguments and options. A key among them is given as ``KEY``.
    """
    return advise(f"To make sure that it is done, and only once, run: {command(*words)}")


def command(*words: object) -> str:
    """Return a command line of this program, quoted for a shell, that works in any directory."""
    database = typed_database()
    options = [] if database is None else ["--db", _shown(database)]
    return " ".join([program(), *(shlex.quote(str(word)) for word in (*words, *options))])


def _shown(database: str) -> str:
    if "://" not in database:
        return os.path.abspath(database)
    # Do not show a URL that may hold a password.
    return "DATABASE" if "@" in database or "?" in database else database


def program() -> str:
    """Return the path of this program, quoted for a shell; only its name if it was not started by its script."""
    path = os.path.abspath(sys.argv[0])
    return shlex.quote(path) if os.path.basename(path) == _NAME and os.access(path, os.X_OK) else _NAME


def print_key(key: str, token: Token, as_json: bool) -> None:
    """Print a new key alone on standard output, so that a script can read it."""
    if as_json:
        print_json({"key": key, **formats.as_object(token)})
        return
    echo(key)
    say(f"This is the key of token {token.id}. Keep it: it is not stored and cannot be shown again.")


def print_token(
    token: Token, as_json: bool, model_usage: Mapping[str, int] | None = None, *, idempotency_key: str | None = None
) -> None:
    """Print a token.

    :param model_usage: what each model has used, if that is known.
    :param idempotency_key: of the call that returned the token. It is printed as JSON only.
    """
    if as_json:
        more = {"model_usage": model_usage, "idempotency_key": idempotency_key}
        print_json({**formats.as_object(token), **{name: value for name, value in more.items() if value is not None}})
        return
    print_lines(formats.describe(token, time.time(), model_usage))


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        echo(line)
