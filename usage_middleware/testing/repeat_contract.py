"""The contract of idempotency keys: a repeated call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ..errors import OperationConflict, TokenNotFound
from ..stores.base import QuotaStore
from .fixtures import Clock, Holder, QuotaStoreFixtures
from .token_store import THREADS


class RepeatContract(QuotaStoreFixtures):
    """A caller that lost the answer repeats the call with the same idempotency key."""

    def test_a_repeated_charge_changes_nothing(self, holder: Holder) -> None:
        options: dict[str, Any] = {"model": "gpt-4o", "idempotency_key": "once", "input_tokens": 5, "output_tokens": 6}
        token = holder.charge(600, **options)
        assert holder.charge(600, **options) == token
        # The answer to a repeated charge does not depend on later changes of the token.
        holder.store.update(holder.id, enabled=False)
        holder.charge(600, **options)
        assert holder.totals == (600, 400)
        assert holder.store.model_usage(holder.id) == {"gpt-4o": 600}
        (day,) = holder.days
        assert (day.used, day.requests, day.input_tokens, day.output_tokens) == (600, 1, 5, 6)
        assert len(holder.operations) == 1

    def test_without_an_idempotency_key_every_charge_counts(self, holder: Holder) -> None:
        for _ in range(3):
            holder.charge(5)
        assert holder.totals == (15, 985)
        assert len({operation.id for operation in holder.operations}) == 3
        assert {operation.idempotency_key for operation in holder.operations} == {None}

    def test_a_repeated_reserve_changes_nothing(self, holder: Holder, clock: Clock) -> None:
        options: dict[str, Any] = {"idempotency_key": "mine", "expires_in": 60, "at_least": 5, "model": "gpt-4o"}
        operation = holder.reserve(300, **options)
        assert not operation.replayed
        again = holder.reserve(300, **options)
        assert again == operation
        assert again.replayed
        assert holder.totals == (300, 700)
        holder.store.settle(operation, 100, input_tokens=7)
        settled = holder.reserve(300, **options)
        assert (settled.id, settled.replayed, settled.final_amount, settled.held) == (operation.id, True, 100, 100)
        clock.to(61)
        assert holder.reserve(300, **options) == settled
        assert holder.totals == (100, 900)

    @pytest.mark.parametrize(("amount", "used"), [(None, 0), (100, 200), (300, 0)])
    def test_a_repeated_refund_changes_nothing(self, holder: Holder, amount: int | None, used: int) -> None:
        charge = holder.charged(300)
        token = holder.store.refund(charge, amount, idempotency_key="refund")
        assert holder.store.refund(charge, amount, idempotency_key="refund") == token
        assert holder.store.refund(charge.id, amount, idempotency_key="refund") == token
        assert holder.totals == (used, 1000 - used)

    @pytest.mark.parametrize("amount", [50, -50, 0])
    def test_a_repeated_grant_changes_nothing(self, holder: Holder, amount: int) -> None:
        token = holder.store.grant(holder.id, amount, idempotency_key="payment 17")
        assert holder.store.grant(holder.id, amount, idempotency_key="payment 17") == token
        assert holder.totals == (0, 1000 + amount)
        holder.store.grant(holder.id, amount)
        assert holder.totals == (0, 1000 + 2 * amount)

    def test_an_idempotency_key_stands_for_one_call(self, holder: Holder) -> None:
        store = holder.store
        charge = holder.charged(5, model="gpt-4o", idempotency_key="charge", input_tokens=1)
        other = holder.charged(5, idempotency_key="other")
        reservation = holder.reserve(5, idempotency_key="reserve", at_least=2)
        store.refund(charge, 1, idempotency_key="refund")
        store.grant(holder.id, 9, idempotency_key="grant")
        uses: list[tuple[str, Callable[[], object]]] = [
            ("amount", lambda: holder.charge(6, model="gpt-4o", idempotency_key="charge", input_tokens=1)),
            ("model", lambda: holder.charge(5, model="gpt-4", idempotency_key="charge", input_tokens=1)),
            ("model", lambda: holder.charge(5, idempotency_key="charge", input_tokens=1)),
            ("input_tokens", lambda: holder.charge(5, model="gpt-4o", idempotency_key="charge")),
            ("output_tokens", lambda: holder.charge(5, idempotency_key="other", output_tokens=1)),
            ("kind", lambda: holder.reserve(5, model="gpt-4o", idempotency_key="charge")),
            ("amount", lambda: holder.reserve(6, idempotency_key="reserve", at_least=2)),
            ("at_least", lambda: holder.reserve(5, idempotency_key="reserve")),
            ("model", lambda: holder.reserve(5, model="gpt-4o", idempotency_key="reserve", at_least=2)),
            ("expires_in", lambda: holder.reserve(5, idempotency_key="reserve", at_least=2, expires_in=601)),
            ("kind", lambda: holder.charge(5, idempotency_key="reserve")),
            ("kind", lambda: holder.charge(1, idempotency_key="refund")),
            ("amount", lambda: store.refund(charge, 2, idempotency_key="refund")),
            ("amount", lambda: store.refund(charge, idempotency_key="refund")),
            ("refund_of", lambda: store.refund(other, 1, idempotency_key="refund")),
            ("kind", lambda: store.refund(charge, 5, idempotency_key="charge")),
            ("amount", lambda: store.grant(holder.id, 8, idempotency_key="grant")),
            ("kind", lambda: store.grant(holder.id, 5, idempotency_key="other")),
            ("kind", lambda: holder.charge(9, idempotency_key="grant")),
        ]
        made = {operation.id for operation in holder.operations}
        for difference, use in uses:
            with pytest.raises(OperationConflict, match=f" another {difference}$") as caught:
                use()
            assert caught.value.operation_id in made
        assert holder.totals == (14, 995)
        assert store.settle(reservation, 5).total_used == 14

    def test_two_holders_may_choose_the_same_idempotency_key(self, holder: Holder) -> None:
        other = Holder(holder.store)
        holder.charge(5, idempotency_key="1")
        other.charge(6, idempotency_key="1")
        operation = other.reserve(7, idempotency_key="2")
        holder.reserve(8, idempotency_key="2")
        holder.store.grant(holder.id, 1, idempotency_key="3")
        other.store.grant(other.id, 2, idempotency_key="3")
        assert holder.totals == (13, 988)
        assert other.totals == (13, 989)
        assert other.store.find_operation(other.key, "2") == operation

    def test_idempotency_keys_are_exact(self, holder: Holder) -> None:
        for key in ("id", "ID", "id ", " id", "id%", "\u0131d", "x" * 255, "\u4ee4\u724c \U0001f511"):
            holder.charge(1, idempotency_key=key)
            holder.charge(1, idempotency_key=key)
            found = holder.store.find_operation(holder.key, key)
            assert found is not None
            assert found.idempotency_key == key
        assert holder.totals == (8, 992)

    def test_threads_that_repeat_a_call_make_it_once(self, holder: Holder) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda number: holder.charge(1, idempotency_key=str(number % 10)), range(100)))
        assert holder.totals == (10, 990)

    # --- operation, find_operation

    def test_an_operation_is_found_by_its_idempotency_key(self, holder: Holder) -> None:
        store = holder.store
        assert store.find_operation(holder.key, "work") is None
        reservation = holder.reserve(300, idempotency_key="work", model="gpt-4o")
        holder.charge(5)
        found = store.find_operation("sk-" + holder.key, "work")
        assert found == reservation
        assert found is not None
        assert found.replayed
        store.settle(reservation, 200, input_tokens=3, output_tokens=4)
        found = store.find_operation(holder.key, "work")
        assert found == store.operation(reservation.id)
        assert found is not None
        assert (found.held, found.final_amount, found.input_tokens, found.output_tokens) == (200, 200, 3, 4)
        assert store.find_operation(Holder(store).key, "work") is None
        assert store.find_operation("no-such-key", "work") is None
        new_key = store.rotate(holder.id)
        assert store.find_operation(holder.key, "work") is None
        assert store.find_operation(new_key, "work") == found
        store.delete(holder.id)
        assert store.find_operation(new_key, "work") is None

    def test_an_operation_is_found_by_its_id(self, holder: Holder) -> None:
        store = holder.store
        assert store.operation("missing") is None
        reservation = holder.reserve(300, idempotency_key="work")
        found = store.operation(reservation.id)
        assert found == reservation
        assert found is not None
        assert not found.replayed
        assert [found] == holder.operations
        # An idempotency key is not an id.
        assert store.operation("work") is None

    def test_a_pruned_operation_is_a_new_one_when_it_is_repeated(self, holder: Holder, clock: Clock) -> None:
        first = holder.charged(5, idempotency_key="work")
        clock.to(10)
        assert holder.store.prune(clock.now) == 1
        assert holder.store.operation(first.id) is None
        assert holder.store.find_operation(holder.key, "work") is None
        second = holder.charged(5, idempotency_key="work")
        assert second.id != first.id
        assert holder.totals == (10, 990)

    def test_only_a_key_that_is_there_repeats_a_call(self, store: QuotaStore) -> None:
        holder = Holder(store)
        holder.charge(5, idempotency_key="once")
        store.delete(holder.id)
        with pytest.raises(TokenNotFound):
            holder.charge(5, idempotency_key="once")
