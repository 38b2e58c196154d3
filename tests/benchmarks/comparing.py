"""Compare ways of doing one thing, in one process and at the same time, so that what disturbs one disturbs all.

The contenders take short turns, A B C, B C A, C A B. In a round each has several turns, and their median counts, so a
turn that was disturbed does not. Each round gives a ratio, and the median of the ratios is reported.

The processor time of this thread is measured. Wall-clock time would be unfair on a busy machine: the longer a turn is,
the more likely another process interrupts it. It is used only if a call waits for the disk.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from textwrap import indent
from typing import Any, TypeAlias, TypeVar

_CALLS = 100  # in a turn: few enough for their arguments to be still in the processor's cache, as with a server
_TURNS = 20  # in a round
_WARM_UP = 5  # turns


class Contender:
    """One way of doing the thing that is measured.

    :param statement: one call, as :mod:`timeit` takes it. Its ``item`` is a new one for each call.
    :param make_item: makes an item, outside of the time that is measured.
    :param budget: the most that a call may cost, as a multiple of the reference.
    :param clock: what measures; :func:`time.perf_counter` if a call waits for the disk.
    :param calls: how many calls a turn has.
    :param each: whether the statement is for one ``item``. If not, it is for all ``items`` of a turn.
    :param names: the other names in the statement.
    """

    def __init__(
        self,
        name: str,
        statement: str,
        make_item: Callable[[], Any],
        *,
        budget: float | None = None,
        clock: Callable[[], float] = time.thread_time,
        calls: int = _CALLS,
        each: bool = True,
        **names: Any,
    ) -> None:
        self.name = name
        self.budget = budget
        self._calls = calls
        # timeit compiles the loop for each contender separately. That matters: since Python 3.11 the bytecode of a call
        # is specialised for what it calls, and a loop that calls several contenders would be slow for all of them.
        # timeit also keeps the garbage collector from running meanwhile.
        self._timer = timeit.Timer(
            "for item in items:\n" + indent(statement, "    ") if each else statement,
            "items = [make_item() for _ in range(calls)]",
            timer=clock,
            globals={**names, "make_item": make_item, "calls": calls},
        )

    def turn(self) -> float:
        """Take one turn, and return the seconds that a call took on average."""
        return self._timer.timeit(1) / self._calls


PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class Row:
    """The measurements of one contender."""

    name: str
    value: float  # in the table's unit
    ratio: float = 1.0  # to the reference
    lowest: float = 1.0
    highest: float = 1.0
    budget: float | None = None
    is_least: bool = False  # whether the budget is the least that the ratio must reach, and not the most
    latencies: Sequence[float] = ()  # seconds, at the PERCENTILES

    @property
    def verdict(self) -> str:
        if self.budget is None:
            return ""
        return "met" if (self.ratio >= self.budget if self.is_least else self.ratio <= self.budget) else "missed"


@dataclass(frozen=True)
class Table:
    """One comparison. The first row is the reference."""

    title: str
    rows: Sequence[Row]
    unit: str = "seconds per call"


@dataclass(frozen=True)
class Chart:
    """A chart with a line for each name."""

    file_name: str
    title: str
    x_label: str
    y_label: str
    x_base: int  # of its logarithmic axis
    lines: Mapping[str, Sequence[tuple[float, float]]]


Result: TypeAlias = Table | Chart | str
"""What a measurement yields. A text is printed as it is, such as a line that says what was left out."""


def compare(
    title: str,
    reference: Contender,
    *others: Contender,
    rounds: int,
    baseline: Contender | None = None,
) -> Table:
    """Measure ``others`` against ``reference``.

    :param baseline: what all of them do besides the thing that is measured. Its cost is subtracted from theirs.
    """
    compared = [reference, *others]
    costs = measure(compared if baseline is None else [baseline, *compared], rounds=rounds)
    if baseline is not None:
        for contender in compared:
            costs[contender] = [cost - base for cost, base in zip(costs[contender], costs[baseline], strict=True)]
    return table_of(title, [(contender.name, costs[contender], contender.budget) for contender in compared])


def measure(contenders: Sequence[Contender], *, rounds: int) -> dict[Contender, list[float]]:
    """Return the seconds of a call of each contender, round by round."""
    _round(contenders, turns=_WARM_UP)
    measured = [_round(contenders, turns=_TURNS) for _ in range(rounds)]
    return {contender: [seconds[contender] for seconds in measured] for contender in contenders}


def table_of(
    title: str,
    measured: Sequence[tuple[str, Sequence[float], float | None]],
    *,
    unit: str = "seconds per call",
    is_least: bool = False,
    latencies: Sequence[Sequence[float]] | None = None,
) -> Table:
    """Return a table of what was measured.

    :param measured: for each row its name, its value in every round, and its budget. The first row is the reference.
    """
    _, reference, _ = measured[0]
    rows = []
    for number, (name, values, budget) in enumerate(measured):
        ratios = [value / reference_value for value, reference_value in zip(values, reference, strict=True)]
        spread = (median(ratios), min(ratios), max(ratios))
        rows.append(Row(name, median(values), *spread, budget, is_least, latencies[number] if latencies else ()))
    return Table(title, rows, unit)


def _round(contenders: Sequence[Contender], *, turns: int) -> dict[Contender, float]:
    costs: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for number in range(turns):
        for contender in in_turn(contenders, number):
            costs[contender].append(contender.turn())
    return {contender: median(seconds) for contender, seconds in costs.items()}


_Item = TypeVar("_Item")


def in_turn(items: Sequence[_Item], number: int) -> Sequence[_Item]:
    """Return the items, rotated so that another one is first in each round."""
    first = number % len(items)
    return (*items[first:], *items[:first])
