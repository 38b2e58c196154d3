"""``history`` with its filters, ``prune``, and ``settle`` for a reservation that has lapsed."""

import io
import sys
import time

import pytest
from command import run, run_json

from usage_middleware import SQLiteTokenStore

DAY = 86400


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def past(db):
    """A database with charges made 60, 30 and 2 days ago and now, an open reservation, and one that has lapsed."""
    now = begin = time.time()
    with SQLiteTokenStore(db, clock=lambda: now) as store:
        key, _ = store.create(total_available=1000, name="Alice")
        for age in (60, 30, 2):
            now = begin - age * DAY
            store.charge(key, age)
        now = begin
        store.reserve(key, 8, expires_in=3600)
        store.charge(key, 1)
        store.reserve(key, 7, expires_in=1e-6)
    return db


# --- history


@pytest.mark.parametrize(
    ("options", "amounts"),
    [
        ([], [7, 1, 8, 2, 30, 60]),
        (["--limit", 2], [7, 1]),
        (["--limit", 0], []),
        (["--since", "31d"], [7, 1, 8, 2, 30]),
        (["--until", "31d"], [60]),
        (["--since", "31d", "--until", "1d"], [2, 30]),
        (["--state", "open"], [8]),
        (["--state", "lapsed"], [7]),
        (["--state", "final", "--limit", 1], [1]),
        (["--state", "final", "--since", "3d"], [1, 2]),
    ],
)
def test_filters_of_history_combine(past, options, amounts):
    assert [operation["amount"] for operation in run_json("history", 1, *options)] == amounts
    assert len(run("history", 1, *options)[0].splitlines()) == 1 + len(amounts)


# --- settle


def test_a_lapsed_reservation_is_found_and_settled(past):
    shown = run("check")[0]
    (lapsed,) = run_json("history", 1, "--state", "lapsed")
    assert f"warning operation {lapsed['id']} of token 1 holds 7 quota units and lapsed on " in shown
    assert run_json("settle", lapsed["id"], 5, "--input-tokens", 3)["total_used"] == 60 + 30 + 2 + 5 + 8 + 1
    assert run_json("settle", lapsed["id"], 5, "--input-tokens", 3)["held"] == 8
    assert "another final_amount" in run("settle", lapsed["id"], 6, status=2)[1]
    (still_open,) = run_json("history", 1, "--state", "open")
    assert run_json("settle", still_open["id"], 0)["held"] == 0
    assert "ok      open reservations: 0" in run("check")[0]
    assert run_json("usage", 1)["input_tokens"] == 3


def test_check_names_the_first_of_many_reservations(db):
    an_hour_ago = time.time() - 3600
    with SQLiteTokenStore(db, clock=lambda: an_hour_ago) as store:
        key, _ = store.create(total_available=1000)
        for _ in range(25):
            store.reserve(key, 2)
    out, _ = run("check")
    assert "open reservations: 25, of which 25 have lapsed and hold 50 quota units" in out
    assert out.count("holds 2 quota units and lapsed on") == 20
    assert "warning 5 more have lapsed" in out


# --- prune


def operations(db):
    with SQLiteTokenStore(db, read_only=True) as store:
        return len(list(store.history(1)))


def test_prune_says_how_many_operations_it_deleted(past):
    assert run("prune", "--older-than", "90d")[1].startswith("Deleted 0 operations from before 20")
    assert run("prune", "--older-than", "45d")[1].startswith("Deleted 1 operation from before ")
    assert run("prune", "--before", int(time.time()) - 25 * DAY)[1].startswith("Deleted 1 operation from before ")
    assert operations(past) == 4
    assert run_json("show", 1)["total_used"] == 60 + 30 + 2 + 8 + 1 + 7
    assert len(run_json("usage", 1, "--days", 90)["days"]) >= 4


@pytest.mark.parametrize("when", ["2099-01-01", pytest.param(str(int(time.time()) + 60 * DAY), id="60 days from now")])
def test_prune_refuses_a_time_in_the_future(past, when):
    for words in ([], ["--yes"], ["--dry-run"]):
        assert "is in the future" in run("prune", "--before", when, *words, status=2)[1]
    assert operations(past) == 6


def test_a_dry_run_of_prune_deletes_nothing_and_counts_the_same(past):
    before = past.read_bytes()
    assert run("prune", "--older-than", "25d", "--dry-run")[1].startswith("Would delete 2 operations from before ")
    assert past.read_bytes() == before
    assert run("prune", "--older-than", "25d")[1].startswith("Deleted 2 operations from before ")


@pytest.mark.parametrize(("answer", "left"), [("y\n", 4), ("n\n", 6), ("", 6)])
def test_at_a_terminal_prune_says_how_many_and_asks(past, monkeypatch, answer, left):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    out, err = run("prune", "--older-than", "25d", status=0 if left == 4 else 2)
    assert "Delete 2 operations from before 20" in out + err
    assert operations(past) == left


def test_prune_with_yes_does_not_ask(past, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    out, err = run("prune", "--older-than", "25d", "--yes")
    assert out == ""
    assert err.startswith("Deleted 2 operations from before ")


@pytest.mark.parametrize("age", ["0d", "0s", "23h"])
def test_operations_of_the_last_day_are_deleted_only_with_yes(past, age):
    _, err = run("prune", "--older-than", age, status=2)
    assert "clients may still repeat operations that are less than a day old" in err
    assert operations(past) == 6
    assert "Deleted" in run("prune", "--older-than", age, "--yes")[1]
    assert operations(past) < 6
