"""Many requests, and much time, leave nothing behind: no memory, no descriptor, no connection.

Each test is small by default and has its full size with ``--full``: ten million requests in one process, and an hour
of gunicorn's workers. What was seen is printed (``pytest -s``).
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from test_hammer import SPAWN
from test_servers import GUNICORN, check_log, started
from traffic import CONNECTIONS, Seen, ask_all, operate, percentile, share_stop

from usage_middleware import SQLiteTokenStore
from usage_middleware.tokens import strip_prefix

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc says what a process holds")

MEGABYTE = 2**20
QUOTA = 10**9


class Held(NamedTuple):
    """What a process holds."""

    rss: int  # bytes
    database: int  # descriptors of the database's files
    sockets: int
    others: int  # descriptors of other files


def held(pid, database):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    kinds = Counter()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # it was closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            is_database = target.startswith(str(database))
            kinds["database" if is_database else "sockets" if target.startswith("socket:") else "others"] += 1
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), kinds["database"], kinds["sockets"], kinds["others"])


class Report:
    """Prints what was seen, and puts it among the test's properties."""

    def __init__(self, record_property):
        self._record_property = record_property

    def __call__(self, name, value):
        print(f"{name}: {value}", flush=True)
        self._record_property(name, str(value))


# --- The workers of gunicorn

WORKERS = 2
THREADS_OF_WORKER = 8
CLIENTS = 2
CONNECTIONS_OF_SERVER = CLIENTS * CONNECTIONS + 1  # that of the operator
THREADED = ["--worker-class=gthread", f"--threads={THREADS_OF_WORKER}", "--keep-alive=75"]
REPLACED = ["--max-requests={lives}", "--max-requests-jitter={lives}"]
SETUPS = {
    "sync": ["--preload"],
    "gthread": [*THREADED, "--preload"],
    "sync, replaced": REPLACED,
    "gthread, replaced": [*THREADED, *REPLACED],
}
THREADS = {"sync": 1, "gthread": THREADS_OF_WORKER}  # of a worker of those that are not replaced


