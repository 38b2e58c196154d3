"""Data between a store and the quota rules: the :class:`Account` that is loaded and the :class:`Changes` to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .tokens import Token
from .usage import DayUsage, add_up, day_of

if TYPE_CHECKING:
    from .operations import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """The token of a transaction, and what else a rule needs of it.

    Exactly one of ``digest``, ``token_id`` and ``operation_id`` names the token.
    """

    #: The digest of its key.
    digest: bytes | None = None
    token_id: int | None = None
    #: The id of one of its operations, which is loaded too.
    operation_id: str | None = None
    #: The idempotency key of another operation, which is loaded if the token has it.
    idempotency_key: str | None = None
    #: The model whose usage is loaded, if the token's model limits are enabled.
    model: str | None = None
    #: Unix time. Reservations whose time has passed by then are loaded, but not more than ``most_lapsed``.
    now: float
    most_lapsed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a store loads of one token after locking it: all that a rule may need."""

    token: Token
    #: The operation of the look-up's ``operation_id``.
    operation: Operation | None = None
    #: The operation that has the look-up's ``idempotency_key``.
    made: Operation | None = None
    #: Reservations that have lapsed and hold units.
    lapsed: Sequence[Operation] = ()
    #: Whether there may be more of them than were loaded. The ledger sets it.
    more_lapsed: bool = False
    #: The look-up's model.
    model: str | None = None
    #: The units that the token's operations for that model hold. It may be 0 if the token's model limits are disabled.
    model_used: int = 0


class Step(NamedTuple):
    """One operation that is made or changed."""

    before: Operation | None
    after: Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a store saves, all or nothing."""

    #: The token before and after the changes.
    before: Token
    token: Token
    #: In the order in which they happened. One operation may be in several.
    steps: tuple[Step, ...] = ()

    @property
    def is_renewed(self) -> bool:
        """Whether a period began.

        If so, what open reservations hold is part of the new quota. Before a store saves the steps, it marks every
        reservation of the token that is open and holds units as not ``unlimited``.
        """
        return any(step.after.kind == "renewal" for step in self.steps)

    def model_usage(self) -> dict[str, int]:
        """Return the number of units by which the usage of each model changes."""
        usage: dict[str, int] = {}
        for before, after in self.steps:
            units = after.held - (before.held if before else 0)
            if after.model is not None and units:
                usage[after.model] = usage.get(after.model, 0) + units
        return usage

    def days(self) -> list[DayUsage]:
        """Return the changes of usage for each day and model."""
        if len(self.steps) == 1:  # an ordinary charge
            return [_booked(self.steps[0])] if self.steps[0].after.is_request else []
        return add_up(_booked(step) for step in self.steps if step.after.is_request)

    def then(self, other: Changes) -> Changes:
        """Return these changes followed by ``other``, which begin with the token as these leave it."""
        return Changes(before=self.before, token=other.token, steps=self.steps + other.steps)


def _booked(step: Step) -> DayUsage:
    before, after = step
    if before is None:
        used, requests, input_tokens, output_tokens = after.held, 1, after.input_tokens, after.output_tokens
    else:
        used, requests = after.held - before.held, 0
        input_tokens = after.input_tokens - before.input_tokens
        output_tokens = after.output_tokens - before.output_tokens
    return DayUsage(day_of(after.created_at), after.model or "", used, requests, input_tokens, output_tokens)
