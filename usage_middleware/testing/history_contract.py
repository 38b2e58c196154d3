"""The contract of history: operations, the log of them, and how they are pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import OperationNotFound
from ..log import LogEntry, LogKind
from ..operations import Operation
from ..stores import history
from ..stores.base import QuotaStore
from ..stores.transaction import Transaction
from .fixtures import NOW, TODAY, Clock, Holder, QuotaStoreFixtures


class HistoryContract(QuotaStoreFixtures):
    """Every change of a token's totals is an operation of its history."""

    def test_history_is_newest_first(self, holder: Holder, clock: Clock) -> None:
        store = holder.store
        Holder(store).charge(1)
        assert list(store.history(holder.id)) == []
        holder.charge(10, model="gpt-4o", idempotency_key="mine", input_tokens=3, output_tokens=4)
        clock.to(1)
        reservation = holder.reserve(20, expires_in=60, at_least=5)
        clock.to(2)
        store.refund(holder.operations[0], idempotency_key="refund")
        clock.to(3)
        store.settle(reservation, 15, input_tokens=5, output_tokens=6)
        clock.to(4)
        store.grant(holder.id, -5, idempotency_key="grant")
        grant, refund, reserve, charge = store.history(holder.id)
        assert grant.number > refund.number > reserve.number > charge.number > 0
        assert (charge.kind, charge.amount, charge.model, charge.idempotency_key) == ("charge", 10, "gpt-4o", "mine")
        assert (charge.held, charge.final_amount, charge.created_at, charge.changed_at) == (0, 10, NOW, NOW + 2)
        assert (charge.input_tokens, charge.output_tokens) == (3, 4)
        assert (reserve.id, reserve.amount, reserve.held, reserve.final_amount) == (reservation.id, 20, 15, 15)
        assert (reserve.at_least, reserve.expires_in, reserve.idempotency_key) == (5, 60, None)
        assert (reserve.created_at, reserve.changed_at, reserve.expires_at) == (NOW + 1, NOW + 3, NOW + 61)
        assert (reserve.input_tokens, reserve.output_tokens) == (5, 6)
        assert (refund.kind, refund.amount, refund.final_amount, refund.refund_of) == ("refund", None, 10, charge.id)
        assert (refund.model, refund.created_at, refund.changed_at) == ("gpt-4o", NOW + 2, NOW + 2)
        assert (grant.kind, grant.amount, grant.final_amount) == ("grant", -5, -5)
        assert (grant.created_at, grant.changed_at, grant.idempotency_key) == (NOW + 4, NOW + 4, "grant")
        for operation in (grant, refund, reserve, charge):
            assert operation.token_id == holder.id
            assert operation.unlimited is False
            assert store.operation(operation.id) == operation
            with pytest.raises(AttributeError):
                operation.held = 1  # type: ignore[misc]

    def test_every_field_of_an_operation_is_kept(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, unlimited_quota=True)
        options: dict[str, Any] = {"model": "gpt-4o", "idempotency_key": "all"}
        reservation = holder.reserve(9, at_least=3, expires_in=0.5, **options)
        store.settle(reservation, 7, input_tokens=5, output_tokens=6)
        store.refund(reservation, 1)
        operations = holder.operations
        # Each field that there is has a value that is not its default, in one of them.
        blank = Operation(id="", token_id=0, kind="charge", amount=None)
        fields = {field.name for field in dataclasses.fields(Operation) if field.name != "replayed"}
        told = {name for name in fields if any(getattr(one, name) != getattr(blank, name) for one in operations)}
        assert told == fields
        for operation in operations:
            assert store.operation(operation.id) == operation
        assert (operations[0].at_least, operations[0].expires_in, operations[0].expires_at) == (3, 0.5, NOW + 0.5)
        assert (operations[0].input_tokens, operations[0].output_tokens, operations[0].held) == (5, 6, 6)
        assert operations[0].unlimited is True

    def test_history_from_one_time_until_another(self, holder: Holder, clock: Clock) -> None:
        for second in range(5):
            clock.to(second + 0.5)
            holder.charge(second)

        def amounts(**times: float) -> list[int | None]:
            return [operation.amount for operation in holder.store.history(holder.id, **times)]

        assert amounts() == [4, 3, 2, 1, 0]
        assert amounts(since=NOW + 1.5) == [4, 3, 2, 1]
        assert amounts(since=NOW + 1.6) == [4, 3, 2]
        assert amounts(until=NOW + 1.5) == [0]
        assert amounts(until=int(NOW) + 2) == [1, 0]
        assert amounts(since=NOW + 1.5, until=NOW + 3.5) == [2, 1]
        assert amounts(since=NOW + 3, until=NOW + 1) == []
        assert amounts(since=0, until=1e12) == [4, 3, 2, 1, 0]
        assert amounts(since=-(2**64), until=2**64) == [4, 3, 2, 1, 0]

    @pytest.mark.parametrize("time", ["2030-01-01", True, float("nan"), float("inf"), 10**400])
    def test_history_takes_times(self, holder: Holder, time: Any) -> None:
        for name in ("since", "until"):
            with pytest.raises((TypeError, ValueError), match=name):
                holder.store.history(holder.id, **{name: time})

    def test_a_long_history_is_read_page_by_page(self, holder: Holder) -> None:
        Holder(holder.store).charge(0)
        for number in range(1010):
            holder.charge(0, idempotency_key=str(number))
        operations = holder.store.history(holder.id)
        assert [operation.idempotency_key for operation in operations] == [*map(str, reversed(range(1010)))]

    def test_a_token_that_is_not_there_has_no_history(self, holder: Holder) -> None:
        deleted = Holder(holder.store)
        deleted.charge(1, model="gpt-4o")
        deleted.store.delete(deleted.id)
        assert holder.store.model_usage(deleted.id) == {}
        assert deleted.days == []
        for token_id in (holder.id + 2, 0, -1, MAX_INTEGER + 1):
            assert list(holder.store.history(token_id)) == []
            assert holder.store.model_usage(token_id) == {}

    def test_open_reservations_are_the_oldest_first(
        self, holder: Holder, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "_PAGE_SIZE", 2)  # so that there are pages
        store, other = holder.store, Holder(holder.store)
        assert list(store.open_reservations()) == []
        mine, others = [], []
        for _ in range(4):
            mine.append(holder.reserve(1))
            others.append(other.reserve(1, expires_in=1))
        holder.reserve(0)
        holder.charge(1)
        store.settle(mine.pop(1), 1)
        store.settle(others.pop(2), 0)
        clock.to(1)
        reservations = list(store.open_reservations())
        assert reservations == [mine[0], others[0], others[1], mine[1], mine[2], others[2]]
        assert set(reservations) <= {*holder.operations, *other.operations}
        other.charge(1)  # releases lapsed reservations
        assert list(store.open_reservations()) == mine


