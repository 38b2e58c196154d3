"""An SQLite store in a process that forks.

A function that runs ``in_a_process`` of its own is above the test that calls it.
"""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
from holders import create
from processes import end_within, environment, in_a_process, process_of
from sqlite_files import (
    SUFFIXES,
    another_process,
    make_database,
    needs_proc,
    open_files,
    sql,
    use_two_connections,
    watch_connections,
)

from usage_middleware import QuotaError, SQLiteTokenStore, StoreError, forks
from usage_middleware.stores.sqlite import connections
from usage_middleware.stores.sqlite.handle import Handle

LEFT_TO_ITS_PARENT = "{} was in use when this process was forked; its parent goes on with the call"

# --- Fork


def fork(in_child, *arguments, by=os.fork):
    """Fork a child that runs a function and exits as any interpreter does. Wait until it has exited with status 0."""
    child = by()
    if child == 0:
        end_within(60)
        in_child(*arguments)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0


def child_ignores(stores, key):
    pass


def child_uses(stores, key):
    assert stores[0].get(key).name == "parent"
    create(stores[0], name="child")
    use_two_connections(stores[0], key)


def child_closes(stores, key):
    stores[0].close()


def child_uses_and_closes(stores, key):
    child_uses(stores, key)
    child_closes(stores, key)


def child_forgets(stores, key):
    stores.clear()
    gc.collect()


def child_has_a_child(stores, key):
    child_uses(stores, key)
    fork(child_uses_and_closes, stores, key)
    assert stores[0].get(key).name == "parent"


def fork_after_use(path, in_child):
    stores = [SQLiteTokenStore(path)]
    key, token = create(stores[0], name="parent")
    use_two_connections(stores[0], key)

    def child():
        # Nothing is inherited: SQLite would take the parent's locks for the child's.
        assert open_files(path) == {}
        globals()[in_child](stores, key)

    fork(child)
    (store,) = stores
    assert store.get(key) == token
    create(store, name="parent, afterwards")
    print(*(token.name for token in store.tokens()), sep="; ")
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_in_c_after_use(path):
    """Fork as C code does, without Python."""
    opened = watch_connections()
    store = SQLiteTokenStore(path)
    key, token = create(store, name="parent")
    use_two_connections(store, key)
    inherited = open_files(path)
    statements = []
    # Nothing here may keep them alive.
    while opened:
        opened.pop().set_trace_callback(statements.append)

    def child():
        for use in (store.create, lambda: store.get(key)):
            with pytest.raises(StoreError, match="was open when this process was forked"):
                use()
        store.close()
        # None of what was inherited was used, and none closed.
        assert statements == []
        assert inherited.items() <= open_files(path).items()

    before = os.stat(path).st_mtime_ns, os.path.getsize(path)
    fork(child, by=ctypes.CDLL(None).fork)
    # The log is where it was, and the child has not written it back without the parent knowing.
    assert all(os.path.exists(f"{path}{suffix}") for suffix in SUFFIXES)
    assert (os.stat(path).st_mtime_ns, os.path.getsize(path)) == before

    assert store.get(key) == token
    assert len(statements) == 1
    create(store, name="parent, afterwards")
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


@needs_proc
def test_a_fork_by_c_code_leaves_a_child_without_the_database(path):
    in_a_process(fork_in_c_after_use, path)
    with SQLiteTokenStore(path) as store:
        assert [token.name for token in store.tokens()] == ["parent", "parent, afterwards"]


def fork_in_a_transaction(path, by, said_by_parent):
    """Forks in the middle of what a transaction does, as a signal handler may."""
    forks._PATIENCE = 0.05
    opened = watch_connections()
    store = SQLiteTokenStore(path)
    key, _ = create(store)
    (connection,) = opened
    children = []

    def work(transaction):
        children.append(os.fork() if by == "Python" else ctypes.CDLL(None).fork())
        if children[0] == 0:
            connection.set_trace_callback(lambda statement: print(statement, flush=True))
        if said_by_parent:
            raise QuotaError(said_by_parent)

    said = ""
    try:
        store._transact(work)
    except (StoreError, QuotaError) as error:
        said = str(error)
    assert said == (said_by_parent if children[0] else LEFT_TO_ITS_PARENT.format(path))
    if children[0] == 0:
        end_within(60)
        del connection
        opened.clear()
        inherited = open_files(path)
        with pytest.raises(StoreError, match="was open when this process was forked"):
            store.create()
        store.close()
        gc.collect()
        assert open_files(path).keys() == inherited.keys()  # which their parent may have removed
        assert len(inherited) >= 3
        sys.exit()
    assert os.waitpid(children[0], 0)[1] == 0
    assert store.charge(key, 1).total_used == 1


@needs_proc
@pytest.mark.parametrize(("by", "said_by_parent"), [("Python", ""), ("C", ""), ("Python", "refused")])
def test_a_child_that_is_forked_in_a_transaction_leaves_it_to_its_parent(path, by, said_by_parent):
    assert in_a_process(fork_in_a_transaction, path, by, said_by_parent) == ""


