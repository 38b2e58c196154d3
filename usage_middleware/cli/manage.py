"""The commands that manage tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import click

from ..errors import TokenNotFound
from ..keys import check_key, key_hint, strip_prefix
from ..stores.base import QuotaStore
from ..tokens import RENEWALS, TOKEN_STATES, Token, token_state
from . import formats
from .arguments import (
    SOME_UNITS,
    UNITS,
    expiry,
    json_option,
    limit_option,
    line_of_standard_input,
    time_option,
    token_id_argument,
)
from .db_option import database_option, open_store
from .printing import advise, committed, print_json_array, print_key, print_lines, print_token, say
from .tables import printable
from .transfer.fields import KEY_MIN_LENGTH

_PERIODS: Final = click.Choice([renewal for renewal in RENEWALS if renewal])


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
    help="A model that may be used, and the most quota units that it may use. Repeatable.",
)
_expires_option = click.option(
    "--expires",
    "--expires-at",
    "expires_at",
    metavar="TIME",
    type=expiry,
    help="When the token stops: 30d, 12h, 2027-01-01, '2027-01-01 18:30' (UTC), Unix seconds, or never.",
)
_renew_option = click.option(
    "--renew",
    "renewal",
    type=_PERIODS,
    help="Renew the quota each day, week (on Monday) or month, at midnight UTC.",
)


def find_token(store: QuotaStore, token_id: int) -> Token:
    """Return the token with that id.

    :raises TokenNotFound: there is none.
    """
    token = store.get_by_id(token_id)
    if token is None:
        raise TokenNotFound(f"there is no token {token_id}")
    return token


@click.command()
@database_option
@click.option("--name", default="", help="What the holder sees as the token's name.")
@click.option(
    "--quota",
    "--total-available",
    "total_available",
    type=UNITS,
    default=0,
    help="Quota units to grant; with --renew, those that each period begins with.",
)
@click.option(
    "--unlimited", "--unlimited-quota", "unlimited_quota", is_flag=True, help="Refuse no charge for lack of quota."
)
@_renew_option
@_model_limit_option
@_expires_option
@click.option("--key", help="Use a key that its holder already has; '-' reads it from standard input.")
@json_option
def create(
    as_json: bool,
    key: str | None,
    model_limits: tuple[tuple[str, int | bool], ...],
    renewal: str | None,
    **fields: Any,
) -> None:
    """Create a token and print its key, only this once.

    The key stands alone on standard output. It is not stored and cannot be shown again. If there is no database, it is
    created.
    """
    if key is not None:
        key = _checked(line_of_standard_input("a key") if key == "-" else key)
    if renewal:
        if not fields["total_available"]:
            raise click.UsageError("--renew needs --quota: the quota units that each period begins with")
        fields.update(renewal=renewal, renewal_quota=fields["total_available"])
    fields["expires_at"] = fields["expires_at"] or 0
    with open_store(create=True) as store:
        with advise("If 'usage-middleware list' shows the token anyway, delete it: its key is lost"):
            new_key, token = store.create(key=key, model_limits=dict(model_limits), **fields)
        with committed(f"token {token.id} was created; 'usage-middleware rotate {token.id}' gives it a new key"):
            print_key(new_key, token, as_json)


def _checked(key: str) -> str:
    try:
        check_key(key)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if 0 < len(strip_prefix(key)) < KEY_MIN_LENGTH:
        raise click.UsageError(
            f"a key must have at least {KEY_MIN_LENGTH} characters beside its prefix: anyone who reads the database "
            "can find a shorter one by trying all of them"
        )
    return key


@click.command("list")
@database_option
@click.option("--state", type=click.Choice(TOKEN_STATES), help="Only tokens in this state.")
@click.option("--name", help="Only tokens whose name contains this text; case does not matter.")
@time_option("--since", "Only tokens that were created at this time or later: 90d, 2027-01-01, …")
@time_option("--until", "Only tokens that were created before this time.")
@limit_option
@json_option
def list_tokens(
    as_json: bool, limit: int | None, state: str | None, name: str | None, since: int | None, until: int | None
) -> None:
    """List tokens.

    A key is shown by its last four characters.
    """
    now = time.time()

    def wanted(tokens: Iterator[Token]) -> Iterator[Token]:
        for token in tokens:
            if (
                (state is None or token_state(token, now) == state)
                and (name is None or name.casefold() in token.name.casefold())
                and (since is None or token.created_at >= since)
                and (until is None or token.created_at < until)
            ):
                yield token

    with open_store(read_only=True) as store:
        tokens = islice(wanted(store.tokens()), limit)
        if as_json:
            print_json_array(map(formats.as_object, tokens))
        else:
            print_lines(formats.token_table(tokens, now))


@click.command()
@database_option
@token_id_argument
@json_option
def show(token_id: int, as_json: bool) -> None:
    """Show one token, and how much of its quota and of each model's limit is used."""
    with open_store(read_only=True) as store:
        token = find_token(store, token_id)
        usage = store.model_usage(token_id)
    print_token(token, as_json, usage)


