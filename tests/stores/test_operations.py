"""The quota rules, as the pure functions that they are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usage_middleware import (
    Account,
    ModelNotAllowed,
    Operation,
    OperationConflict,
    QuotaExceeded,
    Token,
    TokenDisabled,
    TokenExpired,
)
from usage_middleware.operations import bring_up_to_date, check_replay, grant, refund, settle, take

MOST = 2**63 - 1
NOW = 1_800_000_000.0


def token(**fields):
    return Token(**{"id": 1, "total_available": 100, "total_used": 900, **fields})


def operation(kind="charge", held=0, **fields):
    final = None if kind == "reserve" else held
    return Operation(
        **{
            "id": "made",
            "token_id": 1,
            "kind": kind,
            "amount": held,
            "held": held,
            "final_amount": final,
            "created_at": NOW - 60,
            "changed_at": NOW - 60,
            **fields,
        }
    )


def asked(amount, kind="charge", **fields):
    return Operation(id="new", token_id=1, kind=kind, amount=amount, created_at=NOW, **fields)


def totals(changes):
    return changes.token.total_used, changes.token.total_available, changes.token.held


# --- What an operation is


@pytest.mark.parametrize(
    ("made", "is_open", "is_holding", "is_request"),
    [
        pytest.param(operation("charge", 5), False, False, True, id="charge"),
        pytest.param(operation("reserve", 5), True, True, True, id="reservation"),
        pytest.param(operation("reserve", 0), True, False, True, id="reservation that was released"),
        pytest.param(operation("reserve", 5, final_amount=5), False, False, True, id="settled"),
        pytest.param(operation("refund", final_amount=5), False, False, False, id="refund"),
        pytest.param(operation("grant", final_amount=-5), False, False, False, id="grant"),
        pytest.param(operation("renewal", final_amount=0), False, False, False, id="renewal"),
    ],
)
def test_what_an_operation_is(made, is_open, is_holding, is_request):
    assert (made.is_open, made.is_holding, made.is_request) == (is_open, is_holding, is_request)


@pytest.mark.parametrize(
    ("made", "finished"),
    [
        pytest.param(operation("charge", 5, changed_at=9), True, id="changed before"),
        pytest.param(operation("charge", 5, changed_at=10), False, id="changed then"),
        pytest.param(operation("reserve", 0, expires_at=8), True, id="lapsed before, and released"),
        pytest.param(operation("reserve", 0, expires_at=8.5), False, id="lapsed later"),
        pytest.param(operation("reserve", 5, expires_at=8), False, id="lapsed, not released"),
        pytest.param(operation("reserve", 5, expires_at=1, changed_at=10, final_amount=5), False, id="settled late"),
    ],
)
def test_what_is_finished(made, finished):
    assert made.is_finished(before=10, lapsed_before=8) is finished


# --- take


@pytest.mark.parametrize(
    ("fields", "amount", "at_least", "taken"),
    [
        pytest.param({}, 100, None, 100, id="all"),
        pytest.param({}, 101, None, QuotaExceeded, id="more"),
        pytest.param({}, 101, 100, 100, id="less than was asked for"),
        pytest.param({}, 101, 101, QuotaExceeded, id="not less than at_least"),
        pytest.param({"total_available": 0}, 5, 0, 0, id="nothing"),
        pytest.param({"total_available": 0}, 0, None, 0, id="nothing is asked for"),
        pytest.param({"total_available": -5}, 0, None, 0, id="nothing, of an overdrawn token"),
        pytest.param({"total_available": -5}, 5, 0, 0, id="at least nothing, of an overdrawn token"),
        pytest.param({"total_available": -5}, 5, 1, QuotaExceeded, id="overdrawn"),
        pytest.param({"total_available": -5, "unlimited_quota": True}, 10**9, None, 10**9, id="unlimited"),
        pytest.param({"model_limits": {"m": 80}, "model_limits_enabled": True}, 70, None, 70, id="the model's limit"),
        pytest.param(
            {"model_limits": {"m": 80}, "model_limits_enabled": True}, 71, None, QuotaExceeded, id="more than that"
        ),
        pytest.param({"model_limits": {"m": 80}, "model_limits_enabled": True}, 500, 1, 70, id="as far as the model"),
        pytest.param({"model_limits": {"m": 500}, "model_limits_enabled": True}, 500, 1, 100, id="as far as the token"),
        pytest.param({"model_limits": {"m": 5}, "model_limits_enabled": True}, 0, None, 0, id="a limit that is passed"),
        pytest.param({"model_limits": {"m": True}, "model_limits_enabled": True}, 100, None, 100, id="no limit"),
        pytest.param({"model_limits": {"n": 5}, "model_limits_enabled": True}, 0, None, ModelNotAllowed, id="unlisted"),
        pytest.param({"model_limits": {"m": 5}}, 100, None, 100, id="limits that are not enabled"),
        pytest.param({"enabled": False}, 0, None, TokenDisabled, id="disabled"),
        pytest.param({"expires_at": int(NOW)}, 0, None, TokenExpired, id="expired"),
        pytest.param({"expires_at": int(NOW) + 1}, 1, None, 1, id="about to expire"),
        pytest.param({"expires_at": -1}, 1, None, 1, id="never expires"),
    ],
)
@pytest.mark.parametrize("kind", ["charge", "reserve"])
def test_what_is_taken(kind, fields, amount, at_least, taken):
    account = Account(token=token(**fields), model="m", model_used=10)
    if isinstance(taken, type):
        with pytest.raises(taken):
            take(account, asked(amount, kind, at_least=at_least, model="m"), NOW)
        return
    changes = take(account, asked(amount, kind, at_least=at_least, model="m"), NOW)
    ((before, made),) = changes.steps
    assert before is None
    assert (made.held, made.final_amount) == (taken, taken if kind == "charge" else None)
    assert changes.model_usage() == ({"m": taken} if taken else {})
    limited = not account.token.unlimited_quota
    assert totals(changes) == (
        900 + taken,
        account.token.total_available - (taken if limited else 0),
        taken if kind == "reserve" else 0,
    )


def test_less_is_taken_only_when_nothing_is_left_to_be_released():
    account = Account(token=token(held=500), more_lapsed=True)
    with pytest.raises(QuotaExceeded) as caught:
        take(account, asked(101, "reserve", at_least=1), NOW)
    assert (caught.value.requested, caught.value.available, caught.value.held) == (101, 100, 500)
    assert take(account, asked(100, "reserve", at_least=1), NOW).steps[0].after.held == 100


# --- settle, refund, grant

units = st.integers(0, 200)


@given(st.builds(token, unlimited_quota=st.booleans(), held=st.just(50)), units, st.booleans(), units)
def test_a_settle_moves_what_it_holds(before, held, unlimited, amount):
    reservation = operation("reserve", held, unlimited=unlimited)
    changes = settle(Account(token=before, operation=reservation), amount, NOW, input_tokens=3, output_tokens=4)
    given_back = 0 if unlimited else held
    taken = 0 if before.unlimited_quota else amount
    assert totals(changes) == (900 - held + amount, 100 + given_back - taken, 50 - held)
    ((_, after),) = changes.steps
    assert (after.held, after.final_amount, after.changed_at) == (amount, amount, NOW)
    assert (after.input_tokens, after.output_tokens) == (3, 4)


@given(st.booleans(), units, st.booleans(), st.one_of(st.none(), units))
def test_a_refund_gives_back_where_it_came_from(unlimited_now, held, unlimited, amount):
    charge = operation("charge", held, unlimited=unlimited, model="m")
    account = Account(token=token(unlimited_quota=unlimited_now), operation=charge)
    made = asked(amount, "refund", refund_of="made")
    if amount is not None and amount > held:
        with pytest.raises(QuotaExceeded) as caught:
            refund(account, made, NOW)
        assert (caught.value.requested, caught.value.available) == (amount, held)
        return
    changes = refund(account, made, NOW)
    back = held if amount is None else amount
    assert totals(changes) == (900 - back, 100 + (0 if unlimited else back), 0)
    (_, after), (_, recorded) = changes.steps
    assert (after.held, after.final_amount) == (held - back, held)
    assert (recorded.amount, recorded.final_amount, recorded.held, recorded.model) == (amount, back, 0, "m")


@pytest.mark.parametrize(
    "made",
    [operation("reserve", 5), operation("refund"), operation("grant"), operation("renewal")],
    ids=lambda m: m.kind,
)
def test_what_cannot_be_refunded(made):
    with pytest.raises(OperationConflict) as caught:
        refund(Account(token=token(), operation=made), asked(None, "refund"), NOW)
    assert caught.value.operation_id == "made"


@given(st.integers(-200, 200), st.integers(-50, 100))
def test_a_grant_takes_back_what_is_available_and_no_more(amount, available):
    account = Account(token=token(total_available=available))
    if amount < 0 and available + amount < 0:
        with pytest.raises(QuotaExceeded):
            grant(account, "new", None, amount, NOW)
        return
    changes = grant(account, "new", "key", amount, NOW)
    assert totals(changes) == (900, available + amount, 0)
    assert changes.token.total_granted == account.token.total_granted + amount
    assert changes.days() == []
    assert changes.model_usage() == {}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda: grant(Account(token=token()), "new", None, MOST, NOW), id="granted"),
        pytest.param(lambda: take(Account(token=token(unlimited_quota=True)), asked(MOST), NOW), id="used"),
        pytest.param(
            lambda: settle(
                Account(token=token(total_available=-MOST, total_used=MOST), operation=operation("reserve")),
                1,
                NOW,
                input_tokens=0,
                output_tokens=0,
            ),
            id="available",
        ),
    ],
)
def test_totals_stop_at_64_bits(use):
    with pytest.raises(ValueError, match=r"of token 1 would pass (-\()?2\*\*63"):
        use()


# --- What is due


def test_nothing_is_due():
    account = Account(token=token(renewal="daily", renewal_quota=5, renews_at=int(NOW) + 1))
    assert bring_up_to_date(account, NOW, renewal_id="r") == (account, None)


@pytest.mark.parametrize("renewal", ["", "daily"])
def test_what_has_lapsed_is_released(renewal):
    lapsed = [operation("reserve", 30, id="a", model="m"), operation("reserve", 20, id="b", unlimited=True)]
    before = token(held=150, total_used=900, renewal=renewal, renewal_quota=70 if renewal else 0, renews_at=1)
    account = Account(token=before, operation=lapsed[0], lapsed=lapsed, model="m", model_used=40)
    current, changes = bring_up_to_date(account, NOW, renewal_id="r")
    # In a new period, all that is held is part of its quota.
    available = 70 - 150 + 50 if renewal else 100 + 30
    assert totals(changes) == (850, available, 100)
    assert (current.token, current.lapsed, current.model_used) == (changes.token, (), 10)
    assert (current.operation.id, current.operation.held, current.operation.is_open) == ("a", 0, True)
    assert changes.is_renewed == bool(renewal)
    assert changes.model_usage() == {"m": -30}
    assert sum(day.used for day in changes.days()) == -50
    assert [step.after.id for step in changes.steps] == [*(["r"] if renewal else []), "a", "b"]


def test_a_renewal_is_an_operation():
    before = token(renewal="daily", renewal_quota=70, renews_at=1, held=20)
    kept = operation("reserve", 20, unlimited=True)
    current, changes = bring_up_to_date(Account(token=before, operation=kept), NOW, renewal_id="r")
    ((_, made),) = changes.steps
    assert (made.id, made.kind, made.amount, made.final_amount, made.held) == ("r", "renewal", -50, -50, 0)
    assert totals(changes) == (900, 50, 20)
    assert current.operation == dataclasses.replace(kept, unlimited=False)
    # A settle in the same transaction gives back to the new quota.
    settled = settle(current, 0, NOW, input_tokens=0, output_tokens=0)
    assert totals(changes.then(settled)) == (880, 70, 0)
    assert changes.then(settled).before == before


# --- Repetitions


def test_a_repetition_is_the_same_call():
    made = operation("charge", 5, model="m")
    check_replay(made, kind="charge", amount=5, model="m")
    for name, value in {"kind": "reserve", "amount": 6, "model": None}.items():
        with pytest.raises(OperationConflict, match=f"another {name}$") as caught:
            check_replay(made, **{"kind": "charge", "amount": 5, "model": "m", name: value})
        assert caught.value.operation_id == "made"
