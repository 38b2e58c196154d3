"""What the commands share: the database that ``--db`` names, options, and how a token is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .. import stores
from ..errors import TokenNotFound, UsageMiddlewareError
from ..stores.base import QuotaStore
from ..stores.memory import MemoryTokenStore
from ..tokens import Token
from . import formats

if TYPE_CHECKING:
    from ..stores.new_api.new_api_store import NewAPITokenStore

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DATABASE: Final = "usage_middleware.database"  # where the context keeps what --db says


def remember_database(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """The callback of ``--db``: what stands behind the command goes before what stands in front of it."""
    if value is not None:
        ctx.meta[_DATABASE] = value


def database_option(command: _Command) -> _Command:
    return click.option(
        "--db",
        metavar="DATABASE",
        expose_value=False,
        callback=remember_database,
        help="The database, a file or a URL.  [env var: USAGE_MIDDLEWARE_DB]",
    )(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _token_id(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # Without the text, which may be a key in the wrong place.
        raise click.BadParameter("an ID is a number; 'usage-middleware list' shows it") from None


token_id_argument = click.argument("token_id", metavar="ID", type=_token_id)


@contextmanager
def open_store(*, create: bool = False, read_only: bool = False) -> Iterator[QuotaStore]:
    """The store that ``--db`` names. What it refuses inside of the context becomes one line.

    :param create: make a database, or its tables, where there are none; where it is only read, an empty store stands
        for them.
    """
    with _in_one_line(), _open(create=create, read_only=read_only) as store:
        if isinstance(store, QuotaStore):
            yield store
        else:
            raise click.UsageError(
                "this is a database of new-api, which is only read: 'usage-middleware serve' answers from it, and "
                "'usage-middleware import' copies its tokens to a database of yours"
            )


@contextmanager
def open_token_store() -> Iterator[QuotaStore | NewAPITokenStore]:
    """The store that ``--db`` names, or one that only answers."""
    with _in_one_line(), _open() as store:
        yield store


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What a store refuses becomes one line."""
    try:
        yield
    except (UsageMiddlewareError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _open(*, create: bool = False, read_only: bool = False) -> QuotaStore | NewAPITokenStore:
    database = click.get_current_context().meta.get(_DATABASE)
    if not database:
        raise click.UsageError("which database? Name it with --db DATABASE or in USAGE_MIDDLEWARE_DB")
    if database == stores.MEMORY:
        raise click.UsageError("a store in memory ends with the command; name a file or the URL of a database")
    path = stores.file_path(database)
    if path is not None and not Path(path).exists():
        if not create:
            raise click.UsageError(f"there is no database {path}; 'usage-middleware create' makes one")
        if read_only:
            return MemoryTokenStore()
    try:
        store: QuotaStore | NewAPITokenStore = stores.open_and_ask(database, read_only=read_only)
    except ImportError as error:
        raise click.UsageError(str(error)) from None
    if (create and not read_only) or not hasattr(store, "has_tables") or store.has_tables():
        return store
    store.close()
    if create:
        return MemoryTokenStore()
    raise click.UsageError("this database has no tokens; 'usage-middleware create' makes the first")


def print_key(key: str, token: Token, as_json: bool) -> None:
    """Prints a new key, this once: alone on standard output, so that a script can take it."""
    if as_json:
        click.echo(json.dumps({"key": key, **formats.as_object(token)}, ensure_ascii=False))
        return
    click.echo(key)
    click.echo(f"This is the key of token {token.id}. Keep it: it is not stored and cannot be shown again.", err=True)


def print_token(store: QuotaStore, token: Token, as_json: bool) -> None:
    """Prints all that is known of a token."""
    usage = store.model_usage(token.id) if token.id is not None else {}
    if as_json:
        click.echo(json.dumps({**formats.as_object(token), "model_usage": usage}, ensure_ascii=False))
        return
    for line in formats.describe(token, usage, time.time()):
        click.echo(line)


def print_json_array(objects: Iterable[Any]) -> None:
    """Prints a JSON array, each object on a line of its own as it comes."""
    separator = "["
    for item in objects:
        click.echo(f"{separator}{json.dumps(item, ensure_ascii=False)}", nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def find_token(store: QuotaStore, token_id: int) -> Token:
    """:raises TokenNotFound: there is no token of that id."""
    token = store.get_by_id(token_id)
    if token is None:
        raise TokenNotFound(f"there is no token {token_id}")
    return token
