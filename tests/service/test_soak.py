"""Many requests over a long time leak no memory, no descriptor, and no connection.

Each test is small by default and has its full size with ``--full``: ten million requests in one process, and an hour
of gunicorn's workers. What was seen is printed (``pytest -s``).
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from client import PATH, call, environ
from processes import SPAWN
from traffic import CONNECTIONS, START_WITHIN, Request, Seen, ask_all, mix, operate, percentile, start, usage
from waiting import until
from web_servers import GUNICORN, check_log, started

from usage_middleware import SQLiteTokenStore, StoreError, UsageMiddleware
from usage_middleware.keys import strip_prefix

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc says what a process holds"),
    pytest.mark.slow,
]
MEGABYTE = 2**20
QUOTA = 10**9


class Held(NamedTuple):
    """The resources that a process holds."""

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


def descriptors(connections):
    """Return the most descriptors that SQLite has open: the database and its log for each, and one that they share."""
    return 2 * connections + 1


def report(name, value):
    """Print a measurement for the developer that runs ``pytest --full -s``."""
    print(f"{name}: {value}", flush=True)


# --- One process

THREADS = 64
FAILURES = 100  # more than a store keeps connections
NOT_A_DATABASE = b"not a database. " * 100


class KeepsKeys(SQLiteTokenStore):
    """A mutant: a cache of keys without an end."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = {}

    def get(self, key):
        self.seen[key] = token = super().get(key)
        return token


class KeepsConnections(SQLiteTokenStore):
    """A mutant: a connection for each thread, which is not closed when the thread has ended."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.of_threads = {}

    def get(self, key):
        thread = threading.current_thread()
        if thread not in self.of_threads:
            self.of_threads[thread] = sqlite3.connect(self._path, check_same_thread=False)
            self.of_threads[thread].execute("SELECT count(*) FROM tokens").fetchone()
        return super().get(key)


class KeepsFailures(SQLiteTokenStore):
    """A mutant: it keeps what went wrong."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.failures = []

    def get(self, key):
        try:
            return super().get(key)
        except StoreError as error:
            self.failures.append(error)
            raise


class Sample(NamedTuple):
    """What the process holds between two rounds."""

    requests: int  # until then
    blocks: int  # of Python's memory: each object has one or more
    connections: int
    held: Held


