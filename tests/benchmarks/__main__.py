"""Measures what the package costs, as ratios to other ways of doing the same: ``python tests/benchmarks``.

Times depend on the machine, ratios hardly. None is asserted: a budget that is missed is printed as such, and the exit
status tells only whether the measurements ran. A machine that does something else besides widens lowest and highest
before it moves the ratio.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import sqlite3

import click
from comparing import Row, Table
from measurements import MEASUREMENTS, Options


@click.command()
@click.option("--rounds", default=50, show_default=True, type=click.IntRange(min=1), help="How often to compare.")
@click.option(
    "--tokens", default=100_000, show_default=True, type=click.IntRange(min=1), help="How many the database has."
)
@click.option(
    "--writers", default=64, show_default=True, type=click.IntRange(min=1), help="How many processes charge at once."
)
@click.option(
    "--charges", default=50, show_default=True, type=click.IntRange(min=1), help="How often each of them does."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def main(rounds: int, tokens: int, writers: int, charges: int, as_json: bool) -> None:
    """Measure what the package costs, side by side with other ways of doing the same."""
    options = Options(rounds=rounds, tokens=tokens, writers=writers, charges=charges)
    conditions = {**_machine(), **dataclasses.asdict(options)}
    tables = itertools.chain.from_iterable(measure(options) for measure in MEASUREMENTS)
    if as_json:
        click.echo(json.dumps({"conditions": conditions, "tables": [_as_dict(table) for table in tables]}, indent=2))
        return
    click.echo(", ".join(f"{name} {value}" for name, value in conditions.items()))
    for table in tables:
        click.echo(f"\n{table.title}\n{'':52}{'per call':>10}{'ratio':>8}{'lowest':>8}{'highest':>9}{'budget':>8}")
        for number, row in enumerate(table.rows):
            click.echo(_line(row, is_reference=number == 0))


def _machine() -> dict[str, str | int | None]:
    packages = ("Flask", "Werkzeug", "WhiteNoise")
    return {
        platform.python_implementation(): platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **{package: importlib.metadata.version(package) for package in packages},
        "machine": platform.machine(),
        "CPUs": os.cpu_count(),
    }


def _line(row: Row, *, is_reference: bool) -> str:
    line = f"  {row.name:50}{row.seconds * 1e6:>7.3f} us"
    if is_reference:
        return line
    line += f"{row.ratio:8.3f}{row.lowest:8.3f}{row.highest:9.3f}"
    return line if row.budget is None else f"{line}{row.budget:8.3f}  {row.verdict}"


def _as_dict(table: Table) -> dict[str, object]:
    return {
        "title": table.title,
        "rows": [{**dataclasses.asdict(row), "verdict": row.verdict or None} for row in table.rows],
    }


if __name__ == "__main__":
    main()