def _points_to_grant(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            "'usage-middleware grant ID AMOUNT' changes the quota of a token, and a negative AMOUNT takes quota back; "
            "--renewal-quota changes what each period begins with"
        )


@click.command()
@database_option
@token_id_argument
@click.option("--name", help="What the holder sees as the token's name.")
@click.option("--unlimited/--limited", "unlimited_quota", default=None, help="Whether quota is without limit.")
@_renew_option
@click.option("--renewal-quota", type=SOME_UNITS, help="What each period begins with, from the next one on.")
@click.option("--no-renewal", is_flag=True, help="Stop renewing the quota.")
@_model_limit_option
@click.option("--no-model-limits", is_flag=True, help="Remove all model limits.")
@click.option(
    "--model-limits-enabled/--model-limits-disabled",
    "model_limits_enabled",
    default=None,
    help="Whether only the listed models may be used.",
)
@_expires_option
@click.option("--enable/--disable", "enabled", default=None, help="Whether the key works at all.")
@click.option("--quota", "--total-available", hidden=True, expose_value=False, callback=_points_to_grant, help="-")
@json_option
def update(
    token_id: int,
    as_json: bool,
    model_limits: tuple[tuple[str, int | bool], ...],
    no_model_limits: bool,
    no_renewal: bool,
    **changes: Any,
) -> None:
    """Change a token.

    Fields whose options are not given stay as they are. Model limits replace those that the token had, and are enabled.
    """
    if model_limits and no_model_limits:
        raise click.UsageError("--model-limit and --no-model-limits exclude each other")
    changes = {field: value for field, value in changes.items() if value is not None}
    if no_renewal and changes.keys() & {"renewal", "renewal_quota"}:
        raise click.UsageError("--no-renewal excludes --renew and --renewal-quota")
    if model_limits or no_model_limits:
        changes["model_limits"] = dict(model_limits)
        changes.setdefault("model_limits_enabled", bool(model_limits))
    if no_renewal:
        changes["renewal"] = ""
    if not changes:
        raise click.UsageError(
            "nothing to change; add an option such as --name NEW; 'usage-middleware update --help' lists all of them"
        )
    with open_store() as store:
        _check_renewal(store, token_id, changes)
        usage = store.model_usage(token_id)
        with advise("To be sure that it is changed, run the same command again"):
            token = store.update(token_id, **changes)
        with committed(f"token {token_id} was changed"):
            print_token(token, as_json, usage)


def _check_renewal(store: QuotaStore, token_id: int, changes: dict[str, Any]) -> None:
    """Check that a token which renews gets both a period and a quota."""
    if changes.get("renewal") and not changes.get("renewal_quota", find_token(store, token_id).renewal_quota):
        raise click.UsageError("--renew needs --renewal-quota: the quota units that each period begins with")
    if "renewal_quota" in changes and not changes.get("renewal", find_token(store, token_id).renewal):
        raise click.UsageError(f"the quota of token {token_id} does not renew; add --renew daily, weekly or monthly")


@click.command()
@database_option
@token_id_argument
@json_option
def rotate(token_id: int, as_json: bool) -> None:
    """Give a token a new key and print it, only this once.

    The old key stops working at once, and can never be used again.
    """
    with open_store() as store:
        token = find_token(store, token_id)
        with advise(f"To be sure which key token {token_id} has, run the same command again: only the newest works"):
            key = store.rotate(token_id)
        with committed(f"token {token_id} has a new key, which is lost; run the same command again for another"):
            print_key(key, replace(token, hint=key_hint(strip_prefix(key))), as_json)


@click.command()
@database_option
@token_id_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(token_id: int, yes: bool) -> None:
    """Delete a token.

    Its key stops working at once, and can never be used again. At a terminal, the command asks first.
    """
    with open_store() as store:
        token = find_token(store, token_id)
        if not yes and sys.stdin.isatty():
            click.confirm(f"Delete token {token_id} ({printable(token.name)!r}) for good?", abort=True)
        with advise(f"Run the same command again, until it says that there is no token {token_id}"):
            store.delete(token_id)
    say(f"Deleted token {token_id}.")


COMMANDS = (create, list_tokens, show, update, rotate, delete)
