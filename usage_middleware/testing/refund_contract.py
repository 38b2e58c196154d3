"""The contract of refunds and grants."""

from __future__ import annotations

from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import OperationConflict, OperationNotFound, QuotaExceeded, TokenNotFound
from ..stores.base import QuotaStore
from .fixtures import BAD_AMOUNTS, Holder, QuotaStoreFixtures


class RefundContract(QuotaStoreFixtures):
    """What was charged is returned, once."""

    @pytest.mark.parametrize("by_id", [False, True])
    def test_a_refund_gives_back_what_was_charged(self, holder: Holder, by_id: bool) -> None:
        charge = holder.charged(300, model="gpt-4o")
        operation = charge.id if by_id else charge
        store = holder.store
        assert store.refund(operation, 100).total_available == 800
        assert holder.totals == (200, 800)
        assert store.refund(operation, 0).total_used == 200
        assert store.refund(operation).total_used == 0
        # Nothing is left, so a second refund without an amount returns nothing.
        assert store.refund(operation).total_used == 0
        assert holder.totals == (0, 1000)
        assert store.model_usage(holder.id) in ({}, {"gpt-4o": 0})

    def test_refunds_never_give_back_more_than_was_charged(self, holder: Holder) -> None:
        charge = holder.charged(300)
        holder.charge(300)
        holder.store.refund(charge, 200)
        for amount in (101, 300, MAX_INTEGER):
            with pytest.raises(QuotaExceeded) as caught:
                holder.store.refund(charge, amount)
            assert (caught.value.requested, caught.value.available) == (amount, 100)
        assert holder.totals == (400, 600)

    def test_a_settled_reservation_is_refunded_of_its_final_amount(self, holder: Holder) -> None:
        reservation = holder.reserve(300)
        with pytest.raises(OperationConflict, match="settle"):
            holder.store.refund(reservation)
        holder.store.settle(reservation, 200)
        with pytest.raises(QuotaExceeded):
            holder.store.refund(reservation, 201)
        holder.store.refund(reservation, 150)
        # Repeating the settle is still the same call, whatever was refunded since.
        holder.store.settle(reservation, 200)
        assert holder.totals == (50, 950)

    def test_what_cannot_be_refunded(self, holder: Holder) -> None:
        store = holder.store
        with pytest.raises(OperationNotFound) as missing:
            store.refund("missing")
        assert missing.value.operation_id == "missing"
        charge = holder.charged(5)
        store.refund(charge, 1)
        store.grant(holder.id, 1)
        for operation in holder.operations:
            if operation.kind != "charge":
                with pytest.raises(OperationConflict, match=f"is a {operation.kind}") as caught:
                    store.refund(operation)
                assert caught.value.operation_id == operation.id
        store.delete(holder.id)
        with pytest.raises(TokenNotFound):
            store.refund(charge)

    @pytest.mark.parametrize(("amount", "error"), BAD_AMOUNTS)
    def test_the_amount_of_a_refund(self, holder: Holder, amount: Any, error: type[Exception]) -> None:
        charge = holder.charged(10)
        with pytest.raises(error, match="amount"):
            holder.store.refund(charge, amount)
        assert holder.totals == (10, 990)

    def test_quota_that_was_unlimited_is_not_refunded_as_available(self, store: QuotaStore) -> None:
        holder = Holder(store, total_available=5, unlimited_quota=True)
        unlimited = holder.charged(300)
        reservation = holder.reserve(50)
        store.update(holder.id, unlimited_quota=False)
        store.refund(unlimited, 100)
        assert holder.totals == (250, 5)
        store.settle(reservation, 3)
        assert holder.totals == (203, 2)
        limited = holder.charged(2)
        store.refund(reservation, 1)  # it was settled while quota was limited
        assert holder.totals == (204, 1)
        limited_reservation = holder.reserve(1)
        store.update(holder.id, unlimited_quota=True)
        store.refund(limited)
        assert holder.totals == (203, 2)
        store.settle(limited_reservation, 10)
        assert holder.totals == (212, 3)
        store.refund(limited_reservation)  # it was settled while quota was unlimited
        assert holder.totals == (202, 3)


class GrantContract(QuotaStoreFixtures):
    """Only a grant, or a renewal, changes what was granted."""

    def test_a_grant_tops_up_and_takes_back(self, holder: Holder) -> None:
        store = holder.store
        holder.charge(400)
        assert store.grant(holder.id, 500).total_granted == 1500
        assert holder.totals == (400, 1100)
        store.grant(holder.id, -1100)
        store.grant(holder.id, 0)
        assert holder.totals == (400, 0)
        store.grant(holder.id, 3)
        with pytest.raises(QuotaExceeded) as caught:
            store.grant(holder.id, -4)
        assert (caught.value.requested, caught.value.available) == (4, 3)
        assert holder.totals == (400, 3)

    @pytest.mark.parametrize("amount", [True, 1.0, "1", None, MAX_INTEGER + 1, -MAX_INTEGER - 1])
    def test_the_amount_of_a_grant(self, holder: Holder, amount: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="amount"):
            holder.store.grant(holder.id, amount)
        assert holder.totals == (0, 1000)

    def test_only_a_token_is_granted_quota(self, holder: Holder) -> None:
        for token_id in (holder.id + 1, 0, MAX_INTEGER + 1):
            with pytest.raises(TokenNotFound) as caught:
                holder.store.grant(token_id, 1)
            assert caught.value.token_id == token_id
