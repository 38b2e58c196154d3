"""The file of an SQLite database, as other programs read it, change it, and keep it open."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from usage_middleware import SQLiteTokenStore

SUFFIXES = ("", "-wal", "-shm")  # of the database and the files that SQLite keeps next to it (sqlite.org/wal.html)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the open files are read from /proc")


def sql(path, *statements):
    """Run statements in the database as another program does. Return the rows of the last."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
        return rows


def content(path):
    """Return the bytes of the database's files.

    Another process reads them. In this one, closing a file would release the locks that SQLite has on it
    (sqlite.org/howtocorrupt.html, section 2.2).
    """
    names = [f"{path}{suffix}" for suffix in SUFFIXES if os.path.exists(f"{path}{suffix}")]
    return subprocess.run(["cat", *names], stdout=subprocess.PIPE, check=True).stdout


def open_files(path):
    """Return the open files of this process that belong to the database: their numbers and names."""
    files = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith(str(path)):
            files[number] = target
    return files


def count_connections(path):
    """Return how many connections to the database this process has. Each has the log open for itself."""
    return list(open_files(path).values()).count(f"{path}-wal")


@contextmanager
def another_process(path, *statements):
    """Yield another process that has run statements in the database and keeps its connection until the end."""
    program = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement)\n"
        "print('done', flush=True)\n"
        "sys.stdin.read()\n"
        "connection.close()\n"
    )
    command = [sys.executable, "-c", program, path, *statements]
    # Its input is closed at the end, even if the test fails, and that ends the process.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"done\n"
        yield


def watch_connections():
    """Return a list to which every connection is added that this process opens from now on, also after a fork."""
    opened = []

    def hook(event, arguments):
        if event == "sqlite3.connect/handle":
            opened.append(arguments[0])

    sys.addaudithook(hook)
    return opened


def use_two_connections(store, key):
    # The transaction uses the first.
    store._transact(lambda transaction: store.get(key))


@contextmanager
def without_privileges():
    """Act as a user to whom the permissions of files apply, unlike root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def permissions(path, mode):
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with without_privileges():
            yield
    finally:
        path.chmod(before)


@contextmanager
def untouched(path):
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def make_database(path):
    with SQLiteTokenStore(path) as store:
        store.create()
