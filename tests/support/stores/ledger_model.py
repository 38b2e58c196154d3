"""A model of the ledger, which states the rules in a different way than the package does.

It has no totals: it keeps every operation that was ever made, and adds up what they hold. A quota renews one period
after the other, found day by day on the calendar.
"""

from collections import defaultdict
from datetime import datetime, time, timedelta, timezone

from usage_middleware import (
    ModelNotAllowed,
    OperationConflict,
    OperationNotFound,
    QuotaExceeded,
    TokenDisabled,
    TokenExpired,
    TokenNotFound,
)

MOST = 2**63 - 1
START = 1_801_439_940  # 31 January 2027, a Sunday, a minute before midnight in UTC

_REQUESTS = ("charge", "reserve")
_BLANK = {
    "id": None,
    "idempotency_key": None,
    "model": None,
    "held": 0,
    "unlimited": False,
    "at_least": None,
    "expires_in": None,
    "expires_at": None,
    "final_amount": None,
    "input_tokens": 0,
    "output_tokens": 0,
    "refund_of": None,
    "pruned": False,
}


class Model:
    """The ledger as the docstrings of its methods describe it.

    Its methods are those of a store. A call that is not refused replaces ``operations`` at its end. If it is refused
    for lack of quota, a renewal or a release that was due remains.
    """

    def __init__(self):
        self.now = START
        self.keys = {}  # key -> token id, or None if the key was retired
        self.tokens = {}  # what update() changes, when the quota renews, and all that was ever granted
        self.operations = []

    # --- Reads

    def totals(self, token_id):
        """Return what is used, available and held, and when the quota renews, in the period that a read shows."""
        operations, granted, renews_at = self.in_its_period(token_id, self.operations)
        return (
            held(operations, token_id=token_id),
            granted - held(operations, token_id=token_id, unlimited=False),
            held(operations, token_id=token_id, final_amount=None),
            renews_at,
        )

    def history(self, token_id):
        return [entry for entry in reversed(self.operations) if entry["token_id"] == token_id and not entry["pruned"]]

    def model_usage(self, token_id):
        models = {entry["model"] for entry in self.operations if token_id in self.tokens} - {None}
        return {model: held(self.operations, token_id=token_id, model=model) for model in models}

    def usage_by_day(self, token_id):
        """Return what is used, and the number of requests, input and output tokens, by day and model."""
        days = defaultdict(lambda: [0, 0, 0, 0])
        for entry in self.operations:
            if entry["token_id"] == token_id in self.tokens and entry["kind"] in _REQUESTS:
                place = datetime.fromtimestamp(entry["created_at"], timezone.utc).date(), entry["model"] or ""
                figures = entry["held"], 1, entry["input_tokens"], entry["output_tokens"]
                days[place] = [sum(pair) for pair in zip(days[place], figures, strict=True)]
        return dict(days)

    # --- Calls. Each returns the id of its token.

    def charge(self, key, amount, **arguments):
        return self.charge_by_id(self.keys.get(key), amount, **arguments)

    def charge_by_id(self, token_id, amount, model=None, idempotency_key=None, input_tokens=0, output_tokens=0):
        check_amounts(input_tokens, output_tokens)
        call = {"amount": amount, "model": model, "input_tokens": input_tokens, "output_tokens": output_tokens}
        return self.take(token_id, idempotency_key, {"kind": "charge", **call})

    def reserve(self, key, amount, at_least=None, model=None, idempotency_key=None, expires_in=600):
        if at_least is not None and not 0 <= at_least <= amount:
            raise ValueError
        call = {"amount": amount, "at_least": at_least, "model": model, "expires_in": expires_in}
        return self.take(self.keys.get(key), idempotency_key, {"kind": "reserve", **call})

    def take(self, token_id, idempotency_key, call):
        check_amounts(call["amount"])
        token = self.token(token_id)
        if repeated := self.made(token_id, idempotency_key):
            return self.repeat(repeated, call)
        if not token["enabled"]:
            raise TokenDisabled
        if 0 < token["expires_at"] <= self.now:
            raise TokenExpired
        self_now = self.up_to_date(token_id)
        operations, granted, _ = self_now
        amount, model = call["amount"], call["model"]
        least = amount if call.get("at_least") is None else call["at_least"]
        limits = []
        if token["model_limits_enabled"] and model is not None:
            if model not in token["model_limits"]:
                raise ModelNotAllowed
            limit = token["model_limits"][model]
            if limit is not True:
                limits.append((limit - held(operations, token_id=token_id, model=model), {"model": model}))
        if not token["unlimited_quota"]:
            limits.append((granted - held(operations, token_id=token_id, unlimited=False), {}))
        for left, of_model in limits:
            if 0 < least > left:
                self.commit(token_id, *self_now)
                still_held = held(operations, token_id=token_id, final_amount=None, **of_model)
                raise QuotaExceeded(requested=least, available=left, held=still_held, model=of_model.get("model"))
        amount = min([amount, *(max(left, 0) for left, _ in limits)])
        made = {
            **call,
            "held": amount,
            "unlimited": token["unlimited_quota"],
            "final_amount": amount if call["kind"] == "charge" else None,
            "expires_at": self.now + call["expires_in"] if call["kind"] == "reserve" else None,
        }
        self.commit(token_id, *self_now, self.entry(token_id, idempotency_key, made))
        return token_id

    def settle(self, operation, amount, input_tokens=0, output_tokens=0):
        check_amounts(amount, input_tokens, output_tokens)
        settled = self.known(operation)
        token_id = settled["token_id"]
        token = self.token(token_id)
        if settled["kind"] != "reserve":
            raise OperationConflict
        outcome = {"final_amount": amount, "input_tokens": input_tokens, "output_tokens": output_tokens}
        if settled["final_amount"] is not None:
            return self.repeat(settled, outcome)
        self_now = self.up_to_date(token_id)
        change(self_now[0], operation, **outcome, held=amount, unlimited=token["unlimited_quota"], changed_at=self.now)
        self.commit(token_id, *self_now)
        return token_id

    def refund(self, operation, amount=None, idempotency_key=None):
        if amount is not None:
            check_amounts(amount)
        refunded = self.known(operation)
        token_id = refunded["token_id"]
        self.token(token_id)
        call = {"kind": "refund", "amount": amount, "refund_of": operation}
        if repeated := self.made(token_id, idempotency_key):
            return self.repeat(repeated, call)
        if refunded["kind"] not in _REQUESTS or refunded["final_amount"] is None:
            raise OperationConflict
        self_now = self.up_to_date(token_id)
        units = refunded["held"] if amount is None else amount
        if units > refunded["held"]:
            self.commit(token_id, *self_now)
            raise QuotaExceeded(requested=units, available=refunded["held"])
        change(self_now[0], operation, held=refunded["held"] - units, changed_at=self.now)
        made = {**call, "model": refunded["model"], "final_amount": units}
        self.commit(token_id, *self_now, self.entry(token_id, idempotency_key, made))
        return token_id

    def grant(self, token_id, amount, idempotency_key=None):
        if not -MOST <= amount <= MOST:
            raise ValueError
        self.token(token_id)
        call = {"kind": "grant", "amount": amount}
        if repeated := self.made(token_id, idempotency_key):
            return self.repeat(repeated, call)
        operations, granted, renews_at = self_now = self.up_to_date(token_id)
        available = granted - held(operations, token_id=token_id, unlimited=False)
        if amount < 0 and available + amount < 0:
            self.commit(token_id, *self_now)
            still_held = held(operations, token_id=token_id, final_amount=None)
            raise QuotaExceeded(requested=-amount, available=available, held=still_held)
        made = self.entry(token_id, idempotency_key, {**call, "final_amount": amount})
        self.commit(token_id, operations, granted + amount, renews_at, made)
        return token_id

    def update(self, token_id, **changes):
        token = self.token(token_id)
        if changes.get("renewal") == "":
            changes.setdefault("renewal_quota", 0)
        changed = {**token, **changes}
        if (changed["renewal"] == "") != (changed["renewal_quota"] == 0):
            raise ValueError
        self.commit(token_id, *self.up_to_date(token_id))
        if changed["renewal"] != token["renewal"]:
            token["renews_at"] = next_start(changed["renewal"], self.now)
        token.update(changes)
        return token_id

    def give_up_key(self, token_id):
        self.token(token_id)
        self.commit(token_id, *self.up_to_date(token_id))
        self.keys = {key: None if owner == token_id else owner for key, owner in self.keys.items()}

    def delete(self, token_id):
        self.token(token_id)
        self.keys = {key: None if owner == token_id else owner for key, owner in self.keys.items()}
        self.operations = [
            {**entry, "held": 0} if entry["token_id"] == token_id and entry["final_amount"] is None else entry
            for entry in self.operations
        ]
        del self.tokens[token_id]

    def prune(self, before):
        """Return how many operations were deleted. The model keeps them, as they still count."""
        lapsed_before = min(before, self.now)
        lapsed = [entry["token_id"] for entry in self.operations if has_lapsed(entry, lapsed_before) and entry["held"]]
        for token_id in sorted(set(lapsed)):
            self.commit(token_id, *self.up_to_date(token_id, lapsed_before))
        finished = [entry for entry in self.operations if is_finished(entry, before, lapsed_before)]
        deleted = sum(not entry["pruned"] for entry in finished)
        self.operations = [{**entry, "pruned": entry["pruned"] or entry in finished} for entry in self.operations]
        return deleted

    def add(self, token_id, key, total_available, **fields):
        """Add a token that a store has created."""
        self.keys[key] = token_id
        self.tokens[token_id] = {
            "granted": total_available or fields["renewal_quota"],
            "enabled": True,
            "renews_at": next_start(fields["renewal"], self.now),
            **fields,
        }

    # --- How it works

    def token(self, token_id):
        if token_id not in self.tokens:
            raise TokenNotFound
        return self.tokens[token_id]

    def made(self, token_id, idempotency_key):
        """Return the operation that the token has under this key, or ``None``."""
        named = [entry for entry in self.history(token_id) if entry["idempotency_key"] == idempotency_key]
        return named[0] if named and idempotency_key is not None else None

    def known(self, operation_id):
        named = [entry for entry in self.operations if entry["id"] == operation_id and not entry["pruned"]]
        if not named:
            raise OperationNotFound
        return named[0]

    def repeat(self, made, call):
        if any(made[name] != value for name, value in call.items()):
            raise OperationConflict
        return made["token_id"]

    def entry(self, token_id, idempotency_key, fields):
        times = {"created_at": self.now, "changed_at": self.now}
        return {**_BLANK, **times, "token_id": token_id, "idempotency_key": idempotency_key, **fields}

    def up_to_date(self, token_id, lapsed_by=None):
        """Begin a new period if one is due, and release what has lapsed.

        Return the operations, what was granted, and the time of the next period.
        """
        operations, granted, renews_at = self.in_its_period(token_id, self.operations)
        lapsed_by = self.now if lapsed_by is None else lapsed_by
        for entry in operations:
            if entry["token_id"] == token_id and entry["held"] and has_lapsed(entry, lapsed_by):
                entry.update(held=0, changed_at=self.now)
        return operations, granted, renews_at

    def in_its_period(self, token_id, operations):
        operations = [dict(entry) for entry in operations]
        token = self.tokens[token_id]
        granted, renews_at = token["granted"], token["renews_at"]
        if not 0 < renews_at <= self.now:
            return operations, granted, renews_at
        used = held(operations, token_id=token_id)
        still_held = held(operations, token_id=token_id, final_amount=None)
        before = granted - held(operations, token_id=token_id, unlimited=False)
        free = before + still_held  # if all reservations were released now
        while renews_at <= self.now:
            free = min(free, 0) + token["renewal_quota"]
            renews_at = next_start(token["renewal"], renews_at)
        free = min(free, MOST - used + still_held, MOST + before + still_held)
        for entry in operations:
            if entry["token_id"] == token_id and entry["held"] and entry["final_amount"] is None:
                entry["unlimited"] = False
        amount = free - still_held - before
        operations.append(self.entry(token_id, None, {"kind": "renewal", "amount": amount, "final_amount": amount}))
        return operations, free - still_held + held(operations, token_id=token_id, unlimited=False), renews_at

    def commit(self, token_id, operations, granted, renews_at, *made):
        operations = [*operations, *made]
        used = held(operations, token_id=token_id)
        available = granted - held(operations, token_id=token_id, unlimited=False)
        if not all(-MOST <= total <= MOST for total in (used, available, used + available)):
            raise ValueError
        self.tokens[token_id].update(granted=granted, renews_at=renews_at)
        self.operations = operations


def next_start(renewal, now):
    """Return when the first period after a time begins; 0 without renewal."""
    if not renewal:
        return 0
    day = datetime.fromtimestamp(now, timezone.utc).date() + timedelta(days=1)
    while not (
        renewal == "daily" or (renewal == "weekly" and day.weekday() == 0) or (renewal == "monthly" and day.day == 1)
    ):
        day += timedelta(days=1)
    return int(datetime.combine(day, time(), timezone.utc).timestamp())


def held(operations, **which):
    """Return the units that those operations hold, pruned ones included."""
    return sum(entry["held"] for entry in operations if all(entry[name] == value for name, value in which.items()))


def change(operations, operation_id, **fields):
    (entry,) = (entry for entry in operations if entry["id"] == operation_id)
    entry.update(fields)


def has_lapsed(entry, now):
    return entry["kind"] == "reserve" and entry["final_amount"] is None and entry["expires_at"] <= now


def is_finished(entry, before, lapsed_before):
    return has_lapsed(entry, lapsed_before) or (entry["final_amount"] is not None and entry["changed_at"] < before)


def check_amounts(*amounts):
    if not all(0 <= amount <= MOST for amount in amounts):
        raise ValueError
