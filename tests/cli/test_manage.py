"""Creating, reading and changing tokens at the shell."""

import io
import sys
import time

import pytest
from command import KEY, NOW, run, run_json

from usage_middleware import SQLiteTokenStore, Token
from usage_middleware.cli.formats import describe, token_table

# --- Creating and reading tokens


def test_create_prints_the_key_alone_and_once(db):
    out, err = run("create", "--name", "Alice", "--quota", "1_000_000")
    assert KEY.fullmatch(out.removesuffix("\n"))
    assert "cannot be shown again" in err
    with SQLiteTokenStore(db) as store:
        assert store.get(out.strip().removeprefix("sk-")) == store.get_by_id(1)
    key = out.strip().removeprefix("sk-")
    for shown in (run("list"), run("list", "--json"), run("show", 1), run("show", 1, "--json")):
        assert key not in "".join(shown)


def test_create_takes_every_field(db):
    created = run_json(
        *("create", "--name", "Alice", "--total-available", 1000, "--unlimited-quota"),
        *("--model-limit", "gpt-4o=500", "--model-limit", "a=b=7", "--model-limit", "any"),
        *("--expires", "2030-01-01", "--key", "sk-legacy-key-of-a-holder-0001"),
    )
    assert created.pop("key") == "sk-legacy-key-of-a-holder-0001"
    assert abs(created.pop("created_at") - time.time()) < 60
    assert created == {
        "id": 1,
        "name": "Alice",
        "hint": "0001",
        "enabled": True,
        "total_granted": 1000,
        "total_used": 0,
        "total_available": 1000,
        "unlimited_quota": True,
        "model_limits": {"gpt-4o": 500, "a=b": 7, "any": True},
        "model_limits_enabled": True,
        "expires_at": 1893456000,
        "renewal": "",
        "renewal_quota": 0,
        "renews_at": 0,
        "held": 0,
    }
    assert {**run_json("show", 1), "created_at": 0} == {**created, "created_at": 0, "model_usage": {}}


def test_a_key_is_read_from_standard_input(db, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("legacy-key-of-a-holder-0001\n"))
    assert run("create", "--key", "-")[0] == "sk-legacy-key-of-a-holder-0001\n"


def test_list_is_a_table(db):
    with SQLiteTokenStore(db) as store:
        store.create(name="Alice", total_available=1_000_000)
        store.create(name="\u4ee4\u724c", unlimited_quota=True, expires_at=4_102_444_800)
        store.create(name="Old", total_available=5, expires_at=1)
        store.create(name="Empty")
        store.update(store.create(name="Off\x1b[31m\n")[1].id, enabled=False)
        hints = [token.hint for token in store.tokens()]
    out, _ = run("list")
    assert out.splitlines() == [
        "ID  KEY    STATE      AVAILABLE  USED    GRANTED  EXPIRES               NAME",
        f" 1  …{hints[0]}  active     1,000,000     0  1,000,000  never                 Alice",
        f" 2  …{hints[1]}  active     unlimited     0          0  2100-01-01 00:00 UTC  \u4ee4\u724c",
        f" 3  …{hints[2]}  expired            5     0          5  1970-01-01 00:00 UTC  Old",
        f" 4  …{hints[3]}  exhausted          0     0          0  never                 Empty",
        f" 5  …{hints[4]}  disabled           0     0          0  never                 Off\ufffd[31m\ufffd",
    ]


def test_list_as_json(db):
    with SQLiteTokenStore(db) as store:
        store.get_by_id(1)
        assert run_json("list") == []
        store.create(name="caf\u00e9")
        store.create()
    assert [(token["id"], token["name"]) for token in run_json("list")] == [(1, "caf\u00e9"), (2, "")]


def test_a_table_is_printed_without_collecting_its_rows():
    def endless():
        number = 0
        while True:
            number += 1
            yield Token(id=number)

    lines = token_table(endless(), NOW)
    assert [next(lines).split()[0] for _ in range(2000)] == ["ID", *map(str, range(1, 2000))]


def test_show_has_the_fields_and_the_models(db):
    with SQLiteTokenStore(db) as store:
        store.create(name="Alice", total_available=1000, model_limits={"gpt-4o": 500_000, "any": True})
    lines = run("show", 1)[0].splitlines()
    assert "Name       Alice" in lines
    assert "Available  1,000" in lines
    assert "Expires    never" in lines
    assert lines[-3:] == [
        "Models     only those below",
        "  gpt-4o  ░░░░░░░░░░░░░░░░░░░░  0 of 500,000 (0 %)",
        "  any     0",
    ]


