"""The quota rules: what charging, reserving, settling, refunding and granting do to a token.

Every rule is a pure function of an :class:`~.accounts.Account`, which a store has locked and loaded. It returns the
:class:`~.accounts.Changes` that the store saves. No store has a rule of its own.

The invariant: ``total_granted == total_used + total_available``. An operation *holds* the units that it has taken from
a token and not returned. Every change of totals is a change of the units that an operation holds, so only
:func:`_moved` moves totals. Only a grant and a renewal change what was granted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .accounts import Account, Changes, Step
from .checks import MAX_INTEGER
from .errors import ModelNotAllowed, OperationConflict, QuotaExceeded, TokenDisabled, TokenExpired
from .renewal import is_due, renewed
from .tokens import Token

Kind = Literal["charge", "reserve", "refund", "grant", "renewal"]
KINDS: Final[tuple[Kind, ...]] = ("charge", "reserve", "refund", "grant", "renewal")
_REQUESTS: Final = ("charge", "reserve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One entry of a token's history."""

    #: Made by the store, and unique in it.
    id: str
    token_id: int
    #: ``"charge"``, ``"reserve"``, ``"refund"``, ``"grant"`` or ``"renewal"``.
    kind: Kind
    #: The quota units that were requested. Negative for a grant that takes back, and for a renewal with less than was
    #: left. ``None`` for a refund of all that is left.
    amount: int | None
    #: The caller's name for the call, unique for the token, or ``None``.
    idempotency_key: str | None = None
    model: str | None = None
    #: The units that it has taken from the token and not returned.
    held: int = 0
    #: Whether the token's quota was unlimited when it took them, so that they did not come from ``total_available``.
    unlimited: bool = False
    #: The fewest units that a reservation would have taken.
    at_least: int | None = None
    #: How many seconds a reservation lasts.
    expires_in: float | None = None
    #: Unix time at which a reservation lapses if it is not settled.
    expires_at: float | None = None
    #: The final units: what a reservation was settled with, or what a refund returned. ``None``: the operation is open.
    final_amount: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    #: The id of the operation that a refund is of.
    refund_of: str | None = None
    #: Unix time, with a fraction.
    created_at: float = 0.0
    #: Unix time at which the units that it holds last changed.
    changed_at: float = 0.0
    #: Its place in the store's order; 0 in the result of the call that makes it.
    number: int = field(default=0, compare=False)
    #: Whether the call that returned it found it by its idempotency key, as made before. Not stored.
    replayed: bool = field(default=False, compare=False)

    @property
    def is_open(self) -> bool:
        """Whether it is a reservation that is not settled, lapsed or not."""
        return self.final_amount is None

    @property
    def is_holding(self) -> bool:
        """Whether it is an open reservation that holds units."""
        return self.final_amount is None and self.held > 0

    @property
    def is_request(self) -> bool:
        """Whether it is a charge or a reservation: what usage by day counts."""
        return self.kind in _REQUESTS

    def has_lapsed(self, now: float) -> bool:
        """Return whether it is a reservation whose time has passed at ``now``."""
        return self.expires_at is not None and self.expires_at <= now

    def is_finished(self, before: float, lapsed_before: float) -> bool:
        """Return whether it can be pruned: nothing was done with it since ``before``, or since it lapsed."""
        if self.final_amount is not None:
            return self.changed_at < before
        return self.held == 0 and self.expires_at is not None and self.expires_at <= lapsed_before


