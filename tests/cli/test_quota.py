"""``grant``, ``charge``, ``refund`` and ``history`` at the shell."""

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


def test_a_charge_with_an_idempotency_key_is_made_once(db):
    run("create", "--quota", 100, "--model-limit", "gpt-4o=50")
    for _ in range(2):
        charged = run_json("charge", 1, 50, "--model", "gpt-4o", "--idempotency-key", "first")
        assert (charged["total_used"], charged["idempotency_key"]) == (50, "first")
    assert "another amount" in run("charge", 1, 49, "--model", "gpt-4o", "--idempotency-key", "first", status=2)[1]
    assert run_json("show", 1)["model_usage"] == {"gpt-4o": 50}


def test_a_grant_with_an_idempotency_key_is_made_once(db):
    run("create")
    for _ in range(2):
        assert run_json("grant", 1, 50, "--idempotency-key", "payment 7")["total_granted"] == 50
    assert "another amount" in run("grant", 1, 49, "--idempotency-key", "payment 7", status=2)[1]


def test_calls_without_an_idempotency_key_get_different_ones(db):
    run("create")
    keys = {run_json("grant", 1, 50)["idempotency_key"] for _ in range(2)}
    assert len(keys) == 2
    assert run_json("show", 1)["total_granted"] == 100


def test_refund_returns_a_part_and_then_the_rest(db):
    run("create", "--quota", 100)
    run("charge", 1, 50)
    (charge,) = run_json("history", 1)
    for _ in range(2):
        assert run_json("refund", charge["id"], 20, "--idempotency-key", "back")["total_used"] == 30
    assert run_json("refund", charge["id"])["total_used"] == 0
    assert "left to refund" in run("refund", charge["id"], 1, status=2)[1]


def test_history_is_a_table_newest_first(db):
    now = NOW
    with SQLiteTokenStore(db, clock=lambda: now) as store:
        key = store.create(total_available=10_000)[0]
        store.charge(key, 5000, model="gpt-4o")
        (charge,) = store.history(1)
        now = NOW + 60
        reservation = store.reserve(key, 100, model="m\x1b", expires_in=10**8)
        store.refund(charge, 1000)
        refund = next(store.history(1))
    space = " " * (len(f"of {charge.id}") - len("NOTE"))
    assert run("history", 1)[0].splitlines() == [
        f"WHEN                  KIND     AMOUNT   HELD  NOTE{space}  MODEL   OPERATION",
        f"2027-01-15 08:01 UTC  refund    1,000         of {charge.id}  gpt-4o  {refund.id}",
        f"2027-01-15 08:01 UTC  reserve     100    100  open{space}  m\ufffd      {reservation.id}",
        f"2027-01-15 08:00 UTC  charge    5,000  4,000  {space}      gpt-4o  {charge.id}",
    ]
    listed = run_json("history", 1)
    assert [operation["id"] for operation in listed] == [refund.id, reservation.id, charge.id]
    assert listed[-1]["held"] == 4000


def test_history_without_operations_is_empty(db):
    run("create")
    assert run_json("history", 1) == []
    assert len(run("history", 1)[0].splitlines()) == 1
