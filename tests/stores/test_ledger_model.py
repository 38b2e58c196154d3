"""The ledger against a model of it: whatever is called, and in whatever order, a store does what the model does.

The model tells the rules in another way. It moves no totals: it keeps every operation that there ever was, and adds up
what they hold. Hypothesis makes up the calls, and shortens a list of them after which the two differ.

The test is small by default and has its full size with ``--full``.
"""

import itertools
import shutil

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
from sqlalchemy import create_engine

from usage_middleware import (
    MemoryTokenStore,
    ModelNotAllowed,
    OperationConflict,
    OperationNotFound,
    QuotaError,
    QuotaExceeded,
    SQLAlchemyTokenStore,
    SQLiteTokenStore,
    Token,
    TokenDisabled,
    TokenExpired,
    TokenNotFound,
)

MOST = 2**63 - 1
START = 1_800_000_000
MOST_TOKENS = 3

EXAMPLES, STEPS = 160, 4_000
FULL_EXAMPLES, FULL_STEPS = 3_000, 100_000
STEPS_OF_AN_EXAMPLE = 50  # at most

# What of an operation is compared.
ENTRY = (
    "id",
    "token_id",
    "kind",
    "amount",
    "model",
    "held",
    "unlimited",
    "expires_in",
    "expires_at",
    "final_amount",
    "refund_of",
    "created_at",
    "changed_at",
)


