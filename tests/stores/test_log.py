"""A page of a token's log, and how many requests there were, in every store with a ledger."""

import random
from itertools import product

import pytest

from usage_middleware import LogEntry, MemoryTokenStore, Operation, QuotaStore, open_store
from usage_middleware.log import KeepsLog, log_entry
from usage_middleware.testing.fixtures import Clock

NOW = 1_795_500_000


@pytest.fixture(scope="module", params=["memory", "sqlite", "mariadb", "postgresql"])
def store(request, tmp_path_factory):
    """Yield a store with two tokens that were used in every way, at times that are not always in order."""
    if request.param == "memory":
        with MemoryTokenStore() as store:
            yield filled(store)
    elif request.param == "sqlite":
        with open_store(str(tmp_path_factory.mktemp("log") / "tokens.db")) as store:
            yield filled(store)
    else:
        with request.getfixturevalue(request.param).database() as url, open_store(url) as store:
            yield filled(store)


def filled(store):
    clock = store._clock = Clock()
    clock.now = float(NOW)
    chance = random.Random(1)
    for name in ("first", "second"):
        key, token = store.create(name=name, total_available=10**6, renewal="daily", renewal_quota=10**6)
        reserved, settled = [], []
        for _ in range(60):
            # A clock may be set back.
            clock.now += chance.choice([0, 0.25, 1, 7.5, -2])
            what = chance.choice(["charge", "reserve", "settle", "refund", "grant", "day"])
            amount = chance.randrange(100)
            if what == "charge":
                store.charge(key, amount, model=chance.choice([None, "a", "b"]), input_tokens=amount, output_tokens=2)
            elif what == "reserve":
                reserved.append(store.reserve(key, amount, model="c"))
            elif what == "settle" and reserved:
                settled.append(reserved.pop())
                store.settle(settled[-1], amount, input_tokens=amount, output_tokens=3)
            elif what == "refund" and settled:
                store.refund(settled.pop(0))
            elif what == "grant":
                store.grant(token.id, amount)
            elif what == "day":
                clock.now += chance.choice([0, 24 * 3600])
    return store


def expected(store, token_id, kinds, since, until):
    """Return the same from the whole history."""
    wanted = {"charge": ("charge", "reserve"), "refund": ("refund",)}
    names = [name for kind in kinds for name in wanted[kind]]
    return [
        log_entry(operation)
        for operation in store.history(token_id)
        if operation.kind in names and since <= operation.created_at and int(operation.created_at) <= until
    ]


def test_the_log_is_what_the_history_has(store):
    assert isinstance(store, QuotaStore)
    assert isinstance(store, KeepsLog)
    for token in store.tokens():
        entries = list(store.log(token.id))
        assert entries == expected(store, token.id, ("charge", "refund"), 0, 2**63 - 1)
        assert {entry.kind for entry in entries} == {"charge", "refund"}
        used = sum(entry.units if entry.kind == "charge" else -entry.units for entry in entries)
        assert used == token.total_used
        assert store.count_requests(token.id) == sum(entry.kind == "charge" for entry in entries)


def test_every_page_of_every_choice(store):
    token_id = next(store.tokens()).id
    times = sorted({entry.created_at for entry in store.log(token_id)})
    bounds = [0, times[0], times[len(times) // 3], times[len(times) // 2] + 1, times[-1], 2**63 - 1]
    for kinds, since, until in product([("charge",), ("refund",), ("charge", "refund"), ()], bounds, bounds):
        found = expected(store, token_id, kinds, since, until)
        choice = {"kinds": kinds, "since": since, "until": until}
        assert list(store.log(token_id, **choice)) == found
        for offset, size in ((0, 3), (1, 1), (len(found) // 2, 5), (len(found), 5), (2**63 - 1, 1)):
            assert list(store.log(token_id, **choice, offset=offset, size=size)) == found[offset : offset + size]


def test_a_token_that_is_not_there_has_no_log(store):
    for token_id in (99, 0, -1, 2**70):
        assert list(store.log(token_id)) == []
        assert store.count_requests(token_id) == 0


def test_what_is_forgotten_is_not_in_the_log_and_was_a_request():
    with MemoryTokenStore(clock=lambda: NOW) as store:
        key, token = store.create(total_available=10)
        store.charge(key, 1)
        store.prune(NOW - 1)
        assert len(store.log(token.id)) == 1
        store._clock = lambda: NOW + 10
        store.prune(NOW + 5)
        assert store.log(token.id) == []
        assert store.count_requests(token.id) == 1


@pytest.mark.parametrize(
    ("operation", "entry"),
    [
        pytest.param(
            {"kind": "charge", "amount": 5, "held": 2, "final_amount": 5, "model": "m"},
            {"kind": "charge", "units": 5, "model": "m"},
            id="a charge that was refunded in part",
        ),
        pytest.param(
            {"kind": "reserve", "amount": 9, "held": 7, "expires_at": 1.0},
            {"kind": "charge", "units": 7},
            id="an open reservation",
        ),
        pytest.param(
            {"kind": "reserve", "amount": 9, "held": 0, "expires_at": 1.0},
            {"kind": "charge", "units": 0},
            id="one that lapsed",
        ),
        pytest.param(
            {"kind": "reserve", "amount": 9, "held": 4, "final_amount": 4, "input_tokens": 1, "output_tokens": 2},
            {"kind": "charge", "units": 4, "input_tokens": 1, "output_tokens": 2},
            id="one that was settled",
        ),
        pytest.param(
            {"kind": "refund", "amount": None, "final_amount": 3}, {"kind": "refund", "units": 3}, id="a refund"
        ),
    ],
)
def test_an_operation_as_an_entry(operation, entry):
    made = Operation(id="x", token_id=1, created_at=NOW + 0.9, **operation)
    assert log_entry(made) == LogEntry(**{"created_at": NOW, "id": "x", **entry})