@pytest.mark.parametrize(
    ("used", "granted", "shown"),
    [
        (0, 1000, "░░░░░░░░░░░░░░░░░░░░  0 of 1,000 (0 %)"),
        (1, 1000, "█░░░░░░░░░░░░░░░░░░░  1 of 1,000 (0 %)"),
        (500, 1000, "██████████░░░░░░░░░░  500 of 1,000 (50 %)"),
        (999, 1000, "███████████████████░  999 of 1,000 (99 %)"),
        (1000, 1000, "████████████████████  1,000 of 1,000 (100 %)"),
        (1500, 1000, "████████████████████  1,500 of 1,000 (150 %)"),
        (0, 0, "████████████████████  0 of 0 (none left)"),
        (2**62, 2**63 - 1, "██████████░░░░░░░░░░  4,611,686,018,427,387,904 of 9,223,372,036,854,775,807 (50 %)"),
    ],
)
def test_a_bar_is_only_empty_or_full_if_that_is_true(used, granted, shown):
    token = Token(id=1, total_used=used, total_available=granted - used)
    assert f"Used       {shown}" in list(describe(token, NOW, {}))


def test_show_lists_models_that_have_no_limit():
    token = Token(id=1, total_used=5, unlimited_quota=True, model_limits={"listed": 10})
    assert list(describe(token, NOW, {"listed": 5, "\u6a21\u578b": 7}))[-3:] == [
        "Models     any; the limits below are not enabled",
        "  listed  ██████████░░░░░░░░░░  5 of 10 (50 %)",
        "  \u6a21\u578b    7",
    ]


# --- Changing tokens


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--name", "New"], {"name": "New"}),
        (["--name", ""], {"name": ""}),
        (["--unlimited"], {"unlimited_quota": True}),
        (["--expires", "2030-01-01"], {"expires_at": 1893456000}),
        (["--expires", "never"], {"expires_at": 0}),
        (["--disable"], {"enabled": False}),
        (["--model-limit", "new"], {"model_limits": {"new": True}, "model_limits_enabled": True}),
        (
            ["--model-limit", "new=3", "--model-limits-disabled"],
            {"model_limits": {"new": 3}, "model_limits_enabled": False},
        ),
        (["--no-model-limits"], {"model_limits": {}, "model_limits_enabled": False}),
        (["--model-limits-disabled"], {"model_limits_enabled": False}),
        (["--name", "New", "--disable"], {"name": "New", "enabled": False}),
    ],
)
def test_update_changes_only_what_is_named(db, options, changed):
    with SQLiteTokenStore(db) as store:
        store.create(name="Old", total_available=5, model_limits={"old": 1}, expires_at=4_102_444_800)
    before = run_json("show", 1)
    assert run_json("update", 1, *options) == {**before, **changed}
    assert run_json("show", 1) == {**before, **changed}


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (["--disable"], ["--enable"]),
        (["--unlimited"], ["--limited"]),
        (["--model-limits-enabled"], ["--model-limits-disabled"]),
    ],
)
def test_update_undoes_an_update(db, off, on):
    run("create")
    before = run_json("show", 1)
    assert run_json("update", 1, *off) != before
    assert run_json("update", 1, *on) == before


def test_rotate_prints_a_new_key(db):
    old = run("create")[0].strip()
    new = run("rotate", 1)[0].strip()
    assert KEY.fullmatch(new)
    with SQLiteTokenStore(db) as store:
        assert store.get(old.removeprefix("sk-")) is None
        assert store.get(new.removeprefix("sk-")).id == 1


def test_delete_removes_the_token(db):
    run("create")
    assert run("delete", 1) == ("", "Deleted token 1.\n")
    assert run_json("list") == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_delete_asks_at_a_terminal(db, monkeypatch, answer, left):
    run("create", "--name", "Alice")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    out, _ = run("delete", 1, status=0 if not left else 2)
    assert "Alice" in out
    assert len(run_json("list")) == left


def test_delete_with_yes_does_not_ask(db, monkeypatch):
    run("create")
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert run("delete", 1, "--yes")[0] == ""