class Model:
    """What the ledger is to do, as DESIGN.md and the docstrings of its methods have it.

    Its methods are those of a store. The list of operations is replaced at the end of a call, where the call is not
    refused: what is refused has changed nothing.
    """

    def __init__(self):
        self.now = START
        self.keys = {}  # to token ids; to None where a key was given up
        self.tokens = {}  # what update() changes, and the quota that was ever granted
        self.operations = []

    # --- What is read.

    def used(self, token_id):
        return held(self.operations, token_id=token_id)

    def available(self, token_id):
        return self.tokens[token_id]["granted"] - held(self.operations, token_id=token_id, unlimited=False)

    def granted(self, token_id):
        return self.tokens[token_id]["granted"] + held(self.operations, token_id=token_id, unlimited=True)

    def history(self, token_id):
        return [entry for entry in reversed(self.operations) if entry["token_id"] == token_id and not entry["pruned"]]

    def model_usage(self, token_id):
        models = {entry["model"] for entry in self.operations if token_id in self.tokens} - {None}
        return {model: held(self.operations, token_id=token_id, model=model) for model in models}

    # --- What is called. Each returns the id of the token that it was about.

    def charge(self, key, amount, model=None, idempotency_key=None):
        return self.charge_by_id(self.keys.get(key), amount, model, idempotency_key)

    def charge_by_id(self, token_id, amount, model=None, idempotency_key=None):
        return self.take(token_id, "charge", amount, model, idempotency_key, None)

    def reserve(self, key, amount, model=None, idempotency_key=None, expires_in=600):
        return self.take(self.keys.get(key), "reserve", amount, model, idempotency_key, expires_in)

    def take(self, token_id, kind, amount, model, operation_id, expires_in):
        check_amount(amount, least=0)
        token = self.token(token_id)
        call = {"token_id": token_id, "kind": kind, "amount": amount, "model": model, "expires_in": expires_in}
        if repeated := self.find(operation_id):
            return self.repeat(repeated, call)
        if not token["enabled"]:
            raise TokenDisabled
        if 0 < token["expires_at"] <= self.now:
            raise TokenExpired
        operations = self.without_lapsed(self.now, token_id)
        if token["model_limits_enabled"] and model is not None:
            if model not in token["model_limits"]:
                raise ModelNotAllowed
            limit = token["model_limits"][model]
            if limit is not True and 0 < amount > limit - held(operations, token_id=token_id, model=model):
                raise QuotaExceeded
        available = token["granted"] - held(operations, token_id=token_id, unlimited=False)
        if not token["unlimited_quota"] and 0 < amount > available:
            raise QuotaExceeded
        made = {
            **call,
            "id": operation_id,
            "held": amount,
            "unlimited": token["unlimited_quota"],
            "final_amount": amount if kind == "charge" else None,
            "expires_at": self.now + expires_in if kind == "reserve" else None,
        }
        self.commit(token_id, [*operations, self.entry(made)])
        return token_id

    def settle(self, operation_id, amount):
        check_amount(amount, least=0)
        settled = self.known(operation_id)
        token = self.token(settled["token_id"])
        if settled["kind"] != "reserve":
            raise OperationConflict
        if settled["final_amount"] is not None:
            return self.repeat(settled, {"final_amount": amount})
        changes = {"held": amount, "unlimited": token["unlimited_quota"], "final_amount": amount}
        self.commit(settled["token_id"], self.changed(settled, changes))
        return settled["token_id"]

    def refund(self, operation_id, amount=None, idempotency_key=None):
        if amount is not None:
            check_amount(amount, least=0)
        refunded = self.known(operation_id)
        token_id = refunded["token_id"]
        self.token(token_id)
        call = {"token_id": token_id, "kind": "refund", "amount": amount, "refund_of": operation_id}
        if repeated := self.find(idempotency_key):
            return self.repeat(repeated, call)
        if refunded["kind"] not in ("charge", "reserve") or refunded["final_amount"] is None:
            raise OperationConflict
        units = refunded["held"] if amount is None else amount
        if units > refunded["held"]:
            raise QuotaExceeded
        made = {**call, "id": idempotency_key, "model": refunded["model"], "final_amount": units}
        left = {"held": refunded["held"] - units}
        self.commit(token_id, [*self.changed(refunded, left), self.entry(made)])
        return token_id

    def grant(self, token_id, amount):
        check_amount(amount, least=-MOST)
        token = self.token(token_id)
        operations = self.without_lapsed(self.now, token_id)
        available = token["granted"] - held(operations, token_id=token_id, unlimited=False)
        if amount < 0 and available + amount < 0:
            raise QuotaExceeded
        made = {"token_id": token_id, "kind": "grant", "amount": amount, "final_amount": amount}
        self.commit(token_id, [*operations, self.entry(made)], granted=token["granted"] + amount)
        return token_id

    def update(self, token_id, **changes):
        self.token(token_id).update(changes)
        return token_id

    def delete(self, token_id):
        self.give_up_key(token_id)
        del self.tokens[token_id]

    def prune(self, before):
        """Returns how many operations it forgot. They go on to count."""
        lapsed_before = min(before, self.now)
        operations = self.without_lapsed(lapsed_before)
        self.operations = [
            {**entry, "pruned": True} if is_finished(entry, before, lapsed_before) else entry for entry in operations
        ]
        return sum(entry["pruned"] for entry in self.operations) - sum(entry["pruned"] for entry in operations)

    def add(self, token_id, key, total_available, **fields):
        """What a store has created."""
        self.keys[key] = token_id
        self.tokens[token_id] = {"granted": total_available, "enabled": True, **fields}

    def give_up_key(self, token_id):
        self.token(token_id)
        self.keys = {key: None if owner == token_id else owner for key, owner in self.keys.items()}

    # --- How it is done.

    def token(self, token_id):
        if token_id not in self.tokens:
            raise TokenNotFound
        return self.tokens[token_id]

    def find(self, operation_id):
        """The operation that has this id, or ``None``."""
        named = [entry for entry in self.operations if entry["id"] == operation_id and not entry["pruned"]]
        return named[0] if named and operation_id is not None else None

    def known(self, operation_id):
        operation = self.find(operation_id)
        if operation is None:
            raise OperationNotFound
        return operation

    def repeat(self, made, call):
        if any(made[name] != value for name, value in call.items()):
            raise OperationConflict
        return made["token_id"]

    def entry(self, fields):
        nothing = {"id": None, "model": None, "held": 0, "unlimited": False, "expires_at": None, "expires_in": None}
        return {**nothing, "refund_of": None, "created_at": self.now, "changed_at": self.now, "pruned": False, **fields}

    def changed(self, operation, changes):
        changed = {**operation, **changes, "changed_at": self.now}
        return [changed if entry is operation else entry for entry in self.operations]

    def without_lapsed(self, now, token_id=None):
        """All operations, after what the lapsed reservations of a token hold, or of all tokens, was given back."""
        return [
            {**entry, "held": 0, "changed_at": self.now}
            if has_lapsed(entry, now) and entry["held"] and token_id in (None, entry["token_id"])
            else entry
            for entry in self.operations
        ]

    def commit(self, token_id, operations, granted=None):
        token = self.tokens[token_id]
        granted = token["granted"] if granted is None else granted
        used = held(operations, token_id=token_id)
        available = granted - held(operations, token_id=token_id, unlimited=False)
        if max(used, available, used + available) > MOST:
            raise ValueError
        token["granted"] = granted
        self.operations = operations


