"""The commands that manage tokens."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ..checks import MAX_INTEGER
from . import formats
from .common import (
    database_option,
    find_token,
    json_option,
    open_store,
    print_json_array,
    print_key,
    print_token,
    token_id_argument,
)


def _time(text: str) -> int:
    try:
        return formats.parse_expiry(text, time.time())
    except ValueError as error:
        raise click.BadParameter(f"{error}, or never") from None


def _model_limit(text: str) -> tuple[str, int | bool]:
    model, equals, quota = text.rpartition("=")
    if not equals:
        return text, True
    try:
        return model, int(quota)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither MODEL nor MODEL=QUOTA with a number of quota units") from None


_model_limit_option = click.option(
    "--model-limit",
    "model_limits",
    metavar="MODEL[=QUOTA]",
    type=_model_limit,
    multiple=True,
    help="A model that may be used, and the most quota units for it. Repeatable.",
)
_expires_option = click.option(
    "--expires",
    "--expires-at",
    "expires_at",
    metavar="TIME",
    type=_time,
    help="When the token stops: 30d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), Unix seconds, or never.",
)


@click.command()
@database_option
@click.option("--name", default="", help="What the holder sees as the token's name.")
@click.option(
    "--quota",
    "--total-available",
    "total_available",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    help="Quota units to grant.",
)
@click.option("--unlimited", "--unlimited-quota", "unlimited_quota", is_flag=True, help="Refuse nothing for quota.")
@_model_limit_option
@_expires_option
@click.option("--key", help="A key that its holder has already; '-' reads it from standard input.")
@json_option
def create(as_json: bool, key: str | None, model_limits: tuple[tuple[str, int | bool], ...], **fields: Any) -> None:
    """Create a token and print its key, this once.

    The key stands alone on standard output; it is not kept and cannot be shown again. The database is made if it
    is not there.
    """
    if key == "-":
        key = sys.stdin.readline().rstrip("\r\n")
    fields["expires_at"] = fields["expires_at"] or 0
    with open_store(create=True) as store:
        new_key, token = store.create(key=key, model_limits=dict(model_limits), **fields)
    print_key(new_key, token, as_json)


@click.command("list")
@database_option
@json_option
def list_tokens(as_json: bool) -> None:
    """List all tokens.

    A key is shown by its last four characters.
    """
    with open_store() as store:
        if as_json:
            print_json_array(map(formats.as_object, store.tokens()))
        else:
            for line in formats.token_table(store.tokens(), time.time()):
                click.echo(line)


@click.command()
@database_option
@token_id_argument
@json_option
def show(token_id: int, as_json: bool) -> None:
    """Show one token, and how much of its quota and of each model's limit is used."""
    with open_store() as store:
        token = find_token(store, token_id)
        print_token(store, token, as_json)


@click.command()
@database_option
@token_id_argument
@click.option("--name", help="What the holder sees as the token's name.")
@click.option("--unlimited/--limited", "unlimited_quota", default=None, help="Whether nothing is refused for quota.")
@_model_limit_option
@click.option("--no-model-limits", is_flag=True, help="Take all model limits away.")
@click.option(
    "--model-limits-enabled/--model-limits-disabled",
    "model_limits_enabled",
    default=None,
    help="Whether only the listed models may be used.",
)
@_expires_option
@click.option("--enable/--disable", "enabled", default=None, help="Whether the key works at all.")
@json_option
def update(
    token_id: int,
    as_json: bool,
    model_limits: tuple[tuple[str, int | bool], ...],
    no_model_limits: bool,
    **changes: Any,
) -> None:
    """Change a token.

    What is not named stays. Model limits replace those that the token had, and are enabled.
    """
    if model_limits and no_model_limits:
        raise click.UsageError("--model-limit and --no-model-limits exclude each other")
    changes = {field: value for field, value in changes.items() if value is not None}
    if model_limits or no_model_limits:
        changes["model_limits"] = dict(model_limits)
        changes.setdefault("model_limits_enabled", bool(model_limits))
    if not changes:
        raise click.UsageError(f"nothing to change; see 'usage-middleware update --help' for what token {token_id} has")
    with open_store() as store:
        token = store.update(token_id, **changes)
        print_token(store, token, as_json)


@click.command()
@database_option
@token_id_argument
@json_option
def rotate(token_id: int, as_json: bool) -> None:
    """Give a token a new key, and print it, this once.

    The old key stops at once and never returns.
    """
    with open_store() as store:
        key = store.rotate(token_id)
        token = find_token(store, token_id)
    print_key(key, token, as_json)


@click.command()
@database_option
@token_id_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(token_id: int, yes: bool) -> None:
    """Delete a token.

    Its key stops at once and never returns. At a terminal it asks first.
    """
    with open_store() as store:
        token = find_token(store, token_id)
        if not yes and sys.stdin.isatty():
            click.confirm(f"Delete token {token_id} ({formats.printable(token.name)!r}) for good?", abort=True)
        store.delete(token_id)
    click.echo(f"Deleted token {token_id}.", err=True)


COMMANDS = (create, list_tokens, show, update, rotate, delete)
