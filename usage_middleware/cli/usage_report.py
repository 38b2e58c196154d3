"""The command that shows what a token used by day and by model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from typing import Any, Final

import click

from ..tokens import Token
from ..usage import DayUsage
from .arguments import json_option, token_id_argument
from .db_option import database_option, open_store
from .manage import find_token
from .printing import print_json, print_lines
from .tables import bar, printable, table

_MOST_DAYS: Final = 3660
_HEADINGS: Final = ("USED", "", "REQUESTS", "INPUT", "OUTPUT")
_RIGHT: Final = frozenset(("USED", "REQUESTS", "INPUT", "OUTPUT"))
_FIGURES: Final = tuple(name for name in DayUsage._fields if name not in ("day", "model"))
_NO_MODEL: Final = "(no model)"

_Figures = dict[str, int]


@click.command()
@database_option
@token_id_argument
@click.option(
    "--days",
    type=click.IntRange(1, _MOST_DAYS),
    default=30,
    show_default=True,
    help="How many UTC days, today included.",
)
@json_option
def usage(token_id: int, days: int, as_json: bool) -> None:
    """Show what a token used by day and by model.

    A charge counts on the day on which it was made, and a refund on the day of its charge.
    """
    last = datetime.now(timezone.utc).date()
    first = last - timedelta(days=days - 1)
    with open_store(read_only=True) as store:
        token = find_token(store, token_id)
        entries = store.usage_by_day(token_id, first, last)
    if as_json:
        print_json(usage_as_object(token, first, last, entries))
    else:
        print_lines(usage_report(token, first, last, entries))


def usage_as_object(token: Token, first: date, last: date, entries: Sequence[DayUsage]) -> dict[str, Any]:
    """Return the usage of a token for JSON."""
    return {
        "id": token.id,
        "start_date": first.isoformat(),
        "end_date": last.isoformat(),
        **_sum(entries),
        "days": [
            {"date": day.isoformat(), **_sum(models), "models": {entry.model: _sum([entry]) for entry in models}}
            for day, models in _grouped(entries, lambda entry: entry.day)
        ],
    }


def usage_report(token: Token, first: date, last: date, entries: Sequence[DayUsage]) -> Iterator[str]:
    """Yield the lines of two tables with bars: by day, each with its models, and by model."""
    yield f"Token {token.id} {printable(token.name)!r}, {first} to {last} (UTC)"
    yield ""
    if not entries:
        yield "Nothing was used."
        return
    yield from table(("DAY", *_HEADINGS), _rows_by_day(entries), right=_RIGHT)
    yield ""
    models = sorted(_grouped(entries, lambda entry: entry.model), key=lambda group: (-_used(group[1]), group[0]))
    most = max(_used(of_model) for _, of_model in models)
    rows = [_row(_shown(model), _sum(of_model), most) for model, of_model in models]
    yield from table(("MODEL", *_HEADINGS), [*rows, _row("total", _sum(entries))], right=_RIGHT)


def _rows_by_day(entries: Sequence[DayUsage]) -> Iterator[Sequence[str]]:
    days = _grouped(entries, lambda entry: entry.day)
    most = max(_used(of_day) for _, of_day in days)
    for day, of_day in days:
        yield _row(str(day), _sum(of_day), most)
        # A single line without a model would only repeat the line above.
        if len(of_day) > 1 or of_day[0].model:
            for entry in sorted(of_day, key=lambda entry: -entry.used):
                yield _row(f"  {_shown(entry.model)}", _sum([entry]), most)
    yield _row("total", _sum(entries))


def _row(label: str, figures: _Figures, most: int | None = None) -> Sequence[str]:
    used, *others = (f"{figures[name]:,}" for name in _FIGURES)
    return (label, used, "" if most is None else bar(figures["used"], max(most, 1)), *others)


def _grouped(entries: Iterable[DayUsage], key: Any) -> list[tuple[Any, list[DayUsage]]]:
    groups: dict[Any, list[DayUsage]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.items())


def _sum(entries: Iterable[DayUsage]) -> _Figures:
    entries = list(entries)
    return {name: sum(getattr(entry, name) for entry in entries) for name in _FIGURES}


def _used(entries: Iterable[DayUsage]) -> int:
    return sum(entry.used for entry in entries)


def _shown(model: str) -> str:
    return printable(model) or _NO_MODEL


COMMANDS = (usage,)
