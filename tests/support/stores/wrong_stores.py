"""Stores that the contract finds wrong, each in one way. They count correctly as long as nothing goes wrong."""

import dataclasses
import sqlite3
import threading
from contextlib import contextmanager, suppress

from usage_middleware import DamagedToken, SQLiteTokenStore, Step, StoreError
from usage_middleware.stores.hooks import new_id


class Around:
    """A wrapper of a transaction. A wrong store overrides some of its methods."""

    def __init__(self, transaction):
        self._transaction = transaction

    def __getattr__(self, name):
        return getattr(self._transaction, name)


class LocksItsThreads(SQLiteTokenStore):
    """Its lock is valid in its process only: it loads in one transaction of the database, and saves in another."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._threads = threading.Lock()

    def _transact(self, work):
        with self._threads:
            late = Late(super()._transact)
            result = work(late)
            super()._transact(late.save_all)
            return result


class Late:
    """A transaction that loads at once, and saves at the end."""

    def __init__(self, transact):
        self._transact = transact
        self._saves = []

    def save(self, changes):
        self._saves.append(changes)

    def save_all(self, transaction):
        for changes in self._saves:
            transaction.save(changes)

    def __getattr__(self, name):
        return lambda *arguments: self._transact(lambda transaction: getattr(transaction, name)(*arguments))


class RepeatsCommits(SQLiteTokenStore):
    """If the outcome of a commit is unknown, it repeats the work, and an operation that exists gets another id."""

    class Transaction(Around):
        def save(self, changes):
            steps = tuple(self._renamed(step) for step in changes.steps)
            self._transaction.save(dataclasses.replace(changes, steps=steps))

        def _renamed(self, step):
            known = step.before is None and self._find(step.after.id)
            return Step(None, dataclasses.replace(step.after, id=new_id())) if known else step

        def _find(self, operation_id):
            return self._transaction._execute("SELECT 1 FROM operations WHERE id = ?", (operation_id,)).fetchone()

    def _transact(self, work):
        return super()._transact(lambda transaction: work(self.Transaction(transaction)))


class RaisesWhatItsDriverRaises(SQLiteTokenStore):
    """It lets the exceptions of its database through."""

    def _transact(self, work):
        with unwrapped():
            return super()._transact(work)

    def _get(self, digest):
        with unwrapped():
            return super()._get(digest)


@contextmanager
def unwrapped():
    try:
        yield
    except StoreError as error:
        if isinstance(error.__cause__, sqlite3.Error):
            raise error.__cause__ from None
        raise


class TrustsItsRows(SQLiteTokenStore):
    """It raises an error of its own, and not a StoreError, for a row that is not a token."""

    def _get(self, digest):
        try:
            return super()._get(digest)
        except DamagedToken as error:
            raise ValueError(error.reason) from None


class SkipsItsRows(SQLiteTokenStore):
    """It ignores a row that is not a token: its key is not found."""

    def _get(self, digest):
        with suppress(DamagedToken):
            return super()._get(digest)


def forgets_of_a_token(field, *, saved):
    """Return a store that does not save, or does not insert, one field of a token."""

    class Transaction(Around):
        def save(self, changes):
            if saved:
                token = dataclasses.replace(changes.token, **{field: getattr(changes.before, field)})
                changes = dataclasses.replace(changes, token=token)
            self._transaction.save(changes)

        def insert(self, records):
            return self._transaction.insert(records if saved else [without(record, field) for record in records])

    class Forgets(SQLiteTokenStore):
        def _transact(self, work):
            return super()._transact(lambda transaction: work(Transaction(transaction)))

    return Forgets


def without(record, field):
    default = {f.name: f for f in dataclasses.fields(record.token)}[field]
    value = default.default_factory() if default.default is dataclasses.MISSING else default.default
    return dataclasses.replace(record, token=dataclasses.replace(record.token, **{field: value}))


def forgets_of_an_operation(field):
    """Return a store that does not save one field of an operation."""

    class Transaction(Around):
        def save(self, changes):
            steps = tuple(Step(before, blanked(after, field)) for before, after in changes.steps)
            self._transaction.save(dataclasses.replace(changes, steps=steps))

    class Forgets(SQLiteTokenStore):
        def _transact(self, work):
            return super()._transact(lambda transaction: work(Transaction(transaction)))

    return Forgets


def blanked(operation, field):
    blank = {"id": new_id(), "token_id": 2**40, "kind": "grant", "amount": 1}
    fields = {f.name: f.default for f in dataclasses.fields(operation)}
    return dataclasses.replace(operation, **{field: blank.get(field, fields[field])})
