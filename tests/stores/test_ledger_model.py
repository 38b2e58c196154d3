"""The ledger against a model of it: whatever is called, and in whatever order, a store does what the model does.

Hypothesis makes up the calls, and shortens a list of them after which the two differ.

The test is small by default and has its full size with ``--full``.
"""

import dataclasses
import itertools
import shutil
from datetime import date

import databases
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_model import MOST, START, Model
from sqlalchemy import create_engine

from usage_middleware import (
    MemoryTokenStore,
    Operation,
    QuotaError,
    QuotaExceeded,
    SQLAlchemyTokenStore,
    SQLiteTokenStore,
    Token,
    TokenNotFound,
)
from usage_middleware.keys import strip_prefix

MOST_TOKENS = 3
A_DAY = 86_400

EXAMPLES, STEPS = 100, 2_500
FULL_EXAMPLES, FULL_STEPS = 3_000, 100_000
STEPS_OF_AN_EXAMPLE = 50  # at most

# The fields of an operation that are compared.
ENTRY = [field.name for field in dataclasses.fields(Operation) if field.name not in ("number", "replayed")]

# Mostly small, so that limits are met often; sometimes at the end of what a column holds.
AMOUNTS = st.sampled_from([*range(6)] * 6 + [-1, MOST - 5, MOST - 1, MOST, MOST + 1])
FINAL_AMOUNTS = st.sampled_from([*range(6), *range(10, 60, 10)] * 6 + [-1, MOST - 5, MOST])  # more than there is
GRANTS = st.sampled_from([*range(-6, 7)] * 3 + [-MOST - 1, -MOST, 5 - MOST, MOST - 5, MOST, MOST + 1])
AVAILABLE = st.sampled_from([*range(13)] * 3 + [MOST - 5, MOST])
AT_LEAST = st.sampled_from([None] * 4 + [0, 0, 1, 3, 5, -1])
FIGURES = st.sampled_from([0] * 5 + [1, 2, 3, -1])  # of input or output tokens
MODELS = st.sampled_from([None, "capped", "capped", "other"])
LIMITS = st.sampled_from([{"capped": 5}, {"capped": 8, "other": True}, {"capped": 0, "other": 3}, {"other": True}, {}])
NAMES = [*"abcdefgh"]
IDS = st.sampled_from([None] * 4 + NAMES)
KEYS = st.sampled_from([None, None, "a-key", "another-key"])
SECONDS = st.sampled_from([0.5, 0.5, 10, 10, 60, 600, 2 * A_DAY])
PAUSES = st.sampled_from([0, 0, 0.5, 10, 60, A_DAY])
AGES = st.sampled_from([600, 60, 60, 10, 10, 0.5, 0, -60])
JUMPS = st.sampled_from(
    [
        0.5,
        10,
        60,
        60,
        60,
        600,
        *[A_DAY] * 4,
        3 * A_DAY,
        8 * A_DAY,
        40 * A_DAY,
        800 * A_DAY,
        -0.5,
        -60,
        -A_DAY,
        -40 * A_DAY,
    ]
)
RENEWALS = st.sampled_from(
    [("", 0)] * 3 + [("daily", 6), ("daily", 9), ("daily", 12), ("weekly", 3), ("monthly", 8), ("monthly", MOST)]
)
FIELDS = {
    "unlimited_quota": st.sampled_from([False, False, True]),
    "model_limits": LIMITS,
    "model_limits_enabled": st.sampled_from([True, True, False]),
    "expires_at": st.sampled_from([0] * 9 + [-1, START, START + 60]),
}
PLAIN = {"unlimited_quota": False, "model_limits": {}, "model_limits_enabled": False, "expires_at": 0}
CHANGEABLE = [*FIELDS, "enabled", "renewal", "renewal_quota"]
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **FIELDS,
        "enabled": st.sampled_from([True, True, True, True, False]),
        "renewal": st.sampled_from(["", "daily", "daily", "weekly", "monthly"]),
        "renewal_quota": st.sampled_from([4, 7, 7, 0, MOST]),
    },
)

