"""The contract of quotas that renew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import OperationConflict, QuotaExceeded, TokenExpired
from ..stores.base import QuotaStore
from ..tokens import Token, id_of
from .fixtures import Clock, Holder, QuotaStoreFixtures


def renewing(store: QuotaStore, renewal: str = "daily", **fields: Any) -> Holder:
    """A token whose quota of 100 units renews."""
    return Holder(store, **{"total_available": 0, "renewal": renewal, "renewal_quota": 100, **fields})


def _seconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).replace(tzinfo=timezone.utc).timestamp())


def _kinds(holder: Holder) -> list[str]:
    return [operation.kind for operation in holder.operations]


class RenewalContract(QuotaStoreFixtures):
    """A new period begins with the renewal's quota: nothing is left over, and debt is not forgiven."""

    @pytest.mark.parametrize(
        ("renewal", "now", "renews_at"),
        [
            ("daily", "2027-01-15T08:00", "2027-01-16"),
            ("daily", "2027-01-15T00:00", "2027-01-16"),
            ("daily", "2028-02-28T23:59:59.999", "2028-02-29"),
            ("daily", "2026-12-31T12:00", "2027-01-01"),
            ("weekly", "2027-01-15T08:00", "2027-01-18"),
            ("weekly", "2027-01-17T23:59:59.999", "2027-01-18"),
            ("weekly", "2027-01-18T00:00", "2027-01-25"),
            ("weekly", "2026-12-31T12:00", "2027-01-04"),
            ("monthly", "2027-01-15T08:00", "2027-02-01"),
            ("monthly", "2027-01-31T23:59:59.999", "2027-02-01"),
            ("monthly", "2027-02-01T00:00", "2027-03-01"),
            ("monthly", "2028-02-29T08:00", "2028-03-01"),
            ("monthly", "2026-12-31T23:59", "2027-01-01"),
        ],
    )
    def test_a_period_begins_at_midnight_in_utc(
        self, store: QuotaStore, clock: Clock, renewal: str, now: str, renews_at: str
    ) -> None:
        clock.on(now)
        holder = renewing(store, renewal)
        assert holder.token.renews_at == _seconds(renews_at)
        assert holder.totals == (0, 100)
        holder.charge(70)
        clock.now = _seconds(renews_at) - 0.001
        assert holder.totals == (70, 30)
        clock.now = _seconds(renews_at)
        assert holder.totals == (70, 100)
        assert holder.token.renews_at > clock.now

    def test_the_first_period_may_begin_with_another_quota(self, store: QuotaStore, clock: Clock) -> None:
        assert Holder(store, total_available=7, renewal="daily", renewal_quota=100).totals == (0, 7)
        assert Holder(store, total_available=7, renewal="daily").token.renewal_quota == 7

    def test_a_read_shows_it_and_writes_nothing(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(70)
        clock.on("2027-01-16T08:00")
        expected = dataclasses.replace(
            next(iter(store.records())).token, total_available=100, renews_at=_seconds("2027-01-17")
        )
        assert store.get(holder.key) == store.get_by_id(holder.id) == next(store.tokens()) == expected
        # A record for another store has what is written.
        (record,) = store.records()
        assert (record.token.total_available, record.token.renews_at) == (30, _seconds("2027-01-16"))
        assert _kinds(holder) == ["charge"]

    def test_the_next_write_records_it(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(70)
        clock.on("2027-01-16T08:00")
        token = holder.charge(5)
        assert (token.total_used, token.total_available, token.renews_at) == (75, 95, _seconds("2027-01-17"))
        assert holder.token == token
        _, renewal, charge = holder.operations
        assert (renewal.kind, renewal.amount, renewal.final_amount) == ("renewal", 70, 70)
        assert (renewal.created_at, renewal.changed_at, renewal.held) == (clock.now, clock.now, 0)
        assert (renewal.token_id, renewal.idempotency_key, renewal.replayed) == (holder.id, None, False)
        assert store.operation(renewal.id) == renewal
        assert renewal.number < charge.number
        for use in (store.refund, store.settle):
            with pytest.raises(OperationConflict, match="is a renewal"):
                use(renewal, 0)
        holder.charge(5)
        assert _kinds(holder) == ["charge", "renewal", "charge", "charge"]

    @pytest.mark.parametrize("write", ["charge 0", "reserve", "settle", "refund", "grant", "update", "rotate", "prune"])
    def test_every_write_records_it(self, store: QuotaStore, clock: Clock, write: str) -> None:
        holder = renewing(store)
        charge = holder.charged(10)
        reservation = holder.reserve(20, expires_in=2 * 86_400)
        if write == "prune":  # prune changes a token only if it releases a reservation of it
            holder.reserve(5, expires_in=1)
        clock.on("2027-01-16T08:00")
        read = holder.token
        writes: dict[str, Callable[[], object]] = {
            "charge 0": lambda: holder.charge(0),
            "reserve": lambda: holder.reserve(0),
            "settle": lambda: store.settle(reservation, 0),
            "refund": lambda: store.refund(charge, 0),
            "grant": lambda: store.grant(holder.id, 0),
            "update": lambda: store.update(holder.id, name="Renamed"),
            "rotate": lambda: setattr(holder, "key", store.rotate(holder.id)),
            "prune": lambda: store.prune(clock.now - 10),
        }
        writes[write]()
        assert _kinds(holder).count("renewal") == 1
        token = holder.token
        assert token.renews_at == read.renews_at == _seconds("2027-01-17")
        assert token.total_available + token.held == 100
        (record,) = store.records()
        assert record.token == token

    def test_a_refused_charge_records_it_too(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(70)
        clock.on("2027-01-16T08:00")
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(101)
        assert caught.value.available == 100
        assert _kinds(holder) == ["charge", "renewal"]

    def test_a_repeated_call_records_nothing_and_shows_it(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(70, idempotency_key="once")
        clock.on("2027-01-16T08:00")
        token = holder.charge(70, idempotency_key="once")
        assert (token.total_used, token.total_available, token.renews_at) == (70, 100, _seconds("2027-01-17"))
        assert _kinds(holder) == ["charge"]

    def test_a_key_that_may_not_be_used_is_not_charged_in_a_new_period(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store, expires_at=_seconds("2027-01-16"))
        clock.on("2027-01-16T08:00")
        with pytest.raises(TokenExpired):
            holder.charge(1)
        assert holder.totals == (0, 100)

    # --- What a period begins with

    def test_what_is_left_over_is_not_carried_over(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        store.grant(holder.id, 900)
        clock.on("2027-01-16")
        assert holder.totals == (0, 100)
        holder.charge(0)
        assert [operation.amount for operation in holder.operations] == [900, -900, 0]

    @pytest.mark.parametrize(
        ("days", "available"), [(0, -250), (1, -150), (2, -50), (3, 50), (4, 100), (5, 100), (3650, 100)]
    )
    def test_debt_is_not_forgiven(self, store: QuotaStore, clock: Clock, days: int, available: int) -> None:
        holder = renewing(store)
        store.settle(holder.reserve(100), 350)
        clock.now += days * 86_400
        assert holder.totals == (350, available)
        holder.charge(0)
        assert holder.totals == (350, available)
        assert _kinds(holder).count("renewal") == (1 if days else 0)

    @pytest.mark.parametrize("one_by_one", [False, True])
    @pytest.mark.parametrize("renewal", ["daily", "weekly", "monthly"])
    def test_many_periods_are_the_same_whenever_they_are_recorded(
        self, store: QuotaStore, clock: Clock, renewal: str, one_by_one: bool
    ) -> None:
        clock.on("2027-12-31T12:00")
        holder = renewing(store, renewal)
        store.settle(holder.reserve(100), 100 + 1234)
        moments = ["2028-01-01", "2028-01-31", "2028-02-29", "2028-03-01", "2028-04-30"]
        for moment in moments if one_by_one else moments[-1:]:
            clock.on(moment)
            holder.charge(0)
        periods = {"daily": 121, "weekly": 17, "monthly": 4}[renewal]
        assert holder.totals == (1334, min(100, periods * 100 - 1234))

    def test_a_new_quota_begins_with_the_next_period(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(40)
        store.update(holder.id, renewal_quota=500)
        assert holder.totals == (40, 60)
        clock.on("2027-01-16")
        assert holder.totals == (40, 500)
        store.update(holder.id, renewal="monthly", renewal_quota=7)
        assert holder.totals == (40, 500)
        assert holder.token.renews_at == _seconds("2027-02-01")
        clock.on("2027-02-01")
        assert holder.totals == (40, 7)

    def test_a_renewal_is_ended(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.charge(40)
        token = store.update(holder.id, renewal="")
        assert (token.renewal, token.renewal_quota, token.renews_at) == ("", 0, 0)
        clock.on("2027-01-17")
        assert holder.totals == (40, 60)
        # It begins again with the next period, not at once.
        store.update(holder.id, renewal="daily", renewal_quota=100)
        assert holder.totals == (40, 60)
        clock.on("2027-01-18")
        assert holder.totals == (40, 100)

    def test_an_update_that_names_the_same_renewal_moves_no_period(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        clock.on("2027-01-20")
        holder.charge(60)
        clock.on("2027-01-15")
        store.update(holder.id, renewal="daily")
        clock.on("2027-01-18")
        assert holder.totals == (60, 40)

    # --- Clocks that jump

    def test_a_clock_that_goes_backwards_renews_once(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        clock.on("2027-01-18")
        holder.charge(60)
        for moment in ("2027-01-15", "2027-01-16", "2020-02-29", "2027-01-18T23:59"):
            clock.on(moment)
            holder.charge(0)
            assert holder.totals == (60, 40)
        clock.on("2027-01-19")
        assert holder.totals == (60, 100)
        assert _kinds(holder).count("renewal") == 1

    def test_a_quota_never_passes_what_a_store_can_hold(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, total_available=MAX_INTEGER, renewal="daily", renewal_quota=1000)
        holder.charge(MAX_INTEGER - 10)
        clock.on("2027-01-16")
        assert holder.totals == (MAX_INTEGER - 10, 10)
        assert holder.charge(4).total_available == 6
        store.update(holder.id, renewal="")
        assert holder.totals == (MAX_INTEGER - 6, 6)

    def test_a_deleted_token_begins_no_period(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store)
        holder.reserve(60, expires_in=1)
        store.delete(holder.id)
        clock.on("2027-01-16")
        assert store.get(holder.key) is None
        assert store.prune(clock.now - 1) == 1

    # --- Moving

    def test_a_moved_token_renews_as_it_would_have(self, store: QuotaStore, clock: Clock) -> None:
        holder = renewing(store, "monthly")
        holder.charge(40)
        (record,) = store.records()
        moved = dataclasses.replace(record, digest=b"\0" * 32)
        clock.on("2027-03-03")
        (token_id,) = store.restore([moved])
        assert token_id is not None
        token = store.get_by_id(token_id)
        assert token is not None
        assert (token.total_available, token.renews_at) == (100, _seconds("2027-04-01"))

    def test_a_record_without_a_next_period_begins_one(self, store: QuotaStore, clock: Clock) -> None:
        _, origin = store.create(renewal="daily", renewal_quota=5)
        (record,) = store.records()

        def restored(number: int, **fields: Any) -> Token:
            token = dataclasses.replace(origin, **fields)
            (token_id,) = store.restore([dataclasses.replace(record, token=token, digest=bytes([number]) * 32)])
            assert token_id is not None
            found = store.get_by_id(token_id)
            assert found is not None
            assert id_of(found) == token_id
            return found

        assert restored(1, renews_at=0).renews_at == _seconds("2027-01-16")
        assert restored(2, renewal="", renewal_quota=0).renews_at == 0