class LogContract(QuotaStoreFixtures):
    """The log is what a holder sees of the history, and every request is counted."""

    def test_the_log_has_charges_and_refunds(self, holder: Holder, clock: Clock) -> None:
        store = holder.store
        charge = holder.charged(10, model="a", input_tokens=3, output_tokens=4)
        clock.to(0.75)
        settled, is_open = holder.reserve(20), holder.reserve(30, model="b")
        store.settle(settled, 25, input_tokens=5, output_tokens=6)
        store.grant(holder.id, 50)
        clock.to(1.5)
        store.refund(charge, 4)
        refund = holder.operations[-1]
        Holder(store).charge(1)
        second, entries = int(NOW), store.log(holder.id)
        assert list(entries) == [
            LogEntry("refund", second + 1, 4, "a", id=refund.id),
            LogEntry("charge", second, 30, "b", id=is_open.id),
            LogEntry("charge", second, 25, "", 5, 6, settled.id),
            LogEntry("charge", second, 10, "a", 3, 4, charge.id),
        ]
        assert store.count_requests(holder.id) == 3

    def test_any_part_of_the_log_can_be_read(self, holder: Holder, clock: Clock) -> None:
        for number in range(12):
            clock.to([0, 0.5, 1.25, 1][number % 4] + number // 4)  # a clock may be set back
            made = holder.charged(number)
            if number % 3 == 0:
                holder.store.refund(made)
        everything = list(holder.store.log(holder.id))
        assert len(everything) == 16
        bounds = [0, int(NOW), int(NOW) + 2, int(NOW) + 9, MAX_INTEGER]
        kinds: list[list[LogKind]] = [["charge"], ["refund"], ["refund", "charge"], []]
        for choice, since, until in product(kinds, bounds, bounds):
            found = [entry for entry in everything if entry.kind in choice and since <= entry.created_at <= until]
            for offset, size in ((0, 100), (0, 3), (2, 4), (len(found), 5), (MAX_INTEGER, 1)):
                part = holder.store.log(holder.id, kinds=choice, since=since, until=until, offset=offset, size=size)
                assert list(part) == found[offset : offset + size]

    def test_a_request_counts_when_it_is_pruned_too(self, holder: Holder, clock: Clock) -> None:
        holder.charge(1, idempotency_key="work")
        holder.charge(1, idempotency_key="work")  # the same request
        holder.reserve(1, expires_in=1)
        clock.to(10)
        assert holder.store.prune(NOW + 5) == 2
        assert (list(holder.store.log(holder.id)), holder.store.count_requests(holder.id)) == ([], 2)
        assert holder.store.today() == TODAY
        clock.to(86_400)
        holder.charge(1)
        assert holder.store.count_requests(holder.id) == 3
        assert holder.store.today() == holder.days[-1].day > TODAY

    def test_a_token_that_is_not_there_has_no_log(self, holder: Holder) -> None:
        holder.charge(1)
        for token_id in (holder.id + 1, 0, -1, MAX_INTEGER + 1):
            assert list(holder.store.log(token_id)) == []
            assert holder.store.count_requests(token_id) == 0


class PruneContract(QuotaStoreFixtures):
    """Old, finished operations are pruned, and no total changes."""

    def test_prune_forgets_what_is_finished_and_old(self, holder: Holder, clock: Clock) -> None:
        store = holder.store
        old = holder.charged(1)
        refunded_later = holder.charged(2)
        settled_later = holder.reserve(4, expires_in=5)
        still_open = holder.reserve(8, expires_in=1000)
        holder.reserve(16, expires_in=5)
        lapses_later = holder.reserve(32, expires_in=20)
        clock.to(15)
        store.refund(refunded_later, 1)
        store.settle(settled_later, 4)
        assert store.count_finished(NOW) == store.prune(NOW) == 0
        assert store.count_finished(NOW + 10) == 2
        assert store.prune(NOW + 10) == 2
        left = {operation.id for operation in holder.operations if operation.kind != "refund"}
        assert left == {refunded_later.id, settled_later.id, still_open.id, lapses_later.id}
        assert holder.totals == (1 + 1 + 4 + 8 + 32, 1000 - 46)
        with pytest.raises(OperationNotFound):
            store.refund(old)
        # With a time in the future, all finished operations are pruned, but no reservation that has not lapsed.
        assert store.count_finished(NOW + 10_000) == 3
        assert store.prune(NOW + 10_000) == 3
        assert {operation.id for operation in holder.operations} == {still_open.id, lapses_later.id}
        assert holder.totals == (46, 954)
        store.settle(still_open, 8)
        store.settle(lapses_later, 32)
        assert holder.totals == (46, 954)

    def test_prune_takes_many(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store, total_available=1010)
        for _ in range(1010):
            holder.reserve(1, expires_in=1)
        clock.to(2)
        assert store.count_finished(NOW + 1) == 1010
        assert store.prune(NOW + 1) == 1010
        assert store.count_finished(NOW + 1) == store.prune(NOW + 1) == 0
        assert holder.totals == (0, 1010)

    def test_prune_takes_little_at_a_time(
        self, store: QuotaStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "_PAGE_SIZE", 2)
        monkeypatch.setattr(history, "MOST_LAPSED", 3)
        holders = [Holder(store) for _ in range(5)]
        for _ in range(4):
            for holder in holders:
                holder.reserve(1, expires_in=1)
        for holder in holders:
            holder.charge(1)
        clock.to(10)

        def left() -> tuple[int, int]:
            return len(list(store.open_reservations())), sum(len(holder.operations) for holder in holders)

        transact, steps = store._transact, [left()]

        def observe(work: Callable[[Transaction], Any]) -> Any:
            result = transact(work)
            steps.append(left())
            return result

        monkeypatch.setattr(store, "_transact", observe)
        assert steps[0] == (20, 25)
        assert store.prune(NOW + 5) == 25
        assert steps[-1] == (0, 0)
        # A charge waits for one page of operations or for some of one token's reservations, not for all.
        for (held, kept), (still_held, still_kept) in pairwise(steps):
            assert held - still_held <= 3
            assert kept - still_kept <= 2
        assert [holder.totals for holder in holders] == [(1, 999)] * 5

    def test_prune_takes_what_lapsed_until_then(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(5, expires_in=10)
        clock.to(20)
        assert holder.store.prune(NOW + 9.5) == 0
        assert holder.totals == (5, 995)
        assert holder.store.prune(NOW + 10) == 1
        assert holder.totals == (0, 1000)

    def test_prune_forgets_the_reservations_of_a_token_that_is_gone(self, holder: Holder, clock: Clock) -> None:
        holder.reserve(5, expires_in=10)
        holder.store.delete(holder.id)
        assert list(holder.store.open_reservations()) == []
        clock.to(5)
        assert holder.store.prune(NOW + 5) == 0
        clock.to(20)
        assert holder.store.count_finished(NOW + 10) == 1
        assert holder.store.prune(NOW + 10) == 1

    def test_counting_what_is_finished_changes_nothing(self, holder: Holder, clock: Clock) -> None:
        holder.charge(5)
        holder.reserve(5, expires_in=10)
        clock.to(20)
        operations = holder.operations
        assert holder.store.count_finished(NOW + 15) == 2
        assert holder.operations == operations
        assert holder.totals == (10, 990)

    @pytest.mark.parametrize("before", ["2030-01-01", None, True, float("nan"), float("inf"), 10**400])
    def test_prune_takes_a_time(self, holder: Holder, before: Any) -> None:
        holder.charge(1)
        for method in (holder.store.prune, holder.store.count_finished):
            with pytest.raises((TypeError, ValueError), match="before"):
                method(before)
        assert len(holder.operations) == 1
