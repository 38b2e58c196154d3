"""The command that says what is well, and what is not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Final

import click

from ..stores.base import QuotaStore
from ..stores.findings import Finding, ok, warning
from . import formats
from .common import database_option, open_store

_MARKS: Final = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


@click.command()
@database_option
def check() -> int:
    """Say line by line what is well with a database, and what is not.

    Exit status: 0 where nothing is wrong, warnings included; 1 with a problem; 2 where it cannot be opened at all.
    """
    worst = 0
    with open_store() as store:
        store.get_by_id(1)  # as the middleware does: what it refuses is refused here
        click.echo(f"{_MARKS['ok']}opens, and its tables are those of this version")
        for finding in chain(store.health(), _tokens(store, time.time()), _reservations(store, time.time())):
            click.echo(_MARKS[finding.level] + formats.printable(finding.text))
            worst = max(worst, finding.level == "problem")
    return int(worst)


def _tokens(store: QuotaStore, now: float) -> Iterator[Finding]:
    states = Counter(formats.state(token, now) for token in store.tokens())
    counts = ", ".join(f"{states[state]:,} {state}" for state in formats.STATES if states[state])
    yield ok(f"tokens: {counts or 'none'}")


def _reservations(store: QuotaStore, now: float) -> Iterator[Finding]:
    lapsed = units = count = 0
    for operation in store.open_reservations():
        count += 1
        if operation.has_lapsed(now):
            lapsed += 1
            units += operation.held
    if lapsed:
        yield warning(
            f"open reservations: {count:,}, of which {lapsed:,} have lapsed and hold {units:,} quota units until their "
            "tokens are charged again; 'usage-middleware prune' gives them back"
        )
    else:
        yield ok(f"open reservations: {count:,}, none of which has lapsed")


COMMANDS = (check,)
