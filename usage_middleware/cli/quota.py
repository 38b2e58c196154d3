"""The commands that move quota.

Each call has an idempotency key, a new one if the operator gives none. If the connection is lost during COMMIT, the
outcome is unknown, and the command prints how to repeat the call with the same key.
"""

from __future__ import annotations

import uuid
from typing import Any

import click

from ..checks import MAX_INTEGER
from .arguments import UNITS, idempotency_key_option, json_option, line_of_standard_input, token_id_argument
from .db_option import database_option, open_store
from .printing import committed, print_token, repeatable

_STANDARD_INPUT = "-"


# click would take a negative amount for an option.
@click.command(context_settings={"ignore_unknown_options": True})
@database_option
@token_id_argument
@click.argument("amount", type=click.IntRange(-MAX_INTEGER, MAX_INTEGER))
@idempotency_key_option("grant")
@json_option
def grant(token_id: int, amount: int, idempotency_key: str | None, as_json: bool) -> None:
    """Grant a token more quota units.

    A negative AMOUNT takes quota back, but no more than is available.
    """
    key = idempotency_key or _new_key()
    with open_store() as store:
        with repeatable("grant", "--idempotency-key", key, token_id, amount):
            token = store.grant(token_id, amount, idempotency_key=key)
        with committed(f"{amount:,} quota units were granted to token {token_id}, with the idempotency key {key}"):
            print_token(token, as_json, idempotency_key=key)


@click.command()
@database_option
@click.argument("token", metavar="ID|KEY")
@click.argument("amount", type=UNITS)
@click.option("--model", help="The model that was used.")
@click.option("--input-tokens", type=UNITS, default=0, help="How many tokens the model read; for usage by day.")
@click.option("--output-tokens", type=UNITS, default=0, help="How many tokens it wrote; for usage by day.")
@idempotency_key_option("charge")
@json_option
def charge(
    token: str,
    amount: int,
    model: str | None,
    input_tokens: int,
    output_tokens: int,
    idempotency_key: str | None,
    as_json: bool,
) -> None:
    """Charge a token, named by its id or its key.

    A KEY begins with sk-. '-' reads it from standard input, where other users of the machine cannot see it.
    """
    key = idempotency_key or _new_key()
    shown = token if token.isdecimal() or token == _STANDARD_INPUT else "KEY"
    if token == _STANDARD_INPUT:
        token = line_of_standard_input("a key").strip()
    options = ["--idempotency-key", key, *_words(model=model, input_tokens=input_tokens, output_tokens=output_tokens)]
    arguments: dict[str, Any] = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "model": model,
        "idempotency_key": key,
    }
    with open_store() as store:
        with repeatable("charge", *options, shown, amount):
            if shown.isdecimal():
                charged = store.charge_by_id(int(token), amount, **arguments)
            else:
                charged = store.charge(token, amount, **arguments)
        with committed(f"{amount:,} quota units were charged to token {charged.id}, with the idempotency key {key}"):
            print_token(charged, as_json, idempotency_key=key)


@click.command()
@database_option
@click.argument("operation_id", metavar="OPERATION")
@click.argument("amount", type=UNITS)
@click.option("--input-tokens", type=UNITS, default=0, help="How many tokens the model read; for usage by day.")
@click.option("--output-tokens", type=UNITS, default=0, help="How many tokens it wrote; for usage by day.")
@json_option
def settle(operation_id: str, amount: int, input_tokens: int, output_tokens: int, as_json: bool) -> None:
    """Settle a reservation with its final AMOUNT; 0 releases it.

    OPERATION is what 'history' shows in its last column; 'check' lists the reservations whose time has passed.
    """
    with open_store() as store:
        # It needs no idempotency key: to settle again with the same amount changes nothing.
        options = _words(input_tokens=input_tokens, output_tokens=output_tokens)
        with repeatable("settle", *options, operation_id, amount):
            token = store.settle(operation_id, amount, input_tokens=input_tokens, output_tokens=output_tokens)
        with committed(f"operation {operation_id} was settled with {amount:,} quota units"):
            print_token(token, as_json)


@click.command()
@database_option
@click.argument("operation_id", metavar="OPERATION")
@click.argument("amount", type=UNITS, required=False)
@idempotency_key_option("refund")
@json_option
def refund(operation_id: str, amount: int | None, idempotency_key: str | None, as_json: bool) -> None:
    """Refund a charge, or a part of it.

    OPERATION is what 'history' shows in its last column. Without an AMOUNT, all that is left of the charge is refunded.
    """
    key = idempotency_key or _new_key()
    with open_store() as store:
        with repeatable("refund", "--idempotency-key", key, operation_id, *([] if amount is None else [amount])):
            token = store.refund(operation_id, amount, idempotency_key=key)
        what = "all that was left of it" if amount is None else f"{amount:,} quota units"
        with committed(f"operation {operation_id} was refunded: {what}, with the idempotency key {key}"):
            print_token(token, as_json, idempotency_key=key)


def _words(**options: object) -> list[object]:
    """Return options as words of a command line. Leave out those that have no value or 0."""
    given = ((f"--{name.replace('_', '-')}", value) for name, value in options.items() if value)
    return [word for option in given for word in option]


def _new_key() -> str:
    return f"command-{uuid.uuid4().hex}"


COMMANDS = (grant, charge, settle, refund)