def held(operations, **which):
    """The units that those operations hold, pruned ones included."""
    return sum(entry["held"] for entry in operations if all(entry[name] == value for name, value in which.items()))


def has_lapsed(entry, now):
    return entry["kind"] == "reserve" and entry["final_amount"] is None and entry["expires_at"] <= now


def is_finished(entry, before, lapsed_before):
    return has_lapsed(entry, lapsed_before) or (entry["final_amount"] is not None and entry["changed_at"] < before)


def check_amount(amount, least):
    if not least <= amount <= MOST:
        raise ValueError


# Mostly small, so that limits are met often; sometimes at the end of what a column holds.
AMOUNTS = st.sampled_from([*range(6)] * 6 + [-1, MOST - 5, MOST - 1, MOST, MOST + 1])
GRANTS = st.sampled_from([*range(-6, 7)] * 3 + [-MOST - 1, -MOST, 5 - MOST, MOST - 5, MOST, MOST + 1])
AVAILABLE = st.sampled_from([*range(13)] * 3 + [MOST - 5, MOST])
MODELS = st.sampled_from([None, "capped", "capped", "other"])
LIMITS = st.sampled_from([{"capped": 5}, {"capped": 8, "other": True}, {"capped": 0, "other": 3}, {"other": True}, {}])
NAMES = [*"abcdefgh"]
IDS = st.sampled_from([None] * 4 + NAMES)
KEYS = st.sampled_from([None, None, "a-key", "another-key"])
SECONDS = st.sampled_from([0.5, 0.5, 10, 10, 60, 600])
PAUSES = st.sampled_from([0, 0, 0.5, 10, 60])
AGES = st.sampled_from([600, 60, 60, 10, 10, 0.5, 0, -60])
JUMPS = st.sampled_from([0.5, 10, 60, 60, 600, -0.5, -60])
FIELDS = {
    "unlimited_quota": st.sampled_from([False, False, True]),
    "model_limits": LIMITS,
    "model_limits_enabled": st.sampled_from([True, True, False]),
    "expires_at": st.sampled_from([0] * 9 + [-1, START, START + 60]),
}
PLAIN = {"unlimited_quota": False, "model_limits": {}, "model_limits_enabled": False, "expires_at": 0}
CHANGEABLE = [*FIELDS, "enabled"]
CHANGES = st.fixed_dictionaries({}, optional={**FIELDS, "enabled": st.sampled_from([True, True, True, True, False])})

# What may be another where a call is repeated.
OTHERS = {
    "token_id": st.runner().flatmap(lambda machine: st.sampled_from(list(machine.keys))),
    "key": st.runner().flatmap(lambda machine: st.sampled_from(list(machine.keys.values()))),
    "amount": AMOUNTS,
    "model": MODELS,
    "operation_id": st.sampled_from(NAMES),
    "refund_id": st.sampled_from(NAMES),
    "expires_in": SECONDS,
}

