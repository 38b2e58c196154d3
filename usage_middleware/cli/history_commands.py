"""The commands that look back on operations, and that forget them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Final

import click

from ..operations import Operation
from . import formats
from .arguments import json_option, limit_option, past_time, time_option, token_id_argument
from .db_option import database_option, open_store
from .manage import find_token
from .printing import advise, print_json_array, print_lines, say
from .times import format_time

# A client that lost an answer may try again for so long. Younger operations are forgotten only if that is confirmed.
_RETRIES: Final = 86400


@click.command()
@database_option
@token_id_argument
@click.option(
    "--state",
    type=click.Choice(formats.OPERATION_STATES),
    help="Only reservations that are open, or whose time has passed; or only what is final.",
)
@time_option("--since", "Only operations that were made then or later: 90d, 12h, 2027-01-01, …")
@time_option("--until", "Only operations that were made before.")
@limit_option
@json_option
def history(
    token_id: int, as_json: bool, limit: int | None, state: str | None, since: int | None, until: int | None
) -> None:
    """List the operations of a token, the newest first.

    AMOUNT is what an operation came to, HELD what a charge still holds after refunds.
    """
    now = time.time()

    def wanted(operations: Iterator[Operation]) -> Iterator[Operation]:
        for operation in operations:
            if state is None or formats.operation_state(operation, now) == state:
                yield operation

    with open_store(read_only=True) as store:
        find_token(store, token_id)
        operations = islice(wanted(store.history(token_id, since=since, until=until)), limit)
        if as_json:
            print_json_array(map(formats.operation_as_object, operations))
        else:
            print_lines(formats.operation_table(operations, now))


@click.command()
@database_option
@click.option(
    "--before",
    "--older-than",
    "before",
    metavar="TIME",
    type=past_time,
    required=True,
    help="How old: 90d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), or Unix seconds.",
)
@click.option("--dry-run", is_flag=True, help="Count what would be forgotten, and forget nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(before: int, dry_run: bool, yes: bool) -> None:
    """Forget finished operations that are older than a time.

    No total changes, and usage by day stays. What is forgotten cannot be refunded any more, and a call that repeats it
    counts again: keep more than the time in which a client may try again. At a terminal it asks first.
    """
    now = time.time()
    when = format_time(before)
    if before > now:
        raise click.UsageError(f"{when} lies in the future; name a time that has passed")
    with open_store(dry_run=dry_run) as store:
        if dry_run:
            say(f"Would forget {_operations(store.count_finished(before))} from before {when}.")
            return
        if not yes:
            if sys.stdin.isatty():
                count = _operations(store.count_finished(before))
                click.confirm(f"Forget {count} from before {when} for good?", abort=True, err=True)
            elif now - before < _RETRIES:
                raise click.UsageError(
                    "clients may still repeat what is less than a day old, and would be charged again; "
                    "add --yes to forget it all the same"
                )
        with advise("What is not forgotten yet is forgotten by the same command"):
            count = _operations(store.prune(before))
    say(f"Forgot {count} from before {when}.")


def _operations(count: int) -> str:
    return f"{count:,} {'operation' if count == 1 else 'operations'}"


COMMANDS = (history, prune)
