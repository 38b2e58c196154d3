"""The application that a WSGI server loads. It takes the options of ``serve``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .. import stores
from .building import build
from .options import ServiceOptions, service_options

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

DATABASE_VARIABLE: Final = "USAGE_MIDDLEWARE_DB"
OPTIONS_VARIABLE: Final = "USAGE_MIDDLEWARE_SERVE"


@click.command(add_help_option=False)
@click.option("--db", "database", envvar=DATABASE_VARIABLE)
@service_options
def _read(database: str | None, **values: Any) -> tuple[str | None, ServiceOptions]:
    return database, ServiceOptions(**values)


def application(options: str | None = None) -> WSGIApplication:
    """Return what ``usage-middleware serve`` serves, for a WSGI server to load.

    .. code-block:: console

        $ gunicorn "usage_middleware.wsgi:application('--db tokens.db --upstream http://127.0.0.1:3000')"

    :param options: the options of ``serve``, except ``--host`` and ``--port``, as a shell takes them. Left out, they
        come from the environment variable ``USAGE_MIDDLEWARE_SERVE``, for a server whose factories take no arguments.
    :raises ValueError: the options cannot be used, or the database does not exist.
    :raises ImportError: a package that an option needs is not installed.

    The first request opens the database, so the server may load this before it forks.
    """
    words = shlex.split(os.environ.get(OPTIONS_VARIABLE, "") if options is None else options)
    try:
        database, parsed = _read.main(words, prog_name="usage-middleware serve", standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    if not database:
        raise ValueError(f"which database? Name it with --db DATABASE or in {DATABASE_VARIABLE}")
    if database == stores.MEMORY:
        raise ValueError("a store in memory is another one in each process; name a file or the URL of a database")
    path = stores.file_path(database)
    if path is not None and not Path(path).exists():
        raise ValueError(f"there is no database {path}; 'usage-middleware create' makes one")
    return build(stores.open_store(database), parsed)
