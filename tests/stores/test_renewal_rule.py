"""When a quota renews, and what it is then: a table, and every token against a walk over the calendar."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from usage_middleware import Token
from usage_middleware.renewal import first_renewal, is_due, next_renewal, renewed

MOST = 2**63 - 1
PERIODS = ("daily", "weekly", "monthly")


def seconds(moment):
    return datetime.fromisoformat(moment).replace(tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize(
    ("now", "daily", "weekly", "monthly"),
    [
        pytest.param("1970-01-01", "1970-01-02", "1970-01-05", "1970-02-01", id="the epoch, a Thursday"),
        pytest.param("2026-11-24T18:53:00", "2026-11-25", "2026-11-30", "2026-12-01", id="any day"),
        pytest.param("2026-11-29T23:59:59.999999", "2026-11-30", "2026-11-30", "2026-12-01", id="end of a Sunday"),
        pytest.param("2026-11-30", "2026-12-01", "2026-12-07", "2026-12-01", id="begin of a Monday"),
        pytest.param("2026-12-01", "2026-12-02", "2026-12-07", "2027-01-01", id="first of a month"),
        pytest.param("2026-12-31T12:00", "2027-01-01", "2027-01-04", "2027-01-01", id="last of a year"),
        pytest.param("2027-01-31T12:00", "2027-02-01", "2027-02-01", "2027-02-01", id="last of a month, a Sunday"),
        pytest.param("2027-02-28T12:00", "2027-03-01", "2027-03-01", "2027-03-01", id="last of February"),
        pytest.param("2028-02-28T12:00", "2028-02-29", "2028-03-06", "2028-03-01", id="before a leap day"),
        pytest.param("2028-02-29T12:00", "2028-03-01", "2028-03-06", "2028-03-01", id="a leap day"),
        pytest.param("2000-02-29T12:00", "2000-03-01", "2000-03-06", "2000-03-01", id="a leap day of a century"),
        pytest.param("2100-02-28T12:00", "2100-03-01", "2100-03-01", "2100-03-01", id="a century without one"),
        pytest.param("9999-11-30T12:00", "9999-12-01", "9999-12-06", "9999-12-01", id="the last year"),
    ],
)
def test_when_the_next_period_begins(now, daily, weekly, monthly):
    expected = dict(zip(PERIODS, map(seconds, (daily, weekly, monthly)), strict=True))
    assert {renewal: next_renewal(renewal, seconds(now)) for renewal in PERIODS} == expected
    assert {renewal: first_renewal(renewal, seconds(now)) for renewal in PERIODS} == expected
    assert first_renewal("", seconds(now)) == 0


@pytest.mark.parametrize(
    ("available", "held", "periods", "then"),
    [
        pytest.param(40, 0, 1, 100, id="what is left over is not carried over"),
        pytest.param(5000, 0, 1, 100, id="nor what was granted beyond it"),
        pytest.param(0, 0, 1, 100, id="used up"),
        pytest.param(-30, 0, 1, 70, id="debt is not forgiven"),
        pytest.param(-250, 0, 1, -150, id="debt of more than a period"),
        pytest.param(-250, 0, 2, -50, id="after two"),
        pytest.param(-250, 0, 3, 50, id="after three"),
        pytest.param(-250, 0, 4, 100, id="never more than a period's"),
        pytest.param(-250, 0, 10**6, 100, id="after many"),
        pytest.param(40, 60, 1, 40, id="what is held is part of the new quota"),
        pytest.param(-30, 60, 1, 40, id="no debt, if what is held comes back"),
        pytest.param(-90, 60, 1, 10, id="debt beyond what is held"),
        pytest.param(-90, 60, 2, 40, id="paid off"),
        pytest.param(0, 500, 1, -400, id="more is held than a period has"),
    ],
)
def test_what_a_period_begins_with(available, held, periods, then):
    token = Token(
        total_available=available,
        total_used=1000,
        held=held,
        renewal="daily",
        renewal_quota=100,
        renews_at=int(seconds("2027-01-16")),
    )
    now = token.renews_at + (periods - 1) * 86_400 + 0.5
    # Only what is available changes, and when it renews next.
    assert renewed(token, now) == dataclasses.replace(
        token, total_available=then, renews_at=token.renews_at + periods * 86_400
    )


def test_nothing_is_due_before_its_time():
    token = Token(renewal="daily", renewal_quota=100, renews_at=1000)
    assert not is_due(token, 999.999)
    assert renewed(token, 999.999) is token
    assert is_due(token, 1000)


@pytest.mark.parametrize(
    "token",
    [Token(), Token(renews_at=5), Token(renewal="daily", renewal_quota=1), Token(renewal="daily", renews_at=-5)],
)
def test_without_renewal_nothing_is_due(token):
    assert not is_due(token, 1e9)
    assert renewed(token, 1e9) is token


@pytest.mark.parametrize(
    ("fields", "available"),
    [
        pytest.param({"total_used": MOST - 10}, 10, id="all that was granted"),
        pytest.param({"total_used": MOST}, 0, id="no room"),
        pytest.param({"total_used": MOST, "held": 70}, 0, id="no room, and some is held"),
        pytest.param({"total_used": MOST, "total_available": -MOST}, 0, id="overdrawn by all"),
        pytest.param({"total_used": 0, "total_available": -MOST}, 0, id="the change of a total"),
    ],
)
def test_no_total_passes_what_a_column_holds(fields, available):
    token = Token(renewal="daily", renewal_quota=MOST, renews_at=86_400, **fields)
    after = renewed(token, 1e9)
    assert after.total_available == available
    assert abs(after.total_granted) <= MOST
    assert abs(after.total_available - token.total_available) <= MOST


def walk(token, now):
    """The same, one day of the calendar after the other, and one period after the other."""
    day = datetime.fromtimestamp(token.renews_at, timezone.utc).date()
    today = datetime.fromtimestamp(now, timezone.utc).date()
    free = token.total_available + token.held
    is_first = True
    while True:
        begins = {"daily": True, "weekly": day.weekday() == 0, "monthly": day.day == 1}[token.renewal]
        if day > today and begins:
            break
        # It is due at renews_at, whichever day that is, and then whenever a period begins.
        if is_first or (begins and day <= today):
            free = min(free, 0) + token.renewal_quota
        is_first = False
        day += timedelta(days=1)
    renews_at = datetime(day.year, day.month, day.day, tzinfo=timezone.utc).timestamp()
    return dataclasses.replace(token, total_available=free - token.held, renews_at=int(renews_at))


moments = st.integers(0, 4_102_444_800)  # until the year 2100
amounts = st.integers(-10_000, 10_000)


@given(
    renewal=st.sampled_from(PERIODS),
    quota=st.integers(1, 1000),
    available=amounts,
    held=st.integers(0, 2000),
    renews_at=st.integers(1, 4_102_444_800),
    later=st.one_of(st.floats(0, 90 * 86_400), st.floats(0, 3000 * 86_400), st.sampled_from([0, 86_400, 7 * 86_400])),
)
@example(renewal="weekly", quota=1, available=-5, held=0, renews_at=1_800_000_000, later=0)
@example(renewal="monthly", quota=7, available=-50, held=3, renews_at=1_835_395_200, later=366 * 86_400)
def test_a_walk_over_the_calendar_comes_to_the_same(renewal, quota, available, held, renews_at, later):
    token = Token(
        total_available=available,
        total_used=held,
        held=held,
        renewal=renewal,
        renewal_quota=quota,
        renews_at=renews_at,
    )
    after = renewed(token, renews_at + later)
    assert after == walk(token, renews_at + later)
    assert renewed(after, renews_at + later) is after
    assert after.renews_at > renews_at + later


@given(
    renewal=st.sampled_from(PERIODS),
    available=amounts,
    first=moments,
    pauses=st.lists(st.integers(0, 40 * 86_400), min_size=1, max_size=5),
)
def test_it_does_not_matter_how_often_a_token_is_looked_at(renewal, available, first, pauses):
    at_once = often = Token(
        total_available=available, renewal=renewal, renewal_quota=500, renews_at=next_renewal(renewal, first)
    )
    now = first
    for pause in pauses:
        now += pause
        often = renewed(often, now)
    assert often == renewed(at_once, now)
