"""``usage``: what a token used by day and by model, as a report and as JSON."""

import re
from datetime import date, datetime, timedelta, timezone

import pytest
from command import run, run_json

from usage_middleware import MemoryTokenStore, SQLiteTokenStore
from usage_middleware.cli.usage_report import usage_as_object, usage_report
from usage_middleware.tokens import Token
from usage_middleware.usage import DayUsage

FIRST, LAST = date(2026, 11, 1), date(2026, 11, 24)
NOTHING = {"input_tokens": 0, "output_tokens": 0}


@pytest.fixture
def days(db):
    """Charge a token 40 days ago, 2 days ago and today. Return the days and the amounts."""
    now = datetime.now(timezone.utc)
    moment = now.timestamp()
    with SQLiteTokenStore(db, clock=lambda: moment) as store:
        moment = (now - timedelta(days=40)).timestamp()
        key, _ = store.create(total_available=10_000, name="Alice")
        for age, amount in ((40, 40), (2, 1500), (0, 1)):
            moment = (now - timedelta(days=age)).timestamp()
            store.charge(key, amount, model="gpt-4o")
    return [((now - timedelta(days=age)).date(), amount) for age, amount in ((40, 40), (2, 1500), (0, 1))]


@pytest.fixture
def entries():
    """Return a token, and its usage on two days as a store returns it."""
    with MemoryTokenStore(clock=lambda: moment.timestamp()) as store:
        moment = datetime(2026, 11, 22, 23, 59, 59, tzinfo=timezone.utc)
        key, token = store.create(total_available=10_000, name="Alice\x1b")
        store.charge(key, 1000, model="gpt-4o", input_tokens=900, output_tokens=100)
        store.charge(key, 500, model="\u4ee4\u724c")
        moment = datetime(2026, 11, 24, tzinfo=timezone.utc)
        store.charge(key, 1)
        store.charge(key, 0, model="gpt-4o")
        return token, store.usage_by_day(token.id, FIRST, LAST)


def test_the_report_is_two_tables_with_bars(entries):
    token, used = entries
    assert list(usage_report(token, FIRST, LAST, used)) == [
        "Token 1 'Alice\ufffd', 2026-11-01 to 2026-11-24 (UTC)",
        "",
        "DAY            USED                        REQUESTS  INPUT  OUTPUT",
        "2026-11-22    1,500  ████████████████████         2    900     100",
        "  gpt-4o      1,000  █████████████░░░░░░░         1    900     100",
        "  \u4ee4\u724c          500  ██████░░░░░░░░░░░░░░         1      0       0",
        "2026-11-24        1  █░░░░░░░░░░░░░░░░░░░         2      0       0",
        "  (no model)      1  █░░░░░░░░░░░░░░░░░░░         1      0       0",
        "  gpt-4o          0  ░░░░░░░░░░░░░░░░░░░░         1      0       0",
        "total         1,501                               4    900     100",
        "",
        "MODEL        USED                        REQUESTS  INPUT  OUTPUT",
        "gpt-4o      1,000  ████████████████████         2    900     100",
        "\u4ee4\u724c          500  ██████████░░░░░░░░░░         1      0       0",
        "(no model)      1  █░░░░░░░░░░░░░░░░░░░         1      0       0",
        "total       1,501                               4    900     100",
    ]


def test_json_has_days_with_their_models_and_sums(entries):
    token, used = entries
    assert usage_as_object(token, FIRST, LAST, used) == {
        "id": 1,
        "start_date": "2026-11-01",
        "end_date": "2026-11-24",
        "used": 1501,
        "requests": 4,
        "input_tokens": 900,
        "output_tokens": 100,
        "days": [
            {
                "date": "2026-11-22",
                "used": 1500,
                "requests": 2,
                "input_tokens": 900,
                "output_tokens": 100,
                "models": {
                    "gpt-4o": {"used": 1000, "requests": 1, "input_tokens": 900, "output_tokens": 100},
                    "\u4ee4\u724c": {"used": 500, "requests": 1, **NOTHING},
                },
            },
            {
                "date": "2026-11-24",
                "used": 1,
                "requests": 2,
                **NOTHING,
                "models": {"": {"used": 1, "requests": 1, **NOTHING}, "gpt-4o": {"used": 0, "requests": 1, **NOTHING}},
            },
        ],
    }


@pytest.mark.parametrize("count", [1, 2, 3, 30, 41, 3660])
def test_the_last_days_are_shown(days, count):
    shown = run_json("usage", 1, "--days", count)
    first, last = date.fromisoformat(shown["start_date"]), date.fromisoformat(shown["end_date"])
    assert last - first == timedelta(days=count - 1)
    # It may have become midnight in the meantime.
    assert last in (days[-1][0], days[-1][0] + timedelta(days=1))
    assert [(day["date"], day["used"]) for day in shown["days"]] == [
        (str(day), used) for day, used in days if first <= day <= last
    ]


def test_thirty_days_are_shown_by_default(days):
    lines = run("usage", 1)[0].splitlines()
    first, last = map(date.fromisoformat, re.findall(r"\d{4}-\d\d-\d\d", lines[0]))
    assert last - first == timedelta(days=29)
    assert sum(line.startswith("20") for line in lines) == 2


@pytest.mark.parametrize("count", [0, -1, 3661])
def test_days_outside_1_to_3660_are_refused(days, count):
    assert "range" in run("usage", 1, "--days", count, status=2)[1]


def test_a_token_without_usage_is_said_to_have_none(db):
    run("create", "--name", "Alice")
    assert run("usage", 1)[0].splitlines()[1:] == ["", "Nothing was used."]
    assert run_json("usage", 1)["days"] == []
    assert "there is no token 7" in run("usage", 7, status=2)[1]


def test_requests_that_cost_nothing_are_shown():
    lines = list(usage_report(Token(id=1), LAST, LAST, [DayUsage(LAST, "", 0, 3, 0, 0)]))
    assert lines[3].split() == ["2026-11-24", "0", "░░░░░░░░░░░░░░░░░░░░", "3", "0", "0"]
