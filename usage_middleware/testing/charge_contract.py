"""The contract of charges: what a host relies on when it charges a key."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import ModelNotAllowed, QuotaExceeded, TokenDisabled, TokenExpired, TokenNotFound
from ..stores.base import QuotaStore
from .fixtures import BAD_AMOUNTS, BAD_TEXTS, NOW, Clock, Holder, QuotaStoreFixtures
from .token_store import THREADS


class ChargeContract(QuotaStoreFixtures):
    """Charges and reservations take exact amounts, or are refused and change nothing."""

    def test_a_charge_moves_quota_from_available_to_used(self, holder: Holder) -> None:
        token = holder.charge(400)
        assert (token.total_used, token.total_available, token.total_granted) == (400, 600, 1000)
        assert holder.totals == (400, 600)
        assert holder.charge(0) == token
        holder.charge(600)
        assert holder.totals == (1000, 0)

    @pytest.mark.parametrize("make", [Holder.charge, Holder.reserve])
    def test_more_than_is_left_is_refused_and_changes_nothing(self, holder: Holder, make: Callable[..., Any]) -> None:
        make(holder, 999)
        operations = holder.operations
        for amount in (2, 1000, MAX_INTEGER):
            with pytest.raises(QuotaExceeded) as caught:
                make(holder, amount, idempotency_key="refused", model="gpt-4o")
            assert (caught.value.requested, caught.value.available, caught.value.model) == (amount, 1, None)
            assert str(holder.id) in str(caught.value)
        assert holder.totals == (999, 1)
        assert holder.operations == operations
        assert holder.store.model_usage(holder.id) == {}
        # A refusal does not use up the idempotency key.
        make(holder, 1, idempotency_key="refused")
        make(holder, 0)
        assert holder.totals == (1000, 0)

    def test_a_refusal_tells_what_open_reservations_hold(self, holder: Holder) -> None:
        holder.reserve(300)
        holder.reserve(200, model="gpt-4o")
        holder.charge(400)
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(101)
        assert (caught.value.requested, caught.value.available, caught.value.held) == (101, 100, 500)
        with pytest.raises(QuotaExceeded) as caught:
            holder.store.grant(holder.id, -101)
        assert (caught.value.requested, caught.value.available, caught.value.held) == (101, 100, 500)

    def test_unlimited_quota_counts_and_leaves_available_alone(self, store: QuotaStore) -> None:
        holder = Holder(store, total_available=5, unlimited_quota=True)
        assert holder.charge(1000).total_used == 1000
        assert holder.totals == (1000, 5)

    @pytest.mark.parametrize("make", [Holder.charge, Holder.reserve])
    def test_a_key_that_may_not_be_used_is_not_charged(
        self, store: QuotaStore, clock: Clock, make: Callable[..., Any]
    ) -> None:
        holder = Holder(store, expires_at=int(NOW) + 10)
        clock.to(9.9)
        make(holder, 1)
        clock.to(10)
        with pytest.raises(TokenExpired) as expired:
            make(holder, 1)
        assert expired.value.token_id == holder.id
        store.update(holder.id, expires_at=1)
        with pytest.raises(TokenExpired):
            make(holder, 1)
        for never in (0, -1):
            store.update(holder.id, expires_at=never)
            make(holder, 1)
        store.update(holder.id, enabled=False)
        with pytest.raises(TokenDisabled) as disabled:
            make(holder, 1)
        assert disabled.value.token_id == holder.id
        assert holder.totals == (3, 997)
        store.delete(holder.id)
        with pytest.raises(TokenNotFound) as missing:
            make(holder, 1)
        assert holder.key not in str(missing.value)

    @pytest.mark.parametrize(("amount", "error"), [*BAD_AMOUNTS, pytest.param(None, TypeError, id="None")])
    def test_an_amount_is_a_number_of_units(self, holder: Holder, amount: Any, error: type[Exception]) -> None:
        holder.charge(10)
        operation = holder.reserve(10)
        for use in (
            lambda: holder.charge(amount),
            lambda: holder.reserve(amount),
            lambda: holder.store.settle(operation, amount),
        ):
            with pytest.raises(error, match="amount"):
                use()
        assert holder.totals == (20, 980)

    @pytest.mark.parametrize(("tokens", "error"), [*BAD_AMOUNTS, pytest.param(None, TypeError, id="None")])
    @pytest.mark.parametrize("what", ["input_tokens", "output_tokens"])
    def test_input_and_output_tokens_are_numbers(
        self, holder: Holder, what: str, tokens: Any, error: type[Exception]
    ) -> None:
        operation = holder.reserve(10)
        figures: dict[str, Any] = {what: tokens}
        uses: list[Callable[[], object]] = [
            lambda: holder.charge(1, **figures),
            lambda: holder.store.charge_by_id(holder.id, 1, **figures),
            lambda: holder.store.settle(operation, 1, **figures),
        ]
        for use in uses:
            with pytest.raises(error, match=what):
                use()
        assert holder.totals == (10, 990)

    def test_the_range_of_an_amount_is_told(self, holder: Holder) -> None:
        with pytest.raises(ValueError, match=r" 0 to 2\*\*63 - 1 .* -1$"):
            holder.charge(-1)
        with pytest.raises(ValueError, match=rf" -\(2\*\*63 - 1\) to 2\*\*63 - 1 .* -{MAX_INTEGER + 1}$"):
            holder.store.grant(holder.id, -MAX_INTEGER - 1)

    @pytest.mark.parametrize(("name", "error"), BAD_TEXTS)
    def test_models_and_idempotency_keys_are_short_texts(
        self, holder: Holder, name: Any, error: type[Exception]
    ) -> None:
        charge = holder.charged(10)
        store = holder.store
        uses: list[tuple[str, Callable[[], object]]] = [
            ("model", lambda: holder.charge(1, model=name)),
            ("model", lambda: holder.reserve(1, model=name)),
            ("idempotency_key", lambda: holder.charge(1, idempotency_key=name)),
            ("idempotency_key", lambda: holder.reserve(1, idempotency_key=name)),
            ("idempotency_key", lambda: store.refund(charge, idempotency_key=name)),
            ("idempotency_key", lambda: store.grant(holder.id, 1, idempotency_key=name)),
            ("idempotency_key", lambda: store.find_operation(holder.key, name)),
            ("operation", lambda: store.settle(name, 1)),
            ("operation", lambda: store.refund(name)),
            ("operation_id", lambda: store.operation(name)),
        ]
        for argument, use in uses:
            with pytest.raises(error, match=f"^{argument} "):
                use()
        assert holder.totals == (10, 990)

    def test_an_operator_charges_by_id(self, store: QuotaStore) -> None:
        holder = Holder(store, model_limits={"gpt-4o": 100})
        options: dict[str, Any] = {"model": "gpt-4o", "idempotency_key": "once", "input_tokens": 3, "output_tokens": 4}
        token = store.charge_by_id(holder.id, 60, **options)
        assert holder.charge(60, **options) == token
        assert holder.totals == (60, 940)
        with pytest.raises(QuotaExceeded):
            store.charge_by_id(holder.id, 41, model="gpt-4o")
        for token_id in (holder.id + 1, 0, MAX_INTEGER + 1):
            with pytest.raises(TokenNotFound) as caught:
                store.charge_by_id(token_id, 1)
            assert caught.value.token_id == token_id

    def test_totals_stop_at_the_largest_64_bit_integer(self, store: QuotaStore) -> None:
        holder = Holder(store, total_available=2**63 - 1)
        with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
            store.grant(holder.id, 1)
        everything = holder.charged(MAX_INTEGER, model="gpt-4o")
        assert holder.totals == (MAX_INTEGER, 0)
        with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
            store.grant(holder.id, 1)
        store.update(holder.id, unlimited_quota=True)
        for use in (
            lambda: holder.charge(1),
            lambda: holder.reserve(MAX_INTEGER),
            lambda: store.settle(holder.reserve(0), 1),
        ):
            with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
                use()
        assert holder.totals == (MAX_INTEGER, 0)
        store.refund(everything)
        assert holder.totals == (0, MAX_INTEGER)

    # --- Many at once

    def test_threads_do_not_overdraw(self, store: QuotaStore) -> None:
        holder = Holder(store, total_available=100)

        def charge(_: int) -> int:
            try:
                return holder.charge(3).total_used and 3
            except QuotaExceeded:
                return 0

        with ThreadPoolExecutor(THREADS) as pool:
            charged = sum(pool.map(charge, range(100)))
        assert charged == 99
        assert holder.totals == (99, 1)


class ModelLimitContract(QuotaStoreFixtures):
    """Model limits are enforced when they are enabled."""

    @pytest.mark.parametrize("make", [Holder.charge, Holder.reserve])
    def test_model_limits_are_enforced(self, store: QuotaStore, make: Callable[..., Any]) -> None:
        holder = Holder(store, model_limits={"capped": 100, "free": True, "none": 0})
        make(holder, 60, model="capped")
        with pytest.raises(QuotaExceeded) as caught:
            make(holder, 41, model="capped")
        assert (caught.value.requested, caught.value.available, caught.value.model) == (41, 40, "capped")
        make(holder, 40, model="capped")
        make(holder, 0, model="none")
        make(holder, 300, model="free")
        make(holder, 200)  # without a model
        for model in ("capped", "none"):
            with pytest.raises(QuotaExceeded) as caught:
                make(holder, 1, model=model)
            assert (caught.value.requested, caught.value.available, caught.value.model) == (1, 0, model)
        for amount in (0, 1):
            with pytest.raises(ModelNotAllowed) as refused:
                make(holder, amount, model="other")
            assert refused.value.model == "other"
        assert holder.totals == (600, 400)
        assert store.model_usage(holder.id) == {"capped": 100, "free": 300}

    def test_a_refusal_tells_what_open_reservations_hold_of_the_model(self, store: QuotaStore) -> None:
        holder = Holder(store, model_limits={"capped": 100, "free": True})
        holder.reserve(30, model="capped")
        holder.reserve(20, model="capped")
        holder.reserve(400, model="free")
        holder.reserve(100)
        holder.charge(10, model="capped")
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(41, model="capped")
        assert (caught.value.available, caught.value.held, caught.value.model) == (40, 50, "capped")
        # All these reservations are held of the token's own quota.
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(441, model="free")
        assert (caught.value.available, caught.value.held, caught.value.model) == (440, 550, None)

    def test_a_model_that_is_not_limited_still_has_only_the_token_s_quota(self, store: QuotaStore) -> None:
        holder = Holder(store, model_limits={"free": True, "much": 5000})
        for model in ("free", "much"):
            with pytest.raises(QuotaExceeded):
                holder.charge(1001, model=model)

    def test_model_limits_hold_with_unlimited_quota_too(self, store: QuotaStore) -> None:
        holder = Holder(store, unlimited_quota=True, model_limits={"capped": 100})
        holder.charge(100, model="capped")
        with pytest.raises(QuotaExceeded):
            holder.charge(1, model="capped")
        with pytest.raises(ModelNotAllowed):
            holder.charge(1, model="other")

    def test_what_a_model_used_counts_from_before_limits_were_enabled(self, holder: Holder) -> None:
        holder.charge(80, model="gpt-4o")
        holder.store.update(holder.id, model_limits={"gpt-4o": 100}, model_limits_enabled=True)
        with pytest.raises(QuotaExceeded):
            holder.charge(21, model="gpt-4o")
        holder.charge(20, model="gpt-4o")

    def test_settles_and_refunds_count_for_the_model(self, store: QuotaStore) -> None:
        holder = Holder(store, model_limits={"capped": 100})
        store.settle(holder.reserve(100, model="capped"), 30)
        charge = holder.charged(70, model="capped")
        store.refund(charge, 50)
        holder.charge(50, model="capped")
        assert store.model_usage(holder.id) == {"capped": 100}
        store.settle(holder.reserve(0, model="capped"), 7)  # the work was done
        assert store.model_usage(holder.id) == {"capped": 107}
        holder.charge(0, model="capped")
        with pytest.raises(QuotaExceeded) as caught:
            holder.charge(1, model="capped")
        assert caught.value.available == -7

    def test_models_are_told_apart_exactly(self, store: QuotaStore) -> None:
        models = ("gpt", "GPT", "gpt ", " gpt", "gpt%", "\u0131d", "x" * 255, "\u6a21\u578b \U0001f511")
        holder = Holder(store, model_limits=dict.fromkeys(models, 1))
        for model in models:
            holder.charge(1, model=model)
            with pytest.raises(QuotaExceeded):
                holder.charge(1, model=model)
        assert store.model_usage(holder.id) == dict.fromkeys(models, 1)
        assert {day.model for day in holder.days} == set(models)
