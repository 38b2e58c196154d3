"""What a crash or a failing disk does to the ledger: a call is whole, or it never was.

Writers to every store are killed, and the servers of those that have one. Of a :class:`SQLiteTokenStore`, the
write-ahead log is torn, every statement fails once, and the disk is full. Each test is small by default and has its
full size with ``--full``.
"""

import functools
import itertools
import multiprocessing
import random
import resource
import secrets
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import crash_writer
import pytest

import usage_middleware
from usage_middleware import QuotaExceeded, SQLiteTokenStore, StoreError
from usage_middleware.keys import strip_prefix

NOW = 1_800_000_000.0
AN_HOUR = 3600
A_LOT = 10**12


def content(path):
    """The rows of each table that has any, of a database that is sound and that nobody has locked."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> '_sqlite_migrations'"
        ).fetchall()
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for (table,) in tables}
        return {table: rows[table] for table in rows if rows[table]}


def open_store(path, *, now=NOW, synchronous="OFF"):
    """A store whose clock stands still, and which waits for nobody. No power fails here, so it need not wait for the
    disk either."""
    store = SQLiteTokenStore(path, timeout=0, synchronous=synchronous)
    store._now = lambda: now
    return store


# --- Writers that are killed


class Entry(NamedTuple):
    """What is comparable of an operation."""

    kind: str
    amount: int
    model: str | None
    held: int
    final_amount: int | None
    refund_of: str | None = None


def entry(operation):
    return Entry(*(getattr(operation, field) for field in Entry._fields))


def outcome(steps):
    """The operations that these calls leave, by id."""
    left = {}
    for method, operation_id, amount, model, refund_of in steps:
        if method == "charge":
            left[operation_id] = Entry("charge", amount, model, amount, amount)
        elif method == "reserve":
            left[operation_id] = Entry("reserve", amount, model, amount, None)
        elif method == "settle":
            left[operation_id] = left[operation_id]._replace(held=amount, final_amount=amount)
        else:
            charge = left[refund_of]
            left[refund_of] = charge._replace(held=charge.held - amount)
            left[operation_id] = Entry("refund", amount, charge.model, 0, amount, refund_of)
    return left


def wait_until_nothing_runs(store, token_id):
    """A server may learn of a client's death, and end its transaction, a moment after it: a transaction that has the
    token's lock is the last."""
    store._transact(lambda transaction: transaction.load(token_id))


def first_steps(life, count):
    return itertools.islice(crash_writer.steps(life), count)


def kill_writers(text, key, lanes, lives):
    """Kills writers one after the other, in several lanes at once. Returns how many calls of each have returned."""
    command = [sys.executable, "-W", "error", crash_writer.__file__, text, key]
    processes = [
        subprocess.Popen([*command, str(lane), str(lives)], stdout=subprocess.PIPE, text=True) for lane in range(lanes)
    ]
    try:
        reports = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * lanes
    return {life: int(returned) for report in reports for life, returned in map(str.split, report.splitlines())}


@pytest.mark.parametrize(
    ("lanes", "lives", "all_lives"),
    [
        # The next one finds a database that nobody has open, and recovers it.
        pytest.param(1, 10, 500, id="one at a time"),
        # The others go on.
        pytest.param(3, 4, 170, id="three at a time"),
    ],
)
def test_a_writer_that_is_killed(store_text, full, lanes, lives, all_lives):
    is_sqlite = "://" not in store_text
    with usage_middleware.open_store(store_text) as store:
        key, token = store.create(total_available=A_LOT, model_limits={"gpt-4o": A_LOT, "gpt-4o-mini": True})
    key = strip_prefix(key)
    returned = kill_writers(store_text, key, lanes, all_lives if full else lives)
    assert len(returned) == lanes * (all_lives if full else lives)

    def read():
        """The history of each life, once it agrees with the totals."""
        operations = list(store.history(token.id))
        token_now = store.find(token.id)
        held = sum(operation.held for operation in operations)
        assert (token_now.total_used, token_now.total_available) == (held, A_LOT - held)
        models = Counter()
        for operation in operations:
            models[operation.model] += operation.held
        del models[None]
        assert Counter(store.model_usage(token.id)) == models
        lives = defaultdict(dict)
        for operation in operations:
            lives[operation.id.split("/")[0]][operation.id] = entry(operation)
        assert len(operations) == sum(map(len, lives.values()))
        return lives

    if is_sqlite:
        content(store_text)
    with usage_middleware.open_store(store_text) as store:
        wait_until_nothing_runs(store, token.id)
        found = read()
        assert found.keys() == returned.keys()
        in_flight = 0
        for life, count in returned.items():
            # The one call that had not returned was made, or was not.
            assert found[life] in (outcome(first_steps(life, count)), outcome(first_steps(life, count + 1)))
            in_flight += found[life] != outcome(first_steps(life, count))
        print(f"{len(returned)} killed, {sum(returned.values())} calls returned, {in_flight} made and not returned")

        for life, count in returned.items():
            crash_writer.take(next(itertools.islice(crash_writer.steps(life), count, None)), store, key)
        assert read() == {life: outcome(first_steps(life, count + 1)) for life, count in returned.items()}