def fork_in_a_call(path, method, *arguments):
    """Forks before a call has its connection, or just after that, as a signal handler may."""
    forks._PATIENCE = 0.05
    store = SQLiteTokenStore(path)
    key, _ = create(store)
    lend = store._connections._lend
    children = []

    def lend_and_fork(pool, box, **options):
        if method == "charge":
            lend(pool, box, **options)
        children.append(os.fork())
        if children[0]:
            assert os.waitpid(children[0], 0)[1] == 0
        else:
            end_within(60)
        if method == "get":
            lend(pool, box, **options)

    store._connections._lend = lend_and_fork
    said = ""
    try:
        getattr(store, method)(key, *map(int, arguments))
    except StoreError as error:
        said = str(error)
    if children[0] == 0:
        assert said == LEFT_TO_ITS_PARENT.format(path)
        # It has not taken the lock, which no process would get before this one exits.
        assert not any(handle.connection.in_transaction for handle in forks.inherited(Handle))
        sys.exit()
    assert said == ""


@pytest.mark.parametrize("call", [("charge", 1), ("get",)], ids=["charge", "get"])
def test_a_child_that_is_forked_in_a_call_leaves_it_to_its_parent(path, call):
    in_a_process(fork_in_a_call, path, *call)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("in_child", "created"),
    [
        (child_ignores, 0),
        (child_uses, 1),
        (child_closes, 0),
        (child_uses_and_closes, 1),
        (child_forgets, 0),
        (child_has_a_child, 2),
    ],
)
def test_a_store_that_was_used_may_be_forked(path, in_child, created):
    names = in_a_process(fork_after_use, path, in_child.__name__)
    assert names == "; ".join(["parent", *["child"] * created, "parent, afterwards"]) + "\n"
    assert list(path.parent.iterdir()) == [path]


def become_a_daemon(path, count):
    """Use the store, fork, and go on in the child, while the parent exits."""
    store = SQLiteTokenStore(path)
    store.create(name="parent")
    reader, writer = os.pipe()
    if os.fork():
        sys.exit(0)
    end_within(60)
    os.close(writer)
    assert os.read(reader, 1) == b""  # the parent is gone
    for number in range(int(count)):
        store.create(name=f"daemon {number}")
    store.close()
    print("done", flush=True)


@needs_proc
def test_what_a_child_writes_after_its_parent_has_left_is_not_lost(path):
    # A child that took the parent's locks for its own would hold none, and others would take its log away.
    count = 300
    daemon = subprocess.Popen(
        process_of(become_a_daemon, path, count), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert daemon.wait(30) == 0
    others = 0
    # Each use opens the file and, as far as it can tell, closes it as the last one.
    while True:
        with SQLiteTokenStore(path) as store:
            store.create(name="other")
            others += 1
            names = {token.name for token in store.tokens()}
        if f"daemon {count - 1}" in names:
            break
        assert others < 10_000
    assert daemon.stdout.read() == "done\n"
    daemon.stdout.close()
    with SQLiteTokenStore(path) as store:
        assert len(list(store.tokens())) == 1 + count + others
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def forks_beside(lock, function, path, *arguments):
    """Run a function in a process that prints ``forked`` while another process has a lock on the database."""
    with another_process(path, *lock):
        process = subprocess.Popen(
            process_of(function, path, *arguments),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "forked\n", process.communicate()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, ""), errors


def fork_in_the_middle(path, method, key):
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    make_database(f"{path}.other")  # what is imported when it is first needed is there then
    store = SQLiteTokenStore(path)
    asleep = threading.Event()

    def sleep(seconds):
        asleep.set()
        time.sleep(0.5)

    # The fork is to come while the thread sleeps until it asks for the lock again: in the middle of SQLite's code it
    # could find a mutex of the whole library locked, which no store can help.
    connections.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    thread = threading.Thread(target=getattr(store, method), args=[key] if method == "get" else [])
    thread.start()
    assert asleep.wait(30)
    child = os.fork()
    if child == 0:
        end_within(60)
        # Between its attempts, the thread has nothing open.
        assert store.get(key) is not None
        store.create()
        store.close()
        return
    print("forked", flush=True)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert store.get(key) is not None


@needs_proc
@pytest.mark.parametrize(
    ("method", "lock", "created"),
    [
        pytest.param("get", ("PRAGMA locking_mode = EXCLUSIVE", "UPDATE tokens SET name = ''"), 1, id="opens"),
        pytest.param("create", ("BEGIN IMMEDIATE",), 2, id="writes"),
    ],
)
def test_a_fork_while_a_thread(path, method, lock, created):
    with SQLiteTokenStore(path) as store:
        key, _ = create(store)
    forks_beside(lock, fork_in_the_middle, path, method, key)
    with SQLiteTokenStore(path) as store:
        assert len(list(store.tokens())) == 1 + created
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_while_it_waits(path):
    """Forks while a call waits for the lock of another process, as a signal handler may."""
    store = SQLiteTokenStore(path)
    children = []

    def sleep(seconds):
        if not children:
            children.append(os.fork())
            if children[0]:
                print("forked", flush=True)
        time.sleep(seconds)

    connections.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    said = None
    try:
        store.rotate(1)
    except StoreError as error:
        said = str(error)
    if children[0] == 0:
        end_within(60)
        assert said == LEFT_TO_ITS_PARENT.format(path)
        assert store.get_by_id(1)
        sys.exit()
    assert os.waitpid(children[0], 0)[1] == 0
    assert said is None
    # If both had given it the same key, that would be among the retired ones now.
    store.rotate(1)


def test_a_child_that_is_forked_while_a_call_waits_leaves_it_to_its_parent(path):
    with SQLiteTokenStore(path) as store:
        create(store)
    forks_beside(["BEGIN IMMEDIATE"], fork_while_it_waits, path)
