"""The quota rules: what charging, reserving, settling, refunding and granting do to a token.

Every rule is a pure function of a token and an operation. A store loads both, applies the rule, and saves what comes
back, in one transaction; no store has a rule of its own.

The law they keep: ``total_granted == total_used + total_available``. An operation *holds* the units that it has taken
from a token and not given back. All that ever happens is that an operation comes to hold another number of units, so
:func:`hold` is the one place where totals move, and a grant the only other.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Literal

from .errors import ModelNotAllowed, OperationConflict, QuotaExceeded, TokenDisabled, TokenExpired
from .tokens import Token

MAX_INTEGER: Final = 2**63 - 1  # what a 64-bit column holds
ID_MAX_LENGTH: Final = 255

Kind = Literal["charge", "reserve", "refund", "grant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One entry of a token's history."""

    id: str
    token_id: int
    kind: Kind
    #: The quota units asked for: of a grant that takes back negative, of a refund of all that is left ``None``.
    amount: int | None
    model: str | None = None
    #: The units that it has taken from the token and not given back.
    held: int = 0
    #: Whether the token's quota was unlimited when it took them, so that they did not come from ``total_available``.
    unlimited: bool = False
    #: How many seconds a reservation lasts.
    expires_in: float | None = None
    #: Unix time at which a reservation lapses that is not settled.
    expires_at: float | None = None
    #: The units that it came to: what a reservation was settled with, what a refund gave back. ``None``: it is open.
    final_amount: int | None = None
    #: The id of the operation that a refund is of.
    refund_of: str | None = None
    #: Unix time, with a fraction.
    created_at: float = 0.0
    #: Unix time at which it last came to hold other units.
    changed_at: float = 0.0
    #: Its place in the store's order.
    number: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it is a reservation that is not settled, lapsed or not."""
        return self.final_amount is None

    def has_lapsed(self, now: float) -> bool:
        """Whether it is a reservation whose time has passed at ``now``."""
        return self.expires_at is not None and self.expires_at <= now


def hold(token: Token, operation: Operation, units: int, *, unlimited: bool, now: float) -> tuple[Token, Operation]:
    """Makes ``operation`` hold ``units`` of ``token``, whatever it held before.

    :param unlimited: whether the units are taken from no quota: ``total_available`` then stays as it is.
    :raises ValueError: a total would pass 2**63 - 1.
    """
    returned = 0 if operation.unlimited else operation.held
    taken = 0 if unlimited else units
    token = dataclasses.replace(
        token,
        total_used=token.total_used - operation.held + units,
        total_available=token.total_available + returned - taken,
    )
    check_totals(token)
    return token, dataclasses.replace(operation, held=units, unlimited=unlimited, changed_at=now)


def check_allowed(token: Token, amount: int, model: str | None, model_used: int, now: float) -> None:
    """Whether ``token`` may take ``amount`` more units, for ``model`` if one is named.

    :param model_used: what the model has used of the token so far.
    :raises TokenDisabled, TokenExpired, ModelNotAllowed, QuotaExceeded: it may not.
    """
    if not token.enabled:
        raise TokenDisabled(f"token {token.id} is disabled")
    if 0 < token.expires_at <= now:
        raise TokenExpired(f"token {token.id} has expired")
    if model is not None and token.model_limits_enabled:
        limit = token.model_limits.get(model)  # int or True
        if limit is None:
            raise ModelNotAllowed(f"token {token.id} does not allow the model {model!r}")
        if limit is not True and amount > 0 and model_used + amount > limit:
            raise QuotaExceeded(
                f"token {token.id} has {max(limit - model_used, 0)} quota units left for the model {model!r}, "
                f"{amount} are asked for"
            )
    if not token.unlimited_quota and 0 < amount > token.total_available:
        raise QuotaExceeded(f"token {token.id} has {token.total_available} quota units left, {amount} are asked for")


def grant(token: Token, amount: int) -> Token:
    """The token with ``amount`` more units granted; a negative amount takes back.

    :raises QuotaExceeded: less than nothing would be available.
    :raises ValueError: a total would pass 2**63 - 1.
    """
    if amount < 0 and token.total_available + amount < 0:
        raise QuotaExceeded(
            f"token {token.id} has {token.total_available} quota units available, {-amount} cannot be taken back"
        )
    token = dataclasses.replace(token, total_available=token.total_available + amount)
    check_totals(token)
    return token


def refundable(operation: Operation, amount: int | None) -> int:
    """The units that a refund of ``amount`` gives back; of ``None``, all that are left.

    :raises OperationConflict: the operation is of a kind that cannot be refunded, or is an open reservation.
    :raises QuotaExceeded: less is left.
    """
    if operation.kind not in ("charge", "reserve"):
        raise OperationConflict(f"operation {operation.id!r} is a {operation.kind}, which cannot be refunded")
    if operation.is_open:
        raise OperationConflict(f"operation {operation.id!r} is an open reservation; settle it with 0 to release it")
    if amount is None:
        return operation.held
    if amount > operation.held:
        raise QuotaExceeded(f"operation {operation.id!r} has {operation.held} quota units left to refund, not {amount}")
    return amount


def check_totals(token: Token) -> None:
    """Refuses totals that a 64-bit integer does not hold.

    :raises ValueError: a total would pass 2**63 - 1.
    """
    for field in ("total_used", "total_available", "total_granted"):
        if getattr(token, field) > MAX_INTEGER:
            raise ValueError(f"{field} of token {token.id} would pass 2**63 - 1")


def check_replay(operation: Operation, **arguments: object) -> None:
    """Whether an operation id stands for the same call as before.

    :raises OperationConflict: it was used for another.
    """
    for name, value in arguments.items():
        if getattr(operation, name) != value:
            raise OperationConflict(f"operation {operation.id!r} was made before, with another {name}")


def check_amount(amount: object, *, negative: bool = False) -> None:
    """:raises TypeError, ValueError: ``amount`` is no number of quota units."""
    if not isinstance(amount, int) or isinstance(amount, bool):
        # Without the value, here and below: what is no amount may be a key in the wrong place.
        raise TypeError(f"an amount must be an int of quota units, got {type(amount).__name__}")
    if not (-MAX_INTEGER if negative else 0) <= amount <= MAX_INTEGER:
        least = "-(2**63 - 1)" if negative else "0"
        raise ValueError(f"an amount must be {least} to 2**63 - 1 quota units, got {amount}")


def check_text(what: str, text: object) -> None:
    """:raises TypeError, ValueError: ``text`` is nothing that every database takes for an identifier."""
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, got {type(text).__name__}")
    if not 1 <= len(text) <= ID_MAX_LENGTH or "\0" in text:
        raise ValueError(f"{what} must be 1 to {ID_MAX_LENGTH} characters without NUL, got {text[:40]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text that UTF-8 can carry, got {text[:40]!r}") from None


def check_seconds(what: str, seconds: object) -> None:
    """:raises TypeError, ValueError: ``seconds`` is no duration."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, got {type(seconds).__name__}")
    if not (0 < seconds < math.inf):
        raise ValueError(f"{what} must be more than 0 seconds, got {seconds!r}")
