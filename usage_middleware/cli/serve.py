"""The command that serves the endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from ..service.building import build, make_metrics, page_path
from ..service.options import ServiceOptions, service_options
from ..stores.base import QuotaStore
from . import server
from .db_option import database_option, open_token_store
from .printing import say
from .stopping import Stop, stop_in_order

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from ..wsgi.metrics import Metrics

_PORT: Final = 8000

host_option = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_PORT,
    show_default=True,
    help="The port to listen on; 0 takes a free one.",
)


@click.command()
@database_option
@host_option
@port_option
@service_options
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve metrics for Prometheus on a port of their own; see also --metrics-path.",
)
def serve(host: str, port: int, metrics_port: int | None, **values: Any) -> None:
    """Serve the endpoint, alone or in front of an application or an HTTP service, and charge requests to these.

    Alone, it also answers new-api's other endpoints: without them, some clients show nothing.

    With --upstream, each request needs a key and is charged. With --app, this is so if --cost, --cost-header or --llm
    is given. The endpoint is always free.

    A database of new-api is served as it is and never written to.

    This server is for small services and for trying things out. Run a busy service under a WSGI server, which takes the
    same options:

    \b
      gunicorn "usage_middleware.wsgi:application('--db tokens.db --upstream …')"
    """
    options = ServiceOptions(**values)
    with stop_in_order() as stop, open_token_store() as store:
        metrics = None if metrics_port is None else make_metrics(store)
        application = build(store, options, metrics)
        store.get("-")  # report a database that cannot be used now, not to the first client
        if not isinstance(store, QuotaStore):
            say("This is a database of new-api: it is served as it is and never written to.")
        page = page_path(options)

        def ready(url: str) -> None:
            say(f"Serving {url}{options.path} (Ctrl-C stops it)")
            if page is not None:
                say(f"The page for the holders of keys is {url}{page}")

        with _exposed(metrics, host, metrics_port):
            listen(application, host, port, ready, stop)


@contextmanager
def _exposed(metrics: Metrics | None, host: str, port: int | None) -> Iterator[None]:
    """Serve metrics for Prometheus on their own port, in a thread, within the context."""
    if metrics is None or port is None:
        yield
        return
    from prometheus_client import start_http_server

    try:
        exposing, thread = start_http_server(port, addr=host, registry=metrics.exposed())
    except OSError as error:
        raise click.UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --metrics-port"
        ) from None
    say(f"Metrics at http://{f'[{host}]' if ':' in host else host}:{exposing.server_port}/metrics")
    try:
        yield
    finally:
        exposing.shutdown()
        exposing.server_close()
        thread.join()


def listen(application: WSGIApplication, host: str, port: int, ready: Callable[[str], None], stop: Stop) -> None:
    """Serve until ``stop`` is requested. An address that cannot be used becomes one line."""
    try:
        server.serve(application, host, port, ready, stop)
    except server.CannotListen as error:
        raise click.UsageError(
            f"cannot listen on {host} port {port}: {error}; choose another with --port or --host"
        ) from None


COMMANDS = (serve,)