def bring_up_to_date(account: Account, now: float, *, renewal_id: str) -> tuple[Account, Changes | None]:
    """Begin a new period if one is due, and release what lapsed reservations hold.

    A lapsed reservation stays open: a late settle still charges.

    :param renewal_id: the id of the operation that records a renewal.
    :return: the account after that, and the changes, which are ``None`` if nothing was due.
    """
    if not account.lapsed and not is_due(account.token, now):
        return account, None
    token, operation, lapsed, model_used = account.token, account.operation, account.lapsed, account.model_used
    steps = []
    if is_due(token, now):
        available = token.total_available
        token = renewed(token, now)
        steps.append(Step(None, _final(renewal_id, token, "renewal", token.total_available - available, now)))
        lapsed = [_of_new_quota(one) for one in lapsed]
        operation = operation and _of_new_quota(operation)
    for before in lapsed:
        released = dataclasses.replace(before, held=0, changed_at=now)
        token = _moved(token, before, released)
        steps.append(Step(before, released))
        if operation is not None and operation.id == before.id:
            operation = released
        if before.model is not None and before.model == account.model:
            model_used -= before.held
    changes = Changes(before=account.token, token=token, steps=tuple(steps))
    return dataclasses.replace(account, token=token, operation=operation, lapsed=(), model_used=model_used), changes


def take(account: Account, operation: Operation, now: float) -> Changes:
    """Take ``operation.amount`` units for a new charge or reservation. With ``at_least``, fewer will do.

    :raises TokenDisabled, TokenExpired, ModelNotAllowed, QuotaExceeded: the token may not be charged.
    """
    token = account.token
    _check_usable(token, now)
    amount = operation.amount or 0
    # It takes fewer units only if no lapsed reservation is left to release.
    least = amount if operation.at_least is None or account.more_lapsed else operation.at_least
    for left, model in _limits(token, operation.model, account.model_used):
        if least > 0 and left < least:
            raise _exceeded(token, least, left, model)
        amount = min(amount, max(left, 0))
    final_amount = amount if operation.kind == "charge" else None
    operation = dataclasses.replace(
        operation, held=amount, unlimited=token.unlimited_quota, final_amount=final_amount, changed_at=now
    )
    return Changes(before=token, token=_moved(token, None, operation), steps=(Step(None, operation),))


def settle(account: Account, amount: int, now: float, *, input_tokens: int, output_tokens: int) -> Changes:
    """Set the final amount of the account's operation, which is an open reservation. It may overdraw the token."""
    before = account.operation
    assert before is not None
    after = dataclasses.replace(
        before,
        held=amount,
        unlimited=account.token.unlimited_quota,
        final_amount=amount,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        changed_at=now,
    )
    return Changes(before=account.token, token=_moved(account.token, before, after), steps=(Step(before, after),))


def refund(account: Account, made: Operation, now: float) -> Changes:
    """Return ``made.amount`` units of the account's operation, which is a charge. ``None``: all that are left.

    :param made: the operation that records the refund.
    :raises OperationConflict: the operation is of a kind that cannot be refunded, or is an open reservation.
    :raises QuotaExceeded: fewer units are left of it.
    """
    before = account.operation
    assert before is not None
    if before.kind not in _REQUESTS:
        raise OperationConflict(
            f"operation {before.id!r} is a {before.kind}, which cannot be refunded", operation_id=before.id
        )
    if before.is_open:
        raise OperationConflict(
            f"operation {before.id!r} is an open reservation; settle it with 0 to release it", operation_id=before.id
        )
    units = before.held if made.amount is None else made.amount
    if units > before.held:
        raise QuotaExceeded(
            f"operation {before.id!r} has {before.held} quota units left to refund, not {units}",
            requested=units,
            available=before.held,
        )
    after = dataclasses.replace(before, held=before.held - units, changed_at=now)
    made = dataclasses.replace(made, model=before.model, final_amount=units, changed_at=now)
    token = _moved(account.token, before, after)
    return Changes(before=account.token, token=token, steps=(Step(before, after), Step(None, made)))


