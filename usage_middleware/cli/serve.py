"""The command that serves the endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from ..stores.base import QuotaStore
from ..wsgi.endpoints.new_api import NewAPI
from ..wsgi.endpoints.not_found import NotFound
from ..wsgi.middleware import UsageMiddleware
from . import server
from .db_option import database_option, open_token_store
from .printing import say
from .stopping import Stop, stop_in_order

_PORT: Final = 8000

host_option = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
port_option = click.option(
    "--port", type=click.IntRange(0, 65535), default=_PORT, show_default=True, help="The port; 0 takes a free one."
)


@click.command()
@database_option
@click.option(
    "--app", "application", metavar="MODULE:ATTRIBUTE", help="A WSGI application to put the endpoint in front of."
)
@host_option
@port_option
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
@click.option(
    "--new-api/--no-new-api",
    "with_new_api",
    default=None,
    help="Answer what clients of new-api ask beside the path.  [default: unless there is an --app]",
)
@click.option(
    "--quota-per-unit",
    type=click.IntRange(min=1),
    help="How many quota units are one US dollar to clients of new-api.  [default: 500000]",
)
@click.option(
    "--display",
    type=click.Choice(["USD", "TOKENS"]),
    help="What clients of new-api show: US dollars, or quota units as they are.  [default: USD]",
)
@click.option(
    "--system-name", metavar="NAME", help="What clients of new-api call this service.  [default: usage-middleware]"
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
    with_new_api: bool | None,
    **new_api_options: Any,
) -> None:
    """Serve the endpoint, alone or in front of an application.

    Alone, it also answers new-api's other endpoints: without them, some clients show nothing.

    A database of new-api is served as it is, and not written to.

    For a small service, and for trying things out; a busy one belongs under a WSGI server such as gunicorn.
    """
    if origins and no_cors:
        raise click.UsageError("--allow-origin and --no-cors exclude each other")
    if throttle_storage is not None and throttle is None:
        raise click.UsageError("--throttle-storage needs a --throttle")
    given = {name: value for name, value in new_api_options.items() if value is not None}
    if with_new_api is None:
        with_new_api = application is None
    if given and not with_new_api:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} needs --new-api")
    with stop_in_order() as stop, open_token_store() as store:
        allow_origins = () if no_cors else "*" if origins in ((), ("*",)) else origins
        wrapped = server.load_application(application) if application else NotFound(allow_origins)
        middleware = UsageMiddleware(
            wrapped,
            store,
            path=path,
            new_api=NewAPI(**given) if with_new_api else None,
            allow_origins=allow_origins,
            throttle=throttle,
            throttle_storage="memory://" if throttle_storage is None else throttle_storage,
        )
        store.get("-")  # a database that cannot be used is reported now, not to the first client
        if not isinstance(store, QuotaStore):
            say("This is a database of new-api: it is served as it is, and not written to.")
        listen(middleware, host, port, lambda url: say(f"Serving {url}{path} (Ctrl-C stops it)"), stop)


def listen(middleware: UsageMiddleware, host: str, port: int, ready: Callable[[str], None], stop: Stop) -> None:
    """Serve until ``stop`` is requested. If the address cannot be had, that becomes one line."""
    try:
        server.serve(middleware, host, port, ready, stop)
    except server.CannotListen as error:
        raise click.UsageError(
            f"cannot listen on {host} port {port}: {error}; choose another with --port or --host"
        ) from None


COMMANDS = (serve,)
