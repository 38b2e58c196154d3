"""The contract of reservations that are open when a quota renews."""

from __future__ import annotations

import pytest

from ..stores.base import QuotaStore
from .fixtures import Clock, QuotaStoreFixtures
from .renewal_contract import renewing


class HeldContract(QuotaStoreFixtures):
    """What open reservations hold is part of the new period's quota, so that a release carries nothing over."""

    @pytest.mark.parametrize("amount", [0, 30, 60, 80, 160])
    @pytest.mark.parametrize("touched", [False, True])
    def test_what_is_held_is_part_of_the_new_quota(
        self, store: QuotaStore, clock: Clock, amount: int, touched: bool
    ) -> None:
        holder = renewing(store)
        holder.charge(30)
        reservation = holder.reserve(60, expires_in=86_400)
        clock.on("2027-01-16")
        assert (*holder.totals, holder.held) == (90, 40, 60)
        if touched:
            holder.charge(0)
            assert (*holder.totals, holder.held) == (90, 40, 60)
        store.settle(reservation, amount)
        assert (*holder.totals, holder.held) == (30 + amount, 100 - amount, 0)

    def test_what_lapses_in_the_new_period_carries_nothing_over(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        reservation = holder.reserve(60, expires_in=86_400)
        clock.on("2027-01-17")
        assert holder.charge(100).total_available == 0
        assert (*holder.totals, holder.held) == (100, 0, 0)
        store.settle(reservation, 5)  # late
        assert holder.totals == (105, -5)

    def test_debt_is_what_there_was_without_what_is_held(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        reservation = holder.reserve(60, expires_in=1e6)
        store.settle(holder.reserve(40), 70)  # overdrawn by 30, while 60 may be released
        clock.on("2027-01-16")
        assert (*holder.totals, holder.held) == (130, 40, 60)
        store.settle(reservation, 0)
        assert holder.totals == (70, 100)

    @pytest.mark.parametrize("unlimited_first", [False, True])
    @pytest.mark.parametrize("renewed_first", [False, True])
    @pytest.mark.parametrize("recorded", [False, True])
    @pytest.mark.parametrize("amount", [0, 60, 75])
    def test_unlimited_quota_that_is_switched_grants_nothing_twice(
        self,
        store: QuotaStore,
        clock: Clock,
        unlimited_first: bool,
        renewed_first: bool,
        recorded: bool,
        amount: int,
    ) -> None:
        holder = renewing(store, unlimited_quota=unlimited_first)
        reservation = holder.reserve(60, expires_in=1e6)
        assert holder.totals == (60, 100 if unlimited_first else 40)

        def switch() -> None:
            store.update(holder.id, unlimited_quota=not unlimited_first)

        if not renewed_first:
            switch()
        clock.on("2027-01-16")
        if recorded:
            holder.charge(0)
        assert (*holder.totals, holder.held) == (60, 40, 60)
        if renewed_first:
            switch()
        store.settle(reservation, amount)
        # A settle with unlimited quota leaves the new period's quota alone.
        assert holder.totals == (amount, 100 if not unlimited_first else 100 - amount)
        store.refund(reservation)
        assert holder.totals == (0, 100)

    @pytest.mark.parametrize("settled", [None, 0, 25])
    def test_what_was_reserved_with_unlimited_quota_lapses_in_the_new_period(
        self, store: QuotaStore, clock: Clock, settled: int | None
    ) -> None:
        holder = renewing(store, unlimited_quota=True)
        reservation = holder.reserve(60, expires_in=1)
        assert holder.totals == (60, 100)
        store.update(holder.id, unlimited_quota=False)
        clock.on("2027-01-16")
        assert (*holder.totals, holder.held) == (60, 40, 60)  # a read releases nothing
        if settled is None:
            holder.charge(0)
        else:
            store.settle(reservation, settled)
        used = settled or 0
        assert (*holder.totals, holder.held) == (used, 100 - used, 0)
        assert not holder.operations[0].unlimited
