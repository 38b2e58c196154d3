"""The contract of reservations that lapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from ..errors import QuotaExceeded
from ..stores import ledger
from ..stores.base import QuotaStore
from ..stores.transaction import Transaction
from .fixtures import NOW, Clock, Holder, QuotaStoreFixtures


class LapseContract(QuotaStoreFixtures):
    """A lapsed reservation is released before any request is refused for lack of quota."""

    def test_a_lapsed_reservation_is_released_before_anything_is_refused(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(700, expires_in=60)
        holder.reserve(100, expires_in=600)
        clock.to(59.9)
        with pytest.raises(QuotaExceeded):
            holder.charge(900)
        clock.to(60)
        holder.charge(900)
        assert (*holder.totals, holder.held) == (1000, 0, 100)
        with pytest.raises(QuotaExceeded):
            holder.reserve(1)

    def test_a_lapsed_reservation_is_released_once(self, holder: Holder, clock: Clock) -> None:
        reservation = holder.reserve(700, expires_in=60)
        for seconds in (60, 61, 62):
            clock.to(seconds)
            holder.charge(100)
        assert holder.totals == (300, 700)
        # It stays open, for a late settle.
        assert holder.operations[0] == dataclasses.replace(reservation, held=0, changed_at=NOW + 60)
        assert holder.operations[0].is_open

    def test_a_lapsed_reservation_is_released_to_its_model(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, model_limits={"capped": 100})
        holder.reserve(100, model="capped", expires_in=60)
        clock.to(60)
        holder.charge(100, model="capped")
        assert store.model_usage(holder.id) == {"capped": 100}

    def test_a_lapsed_reservation_is_released_before_quota_is_taken_back(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(700, expires_in=60)
        clock.to(60)
        assert holder.store.grant(holder.id, -1000).total_available == 0

    def test_a_lapsed_reservation_is_released_before_less_is_taken(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(700, expires_in=60)
        clock.to(60)
        assert holder.reserve(800, at_least=1).held == 800

    @pytest.mark.parametrize("amount", [0, 700, 800])
    @pytest.mark.parametrize("touched", [False, True])
    def test_a_late_settle_still_charges(self, holder: Holder, clock: Clock, amount: int, touched: bool) -> None:
        reservation = holder.reserve(700, expires_in=60)
        clock.to(61)
        if touched:  # which releases the lapsed reservation
            holder.charge(0)
            assert (*holder.totals, holder.held) == (0, 1000, 0)
        holder.store.settle(reservation, amount)
        holder.store.settle(reservation, amount)
        assert (*holder.totals, holder.held) == (amount, 1000 - amount, 0)

    def test_a_clock_that_is_set_back_does_no_harm(self, holder: Holder, clock: Clock) -> None:
        reservation = holder.reserve(700, expires_in=60)
        clock.to(60)
        holder.charge(0)
        clock.to(0)
        holder.charge(300)
        holder.store.settle(reservation, 700)
        assert holder.totals == (1000, 0)
        assert holder.operations[0].changed_at == NOW

    def test_a_refusal_keeps_what_it_has_released(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(700, model="gpt-4o", expires_in=60)
        clock.to(60)
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(1001)
        assert (caught.value.requested, caught.value.available, caught.value.held) == (1001, 1000, 0)
        assert (*holder.totals, holder.held) == (0, 1000, 0)
        assert holder.store.model_usage(holder.id) in ({}, {"gpt-4o": 0})
        holder.charge(1000)

    def test_a_repeated_call_releases_nothing(self, holder: Holder, clock: Clock) -> None:
        holder.charge(1, idempotency_key="once")
        holder.reserve(700, expires_in=60)
        clock.to(60)
        holder.charge(1, idempotency_key="once")
        assert holder.totals == (701, 299)

    def test_a_lapsed_reservation_is_released_to_its_own_token(self, holder: Holder, clock: Clock) -> None:
        other = Holder(holder.store)
        other.reserve(700, expires_in=60)
        clock.to(60)
        holder.charge(1)
        assert holder.totals == (1, 999)
        assert other.totals == (700, 300)

    def test_an_update_keeps_what_has_lapsed_exact(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(700, expires_in=60)
        holder.reserve(100, expires_in=600)
        clock.to(60)
        token = holder.store.update(holder.id, name="Renamed")
        assert token == holder.token
        assert (token.name, *holder.totals, holder.held) == ("Renamed", 100, 900, 100)

    # --- Many of them

    @pytest.fixture
    def portions(self, store: QuotaStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many reservations hold units, after each transaction; each releases three of them at most."""
        monkeypatch.setattr(ledger, "MOST_LAPSED", 3)
        transact, counts = store._transact, list[int]()

        def observe(work: Callable[[Transaction], Any]) -> Any:
            result = transact(work)
            counts.append(sum(1 for _ in store.open_reservations()))
            return result

        monkeypatch.setattr(store, "_transact", observe)
        return counts

    @pytest.mark.parametrize("lapsed", [2, 3, 4, 10])
    def test_a_charge_that_is_refused_has_released_all_in_portions(
        self, holder: Holder, clock: Clock, portions: list[int], lapsed: int
    ) -> None:
        for _ in range(lapsed):
            holder.reserve(10, expires_in=1)
        holder.reserve(7, expires_in=60)
        clock.to(1)
        portions.clear()
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(994)
        assert (caught.value.requested, caught.value.available, caught.value.held) == (994, 993, 7)
        assert portions == [1 + max(lapsed - released, 0) for released in range(3, lapsed + 3, 3)]
        assert (*holder.totals, holder.held) == (7, 993, 7)

    def test_a_charge_that_needs_them_waits_for_all_portions(
        self, holder: Holder, clock: Clock, portions: list[int]
    ) -> None:
        for _ in range(10):
            holder.reserve(100, expires_in=1)
        clock.to(1)
        portions.clear()
        # Enough after two of them.
        assert holder.charge(600).total_available == 0
        assert portions == [7, 4]
        assert (*holder.totals, holder.held) == (1000, 0, 400)
        # It takes less only if nothing is left to be released.
        assert holder.reserve(1000, at_least=1).held == 400
        assert (*holder.totals, holder.held) == (1000, 0, 400)

    def test_a_model_s_limit_waits_for_all_portions(self, store: QuotaStore, clock: Clock, portions: list[int]) -> None:
        holder = Holder(store, model_limits={"capped": 100})
        for _ in range(10):
            holder.reserve(10, model="capped", expires_in=1)
        clock.to(1)
        assert holder.charge(100, model="capped").total_used == 100
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(1, model="capped")
        assert (caught.value.available, caught.value.held) == (0, 0)

    def test_other_tokens_are_charged_between_portions(
        self, holder: Holder, clock: Clock, portions: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, other = holder.store, Holder(holder.store)
        for _ in range(10):
            holder.reserve(10, expires_in=1)
        clock.to(1)
        transact = store._transact

        def charge_the_other_first(work: Callable[[Transaction], Any]) -> Any:
            monkeypatch.setattr(store, "_transact", transact)
            other.charge(1)
            monkeypatch.setattr(store, "_transact", charge_the_other_first)
            return transact(work)

        monkeypatch.setattr(store, "_transact", charge_the_other_first)
        with pytest.raises(QuotaExceeded):
            holder.charge(1001)
        assert other.totals == (4, 996)
        assert holder.totals == (0, 1000)

    def test_a_settle_and_an_update_release_no_more_than_a_portion(
        self, holder: Holder, clock: Clock, portions: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reservations = [holder.reserve(10, expires_in=number / 10) for number in range(1, 11)]
        clock.to(1)
        portions.clear()
        holder.store.settle(reservations[-1], 25)
        assert portions == [6]
        assert (*holder.totals, holder.held) == (85, 915, 60)
        holder.store.settle(reservations[0], 10)  # late
        assert (*holder.totals, holder.held) == (65, 935, 30)
