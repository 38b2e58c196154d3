"""The option ``--db``, and the store that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from .. import stores
from ..errors import UsageMiddlewareError
from ..stores.base import QuotaStore
from ..stores.memory import MemoryTokenStore
from ..stores.migrations import TablesState

if TYPE_CHECKING:
    from ..stores.new_api.new_api_store import NewAPITokenStore

_Command = TypeVar("_Command", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE: Final = "USAGE_MIDDLEWARE_DB"
NO_TOKENS: Final = "this database has no tokens; 'usage-middleware create' makes the first"

# Keys in the context's meta: the value of --db, and whether it was typed on the command line.
_DATABASE: Final = "usage_middleware.database"
_IS_TYPED: Final = "usage_middleware.database_is_typed"


class Opened(NamedTuple):
    """An open store, and the state of its tables."""

    store: QuotaStore | NewAPITokenStore
    #: The store that ``--db`` names. ``store`` is another one if this has no tables, or those of an earlier version.
    #: ``None`` if there is no such file yet.
    original: QuotaStore | NewAPITokenStore | None
    state: TablesState

    def quota_store(self) -> QuotaStore:
        """Return the store.

        :raises click.UsageError: it is not a :class:`QuotaStore`.
        """
        if not isinstance(self.store, QuotaStore):
            raise click.UsageError(
                "this is a database of new-api, which is only read: 'usage-middleware serve' answers from it, and "
                "'usage-middleware import' copies its tokens into a database of your own"
            )
        return self.store


def remember_database(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Remember ``--db``. If it is given both before and after the subcommand, the later one wins."""
    if value is not None:
        source = ctx.get_parameter_source(str(parameter.name))
        ctx.meta[_DATABASE] = value
        ctx.meta[_IS_TYPED] = source is click.core.ParameterSource.COMMANDLINE


def typed_database() -> str | None:
    """Return what was typed as ``--db``, or ``None`` if the environment variable names the database.

    A command that is printed for the operator needs no ``--db`` then, as the variable is still set.
    """
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
def open_store(*, create: bool = False, read_only: bool = False, dry_run: bool = False) -> Iterator[QuotaStore]:
    """Yield the store that ``--db`` names. An error of the store within the context becomes one line.

    :param create: create the database or its tables if there are none. If nothing may be written, yield an empty store
        in memory instead.
    :param read_only: write nothing, and need no permission to write. The exception is a server with tables of an
        earlier version: they are upgraded, as any other process would do.
    :param dry_run: write nothing at all.
    """
    with _in_one_line(), _open(create=create, read_only=read_only or dry_run, upgrade=not dry_run) as opened:
        yield opened.quota_store()


@contextmanager
def open_to_check() -> Iterator[Opened]:
    """Open the store that ``--db`` names read-only, and yield it with the state of its tables."""
    with _in_one_line(), _open(read_only=True) as opened:
        opened.quota_store()
        yield opened


@contextmanager
def open_token_store() -> Iterator[QuotaStore | NewAPITokenStore]:
    """Yield the store that ``--db`` names, also if it is new-api's, which cannot be charged."""
    with _in_one_line(), _open() as opened:
        yield opened.store


def named_database() -> str:
    """Return the database that ``--db`` or the environment variable names.

    :raises click.UsageError: neither is given, or it is a store in memory, which would end with the command.
    """
    database = click.get_current_context().meta.get(_DATABASE)
    if not database:
        raise click.UsageError(f"which database? Name it with --db DATABASE or in {ENVIRONMENT_VARIABLE}")
    if database == stores.MEMORY:
        raise click.UsageError("a store in memory ends with the command; name a file or the URL of a database")
    return str(database)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except (UsageMiddlewareError, ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from None


@contextmanager
def _open(*, create: bool = False, read_only: bool = False, upgrade: bool = True) -> Iterator[Opened]:
    database = named_database()
    path = stores.file_path(database)
    if path is not None and not Path(path).exists():
        if not create:
            raise click.UsageError(f"there is no database {path}; 'usage-middleware create' makes one")
        if read_only:
            yield Opened(MemoryTokenStore(), None, "none")
            return
    if path is not None and Path(path).is_dir():
        raise click.UsageError(f"{path} is a directory; name a file in it")
    with stores.open_and_ask(database, read_only=read_only) as store:
        state = store.tables_state() if isinstance(store, QuotaStore) else "current"
        if state == "none" and not create:
            raise click.UsageError(NO_TOKENS)
        if state == "none" and read_only:
            yield Opened(MemoryTokenStore(), store, state)
        elif state == "earlier" and read_only:
            with stores.open_earlier(database, upgrade=upgrade) as earlier:
                yield Opened(earlier, store, state)
        else:
            yield Opened(store, store, state)
