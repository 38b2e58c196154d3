"""Compares ways of doing one thing, in one process and at the same time, so that what disturbs one disturbs all.

The contenders take short turns, A B C, B C A, C A B. A round is some of these for each, of which the median counts:
a turn that something disturbed does not. Each round gives a ratio of its own, and the median of those is reported.

What is measured is the processor time of this thread. The clock on the wall would be unfair on a busy machine: the
longer a turn is, the likelier another process comes in between. Only where a call waits for the disk it has to be that.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from textwrap import indent
from typing import Any

_CALLS = 100  # in a turn: few enough for their arguments to be in the processor's cache still, as a server's would be
_TURNS = 20  # in a round


class Contender:
    """One way of doing the thing that is measured.

    :param statement: what one call is, as :mod:`timeit` takes it. ``item`` in it is a fresh one for each call.
    :param make_item: makes an item, outside of the time that is measured.
    :param budget: the most that it may cost, as a multiple of the reference.
    :param clock: what is measured; :func:`time.perf_counter` where a call waits for the disk.
    :param calls: how many a turn has.
    :param names: what else the statement names.
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
        **names: Any,
    ) -> None:
        self.name = name
        self.budget = budget
        self._calls = calls
        # timeit compiles the loop for each contender anew. That matters: since Python 3.11 the code of a call is
        # specialised for what it calls, and a loop that calls now this, now that would be slow for all of them.
        # It also keeps the garbage collector from running meanwhile.
        self._timer = timeit.Timer(
            "for item in items:\n" + indent(statement, "    "),
            "items = [make_item() for _ in range(calls)]",
            timer=clock,
            globals={**names, "make_item": make_item, "calls": calls},
        )

    def turn(self) -> float:
        """The seconds that a call took, on the average of one turn."""
        return self._timer.timeit(1) / self._calls


@dataclass(frozen=True)
class Row:
    """What was measured of one contender."""

    name: str
    seconds: float  # of a call
    ratio: float = 1.0  # to the reference
    lowest: float = 1.0
    highest: float = 1.0
    budget: float | None = None

    @property
    def verdict(self) -> str:
        if self.budget is None:
            return ""
        return "met" if self.ratio <= self.budget else "missed"


@dataclass(frozen=True)
class Table:
    """One comparison. The first row is the reference."""

    title: str
    rows: Sequence[Row]


def compare(
    title: str,
    reference: Contender,
    *others: Contender,
    rounds: int,
    baseline: Contender | None = None,
) -> Table:
    """Measures ``others`` against ``reference``.

    :param baseline: what all of them do besides the thing that is measured. Its cost is taken off theirs.
    """
    compared = [reference, *others]
    contenders = compared if baseline is None else [baseline, *compared]
    _round(contenders)  # to warm up
    costs: dict[Contender, list[float]] = {contender: [] for contender in compared}
    for _ in range(rounds):
        seconds = _round(contenders)
        for contender in compared:
            costs[contender].append(seconds[contender] - (0.0 if baseline is None else seconds[baseline]))
    rows = [Row(reference.name, median(costs[reference]))]
    for contender in others:
        ratios = [
            cost / reference_cost for cost, reference_cost in zip(costs[contender], costs[reference], strict=True)
        ]
        rows.append(
            Row(
                contender.name,
                median(costs[contender]),
                median(ratios),
                min(ratios),
                max(ratios),
                contender.budget,
            )
        )
    return Table(title, rows)


def _round(contenders: Sequence[Contender]) -> dict[Contender, float]:
    turns: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for number in range(_TURNS):
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            turns[contender].append(contender.turn())
    return {contender: median(seconds) for contender, seconds in turns.items()}
