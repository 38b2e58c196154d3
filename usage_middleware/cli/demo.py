"""The command that shows the package at work."""

from __future__ import annotations

import shlex
import tempfile
import time
from pathlib import Path

import click
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from ..stores.sqlite.sqlite_store import SQLiteTokenStore
from ..wsgi.endpoints.new_api import NewAPI
from ..wsgi.endpoints.not_found import NotFound
from ..wsgi.middleware import UsageMiddleware
from .printing import echo, program
from .sample_service import sample_service
from .sample_use import PastClock, use
from .serve import host_option, listen, port_option
from .stopping import stop_in_order


@click.command()
@host_option
@port_option
def demo(host: str, port: int) -> None:
    """Serve the endpoint and the page from a small database with a few weeks of made-up use.

    The database is temporary. It is removed when the command is stopped.
    """
    # Handle signals first: from here on, none of them ends the process before its directory is removed.
    with stop_in_order() as stop, tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        path = Path(directory, "tokens.db")
        clock = PastClock()
        with SQLiteTokenStore(path, clock=clock) as store:
            key, _ = store.create(
                name="Demo Token", total_available=1_000_000, model_limits={"gpt-4o-mini": 500_000, "gpt-4o": True}
            )
            # Pretend that it has been in use. The totals are those of the documented example.
            use(store, clock, key, 12_345)
            unlimited, _ = store.create(name="Unlimited Token", unlimited_quota=True)
            expired, _ = store.create(name="Expired Token", total_available=5000, expires_at=int(time.time()) - 86400)

            def ready(url: str) -> None:
                database = shlex.quote(str(path))
                echo("Open the page for the holder of a key, and enter one of the keys below:\n")
                echo(f"  {url}/\n")
                echo("Or ask for what is left of a token:\n")
                for title, shown in (("", key), ("unlimited", unlimited), ("expired", expired)):
                    comment = f"  # {title}" if title else ""
                    echo(f"  curl -H 'Authorization: Bearer {shown}' {url}/api/usage/token{comment}")
                echo("\nSend a request that costs a quota unit for each character, and ask again:\n")
                echo(f"  curl -H 'Authorization: Bearer {key}' -d hello {url}/shout")
                echo("\nCharge it from another shell and ask again, or look at all tokens:\n")
                echo(f"  {program()} charge --db {database} 1 1000")
                echo(f"  {program()} list --db {database}\n")
                echo("Press Ctrl-C to stop the demonstration and remove its database.")

            if not stop.is_requested:
                service = DispatcherMiddleware(NotFound(), {"/shout": sample_service(store)})
                listen(UsageMiddleware(service, store, page="/", new_api=NewAPI()), host, port, ready, stop)


COMMANDS = (demo,)