# The arguments that may differ if a call is repeated.
OTHERS = {
    "token_id": st.runner().flatmap(lambda machine: st.sampled_from(list(machine.keys))),
    "key": st.runner().flatmap(lambda machine: st.sampled_from(list(machine.keys.values()))),
    "amount": AMOUNTS,
    "at_least": AT_LEAST,
    "model": MODELS,
    "idempotency_key": st.sampled_from(NAMES),
    "expires_in": SECONDS,
    "input_tokens": FIGURES,
    "output_tokens": FIGURES,
    "operation": st.runner().flatmap(lambda machine: st.sampled_from(machine.some_operations(is_open=False))),
}

# The index of one of the existing ones.
TOKENS = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_tokens()))
OPEN = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_operations(is_open=True)))
FINAL = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_operations(is_open=False)))
CALLS = st.runner().flatmap(lambda machine: st.sampled_from(machine.calls))

# Hypothesis leaves some rules out of each example. One without operations shows little, so that all others wait for the
# first of them; if nothing can go on, Hypothesis makes another example.
once_begun = precondition(lambda machine: machine.model.operations)


class Machine(RuleBasedStateMachine):
    """Make calls of a store and of the model, and compare the two after each."""

    def __init__(self, make_store, steps):
        super().__init__()
        self.model = Model()
        self.store = make_store()
        self.store._clock = lambda: self.model.now
        self.steps = steps
        self.keys = {}  # the last key of each token
        self.calls = []  # those that can be repeated

    def teardown(self):
        self.store.close()

    def some_tokens(self):
        """Return the ids of the tokens, and one of a token that was deleted."""
        deleted = [token_id for token_id in self.keys if token_id not in self.model.tokens]
        return [*self.model.tokens, *deleted[-1:]]

    def some_operations(self, *, is_open):
        """Return the ids of operations, most of them of reservations that are open, or of what is final."""
        entries = [entry for entry in self.model.operations if not entry["pruned"]]
        meant = [
            entry
            for entry in entries
            if entry["kind"] in ("charge", "reserve") and (entry["final_amount"] is None) == is_open
        ]
        return [entry["id"] for entry in [*meant, *meant, *meant, *entries]] or ["never made"]

    # --- Tokens

    def add(self, total_available, fields, renewal, key=None):
        fields = {**fields, "renewal": renewal[0], "renewal_quota": renewal[1]}
        written, token = self.store.create(total_available=total_available, key=key, **fields)
        self.keys[token.id] = strip_prefix(written)
        self.model.add(token.id, self.keys[token.id], total_available, **fields)

    @initialize(total_available=AVAILABLE, fields=st.just(PLAIN) | st.fixed_dictionaries(FIELDS), renewal=RENEWALS)
    def create_the_first(self, total_available, fields, renewal):
        self.add(total_available, fields, renewal)

    @once_begun
    @precondition(lambda self: len(self.model.tokens) < MOST_TOKENS)
    @rule(total_available=AVAILABLE, fields=st.fixed_dictionaries(FIELDS), renewal=RENEWALS, key=KEYS)
    def create(self, total_available, fields, renewal, key):
        if key in self.model.keys:
            with pytest.raises(ValueError, match="key"):
                self.store.create(key=key)
        else:
            self.add(total_available, fields, renewal, key)

    @once_begun
    @rule(token_id=TOKENS, changes=CHANGES)
    def update(self, token_id, changes):
        self.call("update", {"token_id": token_id, **changes})

    @once_begun
    @rule(token_id=TOKENS)
    def rotate(self, token_id):
        count = len(self.model.operations)
        expected = outcome(self.model, "give_up_key", {"token_id": token_id})
        actual = outcome(self.store, "rotate", {"token_id": token_id})
        if expected is TokenNotFound:
            assert actual is TokenNotFound
        else:
            self.keys[token_id] = strip_prefix(actual)
            self.model.keys[self.keys[token_id]] = token_id
        self.name_operations(count)

    @precondition(lambda self: len(self.model.tokens) == MOST_TOKENS)
    @rule(token_id=TOKENS)
    def delete(self, token_id):
        self.call("delete", {"token_id": token_id})

    # --- Operations

    @rule(
        seconds=PAUSES,
        token_id=TOKENS,
        amount=AMOUNTS,
        model=MODELS,
        idempotency_key=IDS,
        input_tokens=FIGURES,
        output_tokens=FIGURES,
        by_id=st.booleans(),
    )
    def charge(self, seconds, token_id, by_id, **arguments):
        self.model.now += seconds
        if by_id:
            self.call("charge_by_id", {"token_id": token_id, **arguments})
        else:
            self.call("charge", {"key": self.keys[token_id], **arguments})

    @rule(token_id=TOKENS, amount=AMOUNTS, at_least=AT_LEAST, model=MODELS, idempotency_key=IDS, expires_in=SECONDS)
    def reserve(self, token_id, **arguments):
        self.call("reserve", {"key": self.keys[token_id], **arguments})

    @once_begun
    @rule(operation=OPEN, amount=FINAL_AMOUNTS, input_tokens=FIGURES, output_tokens=FIGURES)
    def settle(self, **arguments):
        self.call("settle", arguments)

    @once_begun
    @rule(operation=FINAL, amount=st.none() | AMOUNTS, idempotency_key=IDS)
    def refund(self, **arguments):
        self.call("refund", arguments)

    @once_begun
    @rule(token_id=TOKENS, amount=GRANTS, idempotency_key=IDS)
    def grant(self, **arguments):
        self.call("grant", arguments)

    @precondition(lambda self: self.calls)
    @rule(call=CALLS)
    def repeat(self, call):
        self.call(*call)

    @precondition(lambda self: self.calls)
    @rule(call=CALLS, data=st.data())
    def repeat_with_another_argument(self, call, data):
        method, arguments = call
        name = data.draw(st.sampled_from([name for name in arguments if name in OTHERS]))
        self.call(method, {**arguments, name: data.draw(OTHERS[name])})

    # --- Time

    @once_begun
    @rule(seconds=JUMPS)
    def set_the_clock(self, seconds):
        self.model.now += seconds

    @precondition(lambda self: sum(not entry["pruned"] for entry in self.model.operations) > MOST_TOKENS)
    @rule(seconds=AGES)
    def prune(self, seconds):
        before = self.model.now - seconds
        counted = self.store.count_finished(before)
        forgotten = self.call("prune", {"before": before})
        # What is recorded while it prunes is not counted before.
        assert counted == forgotten or before > self.model.now

    # --- What must be the same.

    def call(self, method, arguments):
        """Call both, and compare the results."""
        if (arguments.get("idempotency_key") or method == "settle") and (method, arguments) not in self.calls:
            self.calls.append((method, arguments))
        count = len(self.model.operations)
        expected = outcome(self.model, method, arguments)
        actual = outcome(self.store, method, arguments)
        self.name_operations(count)
        if isinstance(actual, Token):
            assert actual == self.store.get_by_id(actual.id)
            actual = actual.id
        elif isinstance(actual, Operation):
            assert actual == self.store.operation(actual.id)
            # The newest of all is what the call has made, unless it was repeated.
            made = self.model.operations[count:]
            assert actual.replayed == (actual.id not in [entry["id"] for entry in made])
            actual = actual.token_id
        assert actual == expected
        return actual

    def name_operations(self, count):
        """Give the operations that the model has made since it had ``count`` the ids that the store made for them."""
        named = {entry["id"] for entry in self.model.operations[:count]}
        made = [entry for entry in reversed(self.model.operations[count:]) if not entry["pruned"]]
        for token_id in {entry["token_id"] for entry in made}:
            of_token = [entry for entry in made if entry["token_id"] == token_id]
            for entry, operation in zip(of_token, self.store.history(token_id), strict=False):
                assert operation.id not in named
                entry["id"] = operation.id

    @invariant()
    def both_are_the_same(self):
        next(self.steps)
        assert [token.id for token in self.store.tokens()] == sorted(self.model.tokens)
        for key, token_id in self.model.keys.items():
            token = self.store.get(key)
            assert token == (None if token_id is None else self.store.get_by_id(token_id))
        for token_id, expected in self.model.tokens.items():
            token = self.store.get_by_id(token_id)
            totals = token.total_used, token.total_available, token.held, token.renews_at
            assert totals == self.model.totals(token_id)
            assert token.total_used >= token.held >= 0
            assert {name: getattr(token, name) for name in CHANGEABLE} == {name: expected[name] for name in CHANGEABLE}
        histories = {token_id: list(self.store.history(token_id)) for token_id in self.keys}
        since, until = self.model.now - 60, self.model.now
        for token_id, history in histories.items():
            expected = self.model.history(token_id)
            assert [values(entry) for entry in history] == [[entry[name] for name in ENTRY] for entry in expected]
            lately = [entry for entry in history if since <= entry.created_at < until]
            assert list(self.store.history(token_id, since=since, until=until)) == lately
            assert positive(self.store.model_usage(token_id)) == positive(self.model.model_usage(token_id))
            days = self.store.usage_by_day(token_id, date.min, date.max)
            assert {(day, model): figures for day, model, *figures in days} == self.model.usage_by_day(token_id)
            if token_id in self.model.tokens:
                assert sum(day.used for day in days) == self.store.get_by_id(token_id).total_used
                for entry in history[:1]:
                    if entry.idempotency_key is not None:
                        assert self.store.find_operation(self.keys[token_id], entry.idempotency_key) == entry
        ids = [entry.id for history in histories.values() for entry in history]
        assert len(set(ids)) == len(ids)


