"""The commands that list operations and delete old ones."""

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

# How long a client that lost an answer may retry. Operations that are younger are deleted only if that is confirmed.
_RETRIES: Final = 86400


@click.command()
@database_option
@token_id_argument
@click.option(
    "--state",
    type=click.Choice(formats.OPERATION_STATES),
    help="Only open reservations, only those whose time has passed, or only what is final.",
)
@time_option("--since", "Only operations that were made at this time or later: 90d, 12h, 2027-01-01, …")
@time_option("--until", "Only operations that were made before this time.")
@limit_option
@json_option
def history(
    token_id: int, as_json: bool, limit: int | None, state: str | None, since: int | None, until: int | None
) -> None:
    """List the operations of a token, newest first.

    AMOUNT is what an operation came to, or what an open reservation asked for. HELD is what a charge still holds after
    its refunds, or what a reservation holds.
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
@click.option("--dry-run", is_flag=True, help="Count what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(before: int, dry_run: bool, yes: bool) -> None:
    """Delete finished operations that are older than a time.

    Reservations that lapsed before that time are released. Otherwise totals and usage by day stay as they are. A
    deleted operation cannot be refunded any more, and a call that repeats it is charged again: keep operations for
    longer than a client may retry. At a terminal, the command asks first.
    """
    now = time.time()
    when = format_time(before)
    if before > now:
        raise click.UsageError(f"{when} is in the future; name a time in the past")
    with open_store(dry_run=dry_run) as store:
        if dry_run:
            say(f"Would delete {_operations(store.count_finished(before))} from before {when}.")
            return
        if not yes:
            if sys.stdin.isatty():
                count = _operations(store.count_finished(before))
                click.confirm(f"Delete {count} from before {when} for good?", abort=True, err=True)
            elif now - before < _RETRIES:
                raise click.UsageError(
                    "clients may still repeat operations that are less than a day old, and would be charged again; "
                    "add --yes to delete them anyway"
                )
        with advise("Run the same command again to delete the rest"):
            count = _operations(store.prune(before))
    say(f"Deleted {count} from before {when}.")


def _operations(count: int) -> str:
    return f"{count:,} {'operation' if count == 1 else 'operations'}"


COMMANDS = (history, prune)
