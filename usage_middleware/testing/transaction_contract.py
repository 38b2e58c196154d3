"""The contract of a store's transactions: what nothing else sees, and what is done once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from .. import operations as rules
from ..accounts import Changes, Lookup
from ..errors import QuotaExceeded, StoreError
from ..operations import Operation
from ..stores.base import QuotaStore
from ..stores.transaction import Transaction
from .fixtures import NOW, Holder, QuotaStoreFixtures

_LONG_ENOUGH = 1.0  # seconds in which a process that does not wait has charged


class _Failure(Exception):
    pass


class TransactionContract(QuotaStoreFixtures):
    """A transaction is whole or it never was, and nothing else changes its token meanwhile."""

    def test_what_fails_is_undone(self, holder: Holder) -> None:
        store = holder.store
        reservation = holder.reserve(100, model="gpt-4o", idempotency_key="open")
        before = list(store.records()), holder.operations, holder.days

        def fail(transaction: Transaction) -> None:
            lookup = Lookup(token_id=holder.id, operation_id=None, now=NOW, most_lapsed=0)
            account = transaction.load(lookup)
            assert account is not None
            made = Operation(id="made", token_id=holder.id, kind="charge", amount=5, model="new", created_at=NOW)
            transaction.save(rules.take(account, made, NOW))
            assert transaction.load(lookup) != account
            transaction.delete(holder.id)
            assert transaction.load(lookup) is None
            raise _Failure

        with pytest.raises(_Failure):
            store._transact(fail)
        assert (list(store.records()), holder.operations, holder.days) == before
        assert store.settle(reservation, 100).total_used == 100
        assert holder.charge(5, idempotency_key="next").total_used == 105

    def test_work_that_is_begun_again_makes_one_operation(
        self, holder: Holder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, transact = holder.store, holder.store._transact

        def undo_the_first(work: Callable[[Transaction], Any]) -> Any:
            def fail(transaction: Transaction) -> None:
                work(transaction)
                raise _Failure

            with pytest.raises(_Failure):
                transact(fail)
            return transact(work)

        monkeypatch.setattr(store, "_transact", undo_the_first)
        reservation = holder.reserve(30)
        store.settle(reservation, 20)
        store.refund(reservation, 5)
        store.grant(holder.id, 7)
        assert holder.totals == (15, 992)
        assert [operation.kind for operation in holder.operations] == ["reserve", "refund", "grant"]
        assert holder.operations[0].id == reservation.id

    def test_a_commit_whose_answer_was_lost_is_repeated_by_its_idempotency_key(
        self, holder: Holder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, transact = holder.store, holder.store._transact

        def lose_the_answer(work: Callable[[Transaction], Any]) -> Any:
            transact(work)
            raise StoreError("the connection is lost")

        charge = holder.charged(50)
        calls: list[Callable[[], object]] = [
            lambda: holder.charge(10, idempotency_key="charge"),
            lambda: holder.reserve(20, idempotency_key="reserve"),
            lambda: store.refund(charge, 5, idempotency_key="refund"),
            lambda: store.grant(holder.id, 3, idempotency_key="grant"),
        ]
        for call in calls:
            with monkeypatch.context() as patch:
                patch.setattr(store, "_transact", lose_the_answer)
                with pytest.raises(StoreError):
                    call()
            for _ in range(2):
                call()
        assert holder.totals == (75, 928)
        found = store.find_operation(holder.key, "reserve")
        assert found is not None
        assert found.replayed

    def test_an_operation_is_never_made_twice(self, holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
        # As by a store that does not know that it has committed, and begins again.
        store, transact = holder.store, holder.store._transact
        works = list[Callable[[Transaction], Any]]()

        def remember(work: Callable[[Transaction], Any]) -> Any:
            works.append(work)
            return transact(work)

        with monkeypatch.context() as patch:
            patch.setattr(store, "_transact", remember)
            holder.charge(30)
            store.grant(holder.id, 5)
        for work in works:
            with pytest.raises(StoreError):
                transact(work)
        assert holder.totals == (30, 975)
        assert len(holder.operations) == 2

    def test_another_process_waits_for_a_transaction(self, store: QuotaStore, tmp_path: Path) -> None:
        if not self.is_shared:
            pytest.skip("this store is one process's own")
        holder = Holder(store)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            # The first use takes long: a new interpreter, and a store that is opened.
            assert other.submit(_charge, self.reopen, tmp_path, holder.key, 0).result(60) == 1000

            def charge_while_the_other_does(transaction: Transaction) -> Future[int | None]:
                account = transaction.load(Lookup(token_id=holder.id, now=NOW, most_lapsed=0))
                assert account is not None
                charged = other.submit(_charge, self.reopen, tmp_path, holder.key, 600)
                wait([charged], timeout=_LONG_ENOUGH)
                made = Operation(id="made", token_id=holder.id, kind="charge", amount=600, created_at=NOW)
                changes: Changes = rules.take(account, made, NOW)
                transaction.save(changes)
                return charged

            charged = store._transact(charge_while_the_other_does)
            assert charged.result(60) is None
        assert holder.totals == (600, 400)


def _charge(reopen: Callable[[Path], QuotaStore], tmp_path: Path, key: str, amount: int) -> int | None:
    """Charge in a process of its own. Return what is left; ``None``: it was refused."""
    with reopen(tmp_path) as store:
        try:
            return store.charge(key, amount).total_available
        except QuotaExceeded:
            return None