def workers_of(process):
    """The oldest first."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def all_workers_of(process):
    deadline = time.monotonic() + 30
    while len(workers := workers_of(process)) < WORKERS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return workers


class Disturbance:
    """Kills and reloads workers, and looks at those that it leaves alone."""

    def __init__(self, servers, database):
        self._servers = servers
        self._database = database
        self._numbers = random.Random(0)
        # One worker of each server that does not replace them by itself.
        self.elders = {name: all_workers_of(servers[name][0])[0] for name in THREADS}
        self.looks = {name: [] for name in THREADS}
        self.kills, self.reloads = Counter(), Counter()
        self.longest_log = 0

    def go_on(self, seconds, interval, running):
        """Looks at each interval, kills at each second one, reloads at each seventh; ends early if anything fails."""
        until = time.monotonic() + seconds
        for number in itertools.count(1):
            done, _ = wait(running, interval, FIRST_EXCEPTION)
            if done or time.monotonic() >= until:
                break
            self.look()
            if number % 2 == 0:
                self.kill()
            if number % 7 == 0:
                self.reload()

    def look(self):
        for name, pid in self.elders.items():
            self.looks[name].append(held(pid, self._database))
        with suppress(FileNotFoundError):
            self.longest_log = max(self.longest_log, os.stat(f"{self._database}-wal").st_size)

    def kill(self):
        name = self._numbers.choice(list(self._servers))
        process, _ = self._servers[name]
        others = [pid for pid in workers_of(process) if pid not in self.elders.values()]
        if others:
            with suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(self._numbers.choice(others), signal.SIGKILL)
                self.kills[name] += 1

    def reload(self):
        name = self._numbers.choice([name for name in self._servers if name not in THREADS])
        self._servers[name][0].send_signal(signal.SIGHUP)
        self.reloads[name] += 1


def test_the_workers_of_gunicorn(tmp_path, full, record_property):
    seconds, interval, lives = (3600, 10, 1000) if full else (6, 0.4, 50)
    database = tmp_path / "tokens.db"
    with SQLiteTokenStore(database) as store:
        keys = {store.create(name=f"token {n}", total_available=QUOTA)[0]: f"token {n}" for n in range(50)}
        disabled, token = store.create()
        store.update(token.id, enabled=False)
    logs = {name: tmp_path / f"{name}.log" for name in SETUPS}
    with ExitStack() as stack:
        servers = {}
        for name, options in SETUPS.items():
            command = [*GUNICORN, f"--workers={WORKERS}", *(o.replace("{lives}", str(lives)) for o in options)]
            servers[name] = stack.enter_context(started([*command, "served:app"], database, logs[name]))
        disturbance = Disturbance(servers, database)
        ports = [port for _, port in servers.values()]
        stop = SPAWN.Event()
        with ProcessPoolExecutor(CLIENTS + 1, mp_context=SPAWN, initializer=share_stop, initargs=(stop,)) as pool:
            clients = [pool.submit(ask_all, ports, keys, disabled, seed) for seed in range(CLIENTS)]
            operator = pool.submit(operate, database, ports, "operator")
            try:
                disturbance.go_on(seconds, interval, [*clients, operator])
            finally:
                stop.set()
            seen = Seen()
            for client in clients:
                seen.update(client.result())
            books = operator.result()
        disturbance.look()
    report = Report(record_property)
    report("answers", seen.answers.total())
    report("answers by status", dict(seen.statuses))
    report("charges", seen.charged.total())
    report("latency in ms, p50 and p99", [percentile(seen.latencies, percent) for percent in (50, 99)])
    report("what the operator did", dict(books.steps))
    report("longest write-ahead log in bytes", disturbance.longest_log)
    for name, (_, port) in servers.items():
        processes = sum(1 for of, _ in seen.answers if of == port)
        lost, kills = seen.lost[port] + books.lost[port], disturbance.kills[name]
        report(f"{name}: processes that answered", processes)
        report(f"{name}: kills and reloads", (kills, disturbance.reloads[name]))
        report(f"{name}: connections lost", lost)
    for name, looks in disturbance.looks.items():
        report(f"{name}: answers of the worker that stays", seen.answers[servers[name][1], disturbance.elders[name]])
        for moment, index in (
            ("first", 0),
            ("first quarter", len(looks) // 4),
            ("half", len(looks) // 2),
            ("last", -1),
        ):
            report(f"{name}: what it held, {moment}", looks[index])
        report(f"{name}: the most it held", Held(*map(max, zip(*looks, strict=True))))

    for log in logs.values():
        check_log(log)
    for name, (_, port) in servers.items():
        # A process takes with it no more than the connections that there are to it.
        ends = sum(1 for of, _ in seen.answers if of == port) + disturbance.kills[name]
        assert seen.lost[port] + books.lost[port] <= ends * CONNECTIONS_OF_SERVER
    for name, looks in disturbance.looks.items():
        assert all(look.database <= descriptors(THREADS[name]) for look in looks)
        assert all(look.sockets <= 1 + 2 * CONNECTIONS_OF_SERVER for look in looks)
        assert len({look.others for look in looks}) == 1
        half, last = looks[len(looks) // 2], looks[-1]
        # In the hour, that is 16 bytes, the smallest object, for each request of its second half. A connection that
        # was opened meanwhile may have filled its cache (sqlite.org/pragma.html#pragma_cache_size).
        opened = (last.database - half.database) // 2
        assert last.rss - half.rss < MEGABYTE + opened * 2 * MEGABYTE
    check_books(database, keys, seen.charged, books)


def descriptors(connections):
    """The most that SQLite has open for so many: the database and its log for each, and what they share."""
    return 2 * connections + 1


def check_books(database, keys, charged, books):
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    totals = {account.id: (account.available, account.used) for account in books.accounts}
    with SQLiteTokenStore(database) as store:
        for key in keys:
            totals[store.get(strip_prefix(key)).id] = (QUOTA - charged[key], charged[key])
        tokens = [token for token in store.tokens() if token.enabled]
        assert {token.id: (token.total_available, token.total_used) for token in tokens} == totals
        for token in tokens:
            held = sum(operation.held for operation in store.history(token.id))
            assert held + books.archive[token.id] == token.total_used
