"""Threads of one process that charge at once, as fast as they can."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from comparing import PERCENTILES, Row, Table, table_of

from usage_middleware import QuotaStore

MODEL = "gpt-4o"
_TURN = 1.0  # seconds in which threads charge


@dataclass(frozen=True)
class Charges:
    """The result of one turn."""

    per_second: float
    latencies: Sequence[float]  # seconds, in ascending order
    counts: Sequence[int]  # by thread


def make_keys(store: QuotaStore, count: int) -> list[str]:
    """Create tokens that are never used up, with a limit for the model, and return their keys."""
    return [store.create(total_available=2**62, model_limits={MODEL: 2**62})[0] for _ in range(count)]


def charge_at_once(store: QuotaStore, keys: Sequence[Sequence[str]], *, seconds: float = _TURN) -> Charges:
    """Charge for some seconds, with a model and an idempotency key, in a thread for each sequence of keys.

    Each charge takes one of the thread's keys at random.
    """
    latencies: list[list[float]] = [[] for _ in keys]
    failures: list[Exception] = []
    begun: list[float] = []
    # The last thread that is ready reads the clock, before any thread continues.
    start = threading.Barrier(len(keys), lambda: begun.append(time.perf_counter()))

    def charge(taken: list[float], own_keys: Sequence[str]) -> None:
        numbers = random.Random(0)
        start.wait()
        now = begun[0]
        while now < begun[0] + seconds:
            key, operation = numbers.choice(own_keys), uuid.uuid4().hex
            before = time.perf_counter()
            store.charge(key, 1, model=MODEL, idempotency_key=operation)
            now = time.perf_counter()
            taken.append(now - before)

    def run(taken: list[float], own_keys: Sequence[str]) -> None:
        try:
            charge(taken, own_keys)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(latencies, keys, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken_seconds = time.perf_counter() - begun[0]
    if failures:
        raise failures[0]
    counts = [len(taken) for taken in latencies]
    return Charges(sum(counts) / taken_seconds, sorted(latency for taken in latencies for latency in taken), counts)


def charges_table(title: str, charges: dict[str, list[Charges]], least: dict[str, float]) -> Table:
    """Return a table of charges per second, as ratios to the first, and of the medians of the latencies.

    :param least: the budgets. Each is the least that a ratio must reach.
    """
    return table_of(
        title,
        [(name, [each.per_second for each in taken], least.get(name)) for name, taken in charges.items()],
        unit="charges per second",
        is_least=True,
        latencies=[
            [median(_at(each.latencies, percentile) for each in taken) for percentile in PERCENTILES]
            for taken in charges.values()
        ],
    )


def shares_table(title: str, charges: dict[str, list[Charges]]) -> Table:
    """Return how many charges the slowest and the fastest thread made, in the round that was furthest from the mean."""
    rows = [Row("the mean of its threads", 100.0)]
    for name, taken in charges.items():
        for which, extreme in (("fewest", min), ("most", max)):
            ratios = [extreme(each.counts) * len(each.counts) / sum(each.counts) for each in taken]
            furthest = extreme(ratios)
            rows.append(Row(f"{name}: the {which}", furthest * 100, furthest, min(ratios), max(ratios)))
    return Table(title, rows, "% of the mean")


def _at(ascending: Sequence[float], percentile: float) -> float:
    return ascending[int(len(ascending) * percentile / 100)]
