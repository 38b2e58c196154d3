"""The command that checks a database."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Final

import click

from ..operations import Operation
from ..stores.base import QuotaStore
from ..stores.findings import Finding, ok, warning
from ..tokens import TOKEN_STATES, token_state
from .arguments import json_option
from .db_option import Opened, database_option, open_to_check
from .printing import echo, print_json_array
from .tables import printable
from .times import format_time

_MARKS: Final = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}
_MOST_RESERVATIONS: Final = 20  # listed one by one; the others are only counted


@click.command()
@database_option
@json_option
def check(as_json: bool) -> int:
    """Check a database and print one line per finding.

    Exit status: 0 without a problem, even if there are warnings; 1 with a problem; 2 if the database cannot be opened.
    """
    worst = 0

    def seen(findings: Iterator[Finding]) -> Iterator[Finding]:
        nonlocal worst
        for finding in findings:
            worst = max(worst, finding.level == "problem")
            yield finding

    with open_to_check() as opened:
        opened.quota_store().get_by_id(1)  # read a token, as the middleware does, so what fails there fails here
        findings = seen(_findings(opened, time.time()))
        if as_json:
            print_json_array({"level": finding.level, "text": finding.text} for finding in findings)
        else:
            for finding in findings:
                echo(_MARKS[finding.level] + printable(finding.text))
    return int(worst)


def _findings(opened: Opened, now: float) -> Iterator[Finding]:
    store = opened.quota_store()
    if opened.state == "current":
        yield ok("opens, and its tables are those of this version")
    else:
        yield warning("its tables are those of an earlier version; any service or command that writes upgrades them")
    # A file of an earlier version is read from a copy, which has other permissions: examine the original.
    examined = opened.original if isinstance(opened.original, QuotaStore) else store
    yield from chain(examined.health(), _tokens(store, now), _reservations(store, now))


def _tokens(store: QuotaStore, now: float) -> Iterator[Finding]:
    states = Counter(token_state(token, now) for token in store.tokens())
    counts = ", ".join(f"{states[state]:,} {state}" for state in TOKEN_STATES if states[state])
    yield ok(f"tokens: {counts or 'none'}")


def _reservations(store: QuotaStore, now: float) -> Iterator[Finding]:
    lapsed = units = count = 0
    listed: list[Operation] = []
    for operation in store.open_reservations():
        count += 1
        if operation.has_lapsed(now):
            lapsed += 1
            units += operation.held
            if len(listed) < _MOST_RESERVATIONS:
                listed.append(operation)
    if not lapsed:
        yield ok(f"open reservations: {count:,}, none of which has lapsed")
        return
    yield warning(
        f"open reservations: {count:,}, of which {lapsed:,} have lapsed and hold {units:,} quota units until their "
        "tokens are charged again; 'usage-middleware settle OPERATION AMOUNT' settles one, and an AMOUNT of 0 releases "
        "it"
    )
    for operation in listed:
        yield warning(
            f"operation {operation.id} of token {operation.token_id} holds {operation.held:,} quota units and lapsed "
            f"on {format_time(int(operation.expires_at or 0))}"
        )
    if lapsed > len(listed):
        yield warning(f"{lapsed - len(listed):,} more have lapsed")


COMMANDS = (check,)
