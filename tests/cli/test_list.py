"""``list`` with its filters."""

import pytest
from command import run, run_json

from usage_middleware import SQLiteTokenStore

DAY = 86400


@pytest.fixture
def tokens(db):
    import time

    now = begin = time.time()
    with SQLiteTokenStore(db, clock=lambda: now) as store:
        for age, name, fields in (
            (30, "Alice", {"total_available": 5}),
            (20, "Bob", {}),
            (10, "alicia", {"total_available": 5, "expires_at": 1}),
            (0, "STRASSE", {"unlimited_quota": True}),
        ):
            now = begin - age * DAY
            store.create(name=name, **fields)
        store.update(store.create(name="Off")[1].id, enabled=False)


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], [1, 2, 3, 4, 5]),
        (["--state", "active"], [1, 4]),
        (["--state", "exhausted"], [2]),
        (["--state", "expired"], [3]),
        (["--state", "disabled"], [5]),
        (["--name", "ali"], [1, 3]),
        (["--name", "straße"], [4]),
        (["--name", "%"], []),
        (["--limit", 2], [1, 2]),
        (["--limit", 0], []),
        (["--since", "15d"], [3, 4, 5]),
        (["--until", "15d"], [1, 2]),
        (["--since", "25d", "--until", "15d"], [2]),
        (["--name", "ali", "--state", "active", "--limit", 1], [1]),
    ],
)
def test_filters_of_list_combine(tokens, options, ids):
    assert [token["id"] for token in run_json("list", *options)] == ids
    assert [line.split()[0] for line in run("list", *options)[0].splitlines()[1:]] == list(map(str, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--state", "gone"], "'gone' is not one of"),
        (["--limit", -1], "range"),
        (["--since", "soon"], "'soon' is not a time"),
    ],
)
def test_a_bad_filter_is_refused(tokens, options, message):
    assert message in run("list", *options, status=2)[1]


def test_a_token_of_unknown_age_is_not_called_new_or_old(db):
    db.with_name("t.jsonl").write_text('{"key": "the-key-of-a-holder"}\n')
    run("import", "t.jsonl")
    assert run_json("list", "--since", "1y") == []
    assert "Created    unknown" in run("show", 1)[0]
