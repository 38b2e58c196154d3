"""The option ``--db``, and the store that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .. import stores
from ..errors import UsageMiddlewareError
from ..stores.base import QuotaStore
from ..stores.memory import MemoryTokenStore

if TYPE_CHECKING:
    from ..stores.new_api.new_api_store import NewAPITokenStore

_Command = TypeVar("_Command", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE: Final = "USAGE_MIDDLEWARE_DB"
NO_TOKENS: Final = "this database has no tokens; 'usage-middleware create' makes the first"

# Under these names the context keeps what --db says, and whether it was typed on the command line.
_DATABASE: Final = "usage_middleware.database"
_IS_TYPED: Final = "usage_middleware.database_is_typed"


def remember_database(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Remember ``--db``. If it is given both before and after the subcommand, the later one wins."""
    if value is not None:
        source = ctx.get_parameter_source(str(parameter.name))
        ctx.meta[_DATABASE] = value
        ctx.meta[_IS_TYPED] = source is click.core.ParameterSource.COMMANDLINE


def typed_database() -> str | None:
    """Return what ``--db`` says; ``None`` if the environment names the database, as it will the next time too."""
    meta = click.get_current_context().meta
    return meta.get(_DATABASE) if meta.get(_IS_TYPED) else None


def database_option(command: _Command) -> _Command:
    return click.option(
        "--db",
        metavar="DATABASE",
        expose_value=False,
        callback=remember_database,
        help=f"The database, a file or a URL.  [env var: {ENVIRONMENT_VARIABLE}]",
    )(command)


@contextmanager
def open_store(*, create: bool = False, read_only: bool = False) -> Iterator[QuotaStore]:
    """Yield the store that ``--db`` names. What it refuses inside of the context becomes one line.

    :param create: make a database, or its tables, if there are none. With ``read_only``, an empty store stands for
        them instead.
    :param read_only: write nothing, and need no permission to write.
    """
    with _in_one_line(), _open(create=create, read_only=read_only) as store:
        if not isinstance(store, QuotaStore):
            raise click.UsageError(
                "this is a database of new-api, which is only read: 'usage-middleware serve' answers from it, and "
                "'usage-middleware import' copies its tokens to a database of yours"
            )
        yield store


@contextmanager
def open_token_store() -> Iterator[QuotaStore | NewAPITokenStore]:
    """Yield the store that ``--db`` names, or one that only answers."""
    with _in_one_line(), _open() as store:
        yield store


def has_tables(store: Any) -> bool:
    """Return whether a store's tables are there. It makes none."""
    return not hasattr(store, "has_tables") or bool(store.has_tables())


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except (UsageMiddlewareError, ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from None


def _open(*, create: bool = False, read_only: bool = False) -> QuotaStore | NewAPITokenStore:
    database = click.get_current_context().meta.get(_DATABASE)
    if not database:
        raise click.UsageError(f"which database? Name it with --db DATABASE or in {ENVIRONMENT_VARIABLE}")
    if database == stores.MEMORY:
        raise click.UsageError("a store in memory ends with the command; name a file or the URL of a database")
    path = stores.file_path(database)
    if path is not None and not Path(path).exists():
        if not create:
            raise click.UsageError(f"there is no database {path}; 'usage-middleware create' makes one")
        if read_only:
            return MemoryTokenStore()
    if path is not None and Path(path).is_dir():
        raise click.UsageError(f"{path} is a directory; name a file in it")
    store: QuotaStore | NewAPITokenStore = stores.open_and_ask(database, read_only=read_only)
    if (create and not read_only) or has_tables(store):
        return store
    store.close()
    if create:
        return MemoryTokenStore()
    raise click.UsageError(NO_TOKENS)
