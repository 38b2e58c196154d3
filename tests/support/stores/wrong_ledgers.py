"""Stores that keep their ledger wrong, each in one way, with the part of the contract that must find it.

``test_wrong_ledgers.py`` runs it.
"""

from __future__ import annotations

import dataclasses

from usage_middleware import MemoryTokenStore, StoreError
from usage_middleware.keys import key_digest
from usage_middleware.testing.charge_contract import ChargeContract
from usage_middleware.testing.day_contract import DayContract
from usage_middleware.testing.held_contract import HeldContract
from usage_middleware.testing.key_contract import KeyContract
from usage_middleware.testing.lapse_contract import LapseContract
from usage_middleware.testing.renewal_contract import RenewalContract
from usage_middleware.testing.repeat_contract import RepeatContract
from usage_middleware.testing.token_store import TokenStoreContract
from usage_middleware.testing.transaction_contract import TransactionContract


class InMemory(TokenStoreContract):
    is_shared = False
    store_class = MemoryTokenStore

    def make_store(self, tmp_path):
        return self.store_class()

    def known_key(self, store):
        return store.create(total_available=5)[0]


class UndoesNothing(MemoryTokenStore):
    def _transact(self, work):
        with self._lock:
            try:
                return work(self._open())
            finally:
                self._open().commit()


class TestUndoesNothing(InMemory, TransactionContract):
    store_class = UndoesNothing


class RepeatsUnderANewId(MemoryTokenStore):
    """It repeats a call that failed, without its idempotency key."""

    def charge(self, key, amount, *, idempotency_key=None, **options):
        try:
            return super().charge(key, amount, idempotency_key=idempotency_key, **options)
        except StoreError:
            return super().charge(key, amount, **options)


class TestRepeatsUnderANewId(InMemory, TransactionContract):
    store_class = RepeatsUnderANewId


# --- What is read


class KeepsThePrefix(MemoryTokenStore):
    def get(self, key, /):
        return None if key.startswith("sk-") else super().get(key)


class TestKeepsThePrefix(InMemory, KeyContract):
    store_class = KeepsThePrefix


class WritesWhenItIsRead(MemoryTokenStore):
    def get(self, key, /):
        token = self._get(key_digest(key))
        if token is not None and token.renews_at and token.enabled:
            self.charge(key, 0)
        return super().get(key)


class TestWritesWhenItIsRead(InMemory, RenewalContract):
    store_class = WritesWhenItIsRead


class PrunesDays(MemoryTokenStore):
    def prune(self, before):
        self._content._days.clear()
        return super().prune(before)


class TestPrunesDays(InMemory, DayContract):
    store_class = PrunesDays


# --- What a transaction loads and saves


def with_content(**methods):
    """Return a store whose transactions have those methods, which are wrong."""

    class Store(MemoryTokenStore):
        def __init__(self):
            super().__init__()
            self._content.__class__ = type("Content", (type(self._content),), methods)

    return Store


def load_nothing_lapsed(self, lookup):
    account = super(type(self), self).load(lookup)
    return account and dataclasses.replace(account, lapsed=())


class TestReleasesNothing(InMemory, LapseContract):
    store_class = with_content(load=load_nothing_lapsed)


def load_all_that_lapsed(self, lookup):
    return super(type(self), self).load(dataclasses.replace(lookup, most_lapsed=10**6))


class TestReleasesAllAtOnce(InMemory, LapseContract):
    store_class = with_content(load=load_all_that_lapsed)


def load_what_any_token_has_made(self, lookup):
    account = super(type(self), self).load(lookup)
    named = [one for one in self._operations.values() if one.idempotency_key == lookup.idempotency_key is not None]
    return account and dataclasses.replace(account, made=named[0] if named else None)


class TestSharesIdempotencyKeys(InMemory, RepeatContract):
    store_class = with_content(load=load_what_any_token_has_made)


def save_without_marking(self, changes):
    unmarked = dict(self._holding)
    if changes.is_renewed:
        self._holding = {}
    super(type(self), self).save(changes)
    self._holding = {**unmarked, **self._holding}


class TestRenewsWithoutMarking(InMemory, HeldContract):
    store_class = with_content(save=save_without_marking)


class TestBooksNothing(InMemory, ChargeContract):
    store_class = with_content(_add_days=lambda self, token_id, days: None)