def charge_until_acknowledged(store, key, name, done):
    """Charges again and again, and repeats each charge until it returns. Returns how many did, and how many were
    repeated."""
    number = repeated = 0
    while not done.is_set():
        while True:
            try:
                store.charge(key, 1, model="gpt-4o", operation_id=f"{name}/{number}")
                break
            except StoreError:
                repeated += 1
                time.sleep(0.01)
        number += 1
    return number, repeated


def test_a_server_that_is_killed(disposable_server, full):
    kills = 50 if full else 3
    done = threading.Event()
    with (
        usage_middleware.open_store(disposable_server.create_database()) as store,
        ThreadPoolExecutor(4) as threads,
    ):
        key, token = store.create(total_available=A_LOT, model_limits={"gpt-4o": A_LOT})
        writers = [threads.submit(charge_until_acknowledged, store, strip_prefix(key), name, done) for name in range(4)]
        try:
            for kill in range(kills):
                used = store.find(token.id).total_used
                while store.find(token.id).total_used < used + 20:
                    assert not any(writer.done() for writer in writers)
                time.sleep(random.Random(kill).uniform(0, 0.05))
                disposable_server.kill()
                disposable_server.start()
        finally:
            done.set()
        counts = [writer.result(60) for writer in writers]
        expected = [f"{name}/{number}" for name, (count, _) in enumerate(counts) for number in range(count)]
        assert sorted(operation.id for operation in store.history(token.id)) == sorted(expected)
        token = store.find(token.id)
        assert (token.total_used, token.total_available) == (len(expected), A_LOT - len(expected))
        assert store.model_usage(token.id) == {"gpt-4o": len(expected)}
        assert all(repeated for _, repeated in counts)
        print(f"{kills} kills, {len(expected)} charges, {sum(repeated for _, repeated in counts)} repeated")


# --- A log that ends anywhere


class Recording(NamedTuple):
    """A database as it was when its log began, the whole log, and what the ledger was after each transaction in it."""

    database: bytes
    log: bytes
    earlier_log: bytes  # which the log has overwritten in part
    contents: list
    commits: list  # where in the log the transactions end; the first of the contents was there before them


def some_of_everything(store, rounds):
    """Makes one call after the other."""
    for number in rounds:
        key, token = store.create(total_available=1000, model_limits={"gpt-4o": 500, "free": True})
        key = strip_prefix(key)
        yield
        store.charge(key, 100, model="gpt-4o", operation_id=f"charge {number}")
        yield
        store.reserve(key, 200, model="gpt-4o", operation_id=f"reserve {number}")
        yield
        store.reserve(key, 300, model="free", operation_id=f"lapses {number}", expires_in=1e-9)
        yield
        store.refund(f"charge {number}", 40)
        yield
        # It takes back what has lapsed.
        store.charge(key, 700)
        yield
        store.settle(f"reserve {number}", 250)
        yield
        store.grant(token.id, 50)
        yield
        store.update(token.id, name=f"Token {number}", enabled=False)
        yield
        store.rotate(token.id)
        yield
        store.settle(f"lapses {number}", 10)
        yield
        if number % 2:
            store.delete(token.id)
            yield


def copy(path):
    """The bytes of a file that is in use. Another process reads it: closing it here would give up SQLite's locks
    (sqlite.org/howtocorrupt.html, section 2.2)."""
    return subprocess.run(["cat", path], stdout=subprocess.PIPE, check=True).stdout


def frame_size(log):
    """Of a frame, its header included (sqlite.org/fileformat2.html, section 4.1)."""
    return int.from_bytes(log[8:12], "big") + 24