class Soak:
    """One process that sends requests to the middleware, in rounds that are all alike."""

    def __init__(self, store_class, folder, requests):
        logging.getLogger("usage_middleware").addHandler(logging.NullHandler())  # of the failures
        (folder / "broken.db").write_bytes(NOT_A_DATABASE)
        self.database = folder / "tokens.db"
        # No power fails here, so it need not wait for the disk.
        self.store = store_class(self.database, synchronous="OFF")
        self.impatient = store_class(self.database, timeout=0, synchronous="OFF")
        self.app = UsageMiddleware(answer, self.store)
        self.broken_app = UsageMiddleware(answer, store_class(folder / "broken.db"))
        self.latencies = folder / "latencies"
        self.keys = {self.store.create(name=f"token {n}", total_available=QUOTA)[0]: f"token {n}" for n in range(50)}
        self.disabled, token = self.store.create()
        self.store.update(token.id, enabled=False)
        self.charged = Counter()
        self.requests = requests

    def round(self, number):
        """Half of the requests one after the other, and half by threads that begin and end with it."""
        for request in itertools.islice(mix(self.keys, self.disabled, number), self.requests // 2):
            ask(self.app, request)
        barrier = threading.Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as pool, self.latencies.open("ab") as file:
            for asked in [pool.submit(self.ask_in_thread, barrier, number, thread) for thread in range(THREADS)]:
                asked.result().tofile(file)
        self.fail()
        self.store.prune(time.time() + 1)

    def ask_in_thread(self, barrier, number, thread):
        """Return the latencies in nanoseconds, of the answers that describe a token. Some charge in the middle."""
        seed = f"{number}/{thread}"
        count = self.requests // 2 // THREADS
        latencies = array("Q")
        barrier.wait()
        for index, request in enumerate(itertools.islice(mix(self.keys, self.disabled, seed), count)):
            if index == count // 2 and thread % 4 == 0:
                self.charge(random.Random(seed).choice(list(self.keys)))
            begun = time.perf_counter_ns()
            ask(self.app, request)
            if request.body.startswith('"name"'):
                latencies.append(time.perf_counter_ns() - begun)
        return latencies

    def charge(self, key):
        self.store.charge(strip_prefix(key), 1)
        with ONE_AT_A_TIME:
            self.charged[key] += 1

    def fail(self):
        key = next(iter(self.keys))
        failed = Request("GET", PATH, f"Bearer {key}", 503, "Service Unavailable")
        for _ in range(FAILURES):
            ask(self.broken_app, failed)
        with closing(sqlite3.connect(self.database, isolation_level=None)) as other, ThreadPoolExecutor() as pool:
            # Locked for a moment: a call that waits succeeds, and a call that does not wait fails.
            other.execute("BEGIN IMMEDIATE")
            charge = pool.submit(self.charge, key)
            with pytest.raises(StoreError, match="locked"):
                self.impatient.charge(strip_prefix(key), 1)
            other.execute("COMMIT")
            charge.result()
            # Each connection fails, and is closed.
            other.execute("ALTER TABLE tokens RENAME TO moved")
            for _ in range(FAILURES):
                ask(self.app, failed)
            other.execute("ALTER TABLE moved RENAME TO tokens")
            ask(self.app, usage(key, self.keys[key]))

    def sample(self, requests):
        gc.collect()
        connections = sum(isinstance(thing, sqlite3.Connection) for thing in gc.get_objects())
        return Sample(requests, sys.getallocatedblocks(), connections, held("self", self.database.parent))


ONE_AT_A_TIME = threading.Lock()


def answer(environ, start_response):
    """Return the wrapped application."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return ["{REQUEST_METHOD} [{SCRIPT_NAME}] {PATH_INFO}".format_map(environ).encode()]


def ask(app, request):
    variables = {} if request.authorization is None else {"HTTP_AUTHORIZATION": request.authorization}
    got = call(app, environ(request.method, request.path, **variables))
    assert got.status == request.status, (request, got)
    assert request.body.encode() in got.body, (request, got)


def run_soak(store_class, folder, requests, rounds):
    """Return the samples: one before the first round, and one after each."""
    soak = Soak(store_class, folder, requests // rounds)
    with soak.store, soak.impatient:
        samples = [soak.sample(0)]
        for number in range(1, rounds + 1):
            soak.round(number)
            samples.append(soak.sample(number * soak.requests))
        tokens = {token.name: token for token in soak.store.tokens()}
        for key, name in soak.keys.items():
            assert (tokens[name].total_used, tokens[name].total_granted) == (soak.charged[key], QUOTA)
    return samples


def check_that_nothing_is_left(samples):
    for sample in samples:
        assert sample.connections <= THREADS
        # SQLite keeps the descriptors of closed connections for new ones, as long as the process has any open
        # ("Posix Advisory Locking" in its os_unix.c). So these are as many as there were connections at once.
        assert sample.held.database <= descriptors(THREADS + 2)
        assert (sample.held.sockets, sample.held.others) == (samples[0].held.sockets, samples[0].held.others)
    # The first half of the rounds warms up.
    half, last = samples[len(samples) // 2], samples[-1]
    rounds = len(samples) - 1 - len(samples) // 2
    # So often or more, each kind of request, each kind of failure and a thread comes in a round. Python's free lists
    # make for some hundred more or less, however many rounds there are.
    assert last.blocks - half.blocks < rounds * THREADS
    # Memory that Python does not know of. If one of a dozen kinds of requests left 16 bytes, the smallest piece that
    # malloc gives, that would be more than a byte for each request of all. With few requests it would not show: what
    # the most connections at once have taken is more.
    if (requests := last.requests - half.requests) >= 1_000_000:
        assert last.held.rss - half.held.rss < requests


def soaked(store_class, folder, *, requests, rounds):
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(run_soak, store_class, folder, requests, rounds).result()


def test_one_process(tmp_path, full):
    size = {"requests": 10_000_000, "rounds": 125} if full else {"requests": 15_360, "rounds": 8}
    samples = soaked(SQLiteTokenStore, tmp_path, **size)
    half = len(samples) // 2
    for moment, index in (("before", 0), ("first round", 1), ("half", half), ("last", -1)):
        report(f"what it held, {moment}", samples[index])
    latencies = array("Q", (tmp_path / "latencies").read_bytes())
    for percent in (50, 99):
        report(f"latency with {THREADS} threads in ms, p{percent}", percentile(latencies, percent))
    check_that_nothing_is_left(samples)


@pytest.mark.parametrize(
    ("mutant", "found_by"),
    [
        pytest.param(KeepsKeys, "blocks", id="keys"),
        pytest.param(KeepsConnections, "connections", id="connections"),
        pytest.param(KeepsFailures, "connections", id="failures, with their connections"),
    ],
)
def test_a_store_that_keeps_something_would_be_found_out(mutant, found_by, tmp_path):
    samples = soaked(mutant, tmp_path, requests=7680, rounds=4)
    with pytest.raises(AssertionError, match=rf"\)\.{found_by}$"):
        check_that_nothing_is_left(samples)


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
STAYING = {"sync": 1, "gthread": THREADS_OF_WORKER}  # of a worker of those that are not replaced


def workers_of(process):
    """Return the workers of a process, the oldest first."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def all_workers_of(process):
    until(lambda: len(workers_of(process)) >= WORKERS)
    return workers_of(process)


class Disturbance:
    """Kills and reloads workers, and looks at those that it leaves alone."""

    def __init__(self, servers, database):
        self._servers = servers
        self._database = database
        self._numbers = random.Random(0)
        # One worker of each server that does not replace them by itself.
        self.elders = {name: all_workers_of(servers[name][0])[0] for name in STAYING}
        self.looks = {name: [] for name in STAYING}
        self.kills, self.reloads = Counter(), Counter()
        self.longest_log = 0

    def go_on(self, seconds, interval, running):
        """Look at each interval, kill at each second one, reload at each seventh. End early if anything fails."""
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
        name = self._numbers.choice([name for name in self._servers if name not in STAYING])
        self._servers[name][0].send_signal(signal.SIGHUP)
        self.reloads[name] += 1


def test_the_workers_of_gunicorn(tmp_path, full):
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
        stop, all_are_there = SPAWN.Event(), SPAWN.Barrier(CLIENTS + 2)
        with ProcessPoolExecutor(
            CLIENTS + 1, mp_context=SPAWN, initializer=start, initargs=(stop, all_are_there)
        ) as pool:
            clients = [pool.submit(ask_all, ports, keys, disabled, seed) for seed in range(CLIENTS)]
            operator = pool.submit(operate, database, ports, "operator")
            try:
                all_are_there.wait(START_WITHIN)
                disturbance.go_on(seconds, interval, [*clients, operator])
            finally:
                stop.set()
            seen = Seen()
            for client in clients:
                seen.update(client.result())
            books = operator.result()
        disturbance.look()
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

    for name, (_, port) in servers.items():
        # A process takes with it no more than the connections that there are to it.
        ends = sum(1 for of, _ in seen.answers if of == port) + disturbance.kills[name]
        assert seen.lost[port] + books.lost[port] <= ends * CONNECTIONS_OF_SERVER
    for name, looks in disturbance.looks.items():
        assert all(look.database <= descriptors(STAYING[name]) for look in looks)
        assert all(look.sockets <= 1 + 2 * CONNECTIONS_OF_SERVER for look in looks)
        # Now and then a module is loaded, from a file.
        assert looks[-1].others == min(look.others for look in looks)
        half, last = looks[len(looks) // 2], looks[-1]
        answers = seen.answers[servers[name][1], disturbance.elders[name]] // 2
        if answers >= 20_000:  # with few, it would not show
            # No object is smaller than 16 bytes. A connection that was opened meanwhile may have filled its cache
            # (sqlite.org/pragma.html#pragma_cache_size).
            opened = (last.database - half.database) // 2
            assert last.rss - half.rss < 16 * answers + opened * 2 * MEGABYTE
    check_books(database, keys, seen.charged, books)
    for log in logs.values():
        check_log(log)


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
            units = sum(operation.held for operation in store.history(token.id))
            assert units + books.archive[token.id] == token.total_used
