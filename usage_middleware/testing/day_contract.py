"""The contract of usage by day: it stays exact, however an operation changes later."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import QuotaExceeded
from ..stores.base import QuotaStore
from ..usage import DayUsage
from .fixtures import TODAY, Clock, Holder, QuotaStoreFixtures

_DAY = 86_400
_TOMORROW = TODAY + timedelta(days=1)


class DayContract(QuotaStoreFixtures):
    """Usage is booked on the day on which its operation was made."""

    def test_a_charge_is_booked_by_day_and_model(self, holder: Holder, clock: Clock) -> None:
        assert holder.days == []
        holder.charge(10)
        holder.charge(20, model="b", input_tokens=3, output_tokens=4)
        holder.charge(5, model="a", input_tokens=1)
        clock.to(_DAY)
        holder.charge(0, model="b", output_tokens=9)
        holder.store.charge_by_id(holder.id, 30, model="b", input_tokens=7)
        assert holder.days == [
            DayUsage(TODAY, "", 10, 1, 0, 0),
            DayUsage(TODAY, "a", 5, 1, 1, 0),
            DayUsage(TODAY, "b", 20, 1, 3, 4),
            DayUsage(_TOMORROW, "b", 30, 2, 7, 9),
        ]
        assert holder.totals == (65, 935)

    def test_no_figure_keeps_a_charge_from_being_made(self, holder: Holder, clock: Clock) -> None:
        most = 2**63 - 1
        holder.charge(1, input_tokens=most)
        holder.charge(2, input_tokens=1, output_tokens=7)
        holder.store.settle(holder.reserve(3), 4, input_tokens=most, output_tokens=most)
        assert holder.days == [DayUsage(TODAY, "", 7, 3, most, most)]
        assert holder.totals == (7, 993)

    def test_a_day_begins_at_midnight_in_utc(self, holder: Holder, clock: Clock) -> None:
        for moment in ("2027-01-15T23:59:59.999", "2027-01-16", "2024-02-29T12:00", "2026-12-31T23:59:59"):
            clock.on(moment)
            holder.charge(1)
        assert [str(day.day) for day in holder.days] == ["2024-02-29", "2026-12-31", "2027-01-15", "2027-01-16"]

    def test_a_reservation_is_a_request_when_it_is_made(self, holder: Holder, clock: Clock) -> None:
        reservation = holder.reserve(300, model="a")
        assert holder.days == [DayUsage(TODAY, "a", 300, 1, 0, 0)]
        clock.to(_DAY)
        # All later changes are booked on the day on which it was made.
        holder.store.settle(reservation, 450, input_tokens=10, output_tokens=20)
        holder.store.settle(reservation, 450, input_tokens=10, output_tokens=20)
        assert holder.days == [DayUsage(TODAY, "a", 450, 1, 10, 20)]
        holder.store.refund(reservation, 50, idempotency_key="refund")
        holder.store.refund(reservation, 50, idempotency_key="refund")
        assert holder.days == [DayUsage(TODAY, "a", 400, 1, 10, 20)]
        holder.store.refund(reservation)
        assert holder.days == [DayUsage(TODAY, "a", 0, 1, 10, 20)]
        assert holder.totals == (0, 1000)

    def test_what_lapses_is_taken_from_the_day_on_which_it_was_reserved(self, holder: Holder, clock: Clock) -> None:
        lapsed = holder.reserve(300, expires_in=_DAY)
        holder.reserve(200, model="a", expires_in=_DAY)
        clock.to(_DAY)
        holder.charge(7)
        assert holder.days == [
            DayUsage(TODAY, "", 0, 1, 0, 0),
            DayUsage(TODAY, "a", 0, 1, 0, 0),
            DayUsage(_TOMORROW, "", 7, 1, 0, 0),
        ]
        holder.store.settle(lapsed, 12, output_tokens=3)  # late
        assert holder.days[0] == DayUsage(TODAY, "", 12, 1, 0, 3)
        assert holder.totals == (19, 981)

    def test_a_refused_charge_is_not_booked(self, holder: Holder, clock: Clock) -> None:
        with pytest.raises(QuotaExceeded):
            holder.charge(1001, model="a", input_tokens=5)
        assert holder.days == []
        holder.reserve(700, model="a", expires_in=1)
        clock.to(1)
        with pytest.raises(QuotaExceeded):
            holder.charge(1001, model="a", input_tokens=5)
        # The release that it made is booked.
        assert holder.days == [DayUsage(TODAY, "a", 0, 1, 0, 0)]

    def test_a_reservation_that_takes_less_is_booked_with_what_it_took(self, holder: Holder, clock: Clock) -> None:
        holder.charge(700)
        holder.reserve(1000, at_least=1)
        assert holder.days == [DayUsage(TODAY, "", 1000, 2, 0, 0)]

    def test_unlimited_quota_is_booked_too(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, unlimited_quota=True)
        holder.charge(5000, model="a")
        store.update(holder.id, unlimited_quota=False)
        holder.charge(5, model="a")
        assert holder.days == [DayUsage(TODAY, "a", 5005, 2, 0, 0)]

    def test_a_grant_is_not_usage(self, holder: Holder) -> None:
        holder.store.grant(holder.id, 100)
        holder.store.grant(holder.id, -50)
        assert holder.days == []

    def test_a_range_of_days_includes_both_ends(self, holder: Holder, clock: Clock) -> None:
        for day in range(5):
            clock.to(day * _DAY)
            holder.charge(day + 1, model="b")
            holder.charge(day + 1, model="a")

        def used(first: int, last: int) -> list[int]:
            days = [TODAY + timedelta(days=number) for number in (first, last)]
            return [day.used for day in holder.store.usage_by_day(holder.id, *days)]

        assert used(0, 4) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert used(1, 2) == [2, 2, 3, 3]
        assert used(3, 3) == [4, 4]
        assert used(-9, 0) == [1, 1]
        assert used(5, 9) == used(3, 1) == []

    def test_other_tokens_have_their_own_days(self, holder: Holder, clock: Clock) -> None:
        other = Holder(holder.store)
        holder.charge(5, model="a")
        other.charge(6, model="a")
        assert holder.days == [DayUsage(TODAY, "a", 5, 1, 0, 0)]
        holder.store.delete(holder.id)
        assert holder.days == []
        assert other.days == [DayUsage(TODAY, "a", 6, 1, 0, 0)]
        for token_id in (other.id + 1, 0, -1, MAX_INTEGER + 1):
            assert list(other.store.usage_by_day(token_id, date.min, date.max)) == []

    def test_prune_forgets_no_day(self, holder: Holder, clock: Clock) -> None:
        holder.charge(5, model="a", input_tokens=2)
        holder.store.settle(holder.reserve(10), 8)
        days = holder.days
        clock.to(_DAY)
        assert holder.store.prune(clock.now) == 2
        assert holder.operations == []
        assert holder.days == days
        assert holder.totals == (13, 987)

    def test_a_clock_that_goes_backwards(self, holder: Holder, clock: Clock) -> None:
        clock.to(_DAY)
        holder.charge(5)
        reservation = holder.reserve(50, expires_in=10)
        clock.to(0)
        holder.charge(6)
        holder.store.settle(reservation, 40)
        assert holder.days == [DayUsage(TODAY, "", 6, 1, 0, 0), DayUsage(_TOMORROW, "", 45, 2, 0, 0)]

    def test_the_largest_figures_are_kept(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, total_available=MAX_INTEGER)
        holder.charge(MAX_INTEGER, model="x" * 255, input_tokens=MAX_INTEGER, output_tokens=MAX_INTEGER)
        assert holder.days == [DayUsage(TODAY, "x" * 255, MAX_INTEGER, 1, MAX_INTEGER, MAX_INTEGER)]

    @pytest.mark.parametrize("day", ["2027-01-15", datetime(2027, 1, 15, tzinfo=timezone.utc), None, 20_000])
    def test_a_day_is_a_date(self, holder: Holder, day: Any) -> None:
        for first, last, name in ((day, TODAY, "first_day"), (TODAY, day, "last_day")):
            with pytest.raises(TypeError, match=name):
                holder.store.usage_by_day(holder.id, first, last)
