"""The command ``usage-middleware``: it manages tokens, moves quota, and serves the endpoint.

Wrong input prints one line on standard error and exits with status 2, never with a traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import click

from . import check, demo, formats, history_commands, manage, quota, serve, usage_report
from .db_option import ENVIRONMENT_VARIABLE, remember_database
from .printing import say
from .stopping import interrupt_in_order
from .transfer import exporting, importing

_FAILED: Final = 2
_GROUPS: Final = (manage, quota, history_commands, usage_report, importing, exporting, check, serve, demo)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--db",
    metavar="DATABASE",
    envvar=ENVIRONMENT_VARIABLE,
    expose_value=False,
    callback=remember_database,
    help="A database file, or the URL of a database server. May also be given after the command.  "
    f"[env var: {ENVIRONMENT_VARIABLE}]",
)
@click.version_option(package_name="usage-middleware")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Manage tokens and their quota, and serve the endpoint /api/usage/token, which shows their holders what is left.

    Try 'usage-middleware demo' first.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _group in _GROUPS:
    for _command in _group.COMMANDS:
        commands.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status, or with 2 after a line that says what is wrong."""
    for stream in (sys.stdout, sys.stderr):
        # Never fail because the terminal cannot show a character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with interrupt_in_order():
            status = commands.main(args, prog_name="usage-middleware", standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt):
        message = "stopped"
    except OSError as error:  # while printing help, for example; a command reports its own
        message = f"cannot write to standard output: {error.strerror or error}"
    else:
        sys.exit(status if isinstance(status, int) else 0)
    say(f"Error: {formats.without_keys(' '.join(message.split()))}")
    _discard_output()
    sys.exit(_FAILED)


def _discard_output() -> None:
    """Discard what standard output did not accept.

    Otherwise Python tries again to write it at exit, fails, and prints an error of its own
    (docs.python.org/3/library/signal.html#note-on-sigpipe).
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
