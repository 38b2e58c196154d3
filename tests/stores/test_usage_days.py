"""Usage by day: how it is booked, and how it adds up."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usage_middleware import Changes, DayUsage, Operation, Step, Token
from usage_middleware.usage import add_up, day_of

TODAY, TOMORROW = date(2027, 1, 15), date(2027, 1, 16)
NOW = 1_800_000_000.0  # on that day


@pytest.mark.parametrize(
    ("time", "day"),
    [
        pytest.param(0, date(1970, 1, 1), id="the epoch"),
        pytest.param(-0.5, date(1969, 12, 31), id="before it"),
        pytest.param(86_399.999, date(1970, 1, 1), id="the last moment of a day"),
        pytest.param(86_400, date(1970, 1, 2), id="the first"),
        pytest.param(1_835_395_200, date(2028, 2, 29), id="a leap day"),
    ],
)
def test_the_day_of_a_time_is_that_in_utc(time, day):
    assert day_of(time) == day


def test_nothing_adds_up_to_nothing():
    assert add_up([]) == []


def test_entries_of_one_day_and_model_become_one():
    entries = [
        DayUsage(TOMORROW, "b", 1, 2, 3, 4),
        DayUsage(TODAY, "b", 5, 0, 0, 1),
        DayUsage(TODAY, "", 7, 1, 0, 0),
        DayUsage(TOMORROW, "b", 10, 20, 30, 40),
        DayUsage(TODAY, "a", -3, 0, -1, 0),
    ]
    assert add_up(entries) == [
        DayUsage(TODAY, "", 7, 1, 0, 0),
        DayUsage(TODAY, "a", -3, 0, -1, 0),
        DayUsage(TODAY, "b", 5, 0, 0, 1),
        DayUsage(TOMORROW, "b", 11, 22, 33, 44),
    ]


figures = st.integers(-10, 10)
usages = st.builds(
    DayUsage, st.sampled_from([TODAY, TOMORROW]), st.sampled_from(["", "a", "A"]), figures, figures, figures, figures
)


@given(st.lists(usages), st.randoms())
def test_sums_do_not_depend_on_the_order(entries, numbers):
    shuffled = list(entries)
    numbers.shuffle(shuffled)
    added = add_up(entries)
    assert added == add_up(shuffled) == add_up(added)
    assert len({(entry.day, entry.model) for entry in added}) == len(added)
    for figure in ("used", "requests", "input_tokens", "output_tokens"):
        assert sum(getattr(entry, figure) for entry in added) == sum(getattr(entry, figure) for entry in entries)


# --- What a change of operations comes to


def operation(**fields):
    return Operation(**{"id": "x", "token_id": 1, "kind": "charge", "amount": 5, "created_at": NOW, **fields})


def days(*steps):
    return Changes(before=Token(id=1), token=Token(id=1), steps=tuple(Step(*step) for step in steps)).days()


def test_a_charge_is_a_request():
    made = operation(held=5, model="a", input_tokens=2, output_tokens=3)
    assert days((None, made)) == [DayUsage(TODAY, "a", 5, 1, 2, 3)]


def test_a_later_change_is_booked_when_the_operation_was_made_and_is_no_request():
    before = operation(kind="reserve", held=9, model="a")
    after = dataclasses.replace(before, held=4, final_amount=4, input_tokens=2, changed_at=NOW + 86_400)
    assert days((before, after)) == [DayUsage(TODAY, "a", -5, 0, 2, 0)]


@pytest.mark.parametrize("kind", ["grant", "refund", "renewal"])
def test_what_is_not_a_request_is_not_booked(kind):
    assert days((None, operation(kind=kind, final_amount=5))) == []


def test_steps_of_one_day_and_model_are_one_entry():
    lapsed = [operation(kind="reserve", held=units, id=str(units)) for units in (3, 4)]
    released = [(before, dataclasses.replace(before, held=0)) for before in lapsed]
    made = operation(held=6)
    refund = operation(kind="refund", final_amount=1)
    assert days(*released, (None, made), (made, dataclasses.replace(made, held=5)), (None, refund)) == [
        DayUsage(TODAY, "", -2, 1, 0, 0)
    ]
