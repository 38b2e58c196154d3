"""The commands that move quota."""

from __future__ import annotations

import sys
import time

import click

from ..checks import MAX_INTEGER
from ..keys import strip_prefix
from . import formats
from .common import (
    database_option,
    find_token,
    json_option,
    open_store,
    print_json_array,
    print_token,
    token_id_argument,
)

_units = click.IntRange(0, MAX_INTEGER)


def _past_time(text: str) -> int:
    try:
        return formats.parse_time(text, time.time(), past=True)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


# A negative amount is not an option.
@click.command(context_settings={"ignore_unknown_options": True})
@database_option
@token_id_argument
@click.argument("amount", type=click.IntRange(-MAX_INTEGER, MAX_INTEGER))
@json_option
def grant(token_id: int, amount: int, as_json: bool) -> None:
    """Grant a token more quota units.

    A negative AMOUNT takes back what is available, never more.
    """
    with open_store() as store:
        print_token(store, store.grant(token_id, amount), as_json)


@click.command()
@database_option
@click.argument("token", metavar="ID|KEY")
@click.argument("amount", type=_units)
@click.option("--model", help="The model that is charged for.")
@click.option("--operation-id", help="Names the charge: repeated with the same, it is made once.")
@json_option
def charge(token: str, amount: int, model: str | None, operation_id: str | None, as_json: bool) -> None:
    """Charge a token, named by its id or its key.

    A KEY begins with sk-; '-' reads it from standard input, where no other user of the machine sees it.
    """
    if token == "-":
        token = sys.stdin.readline().strip()
        by_id = False
    else:
        by_id = token.isdecimal()
    with open_store() as store:
        if by_id:
            charged = store.charge_by_id(int(token), amount, model=model, idempotency_key=operation_id)
        else:
            charged = store.charge(strip_prefix(token), amount, model=model, idempotency_key=operation_id)
        print_token(store, charged, as_json)


@click.command()
@database_option
@click.argument("operation_id", metavar="OPERATION")
@click.argument("amount", type=_units, required=False)
@click.option("--refund-id", help="Names the refund: repeated with the same, it is made once.")
@json_option
def refund(operation_id: str, amount: int | None, refund_id: str | None, as_json: bool) -> None:
    """Refund a charge, or a part of it.

    OPERATION is what 'history' shows in its last column. Without an AMOUNT, all that is left of the charge is given
    back.
    """
    with open_store() as store:
        print_token(store, store.refund(operation_id, amount, idempotency_key=refund_id), as_json)


@click.command()
@database_option
@token_id_argument
@json_option
def history(token_id: int, as_json: bool) -> None:
    """List the operations of a token, the newest first.

    AMOUNT is what an operation came to, HELD what a charge still holds after refunds.
    """
    with open_store() as store:
        find_token(store, token_id)
        operations = store.history(token_id)
        if as_json:
            print_json_array(map(formats.operation_as_object, operations))
        else:
            for line in formats.operation_table(operations):
                click.echo(line)


@click.command()
@database_option
@click.option(
    "--before",
    "--older-than",
    "before",
    metavar="TIME",
    type=_past_time,
    required=True,
    help="How old: 90d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), or Unix seconds.",
)
def prune(before: int) -> None:
    """Forget finished operations that are older than a time.

    No total changes. What is forgotten cannot be refunded any more, and a call that repeats it counts anew: keep more
    than the time in which a client may try again.
    """
    with open_store() as store:
        count = store.prune(before)
    noun = "operation" if count == 1 else "operations"
    click.echo(f"Forgot {count:,} {noun} from before {formats.format_time(before)}.", err=True)


COMMANDS = (grant, charge, refund, history, prune)