# Which one of those that there are.
TOKENS = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_tokens()))
OPEN = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_operations(is_open=True)))
FINAL = st.runner().flatmap(lambda machine: st.sampled_from(machine.some_operations(is_open=False)))
CALLS = st.runner().flatmap(lambda machine: st.sampled_from(machine.calls))

# Hypothesis leaves some rules out of each example. One without operations shows little, so that all others wait for the
# first of them; where nothing can go on, Hypothesis makes another example.
once_begun = precondition(lambda machine: machine.model.operations)


class Machine(RuleBasedStateMachine):
    """Makes calls of a store and of the model, and compares the two after each."""

    def __init__(self, make_store, steps):
        super().__init__()
        self.model = Model()
        self.store = make_store()
        self.store._now = lambda: self.model.now
        self.steps = steps
        self.keys = {}  # the last key of each token
        self.calls = []  # those that name an operation

    def teardown(self):
        self.store.close()

    def some_tokens(self):
        """The ids of the tokens, and one of a token that was deleted."""
        deleted = [token_id for token_id in self.keys if token_id not in self.model.tokens]
        return [*self.model.tokens, *deleted[-1:]]

    def some_operations(self, *, is_open):
        """The ids of operations, most of them of reservations that are open, or of what is final."""
        entries = [entry for entry in self.model.operations if not entry["pruned"]]
        meant = [
            entry
            for entry in entries
            if entry["kind"] in ("charge", "reserve") and (entry["final_amount"] is None) == is_open
        ]
        return [entry["id"] for entry in [*meant, *meant, *meant, *entries]] or ["never made"]

    # --- Tokens

    def add(self, total_available, fields, key=None):
        written, token = self.store.create(total_available=total_available, key=key, **fields)
        self.keys[token.id] = written.removeprefix("sk-")
        self.model.add(token.id, self.keys[token.id], total_available, **fields)

    @initialize(total_available=AVAILABLE, fields=st.just(PLAIN) | st.fixed_dictionaries(FIELDS))
    def create_the_first(self, total_available, fields):
        self.add(total_available, fields)

    @once_begun
    @precondition(lambda self: len(self.model.tokens) < MOST_TOKENS)
    @rule(total_available=AVAILABLE, fields=st.fixed_dictionaries(FIELDS), key=KEYS)
    def create(self, total_available, fields, key):
        if key in self.model.keys:
            with pytest.raises(ValueError, match="key"):
                self.store.create(key=key)
        else:
            self.add(total_available, fields, key)

    @once_begun
    @rule(token_id=TOKENS, changes=CHANGES)
    def update(self, token_id, changes):
        self.call("update", {"token_id": token_id, **changes})

    @once_begun
    @rule(token_id=TOKENS)
    def rotate(self, token_id):
        expected = outcome(self.model, "give_up_key", {"token_id": token_id})
        actual = outcome(self.store, "rotate", {"token_id": token_id})
        if expected is TokenNotFound:
            assert actual is TokenNotFound
        else:
            self.keys[token_id] = actual.removeprefix("sk-")
            self.model.keys[self.keys[token_id]] = token_id

    @precondition(lambda self: len(self.model.tokens) == MOST_TOKENS)
    @rule(token_id=TOKENS)
    def delete(self, token_id):
        self.call("delete", {"token_id": token_id})

    # --- Operations

    @rule(seconds=PAUSES, token_id=TOKENS, amount=AMOUNTS, model=MODELS, idempotency_key=IDS, by_id=st.booleans())
    def charge(self, seconds, token_id, by_id, **arguments):
        self.model.now += seconds
        if by_id:
            self.call("charge_by_id", {"token_id": token_id, **arguments})
        else:
            self.call("charge", {"key": self.keys[token_id], **arguments})

    @rule(token_id=TOKENS, amount=AMOUNTS, model=MODELS, idempotency_key=IDS, expires_in=SECONDS)
    def reserve(self, token_id, **arguments):
        self.call("reserve", {"key": self.keys[token_id], **arguments})

    @once_begun
    @rule(idempotency_key=OPEN, amount=AMOUNTS)
    def settle(self, **arguments):
        self.call("settle", arguments)

    @once_begun
    @rule(operation=FINAL, amount=st.none() | AMOUNTS, idempotency_key=IDS)
    def refund(self, **arguments):
        self.call("refund", arguments)

    @once_begun
    @rule(token_id=TOKENS, amount=GRANTS)
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
        self.call("prune", {"before": self.model.now - seconds})

    # --- What must be the same.

    def call(self, method, arguments):
        """Calls both, and compares what comes of it."""
        if arguments.get("operation_id") is not None and (method, arguments) not in self.calls:
            self.calls.append((method, arguments))
        count = len(self.model.operations)
        available = {token_id: self.model.available(token_id) for token_id in self.model.tokens}
        expected = outcome(self.model, method, arguments)
        actual = outcome(self.store, method, arguments)
        for made in self.model.operations[count:]:
            if made["id"] is None:
                made["id"] = next(self.store.history(made["token_id"])).id
            if method == "reserve":
                assert actual == made["id"]
        if isinstance(actual, Token):
            assert actual == self.store.get_by_id(actual.id)
            actual = actual.id
        elif isinstance(actual, str):
            assert actual == (arguments["operation_id"] or actual)
            actual = self.model.find(actual)["token_id"]
        assert actual == expected
        for token_id in self.model.tokens:
            assert self.model.available(token_id) >= min(available[token_id], 0) or method == "settle"

    @invariant()
    def both_are_the_same(self):
        next(self.steps)
        assert [token.id for token in self.store.tokens()] == sorted(self.model.tokens)
        for key, token_id in self.model.keys.items():
            token = self.store.get(key)
            assert token == (None if token_id is None else self.store.get_by_id(token_id))
        for token_id, expected in self.model.tokens.items():
            token = self.store.get_by_id(token_id)
            used, available = self.model.used(token_id), self.model.available(token_id)
            assert (token.total_used, token.total_available) == (used, available)
            assert used >= 0
            # Grants change it, and units that are taken while quota is unlimited; nothing else does.
            assert token.total_granted == self.model.granted(token_id)
            assert {name: getattr(token, name) for name in CHANGEABLE} == {name: expected[name] for name in CHANGEABLE}
        histories = {token_id: list(self.store.history(token_id)) for token_id in self.keys}
        for token_id, history in histories.items():
            expected = self.model.history(token_id)
            assert [values(entry) for entry in history] == [[entry[name] for name in ENTRY] for entry in expected]
            assert positive(self.store.model_usage(token_id)) == positive(self.model.model_usage(token_id))
        ids = [entry.id for history in histories.values() for entry in history]
        assert len(set(ids)) == len(ids)


def values(operation):
    return [getattr(operation, name) for name in ENTRY]


def positive(usage):
    """A model that nothing was used of may be left out."""
    return {model: units for model, units in usage.items() if units != 0}


def outcome(ledger, method, arguments):
    """What a call returns, or the class of its refusal."""
    try:
        return getattr(ledger, method)(**arguments)
    except (QuotaError, ValueError) as error:
        return type(error)


def over_a_server(server):
    """Makes stores over one database, which is emptied for each, and over one engine: to connect takes longer."""
    with databases.shared(server) as database:
        engine = create_engine(database.url)

        def make():
            database.empty()
            return SQLAlchemyTokenStore(engine)

        make().find(1)
        yield make
        engine.dispose()


@pytest.fixture(params=["memory", "sqlite", *databases.KINDS])
def kind(request):
    return request.param


@pytest.fixture
def make_store(kind, request, tmp_path):
    """Makes an empty store, as often as it is called."""
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


def test_a_store_does_what_the_model_does(kind, make_store, full):
    steps = itertools.count()
    # A server takes longer for each, and the rules are the same.
    smaller = 20 if kind in databases.KINDS else 1
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
