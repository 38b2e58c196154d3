"""Measure what the package costs, as ratios to other ways of doing the same: ``python tests/benchmarks``.

Times depend on the machine, ratios hardly do. No ratio is asserted: a missed budget is printed as such, and the exit
status says only whether the measurements ran. Other work on the machine changes the lowest and the highest ratio before
it changes the median.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sqlite3
from pathlib import Path

import click
import plots
from comparing import PERCENTILES, Chart, Result, Row, Table
from measurements import PARTS, Options
from serving import SERVERS

_PACKAGES = ("Werkzeug", "WhiteNoise", "Flask", "SQLAlchemy", "Django", "FastAPI", "granian", "gunicorn")
_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Measure this part; can be repeated.")
@click.option("--rounds", default=20, type=_COUNT, help="How often to compare what takes microseconds.")
@click.option(
    "--long-rounds",
    default=3,
    type=_COUNT,
    help="How often to compare frameworks, token counts, threads, HTTP, proxies, histories, database servers.",
)
@click.option("--tokens", default=100_000, type=_COUNT, help="How many tokens the database has.")
@click.option(
    "--tokens-most",
    default=1_000_000,
    type=click.IntRange(min=2_000),
    help="The most tokens in the part 'tokens'. A database of 10,000,000 takes two minutes to fill, and 1.3 GB.",
)
@click.option("--at-once", default=64, type=_COUNT, help="The most threads, or connections, that ask at once.")
@click.option(
    "--server", multiple=True, default=SERVERS, type=click.Choice(SERVERS), help="For the part 'http'; can be repeated."
)
@click.option("--charging-threads", default=16, type=_COUNT, help="How many threads of one process charge at once.")
@click.option("--writers", default=64, type=_COUNT, help="How many processes charge at once.")
@click.option("--charges", default=50, type=_COUNT, help="How many charges each of them makes.")
@click.option("--import-tokens", default=100_000, type=_COUNT, help="How many tokens the part 'import' imports.")
@click.option(
    "--operations", default=1_000_000, type=_COUNT, help="How many operations the token has in the part 'histories'."
)
@click.option(
    "--plots",
    "plots_directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw the parts 'tokens' and 'threads' as SVG files in this directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def main(only: tuple[str, ...], plots_directory: Path | None, as_json: bool, **sizes: object) -> None:
    """Measure what the package costs, side by side with other ways of doing the same.

    Each table is one comparison, and its first row is the reference. The ratio is the median over the rounds. Lowest
    and highest are the extremes. Latencies are medians over the rounds.
    """
    if plots_directory is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise click.UsageError("--plots needs matplotlib: pip install -e '.[benchmarks]'")
        plots_directory.mkdir(parents=True, exist_ok=True)
    options = Options(**sizes)  # type: ignore[arg-type]
    conditions = {**_machine(), **dataclasses.asdict(options)}
    if not as_json:
        click.echo(", ".join(f"{name} {value}" for name, value in conditions.items()))
    results: list[Result] = []
    for part in PARTS:
        if only and part not in only:
            continue
        for measure in PARTS[part]:
            for result in measure(options):
                results.append(result)
                if isinstance(result, Chart) and plots_directory is not None:
                    plots.draw(result, plots_directory)
                if not as_json:
                    _print(result)
    if as_json:
        click.echo(json.dumps({"conditions": conditions, **_as_dict(results)}, indent=2))


def _machine() -> dict[str, object]:
    return {
        platform.python_implementation(): platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **{name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name.lower())},
        "machine": platform.machine(),
        "CPUs": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
    }


def _print(result: Result) -> None:
    if isinstance(result, str):
        click.echo(f"\n{result}")
    elif isinstance(result, Table):
        heading = f"{'':50}{result.unit:>20}{'ratio':>8}{'lowest':>8}{'highest':>9}"
        has_budgets = any(row.budget for row in result.rows)
        if has_budgets:
            heading += f"{'budget':>8}{'':8}"
        if result.rows[0].latencies:
            heading += "".join(f"{f'p{percentile:g} ms':>10}" for percentile in PERCENTILES)
        click.echo(f"\n{result.title}\n{heading.rstrip()}")
        for number, row in enumerate(result.rows):
            click.echo(_line(row, result.unit, is_reference=number == 0, has_budgets=has_budgets))


def _line(row: Row, unit: str, *, is_reference: bool, has_budgets: bool) -> str:
    line = f"  {row.name:48}{_value(row.value, unit):>20}"
    line += " " * 25 if is_reference else f"{row.ratio:8.3f}{row.lowest:8.3f}{row.highest:9.3f}"
    if has_budgets:
        line += f"{'' if row.budget is None else f'{row.budget:.3f}':>8}  {row.verdict:6}"
    line += "".join(f"{latency * 1e3:10.3f}" for latency in row.latencies)
    return line.rstrip()


def _value(value: float, unit: str) -> str:
    if unit != "seconds per call":
        return f"{value:,.0f}"
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e6:.3f} us"


def _as_dict(results: list[Result]) -> dict[str, object]:
    return {
        "tables": [_table_as_dict(result) for result in results if isinstance(result, Table)],
        "left_out": [result for result in results if isinstance(result, str)],
    }


def _table_as_dict(table: Table) -> dict[str, object]:
    return {
        "title": table.title,
        "unit": table.unit,
        "rows": [{**dataclasses.asdict(row), "verdict": row.verdict or None} for row in table.rows],
    }


if __name__ == "__main__":
    main()
