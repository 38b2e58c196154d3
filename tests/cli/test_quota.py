"""``grant``, ``charge``, ``refund``, ``history`` and ``prune``, as an operator types them."""

import io
import sys

from command import NOW, run, run_json

from usage_middleware import SQLiteTokenStore

# --- Moving quota


def test_grant_tops_up_and_takes_back(db):
    run("create", "--quota", 100)
    assert run_json("grant", 1, 50)["total_granted"] == 150
    assert run_json("grant", 1, "-30")["total_granted"] == 120
    assert "cannot be taken back" in run("grant", 1, -121, status=2)[1]
    assert run_json("show", 1)["total_available"] == 120


def test_charge_by_id_by_key_and_from_standard_input(db, monkeypatch):
    key = run("create", "--quota", 100)[0].strip()
    assert run_json("charge", 1, 5)["total_used"] == 5
    assert run_json("charge", key, 5)["total_used"] == 10
    monkeypatch.setattr(sys, "stdin", io.StringIO(key + "\n"))
    assert run_json("charge", "-", 5)["total_used"] == 15
    _, err = run("charge", "sk-canary", 5, status=2)
    assert "canary" not in err


def test_a_charge_with_an_operation_id_is_made_once(db):
    run("create", "--quota", 100, "--model-limit", "gpt-4o=50")
    for _ in range(2):
        charged = run_json("charge", 1, 50, "--model", "gpt-4o", "--operation-id", "first")
        assert (charged["total_used"], charged["model_usage"]) == (50, {"gpt-4o": 50})
    assert "another amount" in run("charge", 1, 49, "--model", "gpt-4o", "--operation-id", "first", status=2)[1]


def test_refund_gives_back(db):
    run("create", "--quota", 100)
    run("charge", 1, 50, "--operation-id", "first")
    for _ in range(2):
        assert run_json("refund", "first", 20, "--refund-id", "back")["total_used"] == 30
    assert run_json("refund", "first")["total_used"] == 0
    assert "left to refund" in run("refund", "first", 1, status=2)[1]


def test_history_is_a_table_newest_first(db):
    with SQLiteTokenStore(db) as store:
        store._now = lambda: NOW
        key = store.create(total_available=10_000)[0].removeprefix("sk-")
        store.charge(key, 5000, model="gpt-4o", idempotency_key="first")
        store._now = lambda: NOW + 60
        store.reserve(key, 100, idempotency_key="second\x1b")
        store.refund("first", 1000, idempotency_key="third")
    assert run("history", 1)[0].splitlines() == [
        "WHEN                  KIND     AMOUNT   HELD  NOTE      MODEL   OPERATION",
        "2027-01-15 08:01 UTC  refund    1,000         of first  gpt-4o  third",
        "2027-01-15 08:01 UTC  reserve     100    100  open              second\ufffd",
        "2027-01-15 08:00 UTC  charge    5,000  4,000            gpt-4o  first",
    ]
    listed = run_json("history", 1)
    assert [operation["id"] for operation in listed] == ["third", "second\x1b", "first"]
    assert listed[-1]["held"] == 4000


def test_history_of_a_token_without_any(db):
    run("create")
    assert run_json("history", 1) == []
    assert len(run("history", 1)[0].splitlines()) == 1


def test_prune_counts_what_it_forgot(db):
    with SQLiteTokenStore(db) as store:
        store._now = lambda: NOW
        key = store.create(total_available=100)[0].removeprefix("sk-")
        store.charge(key, 5)
    assert "Forgot 0 operations" in run("prune", "--before", NOW)[1]
    assert "Forgot 1 operation " in run("prune", "--older-than", NOW + 1)[1]
    assert run_json("show", 1)["total_used"] == 5
