"""A database that another user reads: only its owner's files are beside it, and the owner can go on."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest
from forks import forked
from holders import create
from processes import environment, process_of
from sqlite_files import SUFFIXES, another_process, sql

from usage_middleware import SQLiteTokenStore, StoreError
from usage_middleware.stores.sqlite import reading

NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def as_another_user(function):
    """Return what ``function`` returns in a process of a user that owns nothing."""

    def become_another_user():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return function()

    return forked(become_another_user)


def files_beside(path):
    """Return the database's files: their owners and permissions."""
    return {
        name: (status.st_uid, stat.S_IMODE(status.st_mode))
        for name in sorted(os.listdir(path.parent))
        for status in [os.stat(path.parent / name)]
    }


def charges(path, key):
    """Charge until its input is closed, or it is killed."""
    store = SQLiteTokenStore(path)
    print(store.charge(key, 1).total_used, flush=True)
    sys.stdin.read()
    store.close()


@contextmanager
def in_use(path, key):
    """Its owner has it open, and has charged: that is in the log alone."""
    with subprocess.Popen(
        process_of(charges, path, key),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "1\n"
        yield process


@contextmanager
def closed(path, key):
    with SQLiteTokenStore(path) as store:
        store.charge(key, 1)
    yield


@contextmanager
def crashed(path, key):
    """Leave what was charged in a log."""
    with in_use(path, key) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.path.getsize(f"{path}-wal") > 0
    yield


@pytest.fixture
def owned(folder):
    """Return a database that everyone may read, and the key of a token in it."""
    path = folder / "tokens.db"
    with SQLiteTokenStore(path) as store:
        key, _ = create(store)
    path.chmod(0o644)
    return path, key


@as_root
@pytest.mark.parametrize("folder_mode", [0o755, 0o777], ids=["a folder of its owner", "a folder of all"])
@pytest.mark.parametrize("state", [closed, in_use, crashed])
def test_another_user_reads_it_and_leaves_nothing(owned, state, folder_mode):
    path, key = owned
    path.parent.chmod(folder_mode)

    def read():
        with SQLiteTokenStore(path, read_only=True) as store:
            return [store.get(key).total_used for _ in range(3)]

    with state(path, key):
        before = files_beside(path)
        assert as_another_user(read) == "[1, 1, 1]"
        assert files_beside(path) == before
        assert {owner for owner, _ in before.values()} == {0}
    with SQLiteTokenStore(path) as store:
        assert store.charge(key, 1).total_used == 2


@as_root
def test_a_copy_that_no_user_may_write_is_read(owned):
    path, key = owned
    path.chmod(0o444)
    path.parent.chmod(0o555)

    def read():
        with SQLiteTokenStore(path, read_only=True) as store:
            return store.get(key) == next(store.tokens())

    assert as_another_user(read) == "True"
    assert files_beside(path) == {path.name: (0, 0o444)}


@as_root
def test_what_another_user_may_not_read_is_refused(owned):
    path, key = owned
    path.parent.chmod(0o777)

    def read():
        with pytest.raises(StoreError) as caught, SQLiteTokenStore(path, read_only=True) as store:
            store.get(key)
        return caught.value

    with in_use(path, key):
        os.chmod(f"{path}-shm", 0o600)
        before = files_beside(path)
        assert as_another_user(read) == (
            f"{path} cannot be opened: this process may not read it, or the files -wal and -shm beside it"
        )
        assert files_beside(path) == before
    path.chmod(0o600)
    assert "may not read it" in as_another_user(read)


def test_a_log_without_its_index_is_not_given_one(owned, monkeypatch):
    monkeypatch.setattr(reading, "_TRANSITION", 0.05)
    path, key = owned
    with crashed(path, key):
        os.unlink(f"{path}-shm")
    before = files_beside(path)
    with SQLiteTokenStore(path, read_only=True) as store:
        with pytest.raises(StoreError, match=r"log \(tokens.db-wal\) without its index \(-shm\).* open it once for w"):
            store.get(key)
        assert files_beside(path) == before
        with SQLiteTokenStore(path) as owner:
            assert owner.get(key).total_used == 1
            assert store.get(key).total_used == 1


def test_a_log_does_not_go_just_before_it_is_read(owned, monkeypatch):
    """Its owner closes it when a reader has looked at its files. The reader would make the log again."""
    path, key = owned
    exists = os.path.exists
    logs = []

    def close_afterwards(file):
        is_there = exists(file)
        if str(file).endswith("-shm"):
            monkeypatch.setattr(os.path, "exists", exists)
            logs.append(os.stat(f"{path}-wal"))
            owner.stdin.close()
            owner.wait()
        return is_there

    with in_use(path, key) as owner, SQLiteTokenStore(path, read_only=True) as store:
        monkeypatch.setattr(os.path, "exists", close_afterwards)
        assert store.get(key).total_used == 1
        assert os.path.samestat(os.stat(f"{path}-wal"), *logs)


def test_a_process_that_reads_first_can_still_write(owned):
    path, key = owned
    with ExitStack() as stack:
        stack.enter_context(another_process(path, "SELECT count(*) FROM tokens"))
        reader = stack.enter_context(SQLiteTokenStore(path, read_only=True))
        assert reader.get(key).total_used == 0
        writer = stack.enter_context(SQLiteTokenStore(path))
        assert writer.charge(key, 1).total_used == reader.get(key).total_used == 1


def test_a_reader_sees_what_is_written_between_its_reads(owned):
    path, key = owned
    with SQLiteTokenStore(path, read_only=True) as reader:
        assert reader.get(key).total_used == 0
        for used in range(1, 4):
            with SQLiteTokenStore(path) as store:
                store.charge(key, 1)
                assert reader.get(key).total_used == used
            assert reader.get(key).total_used == used


def charge_and_close(path, key, seconds):
    """Open, charge and close it, over and over."""
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline:
        with SQLiteTokenStore(path, synchronous="OFF") as store:
            print(store.charge(key, 1).total_used)


@as_root
@pytest.mark.slow
def test_another_user_reads_while_its_owner_opens_and_closes_it(owned, full):
    path, key = owned
    path.parent.chmod(0o777)
    with SQLiteTokenStore(path) as store:
        store.grant(1, 10**9)

    seconds = 40 if full else 3  # another user lives for a minute

    def read():
        seen = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with SQLiteTokenStore(path, read_only=True) as store:
                seen += [store.get(key).total_used for _ in range(3)]
        assert seen == sorted(seen)
        return seen[-1] > 0

    with subprocess.Popen(
        process_of(charge_and_close, path, key, seconds), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert as_another_user(read) == "True"
        made = process.stdout.read().split()
    assert files_beside(path) == {path.name: (0, 0o644)}
    assert made == [str(number) for number in range(1, len(made) + 1)]


# --- New files


@pytest.mark.parametrize(
    ("mask", "mode"), [(0o022, 0o640), (0o002, 0o660), (0o000, 0o660), (0o077, 0o600), (0o007, 0o660)]
)
@pytest.mark.parametrize("is_link", [False, True], ids=["a file", "a link to none"])
def test_new_files_are_not_for_others(tmp_path, mask, mode, is_link):
    path = tmp_path / "tokens.db"
    target = tmp_path / "elsewhere.db" if is_link else path
    if is_link:
        path.symlink_to(target)

    def make():
        os.umask(mask)
        with SQLiteTokenStore(path) as store:
            store.create()
            return [oct(stat.S_IMODE(os.stat(f"{target}{suffix}").st_mode)) for suffix in SUFFIXES]

    assert forked(make) == str([oct(mode)] * 3)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_system_that_has_no_such_call_makes_them_too(path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "mknod", refuse)
    with SQLiteTokenStore(path) as store:
        store.create()
    assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0


def test_a_file_that_is_there_keeps_its_permissions(path):
    path.touch()
    path.chmod(0o604)
    with SQLiteTokenStore(path) as store:
        store.create()
        assert {stat.S_IMODE(os.stat(f"{path}{suffix}").st_mode) for suffix in SUFFIXES} == {0o604}


# --- Views


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.mark.parametrize("name", ["tokens", "Tokens", "usage_by_day"])
def test_a_view_is_not_read(path, name):
    with SQLiteTokenStore(path) as store:
        store.create()
    sql(path, f"DROP TABLE {name}", f"CREATE VIEW {name} AS {ENDLESS} SELECT i AS id, '' AS digest FROM n")
    shutil.copyfile(path, path.with_name("copy.db"))
    for read_only in (True, False):
        with SQLiteTokenStore(path.with_name("copy.db"), read_only=read_only) as store:
            for use in (store.count, lambda: store.get("some-key"), store.tables_state):
                with pytest.raises(StoreError, match=f"has a view '{name}' that usage-middleware did not make"):
                    use()