def grant(account: Account, operation_id: str, idempotency_key: str | None, amount: int, now: float) -> Changes:
    """Grant ``amount`` more units; a negative amount takes back what is available.

    :raises QuotaExceeded: less than that is available.
    """
    before = account.token
    if amount < 0 and before.total_available + amount < 0:
        raise QuotaExceeded(
            f"token {before.id} has {before.total_available} quota units available, {-amount} cannot be taken back",
            requested=-amount,
            available=before.total_available,
            held=before.held,
        )
    token = dataclasses.replace(before, total_available=before.total_available + amount)
    check_totals(token)
    granted = _final(operation_id, token, "grant", amount, now, idempotency_key=idempotency_key)
    return Changes(before=before, token=token, steps=(Step(None, granted),))


def check_totals(token: Token) -> None:
    """Refuse totals that a 64-bit integer does not hold.

    :raises ValueError: a total would pass 2**63 - 1, or -(2**63 - 1).
    """
    for name in ("total_used", "total_available", "total_granted"):
        total = getattr(token, name)
        if not -MAX_INTEGER <= total <= MAX_INTEGER:
            raise ValueError(f"{name} of token {token.id} would pass {'-(2**63 - 1)' if total < 0 else '2**63 - 1'}")


def check_replay(operation: Operation, **arguments: object) -> None:
    """Check that a repeated call is the same as the call that made the operation.

    :raises OperationConflict: it is another call.
    """
    for name, value in arguments.items():
        if getattr(operation, name) != value:
            raise OperationConflict(
                f"operation {operation.id!r} was made before, with another {name}", operation_id=operation.id
            )


def _moved(token: Token, before: Operation | None, after: Operation) -> Token:
    """Return the token after one of its operations was changed or made."""
    units, from_quota, in_reserve = _holdings(after)
    if before is not None:
        units_before, from_quota_before, in_reserve_before = _holdings(before)
        units, from_quota = units - units_before, from_quota - from_quota_before
        in_reserve -= in_reserve_before
    token = dataclasses.replace(
        token,
        total_used=token.total_used + units,
        total_available=token.total_available - from_quota,
        held=token.held + in_reserve,
    )
    check_totals(token)
    return token


def _of_new_quota(operation: Operation) -> Operation:
    """Return the operation in a new period. If it is open, what it holds is part of the new quota."""
    return dataclasses.replace(operation, unlimited=False) if operation.is_holding else operation


def _holdings(operation: Operation) -> tuple[int, int, int]:
    """Return the units that an operation holds, and how many of them came from the quota and how many are not final."""
    units = operation.held
    return units, 0 if operation.unlimited else units, units if operation.is_open else 0


def _check_usable(token: Token, now: float) -> None:
    if not token.enabled:
        raise TokenDisabled(f"token {token.id} is disabled", token_id=token.id)
    if 0 < token.expires_at <= now:
        raise TokenExpired(f"token {token.id} has expired", token_id=token.id)


def _limits(token: Token, model: str | None, model_used: int) -> Iterator[tuple[int, str | None]]:
    """Yield what is left of each limit that applies to a charge, with the model if the limit is the model's."""
    if model is not None and token.model_limits_enabled:
        limit = token.model_limits.get(model)  # int or True
        if limit is None:
            raise ModelNotAllowed(f"token {token.id} does not allow the model {model!r}", model=model)
        if limit is not True:
            yield limit - model_used, model
    if not token.unlimited_quota:
        yield token.total_available, None


def _exceeded(token: Token, requested: int, left: int, model: str | None) -> QuotaExceeded:
    if model is None:
        text = f"token {token.id} has {left} quota units left, {requested} are asked for"
        return QuotaExceeded(text, requested=requested, available=left, held=token.held)
    text = f"token {token.id} has {max(left, 0)} quota units left for the model {model!r}, {requested} are asked for"
    return QuotaExceeded(text, requested=requested, available=left, model=model)


def _final(operation_id: str, token: Token, kind: Kind, amount: int, now: float, **more: Any) -> Operation:
    """Return an operation that holds nothing and is final as it is made."""
    assert token.id is not None
    return Operation(
        id=operation_id,
        token_id=token.id,
        kind=kind,
        amount=amount,
        final_amount=amount,
        created_at=now,
        changed_at=now,
        **more,
    )