def ends_of_commits(log):
    """Where frames end that are the last of a transaction, and no remains of an earlier log."""
    salt = log[16:24]
    for start in range(32, len(log), frame_size(log)):
        _, pages, of_log = struct.unpack_from(">II8s", log, start)
        if pages and of_log == salt:
            yield start + frame_size(log)


def record(path, *, earlier):
    log_path = f"{path}-wal"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection, open_store(path) as store:
        store.get("key")
        earlier_log = b""
        if earlier:
            for _ in some_of_everything(store, range(-6, 0)):
                pass
            assert connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
            earlier_log = copy(log_path)
        database = copy(path)
        contents = [content(path)]
        contents += [content(path) for _ in some_of_everything(store, range(6))]
        log = copy(log_path)
        assert copy(path) == database
    commits = list(ends_of_commits(log))
    # The tables were made in a transaction that is in the log, too, where there was no checkpoint after it.
    if not earlier:
        del commits[0]
    assert len(commits) == len(contents) - 1
    return Recording(database, log, earlier_log, contents, commits)


@pytest.mark.parametrize(
    ("earlier", "remains"),
    [
        pytest.param(False, lambda recording, end: b"", id="nothing"),
        pytest.param(False, lambda recording, end: bytes(len(recording.log) - end), id="zeros"),
        pytest.param(False, lambda recording, end: random.Random(end).randbytes(len(recording.log) - end), id="noise"),
        pytest.param(True, lambda recording, end: recording.earlier_log[end:], id="an earlier log"),
    ],
)
def test_a_log_of_which_only_the_beginning_was_written(tmp_path, full, earlier, remains):
    recording = record(tmp_path / "recorded.db", earlier=earlier)
    size = len(recording.log)
    places = 10_000 if full else 100
    ends = [size * n // places for n in range(places + 1)]
    boundaries = [end + near for end in range(32, size, frame_size(recording.log)) for near in (-1, 0, 1)]
    ends += boundaries if full else random.Random(0).sample(boundaries, 25)
    path = tmp_path / "tokens.db"
    for end in ends:
        log = recording.log[:end] + remains(recording, end)
        path.write_bytes(recording.database)
        Path(f"{path}-wal").write_bytes(log)
        # What remains may happen to be what would have been written.
        while end < size and log[end : end + 1] == recording.log[end : end + 1]:
            end += 1
        with open_store(path) as store:
            store.get("key")
            assert content(path) == recording.contents[bisect_right(recording.commits, end)]
            key, _ = store.create(total_available=5)
            assert store.charge(strip_prefix(key), 3).total_available == 2
            content(path)


# --- Statements that fail


@contextmanager
def nothing_random():
    """Within it, the same call leaves the same rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
        patch.setattr(secrets, "choice", lambda sequence: sequence[0])
        yield


WRITES = {
    "create": lambda store: store.create(name="New", total_available=5),
    "update": lambda store: store.update(1, name="Changed", enabled=False),
    "rotate": lambda store: store.rotate(1),
    "delete": lambda store: store.delete(1),
    "charge": lambda store: store.charge("one", 7),
    "charge for a model": lambda store: store.charge("one", 7, model="gpt-4o"),
    "charge with an id": lambda store: store.charge("one", 7, model="gpt-4o", operation_id="new"),
    "charge that takes back": lambda store: store.charge("two", 500, model="free"),
    "charge by id": lambda store: store.charge_by_id(1, 7, operation_id="new"),
    "reserve": lambda store: store.reserve("one", 7),
    "reserve with an id": lambda store: store.reserve("one", 7, model="gpt-4o", operation_id="new"),
    "settle": lambda store: store.settle("open", 250),
    "settle late": lambda store: store.settle("lapsed", 1200),
    "refund": lambda store: store.refund("charge", 40),
    "refund with an id": lambda store: store.refund("charge", refund_id="new"),
    "grant": lambda store: store.grant(1, 10),
    "grant that takes back": lambda store: store.grant(2, -1000),
    "prune": lambda store: store.prune(NOW),
}
READS = {
    "get": lambda store: store.get("one"),
    "find": lambda store: store.find(1),
    "tokens": lambda store: list(store.tokens()),
    "history": lambda store: list(store.history(1)),
    "model_usage": lambda store: store.model_usage(1),
}
CALLS = {**WRITES, **READS}
# A caller who does not know whether they were made calls again.
REPEATABLE = ("charge with an id", "charge by id", "reserve with an id", "settle", "settle late", "refund with an id")


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """The file of a ledger to which the calls can be made."""
    path = tmp_path_factory.mktemp("ledger") / "tokens.db"
    with open_store(path, now=NOW - AN_HOUR) as store:
        for key in ("one", "two", "three"):
            store.create(key=key, total_available=1000, model_limits={"gpt-4o": 500, "free": True})
        store.charge("one", 100, model="gpt-4o", operation_id="charge")
        store.reserve("one", 200, model="gpt-4o", operation_id="open", expires_in=2 * AN_HOUR)
        store.reserve("two", 900, model="free", operation_id="lapsed", expires_in=AN_HOUR / 2)
        store.refund("charge", 10)
        store.delete(3)
    return path


class Statements:
    """The statements of all connections, in order, and the errors that some of them raise."""

    def __init__(self):
        self.seen = []
        self._errors = {}

    @contextmanager
    def watched(self, errors=()):
        """:param errors: by the statement's number, from 1, and whether they come ``"before"`` or ``"after"`` it is
        done; or of a rollback, by that word."""
        self.seen = seen = []
        self._errors = dict(errors)
        try:
            yield seen
        finally:
            self.__init__()

    def reach(self, place):
        if place in self._errors:
            raise self._errors[place]()


@pytest.fixture
def statements(monkeypatch):
    """Watches the connections that are opened from now on. When the test is done with them, all are closed."""
    statements = Statements()
    opened = []

    class Connection(sqlite3.Connection):
        is_closed = False

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(self)

        def close(self):
            super().close()
            self.is_closed = True

        def execute(self, sql, *parameters):
            statements.seen.append(sql)
            number = len(statements.seen)
            statements.reach((number, "before"))
            cursor = super().execute(sql, *parameters)
            try:
                statements.reach((number, "after"))
            except BaseException:
                cursor.close()  # which nobody but this frame, and so the traceback, has
                raise
            return cursor

        def rollback(self):
            statements.reach("rollback")
            super().rollback()

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Connection))
    yield statements
    assert opened
    left = [connection for connection in opened if not connection.is_closed]
    for connection in left:
        connection.close()
    assert not left, "connections that nobody closed"


def disk_full():
    return sqlite3.OperationalError("database or disk is full")


def io_error():
    return sqlite3.OperationalError("disk I/O error")


def locked():
    return sqlite3.OperationalError("database is locked")


each_error = pytest.mark.parametrize(
    ("error", "raised"),
    [
        pytest.param(disk_full, StoreError, id="disk full"),
        pytest.param(io_error, StoreError, id="I-O error"),
        pytest.param(locked, StoreError, id="locked"),
        pytest.param(KeyboardInterrupt, KeyboardInterrupt, id="interrupted"),
        pytest.param(MemoryError, MemoryError, id="no memory"),
    ],
)


def check_every_statement(start, call, statements, error, raised):
    """Makes a call, and then once for each of its statements, which fails.

    :param start: given a name, returns a path of its own and a store there; they are the same but for that.
    """
    path, store = start("whole")
    with store:
        before = content(path)
        with statements.watched() as ran:
            result = call(store)
        after = content(path)
    assert ran
    places = [(number, "before") for number in range(1, len(ran) + 1)]
    if error is KeyboardInterrupt:
        # Python raises it when a statement is done. After the last of a transaction it comes too late to undo anything.
        places += [(number, "after") for number, sql in enumerate(ran, 1) if sql != "COMMIT"]
    for number, when in places:
        path, store = start(f"{number} {when}")
        with store:
            with statements.watched({(number, when): error}), pytest.raises(raised) as caught:
                call(store)
            assert (raised is StoreError) == isinstance(caught.value.__cause__, sqlite3.Error)
            # A call that takes more than one transaction, prune(), has done all in the first.
            made = "COMMIT" in ran[: number - 1]
            assert content(path) == (after if made else before)
            again = call(store)
            assert made or again == result
            assert content(path) == after
        path.unlink()


@pytest.mark.parametrize("name", CALLS)
@each_error
def test_a_statement_that_fails(ledger, tmp_path, statements, name, error, raised):
    def start(name):
        path = shutil.copyfile(ledger, tmp_path / f"{name}.db")
        store = open_store(path)
        store.get("one")
        return path, store

    with nothing_random():
        check_every_statement(start, CALLS[name], statements, error, raised)


@pytest.mark.parametrize("exists", [pytest.param(True, id="a ledger"), pytest.param(False, id="no file")])
@each_error
def test_a_first_statement_that_fails(ledger, tmp_path, statements, exists, error, raised):
    def start(name):
        path = tmp_path / f"{name}.db"
        if exists:
            shutil.copyfile(ledger, path)
        return path, open_store(path)

    check_every_statement(start, READS["get"], statements, error, raised)


def test_a_rollback_that_fails(ledger, tmp_path, statements):
    path = shutil.copyfile(ledger, tmp_path / "tokens.db")
    with open_store(path) as store:
        store.get("one")
        before = content(path)
        with statements.watched({"rollback": io_error}), pytest.raises(QuotaExceeded):
            store.grant(2, -1001)
        assert content(path) == before
        store.grant(2, -1000)


@pytest.mark.parametrize("name", REPEATABLE)
@each_error
def test_an_answer_that_is_lost(ledger, tmp_path, statements, name, error, raised):
    call = WRITES[name]
    with open_store(shutil.copyfile(ledger, tmp_path / "1.db")) as store:
        store.get("one")
        with statements.watched() as ran:
            result = call(store)
    after = content(tmp_path / "1.db")
    assert ran[-1] == "COMMIT"

    path = shutil.copyfile(ledger, tmp_path / "2.db")
    with open_store(path) as store:
        store.get("one")
        with statements.watched({(len(ran), "after"): error}), pytest.raises(raised):
            call(store)
        assert content(path) == after
        assert call(store) == result
        assert content(path) == after


# --- Disks that are full


@contextmanager
def files_no_larger_than(size):
    """A disk with room for so much. What this process writes beyond fails, after what there is room for; it is no
    signal that ends the process, as Python ignores that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Attempt(NamedTuple):
    """What became of a call on a disk that was full."""

    failed: bool
    before: dict
    found: dict
    repeated: dict
    reopened: dict


def call_on_a_full_disk(path, name, state, room):
    """Makes a call while no file can grow further than what the log has and ``room`` bytes more; where it failed, once
    more with room for all. Then closes the store without any, so that what is in the log has to stay there."""
    log = Path(f"{path}-wal")
    with nothing_random(), open_store(path) as store:
        if state != "closed":
            store.get("one")
        if state == "a log":
            store.update(2, name="in the log")
        before = content(path)
        failed = False
        with files_no_larger_than(room + (log.stat().st_size if log.exists() else 0)):
            try:
                WRITES[name](store)
            except StoreError:
                failed = True
        found = content(path)
        if failed:
            WRITES[name](store)
        repeated = content(path)
        with files_no_larger_than(0):
            store.close()
    reopened = content(path)
    path.unlink()
    return Attempt(failed, before, found, repeated, reopened)


@pytest.fixture(scope="module")
def other_process():
    """The one process that has no room."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("state", ["closed", "no log", "a log"])
@pytest.mark.parametrize("name", WRITES)
def test_a_disk_that_is_full(ledger, tmp_path, full, other_process, name, state):
    # From none to more than any call needs; each writes the log in pieces of 24 and 4096 bytes.
    rooms = range(0, 50_000, 61 if full else 6101)
    paths = [shutil.copyfile(ledger, tmp_path / f"{room}.db") for room in rooms]
    attempts = list(other_process.map(call_on_a_full_disk, paths, repeat(name), repeat(state), rooms))
    before, after = attempts[0].before, attempts[-1].found
    assert before != after
    for attempt in attempts:
        assert attempt == Attempt(attempt.failed, before, before if attempt.failed else after, after, after)
    failed = [attempt.failed for attempt in attempts]
    assert failed[0]
    assert not failed[-1]
    assert failed == sorted(failed, reverse=True)


def test_a_database_that_may_not_grow(tmp_path, monkeypatch, full):
    path = tmp_path / "tokens.db"
    with open_store(path) as store:
        store.create(key="key", total_available=A_LOT)
    with closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connect = sqlite3.connect

    def connect_with_limit(most, *arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count = {most}")
        return connection

    charges = 0
    for most in range(pages, pages + (100 if full else 10)):
        monkeypatch.setattr(sqlite3, "connect", functools.partial(connect_with_limit, most))
        with open_store(path) as store:
            for _ in range(2):
                with pytest.raises(StoreError, match="full"):  # noqa: PT012 - some charges still fit
                    for _ in range(100):
                        before = content(path)
                        store.charge("key", 1, model=f"model {charges}", operation_id=f"{charges} {'x' * 200}")
                        charges += 1
                assert content(path) == before
            assert store.get("key").total_used == charges
    assert charges > 10
