"""Quota that renews, at the shell."""

import time

import pytest
from command import run, run_json


def test_create_with_a_renewal(db):
    created = run_json("create", "--renew", "monthly", "--quota", 1000)
    assert (created["renewal"], created["renewal_quota"], created["total_available"]) == ("monthly", 1000, 1000)
    assert created["renews_at"] > time.time()
    shown = run("show", 1)[0]
    assert "Renews     monthly, 1,000 quota units; next on 2" in shown
    assert "00:00 UTC\n" in shown


def test_show_leaves_out_what_a_token_does_not_have(db):
    run("create", "--quota", 1000)
    assert "Renews" not in run("show", 1)[0]
    assert "Held" not in run("show", 1)[0]


def test_show_has_what_reservations_hold(db):
    from usage_middleware import SQLiteTokenStore

    with SQLiteTokenStore(db) as store:
        store.reserve(store.create(total_available=5000)[0], 1500)
    assert "Held       1,500 by open reservations; part of what is used" in run("show", 1)[0]
    assert run_json("list")[0]["held"] == 1500


def test_update_starts_changes_and_ends_a_renewal(db):
    run("create", "--quota", 1000)
    updated = run_json("update", 1, "--renew", "daily", "--renewal-quota", 50)
    assert (updated["renewal"], updated["renewal_quota"], updated["total_available"]) == ("daily", 50, 1000)
    assert run_json("update", 1, "--renew", "weekly")["renewal_quota"] == 50
    assert run_json("update", 1, "--renewal-quota", 70)["renewal"] == "weekly"
    ended = run_json("update", 1, "--no-renewal")
    assert (ended["renewal"], ended["renewal_quota"], ended["renews_at"]) == ("", 0, 0)
    assert ended["total_available"] == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--renew", "monthly"], "--renew needs --quota"),
        (["create", "--renew", "hourly", "--quota", 5], "'hourly' is not one of 'daily', 'weekly', 'monthly'"),
        (["update", 1, "--renew", "daily"], "--renew needs --renewal-quota"),
        (["update", 1, "--renewal-quota", 5], "the quota of token 1 does not renew; add --renew"),
        (["update", 1, "--renew", "daily", "--renewal-quota", 0], "range"),
        (["update", 1, "--renew", "daily", "--renewal-quota", 5, "--no-renewal"], "--no-renewal excludes"),
        (["update", 1, "--quota", 5], "'usage-middleware grant ID AMOUNT' changes the quota of a token"),
        (["update", 1, "--total-available", 5], "'usage-middleware grant ID AMOUNT' changes the quota of a token"),
        (["update", 7, "--renew", "daily"], "there is no token 7"),
    ],
)
def test_a_wrong_renewal_is_refused_and_changes_nothing(db, words, message):
    run("create", "--quota", 1000)
    before = run("list", "--json")
    out, err = run(*words, status=2)
    assert out == ""
    assert message in err
    assert run("list", "--json") == before