def values(operation):
    return [getattr(operation, name) for name in ENTRY]


def positive(usage):
    """Leave out models of which nothing was used."""
    return {model: units for model, units in usage.items() if units != 0}


def outcome(ledger, method, arguments):
    """Return what a call returns, or the class of its refusal, and the data of one for lack of quota."""
    try:
        return getattr(ledger, method)(**arguments)
    except QuotaExceeded as error:
        return QuotaExceeded, error.requested, error.available, error.held, error.model
    except (QuotaError, ValueError) as error:
        return type(error)


def over_a_server(server):
    """Make stores over one database, which is emptied for each, and over one engine, as connecting takes longer."""
    with databases.shared(server) as database:
        engine = create_engine(database.url)

        def make():
            database.empty()
            return SQLAlchemyTokenStore(engine)

        SQLAlchemyTokenStore(engine).get_by_id(1)
        yield make
        engine.dispose()


@pytest.fixture(
    params=["memory", "sqlite", *(pytest.param(kind, marks=pytest.mark.servers) for kind in databases.KINDS)]
)
def kind(request):
    return request.param


@pytest.fixture
def make_store(kind, request, tmp_path):
    """Make an empty store, as often as it is called."""
    if kind in databases.KINDS:
        yield from over_a_server(request.getfixturevalue(kind))
        return
    if kind == "memory":
        yield MemoryTokenStore
        return
    empty, path = tmp_path / "empty.db", tmp_path / "tokens.db"
    with SQLiteTokenStore(empty) as store:
        assert list(store.tokens()) == []

    def make():
        shutil.copyfile(empty, path)  # which takes less time than to make its tables
        # What is tested is logic: nothing need reach the disk.
        return SQLiteTokenStore(path, synchronous="OFF")

    yield make


@pytest.mark.slow
def test_a_store_does_what_the_model_does(kind, make_store, full):
    steps = itertools.count()
    # A server takes longer for each, and the rules are the same.
    smaller = 16 if kind in databases.KINDS else 1
    run_state_machine_as_test(
        lambda: Machine(make_store, steps),
        settings=settings(
            max_examples=(FULL_EXAMPLES if full else EXAMPLES) // smaller,
            stateful_step_count=STEPS_OF_AN_EXAMPLE,
            deadline=None,
            # The same examples in each small run, so that it fails for a change only; others in each full one.
            derandomize=not full,
            print_blob=full,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    taken = next(steps)
    print(f"{taken:,} steps")
    assert taken >= (FULL_STEPS if full else STEPS) // smaller
