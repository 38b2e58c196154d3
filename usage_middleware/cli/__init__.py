"""The command ``usage-middleware``: an operator's way to tokens, and a way to serve the endpoint.

Wrong input is one line on standard error and exit status 2, never a traceback.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from . import check, formats, manage, quota, serve, transfer
from .common import remember_database


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--db",
    metavar="DATABASE",
    envvar="USAGE_MIDDLEWARE_DB",
    expose_value=False,
    callback=remember_database,
    help="A file, or the URL of a database server; may stand behind the command too.  [env var: USAGE_MIDDLEWARE_DB]",
)
@click.version_option(package_name="usage-middleware")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Tokens with a quota, and the endpoint /api/usage/token that tells their holders what is left.

    Try 'usage-middleware demo' first.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (*manage.COMMANDS, *quota.COMMANDS, *transfer.COMMANDS, *check.COMMANDS, *serve.COMMANDS):
    commands.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process: status 0, or 2 after a line that says what is wrong."""
    for stream in (sys.stdout, sys.stderr):
        # A name or a bar that the terminal's encoding does not have is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = commands.main(args, prog_name="usage-middleware", standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except click.Abort:
        message = "stopped"
    else:
        sys.exit(status if isinstance(status, int) else 0)
    click.echo(f"Error: {formats.without_keys(' '.join(message.split()))}", err=True)
    sys.exit(2)
