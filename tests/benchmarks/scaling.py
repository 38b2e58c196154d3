"""What a usage request costs with more and more tokens, and with more and more threads at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from calling import answer_of, by_hand, check_same_answer, usage_environ, usage_request
from comparing import PERCENTILES, Chart, Contender, Result, Row, Table, in_turn, measure, table_of
from peers import BARE_WSGI, FLASK, FLASK_SQLALCHEMY, OURS, hand_written, present
from tokens_database import filled_database, key, random_keys

from usage_middleware import MemoryTokenStore, UsageMiddleware

_FEWEST_TOKENS = 1_000
_BY_HAND = "by hand: one look-up, one json.dumps"
_PAGE_CACHE = 2_000 * 1024  # bytes; sqlite.org/pragma.html#pragma_cache_size
_TURN = 0.25  # seconds in which threads ask
_IN_MEMORY = 10_000  # tokens


def by_number_of_tokens(most: int, rounds: int) -> Iterator[Result]:
    """Measure a usage request with 1,000 tokens, ten times as many, and so on."""
    counts = [_FEWEST_TOKENS]
    while counts[-1] < most:
        counts.append(min(counts[-1] * 10, most))
    peers, lines = present((OURS, FLASK, FLASK_SQLALCHEMY))
    yield from lines
    with ExitStack() as stack:
        paths = {count: stack.enter_context(filled_database(count)) for count in counts}
        contenders: dict[tuple[str, int], Contender] = {}
        for count, path in paths.items():
            make_key = random_keys(count)
            answer = hand_written(stack.enter_context(closing(sqlite3.connect(path, isolation_level=None))))
            contenders[_BY_HAND, count] = by_hand(answer, make_key)
            for peer in peers:
                app = stack.enter_context(peer.make(path))
                check_same_answer(answer, app)
                contenders[peer.name, count] = usage_request(peer.name, app, make_key, calls=peer.calls)
        costs = measure(list(contenders.values()), rounds=rounds)
        names = [_BY_HAND, *(peer.name for peer in peers)]
        for count in counts:
            yield table_of(
                f"A usage request with {count:,} tokens",
                [(name, costs[contenders[name, count]], None) for name in names],
            )
        for name in names:
            budget = 1.5 if name == OURS.name else None
            yield table_of(
                f"{name}: what more tokens cost",
                [
                    (f"{count:,} tokens", costs[contenders[name, count]], budget if count == most else None)
                    for count in counts
                ],
            )
        yield Chart(
            "tokens",
            "A usage request by the number of tokens",
            "tokens in the database",
            "processor time of a request (µs)",
            10,
            {name: [(count, median(costs[contenders[name, count]]) * 1e6) for count in counts] for name in names},
        )
        yield from _memory(paths, most // 10)


def _memory(paths: dict[int, Path], requests: int) -> Iterator[Result]:
    """Measure how much a process grows while it asks for random tokens. Each number of tokens has its own process."""
    if not Path("/proc/self/statm").exists():
        yield "What a process grows by: left out, this system has no /proc/self/statm"
        return
    rows = [Row("the page cache that SQLite has by default", _PAGE_CACHE)]
    for count in (min(paths), max(paths)):
        command = [sys.executable, Path(__file__).with_name("memory.py"), paths[count], str(count), str(requests)]
        grown = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        ratio = grown / _PAGE_CACHE
        budget = 1.5 if count == max(paths) else None
        rows.append(Row(f"UsageMiddleware, {count:,} tokens", grown, ratio, ratio, ratio, budget))
    yield Table(f"By how much a process grows in {requests:,} requests for random tokens", rows, "bytes")


@dataclass(frozen=True)
class Load:
    """The result of one turn."""

    per_second: float
    latencies: Sequence[float]  # seconds, at the PERCENTILES
    processor_time: float  # seconds for each request


def by_number_of_threads(tokens: int, most: int, rounds: int) -> Iterator[Result]:
    """Measure usage requests of 1, 2, 4, ... threads of one process, which ask as fast as they can."""
    numbers = [1]
    while numbers[-1] < most:
        numbers.append(min(numbers[-1] * 2, most))
    peers, lines = present((BARE_WSGI, OURS, FLASK, FLASK_SQLALCHEMY))
    yield from lines
    with filled_database(tokens) as path, ExitStack() as stack:
        apps: dict[str, Any] = {peer.name: stack.enter_context(peer.make(path)) for peer in peers}
        make_key = random_keys(tokens)
        keys = [make_key() for _ in range(10_000)]
        memory = stack.enter_context(MemoryTokenStore())
        for number in range(min(tokens, _IN_MEMORY)):
            memory.create(key=key(number), name=f"Token {number}", total_available=1_000_000)
        in_memory = "UsageMiddleware, MemoryTokenStore"
        apps[in_memory] = UsageMiddleware(apps[OURS.name], memory)
        loads: dict[tuple[str, int], list[Load]] = {(name, number): [] for name in apps for number in numbers}
        known = [key(number) for number in range(min(tokens, _IN_MEMORY))]
        for turn in range(rounds):
            for number in numbers:
                for name in in_turn(list(apps), turn):
                    asked = known if name == in_memory else keys
                    loads[name, number].append(_ask_at_once(apps[name], asked, number))
    for number in numbers:
        yield load_table(
            f"Usage requests in one process, {_threads(number)} at once",
            {name: loads[name, number] for name in apps},
        )
    for name in apps:
        yield processor_time_table(
            f"{name}: processor time of a request, when threads ask at once",
            {_threads(number): loads[name, number] for number in numbers},
        )
    for file_name, label, value in (
        ("threads", "requests per second", lambda load: load.per_second),
        ("threads-latency", "99th percentile of the latency (ms)", lambda load: load.latencies[2] * 1e3),
    ):
        yield Chart(
            file_name,
            "Usage requests by the number of threads that ask at once",
            "threads of one process",
            label,
            2,
            {name: [(number, median(map(value, loads[name, number]))) for number in numbers] for name in apps},
        )


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def load_table(title: str, loads: dict[str, list[Load]]) -> Table:
    """Return a table of requests per second, as ratios to the first, and of the medians of the latencies."""
    return table_of(
        title,
        [(name, [load.per_second for load in taken], None) for name, taken in loads.items()],
        unit="requests per second",
        latencies=[
            [median(load.latencies[place] for load in taken) for place in range(len(PERCENTILES))]
            for taken in loads.values()
        ],
    )


def processor_time_table(title: str, loads: dict[str, list[Load]]) -> Table:
    """Return a table of processor time. On a busy machine it is more reliable than the clock."""
    return table_of(title, [(name, [load.processor_time for load in taken], None) for name, taken in loads.items()])


def _ask_at_once(app: Any, keys: Sequence[str], threads: int) -> Load:
    """Let that many threads ask, each of them one request after the other."""
    latencies: list[list[float]] = [[] for _ in range(threads)]
    environs = [usage_environ(key) for key in keys]
    clocks: list[float] = []
    # The last thread that is ready reads the clocks, before any thread continues.
    start = threading.Barrier(threads, lambda: clocks.extend((time.perf_counter(), time.process_time())))

    def ask(number: int) -> None:
        taken = latencies[number]
        place = number * 101
        answer_of(app, environs[place % len(environs)].copy())  # so that what a thread keeps for itself is made before
        start.wait()
        end = clocks[0] + _TURN
        begun = 0.0
        while begun < end:
            place += 1
            environ = environs[place % len(environs)].copy()
            begun = time.perf_counter()
            answer_of(app, environ)
            taken.append(time.perf_counter() - begun)

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    seconds, processor_time = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    taken = sorted(latency for of_thread in latencies for latency in of_thread)
    return Load(
        len(taken) / seconds,
        [taken[int(len(taken) * percentile / 100)] for percentile in PERCENTILES],
        processor_time / len(taken),
    )
