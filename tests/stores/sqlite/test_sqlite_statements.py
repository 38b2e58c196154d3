"""Each statement of each call fails once: the call takes effect completely or not at all."""

import shutil
import sqlite3

import pytest
from sqlite_ledger import A_LOT, CALLS, READS, REPEATABLE, WRITES, content, nothing_random, open_store
from sqlite_statements import each_error, io_error

from usage_middleware import QuotaExceeded, StoreError

pytestmark = pytest.mark.slow


def check_every_statement(start, call, statements, error, raised):
    """Make a call, and then once for each of its statements, which fails.

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
    left = {0: before, ran.count("COMMIT"): after}  # by the transactions that were committed
    for number, when in places:
        path, store = start(f"{number} {when}")
        with store:
            with statements.watched({(number, when): error}), pytest.raises(raised) as caught:
                call(store)
            assert (raised is StoreError) == isinstance(caught.value.__cause__, sqlite3.Error)
            committed = ran[: number - 1].count("COMMIT")
            assert content(path) == left.setdefault(committed, content(path))
            again = call(store)
            assert committed or again == result
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
            store.grant(1, -A_LOT)
        assert content(path) == before
        store.grant(1, -700)


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
