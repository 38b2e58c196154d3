"""The commands that serve the endpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
from werkzeug.exceptions import NotFound

from ..keys import strip_prefix
from ..stores.base import QuotaStore
from ..stores.sqlite.sqlite_store import SQLiteTokenStore
from ..wsgi.middleware import UsageMiddleware
from . import server
from .common import database_option, open_token_store

_PORT: Final = 8000

_host_option = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
_port_option = click.option(
    "--port", type=click.IntRange(0, 65535), default=_PORT, show_default=True, help="The port; 0 takes a free one."
)


@click.command()
@database_option
@click.option(
    "--app", "application", metavar="MODULE:ATTRIBUTE", help="A WSGI application to put the endpoint in front of."
)
@_host_option
@_port_option
@click.option("--path", default="/api/usage/token", show_default=True, help="The path to answer.")
@click.option(
    "--allow-origin", "origins", metavar="ORIGIN", multiple=True, help="A web origin that may ask. Repeatable."
)
@click.option("--no-cors", is_flag=True, help="Let no web page ask.  [default: any may]")
@click.option(
    "--throttle", metavar="LIMIT", help="How often one client may send a wrong key, such as '20 per 20 minutes'."
)
@click.option(
    "--throttle-storage",
    metavar="URI",
    help="Where failures are counted, such as redis://localhost:6379.  [default: memory://]",
)
def serve(
    application: str | None,
    host: str,
    port: int,
    path: str,
    origins: tuple[str, ...],
    no_cors: bool,
    throttle: str | None,
    throttle_storage: str | None,
) -> None:
    """Serve the endpoint, alone or in front of an application.

    A database of new-api is served as it is, and not written to.

    For a small service, and for trying things out; a busy one belongs under a WSGI server such as gunicorn.
    """
    if origins and no_cors:
        raise click.UsageError("--allow-origin and --no-cors exclude each other")
    if throttle_storage is not None and throttle is None:
        raise click.UsageError("--throttle-storage needs a --throttle")
    with open_token_store() as store:
        wrapped = server.load_application(application) if application else NotFound()
        allow_origins = () if no_cors else "*" if origins in ((), ("*",)) else origins
        try:
            middleware = UsageMiddleware(
                wrapped,
                store,
                path=path,
                allow_origins=allow_origins,
                throttle=throttle,
                throttle_storage="memory://" if throttle_storage is None else throttle_storage,
            )
        except ImportError as error:
            raise click.UsageError(str(error)) from None
        store.get("-")  # a database that cannot be used is told now, not to the first client
        if not isinstance(store, QuotaStore):
            click.echo("This is a database of new-api: it is served as it is, and not written to.", err=True)
        _serve(middleware, host, port, lambda url: click.echo(f"Serving {url}{path} (Ctrl-C stops it)", err=True))


@click.command()
@_host_option
@_port_option
def demo(host: str, port: int) -> None:
    """Make a small database, print a curl line for it, and serve it.

    The database is a temporary one and goes when the command is stopped.
    """
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        path = str(Path(directory, "tokens.db"))
        with SQLiteTokenStore(path) as store:
            key, _ = store.create(
                name="Demo Token", total_available=1_000_000, model_limits={"gpt-4o-mini": 500_000, "gpt-4o": True}
            )
            # As if it had been in use: the documented example has these totals.
            store.charge(strip_prefix(key), 12_345, model="gpt-4o-mini")
            unlimited, _ = store.create(name="Unlimited Token", unlimited_quota=True)
            expired, _ = store.create(name="Expired Token", total_available=5000, expires_at=int(time.time()) - 86400)

            def ready(url: str) -> None:
                click.echo("Ask for what is left of a token:\n")
                for title, shown in (("", key), ("unlimited", unlimited), ("expired", expired)):
                    comment = f"  # {title}" if title else ""
                    click.echo(f"  curl -H 'Authorization: Bearer {shown}' {url}/api/usage/token{comment}")
                click.echo("\nCharge it from another shell and ask again, or look at all tokens:\n")
                click.echo(f"  usage-middleware charge --db {path} 1 1000")
                click.echo(f"  usage-middleware list --db {path}\n")
                click.echo("Ctrl-C stops the demonstration and removes its database.")

            _serve(UsageMiddleware(NotFound(), store), host, port, ready)


def _serve(middleware: UsageMiddleware, host: str, port: int, ready: Callable[[str], None]) -> None:
    try:
        server.serve(middleware, host, port, ready)
    except OSError as error:
        raise click.UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --port or --host"
        ) from None


COMMANDS = (serve, demo)
