"""The contract of the ledger: what a host relies upon when it charges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import (
    ModelNotAllowed,
    OperationConflict,
    OperationNotFound,
    QuotaExceeded,
    TokenDisabled,
    TokenExpired,
    TokenNotFound,
)
from ..operations import Operation
from ..stores import ledger
from ..stores.base import QuotaStore
from ..stores.transaction import Transaction
from ..tokens import Token
from .token_store import THREADS

_NOW = 1_800_000_000.0

_BAD_AMOUNTS = [
    pytest.param(-1, ValueError, id="negative"),
    pytest.param(MAX_INTEGER + 1, ValueError, id="too large"),
    pytest.param(True, TypeError, id="bool"),
    pytest.param(1.0, TypeError, id="float"),
    pytest.param("1", TypeError, id="str"),
]
_BAD_NAMES = [
    pytest.param("", ValueError, id="empty"),
    pytest.param("x" * 256, ValueError, id="too long"),
    pytest.param("a\0b", ValueError, id="NUL"),
    pytest.param("\ud800", ValueError, id="not even text"),
    pytest.param(b"x", TypeError, id="bytes"),
    pytest.param(1, TypeError, id="int"),
]


class Account:
    """One token of a store, and its key: what a test charges."""

    def __init__(self, store: QuotaStore, **fields: Any) -> None:
        self.store = store
        key, token = store.create(**{"total_available": 1000, **fields})
        assert token.id is not None
        self.key = key.removeprefix("sk-")
        self.id = token.id

    @property
    def totals(self) -> tuple[int, int]:
        """What is used, and what is available."""
        token = self.store.get(self.key)
        assert token is not None
        assert token == self.store.get_by_id(self.id)
        return token.total_used, token.total_available

    def charge(self, amount: int, **options: Any) -> Token:
        return self.store.charge(self.key, amount, **options)

    def reserve(self, amount: int, **options: Any) -> Operation:
        return self.store.reserve(self.key, amount, **options)


class LedgerContract:
    """What a host relies upon when it charges."""

    @pytest.fixture
    def account(self, store: QuotaStore) -> Account:
        """A token with 1000 quota units."""
        return Account(store)

    @pytest.fixture
    def clock(self, store: QuotaStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        """Sets the store's clock to a number of seconds after some time."""

        def set_to(seconds: float) -> None:
            monkeypatch.setattr(store, "_now", lambda: _NOW + seconds, raising=False)

        set_to(0)
        return set_to

    # --- charge

    def test_a_charge_moves_quota_from_available_to_used(self, account: Account) -> None:
        token = account.charge(400)
        assert (token.total_used, token.total_available, token.total_granted) == (400, 600, 1000)
        assert account.totals == (400, 600)
        assert account.charge(0) == token
        account.charge(600)
        assert account.totals == (1000, 0)

    @pytest.mark.parametrize("make", [Account.charge, Account.reserve])
    def test_more_than_is_left_is_refused_and_changes_nothing(self, account: Account, make: Callable[..., Any]) -> None:
        make(account, 999)
        history = list(account.store.history(account.id))
        for amount in (2, 1000, MAX_INTEGER):
            with pytest.raises(QuotaExceeded, match=f"token {account.id} has 1 .* {amount} "):
                make(account, amount, idempotency_key="refused", model="gpt-4o")
        assert account.totals == (999, 1)
        assert list(account.store.history(account.id)) == history
        assert account.store.model_usage(account.id) == {}
        # A refusal does not use up the operation's id.
        make(account, 1, idempotency_key="refused")
        make(account, 0)
        assert account.totals == (1000, 0)

    def test_unlimited_quota_counts_and_leaves_available_alone(self, store: QuotaStore) -> None:
        account = Account(store, total_available=5, unlimited_quota=True)
        assert account.charge(1000).total_used == 1000
        assert account.totals == (1000, 5)

    @pytest.mark.parametrize("make", [Account.charge, Account.reserve])
    def test_a_key_that_may_not_be_used_is_not_charged(
        self, store: QuotaStore, clock: Callable[[float], None], make: Callable[..., Any]
    ) -> None:
        account = Account(store, expires_at=int(_NOW) + 10)
        clock(9.9)
        make(account, 1)
        clock(10)
        with pytest.raises(TokenExpired, match=f"token {account.id} "):
            make(account, 1)
        store.update(account.id, expires_at=1)
        with pytest.raises(TokenExpired):
            make(account, 1)
        for never in (0, -1):
            store.update(account.id, expires_at=never)
            make(account, 1)
        store.update(account.id, enabled=False)
        with pytest.raises(TokenDisabled, match=f"token {account.id} "):
            make(account, 1)
        assert account.totals == (3, 997)
        store.delete(account.id)
        with pytest.raises(TokenNotFound, match=r"\bkey$") as caught:
            make(account, 1)
        assert account.key not in str(caught.value)

    @pytest.mark.parametrize(("amount", "error"), [*_BAD_AMOUNTS, pytest.param(None, TypeError, id="None")])
    def test_an_amount_is_a_number_of_units(self, account: Account, amount: Any, error: type[Exception]) -> None:
        account.charge(10, idempotency_key="charge")
        account.reserve(10, idempotency_key="reserve")
        for use in (
            lambda: account.charge(amount),
            lambda: account.reserve(amount),
            lambda: account.store.settle("reserve", amount),
        ):
            with pytest.raises(error, match="amount"):
                use()
        assert account.totals == (20, 980)

    def test_the_range_of_an_amount_is_told(self, account: Account) -> None:
        with pytest.raises(ValueError, match=r" 0 to 2\*\*63 - 1 .* -1$"):
            account.charge(-1)
        with pytest.raises(ValueError, match=rf" -\(2\*\*63 - 1\) to 2\*\*63 - 1 .* -{MAX_INTEGER + 1}$"):
            account.store.grant(account.id, -MAX_INTEGER - 1)

    @pytest.mark.parametrize(("name", "error"), _BAD_NAMES)
    def test_models_and_operation_ids_are_short_texts(
        self, account: Account, name: Any, error: type[Exception]
    ) -> None:
        account.charge(10, idempotency_key="charge")
        uses: list[tuple[str, Callable[[], object]]] = [
            ("model", lambda: account.charge(1, model=name)),
            ("operation_id", lambda: account.charge(1, idempotency_key=name)),
            ("operation_id", lambda: account.reserve(1, idempotency_key=name)),
            ("operation_id", lambda: account.store.settle(name, 1)),
            ("operation_id", lambda: account.store.refund(name)),
            ("refund_id", lambda: account.store.refund("charge", idempotency_key=name)),
        ]
        for argument, use in uses:
            with pytest.raises(error, match=f"^{argument} "):
                use()
        assert account.totals == (10, 990)

    def test_an_operator_charges_by_id(self, store: QuotaStore) -> None:
        account = Account(store, model_limits={"gpt-4o": 100})
        token = store.charge_by_id(account.id, 60, model="gpt-4o", idempotency_key="once")
        assert account.charge(60, model="gpt-4o", idempotency_key="once") == token
        assert account.totals == (60, 940)
        with pytest.raises(QuotaExceeded):
            store.charge_by_id(account.id, 41, model="gpt-4o")
        for token_id in (account.id + 1, 0, MAX_INTEGER + 1):
            with pytest.raises(TokenNotFound):
                store.charge_by_id(token_id, 1)

    def test_a_key_is_a_str(self, account: Account) -> None:
        for key in (None, b"key", 5):
            with pytest.raises(TypeError, match=f"key .* {type(key).__name__}$"):
                account.store.charge(key, 1)  # type: ignore[arg-type]

    # --- model limits

    @pytest.mark.parametrize("make", [Account.charge, Account.reserve])
    def test_model_limits_are_enforced(self, store: QuotaStore, make: Callable[..., Any]) -> None:
        account = Account(store, model_limits={"capped": 100, "free": True, "none": 0})
        make(account, 60, model="capped")
        with pytest.raises(QuotaExceeded, match=f"token {account.id} has 40 .* 'capped', 41 "):
            make(account, 41, model="capped")
        make(account, 40, model="capped")
        make(account, 0, model="none")
        make(account, 300, model="free")
        make(account, 200)  # without a model
        for model in ("capped", "none"):
            with pytest.raises(QuotaExceeded, match=f"has 0 .* '{model}', 1 "):
                make(account, 1, model=model)
        for amount in (0, 1):
            with pytest.raises(ModelNotAllowed, match=f"token {account.id} .* 'other'"):
                make(account, amount, model="other")
        assert account.totals == (600, 400)
        assert store.model_usage(account.id) == {"capped": 100, "free": 300}

    def test_a_model_that_is_not_limited_still_has_only_the_token_s_quota(self, store: QuotaStore) -> None:
        account = Account(store, model_limits={"free": True, "much": 5000})
        for model in ("free", "much"):
            with pytest.raises(QuotaExceeded):
                account.charge(1001, model=model)

    def test_model_limits_hold_with_unlimited_quota_too(self, store: QuotaStore) -> None:
        account = Account(store, unlimited_quota=True, model_limits={"capped": 100})
        account.charge(100, model="capped")
        with pytest.raises(QuotaExceeded):
            account.charge(1, model="capped")
        with pytest.raises(ModelNotAllowed):
            account.charge(1, model="other")

    def test_what_a_model_used_counts_from_before_limits_were_enabled(self, account: Account) -> None:
        account.charge(80, model="gpt-4o")
        account.store.update(account.id, model_limits={"gpt-4o": 100}, model_limits_enabled=True)
        with pytest.raises(QuotaExceeded):
            account.charge(21, model="gpt-4o")
        account.charge(20, model="gpt-4o")

    def test_settles_and_refunds_count_for_the_model(self, store: QuotaStore) -> None:
        account = Account(store, model_limits={"capped": 100})
        account.reserve(100, model="capped", idempotency_key="a")
        store.settle("a", 30)
        account.charge(70, model="capped", idempotency_key="b")
        store.refund("b", 50)
        account.charge(50, model="capped")
        assert store.model_usage(account.id) == {"capped": 100}
        account.reserve(0, model="capped", idempotency_key="c")
        store.settle("c", 7)  # the work was done
        assert store.model_usage(account.id) == {"capped": 107}
        account.charge(0, model="capped")
        with pytest.raises(QuotaExceeded, match="has 0 "):
            account.charge(1, model="capped")

    # --- the same call again

    def test_a_repeated_charge_changes_nothing(self, account: Account) -> None:
        token = account.charge(600, model="gpt-4o", idempotency_key="once")
        assert account.charge(600, model="gpt-4o", idempotency_key="once") == token
        # The answer of a charge that was made does not depend on what became of the token since.
        account.store.update(account.id, enabled=False)
        account.charge(600, model="gpt-4o", idempotency_key="once")
        assert account.totals == (600, 400)
        assert account.store.model_usage(account.id) == {"gpt-4o": 600}
        assert len(list(account.store.history(account.id))) == 1

    def test_without_an_operation_id_every_charge_counts(self, account: Account) -> None:
        for _ in range(3):
            account.charge(5)
        assert account.totals == (15, 985)
        assert len({operation.id for operation in account.store.history(account.id)}) == 3

    def test_an_operation_id_stands_for_one_call(self, account: Account) -> None:
        other = Account(account.store)
        account.charge(5, model="gpt-4o", idempotency_key="charge")
        account.reserve(5, idempotency_key="reserve")
        account.store.refund("charge", 1, idempotency_key="refund")
        other.charge(5, idempotency_key="other")
        uses: list[tuple[str, str, Callable[[], object]]] = [
            ("charge", "amount", lambda: account.charge(6, model="gpt-4o", idempotency_key="charge")),
            ("charge", "model", lambda: account.charge(5, model="gpt-4", idempotency_key="charge")),
            ("charge", "model", lambda: account.charge(5, idempotency_key="charge")),
            ("charge", "token_id", lambda: other.charge(5, model="gpt-4o", idempotency_key="charge")),
            ("charge", "kind", lambda: account.reserve(5, model="gpt-4o", idempotency_key="charge")),
            ("reserve", "amount", lambda: account.reserve(6, idempotency_key="reserve")),
            ("reserve", "model", lambda: account.reserve(5, model="gpt-4o", idempotency_key="reserve")),
            ("reserve", "expires_in", lambda: account.reserve(5, idempotency_key="reserve", expires_in=601)),
            ("reserve", "kind", lambda: account.charge(5, idempotency_key="reserve")),
            ("refund", "kind", lambda: account.charge(1, idempotency_key="refund")),
            ("refund", "kind", lambda: account.charge(1, model="gpt-4o", idempotency_key="refund")),
            ("refund", "amount", lambda: account.store.refund("charge", 2, idempotency_key="refund")),
            ("refund", "amount", lambda: account.store.refund("charge", idempotency_key="refund")),
            ("refund", "refund_of", lambda: account.store.refund("other", 1, idempotency_key="refund")),
            ("charge", "kind", lambda: account.store.refund("charge", 5, idempotency_key="charge")),
        ]
        for operation_id, difference, use in uses:
            with pytest.raises(OperationConflict, match=f"'{operation_id}' .* another {difference}$"):
                use()
        assert account.totals == (9, 991)
        assert other.totals == (5, 995)

    def test_operation_ids_are_exact(self, account: Account) -> None:
        for operation_id in ("id", "ID", "id ", " id", "id%", "\u0131d", "x" * 255, "\u4ee4\u724c \U0001f511"):
            account.charge(1, idempotency_key=operation_id)
            account.charge(1, idempotency_key=operation_id)
        assert account.totals == (8, 992)

    # --- reserve, settle

    @pytest.mark.parametrize("amount", [0, 1, 299, 300, 301, 1000])
    def test_settle_sets_the_final_amount(self, account: Account, amount: int) -> None:
        operation_id = account.reserve(300)
        assert account.totals == (300, 700)
        token = account.store.settle(operation_id, amount)
        assert (token.total_used, token.total_available) == (amount, 1000 - amount)
        assert account.store.settle(operation_id, amount) == token
        assert account.totals == (amount, 1000 - amount)

    def test_settle_may_overdraw_as_the_work_was_done(self, account: Account) -> None:
        operation_id = account.reserve(300)
        account.charge(600)
        assert account.store.settle(operation_id, 450).total_available == -50
        assert account.totals == (1050, -50)
        with pytest.raises(QuotaExceeded):
            account.charge(1)
        account.charge(0)
        assert account.store.grant(account.id, 0).total_available == -50
        assert account.store.grant(account.id, 20).total_available == -30
        assert account.store.grant(account.id, 40).total_available == 10

    def test_settle_does_not_ask_whether_the_token_may_still_be_used(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        operation_id = account.reserve(300, model="gpt-4o")
        account.store.update(
            account.id, enabled=False, expires_at=1, model_limits={"other": 1}, model_limits_enabled=True
        )
        account.store.rotate(account.id)
        assert account.store.settle(operation_id, 200).total_used == 200

    def test_a_reservation_is_settled_once(self, account: Account) -> None:
        operation_id = account.reserve(300)
        account.store.settle(operation_id, 200)
        for amount in (0, 199, 300):
            with pytest.raises(OperationConflict):
                account.store.settle(operation_id, amount)
        assert account.totals == (200, 800)

    def test_only_a_reservation_is_settled(self, account: Account) -> None:
        with pytest.raises(OperationNotFound, match="missing"):
            account.store.settle("missing", 0)
        account.charge(5, idempotency_key="charge")
        account.store.refund("charge", 1, idempotency_key="refund")
        account.store.grant(account.id, 7)
        for operation in account.store.history(account.id):
            for amount in (0, operation.final_amount):
                with pytest.raises(OperationConflict, match=f"'{operation.id}' is a {operation.kind}"):
                    account.store.settle(operation.id, amount)  # type: ignore[arg-type]
        account.reserve(5, idempotency_key="reserve")
        account.store.delete(account.id)
        with pytest.raises(TokenNotFound, match=str(account.id)):
            account.store.settle("reserve", 5)

    def test_a_repeated_reserve_changes_nothing(self, account: Account, clock: Callable[[float], None]) -> None:
        assert account.reserve(300, idempotency_key="mine", expires_in=60) == "mine"
        assert account.reserve(300, idempotency_key="mine", expires_in=60) == "mine"
        assert account.totals == (300, 700)
        account.store.settle("mine", 100)
        assert account.reserve(300, idempotency_key="mine", expires_in=60) == "mine"
        clock(61)
        assert account.reserve(300, idempotency_key="mine", expires_in=60) == "mine"
        assert account.totals == (100, 900)

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), None, "600", True])
    def test_a_reservation_lasts_a_number_of_seconds(self, account: Account, seconds: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"^expires_in "):
            account.reserve(1, expires_in=seconds)
        assert account.totals == (0, 1000)

    # --- reservations that lapse

    def test_a_lapsed_reservation_gives_back_before_anything_is_refused(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        account.reserve(700, expires_in=60)
        account.reserve(100, expires_in=600)
        clock(59.9)
        with pytest.raises(QuotaExceeded):
            account.charge(900)
        clock(60)
        account.charge(900)
        assert account.totals == (1000, 0)
        with pytest.raises(QuotaExceeded):
            account.reserve(1)

    def test_a_lapsed_reservation_gives_back_once(self, account: Account, clock: Callable[[float], None]) -> None:
        account.reserve(700, idempotency_key="lapses", expires_in=60)
        (reservation,) = account.store.history(account.id)
        for seconds in (60, 61, 62):
            clock(seconds)
            account.charge(100)
        assert account.totals == (300, 700)
        *_, lapsed = account.store.history(account.id)
        # It stays open, for a late settle.
        assert lapsed == dataclasses.replace(reservation, held=0, changed_at=_NOW + 60)
        assert reservation.is_open

    def test_a_lapsed_reservation_gives_back_to_its_model(
        self, store: QuotaStore, clock: Callable[[float], None]
    ) -> None:
        account = Account(store, model_limits={"capped": 100})
        account.reserve(100, model="capped", expires_in=60)
        clock(60)
        account.charge(100, model="capped")
        assert store.model_usage(account.id) == {"capped": 100}

    def test_a_lapsed_reservation_gives_back_before_quota_is_taken_back(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        account.reserve(700, expires_in=60)
        clock(60)
        assert account.store.grant(account.id, -1000).total_available == 0

    @pytest.mark.parametrize("amount", [0, 700, 800])
    @pytest.mark.parametrize("touched", [False, True])
    def test_a_late_settle_still_charges(
        self, account: Account, clock: Callable[[float], None], amount: int, touched: bool
    ) -> None:
        operation_id = account.reserve(700, expires_in=60)
        clock(61)
        if touched:  # and so given back
            account.charge(0)
            assert account.totals == (0, 1000)
        account.store.settle(operation_id, amount)
        account.store.settle(operation_id, amount)
        assert account.totals == (amount, 1000 - amount)

    def test_a_clock_that_is_set_back_does_no_harm(self, account: Account, clock: Callable[[float], None]) -> None:
        operation_id = account.reserve(700, expires_in=60)
        clock(60)
        account.charge(0)
        clock(0)
        account.charge(300)
        account.store.settle(operation_id, 700)
        assert account.totals == (1000, 0)
        *_, reservation = account.store.history(account.id)
        assert reservation.changed_at == _NOW

    def test_a_refusal_does_not_give_back_what_has_lapsed(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        account.reserve(700, model="gpt-4o", expires_in=60)
        clock(60)
        with pytest.raises(QuotaExceeded):
            account.charge(1001)
        assert account.totals == (700, 300)
        assert account.store.model_usage(account.id) == {"gpt-4o": 700}
        account.charge(1000)

    def test_a_repeated_call_does_not_give_back_what_has_lapsed(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        account.charge(1, idempotency_key="once")
        account.reserve(700, expires_in=60)
        clock(60)
        account.charge(1, idempotency_key="once")
        assert account.totals == (701, 299)

    def test_a_lapsed_reservation_is_given_back_to_its_own_token(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        other = Account(account.store)
        other.reserve(700, expires_in=60)
        clock(60)
        account.charge(1)
        assert account.totals == (1, 999)
        assert other.totals == (700, 300)

    # --- refund

    def test_a_refund_gives_back_what_was_charged(self, account: Account) -> None:
        account.charge(300, model="gpt-4o", idempotency_key="charge")
        assert account.store.refund("charge", 100).total_available == 800
        assert account.totals == (200, 800)
        assert account.store.refund("charge", 0).total_used == 200
        assert account.store.refund("charge").total_used == 0
        # Nothing is left, so that without an amount a second refund finds nothing to give back.
        assert account.store.refund("charge").total_used == 0
        assert account.totals == (0, 1000)
        assert account.store.model_usage(account.id) in ({}, {"gpt-4o": 0})

    def test_refunds_never_give_back_more_than_was_charged(self, account: Account) -> None:
        account.charge(300, idempotency_key="charge")
        account.charge(300)
        account.store.refund("charge", 200)
        for amount in (101, 300, MAX_INTEGER):
            with pytest.raises(QuotaExceeded, match=f"'charge' has 100 .* {amount}$"):
                account.store.refund("charge", amount)
        assert account.totals == (400, 600)

    def test_a_settled_reservation_is_refunded_of_its_final_amount(self, account: Account) -> None:
        account.reserve(300, idempotency_key="reserve")
        with pytest.raises(OperationConflict, match=r"'reserve' .* settle"):
            account.store.refund("reserve")
        account.store.settle("reserve", 200)
        with pytest.raises(QuotaExceeded):
            account.store.refund("reserve", 201)
        account.store.refund("reserve", 150)
        # The settle is still the same call, whatever was refunded since.
        account.store.settle("reserve", 200)
        assert account.totals == (50, 950)

    @pytest.mark.parametrize(("amount", "used"), [(None, 0), (100, 200), (300, 0)])
    def test_a_repeated_refund_changes_nothing(self, account: Account, amount: int | None, used: int) -> None:
        account.charge(300, idempotency_key="charge")
        token = account.store.refund("charge", amount, idempotency_key="refund")
        assert account.store.refund("charge", amount, idempotency_key="refund") == token
        assert account.totals == (used, 1000 - used)

    def test_what_cannot_be_refunded(self, account: Account) -> None:
        with pytest.raises(OperationNotFound, match="missing"):
            account.store.refund("missing")
        account.charge(5, idempotency_key="charge")
        account.store.refund("charge", 1, idempotency_key="refund")
        account.store.grant(account.id, 1)
        for operation in account.store.history(account.id):
            if operation.kind != "charge":
                with pytest.raises(OperationConflict, match=f"'{operation.id}' is a {operation.kind}"):
                    account.store.refund(operation.id)
        account.store.delete(account.id)
        with pytest.raises(TokenNotFound):
            account.store.refund("charge")

    @pytest.mark.parametrize(("amount", "error"), _BAD_AMOUNTS)
    def test_the_amount_of_a_refund(self, account: Account, amount: Any, error: type[Exception]) -> None:
        account.charge(10, idempotency_key="charge")
        with pytest.raises(error, match="amount"):
            account.store.refund("charge", amount)
        assert account.totals == (10, 990)

    def test_quota_that_was_unlimited_is_not_refunded_as_available(self, store: QuotaStore) -> None:
        account = Account(store, total_available=5, unlimited_quota=True)
        account.charge(300, idempotency_key="unlimited")
        account.reserve(50, idempotency_key="reserve")
        store.update(account.id, unlimited_quota=False)
        store.refund("unlimited", 100)
        assert account.totals == (250, 5)
        store.settle("reserve", 3)
        assert account.totals == (203, 2)
        account.charge(2, idempotency_key="limited")
        store.refund("reserve", 1)  # it was settled while quota was limited
        assert account.totals == (204, 1)
        account.reserve(1, idempotency_key="limited reserve")
        store.update(account.id, unlimited_quota=True)
        store.refund("limited")
        assert account.totals == (203, 2)
        store.settle("limited reserve", 10)
        assert account.totals == (212, 3)
        store.refund("limited reserve")  # it was settled while quota was unlimited
        assert account.totals == (202, 3)

    # --- grant

    def test_a_grant_tops_up_and_takes_back(self, account: Account) -> None:
        account.charge(400)
        assert account.store.grant(account.id, 500).total_granted == 1500
        assert account.totals == (400, 1100)
        account.store.grant(account.id, -1100)
        account.store.grant(account.id, 0)
        assert account.totals == (400, 0)
        account.store.grant(account.id, 3)
        with pytest.raises(QuotaExceeded, match=f"{account.id} has 3 .* 4 "):
            account.store.grant(account.id, -4)
        assert account.totals == (400, 3)

    @pytest.mark.parametrize("amount", [True, 1.0, "1", None, MAX_INTEGER + 1, -MAX_INTEGER - 1])
    def test_the_amount_of_a_grant(self, account: Account, amount: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="amount"):
            account.store.grant(account.id, amount)
        assert account.totals == (0, 1000)

    def test_only_a_token_is_granted_quota(self, account: Account) -> None:
        for token_id in (account.id + 1, 0, MAX_INTEGER + 1):
            with pytest.raises(TokenNotFound, match=str(token_id)):
                account.store.grant(token_id, 1)

    def test_totals_stop_at_the_largest_64_bit_integer(self, store: QuotaStore) -> None:
        account = Account(store, total_available=2**63 - 1)
        with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
            store.grant(account.id, 1)
        account.charge(MAX_INTEGER, idempotency_key="all", model="gpt-4o")
        assert account.totals == (MAX_INTEGER, 0)
        with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
            store.grant(account.id, 1)
        store.update(account.id, unlimited_quota=True)
        for use in (
            lambda: account.charge(1),
            lambda: account.reserve(MAX_INTEGER),
            lambda: store.settle(account.reserve(0), 1),
        ):
            with pytest.raises(ValueError, match="2\\*\\*63 - 1"):
                use()
        assert account.totals == (MAX_INTEGER, 0)
        store.refund("all")
        assert account.totals == (0, MAX_INTEGER)

    # --- history, model usage, prune

    def test_history_is_newest_first(self, account: Account, clock: Callable[[float], None]) -> None:
        Account(account.store).charge(1)
        assert list(account.store.history(account.id)) == []
        account.charge(10, model="gpt-4o", idempotency_key="charge")
        clock(1)
        account.reserve(20, idempotency_key="reserve", expires_in=60)
        clock(2)
        account.store.refund("charge", idempotency_key="refund")
        clock(3)
        account.store.settle("reserve", 15)
        clock(4)
        account.store.grant(account.id, -5)
        grant, refund, reserve, charge = account.store.history(account.id)
        assert (charge.id, charge.kind, charge.amount, charge.model) == ("charge", "charge", 10, "gpt-4o")
        assert (charge.held, charge.final_amount, charge.created_at, charge.changed_at) == (0, 10, _NOW, _NOW + 2)
        assert (reserve.amount, reserve.held, reserve.final_amount) == (20, 15, 15)
        assert (reserve.created_at, reserve.changed_at, reserve.expires_at) == (_NOW + 1, _NOW + 3, _NOW + 61)
        assert (refund.kind, refund.amount, refund.final_amount, refund.refund_of) == ("refund", None, 10, "charge")
        assert (refund.model, refund.created_at, refund.changed_at) == ("gpt-4o", _NOW + 2, _NOW + 2)
        assert (grant.kind, grant.amount, grant.final_amount) == ("grant", -5, -5)
        assert (grant.created_at, grant.changed_at) == (_NOW + 4, _NOW + 4)
        for operation in (grant, refund, reserve, charge):
            assert operation.token_id == account.id
            assert operation.unlimited is False
            with pytest.raises(AttributeError):
                operation.held = 1  # type: ignore[misc]

    def test_a_long_history_is_read_page_by_page(self, account: Account) -> None:
        Account(account.store).charge(0)
        for number in range(1010):
            account.charge(0, idempotency_key=str(number))
        assert [operation.id for operation in account.store.history(account.id)] == [*map(str, reversed(range(1010)))]

    def test_a_token_that_is_not_there_has_no_history(self, account: Account) -> None:
        deleted = Account(account.store)
        deleted.charge(1, model="gpt-4o")
        deleted.store.delete(deleted.id)
        assert account.store.model_usage(deleted.id) == {}
        for token_id in (account.id + 2, 0, -1, MAX_INTEGER + 1):
            assert list(account.store.history(token_id)) == []
            assert account.store.model_usage(token_id) == {}

    def test_prune_forgets_what_is_finished_and_old(self, account: Account, clock: Callable[[float], None]) -> None:
        account.charge(1, idempotency_key="old")
        account.charge(2, idempotency_key="refunded later")
        account.reserve(4, idempotency_key="settled later", expires_in=5)
        account.reserve(8, idempotency_key="open", expires_in=1000)
        account.reserve(16, idempotency_key="lapsed", expires_in=5)
        account.reserve(32, idempotency_key="lapses later", expires_in=20)
        clock(15)
        account.store.refund("refunded later", 1)
        account.store.settle("settled later", 4)
        assert account.store.prune(_NOW) == 0
        assert account.store.prune(_NOW + 10) == 2
        left = {operation.id for operation in account.store.history(account.id) if operation.kind != "refund"}
        assert left == {"refunded later", "settled later", "open", "lapses later"}
        assert account.totals == (1 + 1 + 4 + 8 + 32, 1000 - 46)
        with pytest.raises(OperationNotFound):
            account.store.refund("old")
        # A time to come takes all that is finished, and no reservation that has not lapsed.
        assert account.store.prune(_NOW + 10_000) == 3
        assert {operation.id for operation in account.store.history(account.id)} == {"open", "lapses later"}
        assert account.totals == (46, 954)
        account.store.settle("open", 8)
        account.store.settle("lapses later", 32)
        assert account.totals == (46, 954)

    def test_prune_takes_many(self, store: QuotaStore, clock: Callable[[float], None]) -> None:
        account = Account(store, total_available=1010)
        for _ in range(1010):
            account.reserve(1, expires_in=1)
        clock(2)
        assert store.prune(_NOW + 1) == 1010
        assert store.prune(_NOW + 1) == 0
        assert account.totals == (0, 1010)

    def test_prune_takes_little_at_a_time(
        self, store: QuotaStore, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger, "_PAGE_SIZE", 2)
        accounts = [Account(store) for _ in range(5)]
        for _ in range(2):
            for account in accounts:
                account.reserve(1, expires_in=1)
        for account in accounts:
            account.charge(1)
        clock(10)

        def left() -> tuple[int, int]:
            histories = [list(store.history(account.id)) for account in accounts]
            return len(list(store.open_reservations())), sum(map(len, histories))

        transact, steps = store._transact, [left()]

        def observe(work: Callable[[Transaction], Any]) -> Any:
            result = transact(work)
            steps.append(left())
            return result

        monkeypatch.setattr(store, "_transact", observe)
        assert steps[0] == (10, 15)
        assert store.prune(_NOW + 5) == 15
        assert steps[-1] == (0, 0)
        # One that charges waits for a page of operations, and for what their tokens hold, not for all.
        for (held, kept), (still_held, still_kept) in pairwise(steps):
            assert held - still_held <= 2 * 2
            assert kept - still_kept <= 2
        assert [account.totals for account in accounts] == [(1, 999)] * 5

    def test_prune_takes_what_lapsed_until_then(self, account: Account, clock: Callable[[float], None]) -> None:
        account.reserve(5, expires_in=10)
        clock(20)
        assert account.store.prune(_NOW + 9.5) == 0
        assert account.totals == (5, 995)
        assert account.store.prune(_NOW + 10) == 1
        assert account.totals == (0, 1000)

    def test_prune_forgets_the_reservations_of_a_token_that_is_gone(
        self, account: Account, clock: Callable[[float], None]
    ) -> None:
        account.reserve(5, expires_in=1)
        account.store.delete(account.id)
        clock(10)
        assert account.store.prune(_NOW + 5) == 1

    @pytest.mark.parametrize("before", ["2030-01-01", None, True, float("nan"), float("inf")])
    def test_prune_takes_a_time(self, account: Account, before: Any) -> None:
        account.charge(1)
        with pytest.raises((TypeError, ValueError), match="before"):
            account.store.prune(before)
        assert len(list(account.store.history(account.id))) == 1

    def test_open_reservations_are_the_oldest_first(
        self, account: Account, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger, "_PAGE_SIZE", 2)  # so that there are pages
        store, other = account.store, Account(account.store)
        assert list(store.open_reservations()) == []
        for number in range(4):
            account.reserve(1, idempotency_key=f"a{number}")
            other.reserve(1, idempotency_key=f"b{number}", expires_in=1)
        account.reserve(0)
        account.charge(1)
        store.settle("a1", 1)
        store.settle("b2", 0)
        clock(1)
        reservations = list(store.open_reservations())
        assert [reservation.id for reservation in reservations] == ["a0", "b0", "b1", "a2", "a3", "b3"]
        assert set(reservations) <= {*store.history(account.id), *store.history(other.id)}
        other.charge(1)  # gives back what has lapsed
        assert [reservation.id for reservation in store.open_reservations()] == ["a0", "a2", "a3"]

    # --- many at once

    def test_threads_do_not_overdraw(self, store: QuotaStore) -> None:
        account = Account(store, total_available=100)

        def charge(_: int) -> int:
            try:
                return account.charge(3).total_used and 3
            except QuotaExceeded:
                return 0

        with ThreadPoolExecutor(THREADS) as pool:
            charged = sum(pool.map(charge, range(100)))
        assert charged == 99
        assert account.totals == (99, 1)

    def test_threads_that_repeat_a_call_make_it_once(self, account: Account) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda number: account.charge(1, idempotency_key=str(number % 10)), range(100)))
        assert account.totals == (10, 990)
