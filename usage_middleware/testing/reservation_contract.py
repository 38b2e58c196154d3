"""The contract of reservations: a charge that is not final until it is settled."""

from __future__ import annotations

from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import OperationConflict, OperationNotFound, QuotaExceeded, TokenNotFound
from ..stores.base import QuotaStore
from .fixtures import NOW, Clock, Holder, QuotaStoreFixtures


class ReservationContract(QuotaStoreFixtures):
    """A reservation holds units until its final amount is set."""

    def test_a_reservation_is_an_operation(self, holder: Holder, clock: Clock) -> None:
        operation = holder.reserve(300, model="gpt-4o", idempotency_key="mine", expires_in=60)
        assert (operation.kind, operation.amount, operation.held, operation.token_id) == (
            "reserve",
            300,
            300,
            holder.id,
        )
        assert (operation.model, operation.idempotency_key, operation.unlimited) == ("gpt-4o", "mine", False)
        assert (operation.created_at, operation.expires_at) == (NOW, NOW + 60)
        assert operation.is_open
        assert operation.is_holding
        assert [operation] == holder.operations

    @pytest.mark.parametrize("amount", [0, 1, 299, 300, 301, 1000])
    @pytest.mark.parametrize("by_id", [False, True])
    def test_settle_sets_the_final_amount(self, holder: Holder, amount: int, by_id: bool) -> None:
        reservation = holder.reserve(300)
        assert (*holder.totals, holder.held) == (300, 700, 300)
        operation = reservation.id if by_id else reservation
        token = holder.store.settle(operation, amount)
        assert (token.total_used, token.total_available, token.held) == (amount, 1000 - amount, 0)
        assert holder.store.settle(operation, amount) == token
        assert (*holder.totals, holder.held) == (amount, 1000 - amount, 0)

    def test_what_reservations_hold_is_told(self, store: QuotaStore) -> None:
        for unlimited in (False, True):
            holder = Holder(store, unlimited_quota=unlimited)
            first, second = holder.reserve(300), holder.reserve(50)
            store.refund(holder.charged(100), 10)
            assert holder.held == 350
            store.settle(first, 400)
            assert holder.held == 50
            store.update(holder.id, unlimited_quota=not unlimited)
            assert holder.held == 50
            store.settle(second, 0)
            assert holder.held == 0
            assert store.reserve(holder.key, 0).is_open
            assert holder.held == 0

    def test_settle_may_overdraw_as_the_work_was_done(self, holder: Holder) -> None:
        reservation = holder.reserve(300)
        holder.charge(600)
        assert holder.store.settle(reservation, 450).total_available == -50
        assert holder.totals == (1050, -50)
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(1)
        assert caught.value.available == -50
        holder.charge(0)
        assert holder.store.grant(holder.id, 0).total_available == -50
        assert holder.store.grant(holder.id, 20).total_available == -30
        assert holder.store.grant(holder.id, 40).total_available == 10

    def test_settle_does_not_ask_whether_the_token_may_still_be_used(self, holder: Holder, clock: Clock) -> None:
        reservation = holder.reserve(300, model="gpt-4o")
        holder.store.update(
            holder.id, enabled=False, expires_at=1, model_limits={"other": 1}, model_limits_enabled=True
        )
        holder.store.rotate(holder.id)
        assert holder.store.settle(reservation, 200).total_used == 200

    def test_a_reservation_is_settled_once(self, holder: Holder) -> None:
        reservation = holder.reserve(300)
        holder.store.settle(reservation, 200, input_tokens=5)
        for amount, tokens in ((0, 5), (199, 5), (300, 5), (200, 0)):
            with pytest.raises(OperationConflict) as caught:
                holder.store.settle(reservation, amount, input_tokens=tokens)
            assert caught.value.operation_id == reservation.id
        holder.store.settle(reservation, 200, input_tokens=5)
        assert holder.totals == (200, 800)

    def test_only_a_reservation_is_settled(self, holder: Holder) -> None:
        store = holder.store
        with pytest.raises(OperationNotFound) as missing:
            store.settle("missing", 0)
        assert missing.value.operation_id == "missing"
        store.refund(holder.charged(5), 1)
        store.grant(holder.id, 7)
        for operation in holder.operations:
            for amount in (0, abs(operation.final_amount or 0)):
                with pytest.raises(OperationConflict, match=f"is a {operation.kind}"):
                    store.settle(operation, amount)
        reservation = holder.reserve(5)
        store.delete(holder.id)
        with pytest.raises(TokenNotFound) as deleted:
            store.settle(reservation, 5)
        assert deleted.value.token_id == holder.id

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 10**400, None, "600", True])
    def test_a_reservation_lasts_a_number_of_seconds(self, holder: Holder, seconds: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"^expires_in "):
            holder.reserve(1, expires_in=seconds)
        assert holder.totals == (0, 1000)

    # --- at_least

    @pytest.mark.parametrize(
        ("amount", "at_least", "taken"),
        [(1000, 0, 300), (301, 300, 300), (300, 300, 300), (299, 1, 299), (MAX_INTEGER, 100, 300), (0, 0, 0)],
    )
    def test_a_reservation_takes_what_there_is(self, holder: Holder, amount: int, at_least: int, taken: int) -> None:
        holder.charge(700)
        operation = holder.reserve(amount, at_least=at_least)
        assert (operation.amount, operation.at_least, operation.held) == (amount, at_least, taken)
        assert (*holder.totals, holder.held) == (700 + taken, 300 - taken, taken)
        holder.store.settle(operation, 5)
        assert holder.totals == (705, 295)

    def test_a_reservation_takes_no_less_than_at_least(self, holder: Holder) -> None:
        holder.charge(700)
        with pytest.raises(QuotaExceeded) as caught:
            holder.reserve(1000, at_least=301)
        assert (caught.value.requested, caught.value.available) == (301, 300)
        assert holder.totals == (700, 300)

    def test_a_reservation_takes_what_a_model_has_left(self, store: QuotaStore) -> None:
        for unlimited in (False, True):
            holder = Holder(store, unlimited_quota=unlimited, model_limits={"capped": 100})
            holder.charge(60, model="capped")
            assert holder.reserve(500, at_least=1, model="capped").held == 40
            with pytest.raises(QuotaExceeded) as caught:
                holder.reserve(500, at_least=1, model="capped")
            assert (caught.value.requested, caught.value.available, caught.value.model) == (1, 0, "capped")
            assert holder.reserve(500, at_least=0, model="capped").held == 0

    def test_an_overdrawn_token_has_nothing_to_take(self, holder: Holder) -> None:
        holder.store.settle(holder.reserve(0), 1050)
        assert holder.reserve(100, at_least=0).held == 0
        with pytest.raises(QuotaExceeded) as caught:
            holder.reserve(100, at_least=1)
        assert (caught.value.requested, caught.value.available) == (1, -50)
        assert holder.totals == (1050, -50)

    def test_unlimited_quota_gives_all_that_is_asked_for(self, store: QuotaStore) -> None:
        holder = Holder(store, total_available=5, unlimited_quota=True)
        assert holder.reserve(1000, at_least=1).held == 1000

    @pytest.mark.parametrize("at_least", [-1, 11, True, 1.0, "1"])
    def test_at_least_is_at_most_the_amount(self, holder: Holder, at_least: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="at_least"):
            holder.reserve(10, at_least=at_least)
        assert holder.totals == (0, 1000)
