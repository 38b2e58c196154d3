"""The ledger: how a store charges tokens. Its rules are pure functions in :mod:`usage_middleware.operations`.

Each method is one transaction: it locks a token, applies a rule to it and to an operation, and saves both. What it
returns is committed. What it raises has changed nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from .. import operations as rules
from ..errors import OperationConflict, TokenNotFound
from ..keys import key_digest
from ..operations import MAX_INTEGER, Kind, Operation
from ..tokens import Token
from .transaction import (
    Transaction,
    can_exist,
    change_held,
    find_operation,
    find_token,
    give_back_all_lapsed,
    give_back_lapsed,
    id_of,
)

_PAGE_SIZE: Final = 1000

_Result = TypeVar("_Result")


class Ledger(ABC):
    """Charging, by key; granting, by token id; and the history of both."""

    # --- What a store brings.

    @abstractmethod
    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        """What ``work`` returns, when all that it did in a transaction is committed; what it raises undoes all of it.

        It has no effect beyond the transaction, as a database may ask for a transaction to be begun again.
        """

    @abstractmethod
    def _history(self, token_id: int, before: int, size: int) -> Sequence[Operation]:
        """Up to ``size`` operations of a token with a ``number`` smaller than ``before``, the greatest first."""

    @abstractmethod
    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        """Up to ``size`` open reservations that hold units, with a ``number`` greater than ``after``, by number."""

    @abstractmethod
    def _model_usage(self, first_id: int, last_id: int) -> Sequence[tuple[int, str, int]]:
        """A token id, a model, and the units that it has used, for each model of the tokens from one id to another."""

    def _now(self) -> float:
        """Unix time. A test of a store may set the clock."""
        return time.time()

    # --- What the host application calls.

    def charge(self, key: str, amount: int, *, model: str | None = None, operation_id: str | None = None) -> Token:
        """Moves ``amount`` quota units of the key's token from available to used.

        With unlimited quota they are added to used and available stays. With model limits enabled, the model must be
        listed and have them left; a charge without a model is not held against model limits.

        :param operation_id: names the charge, so that a caller who lost the answer can call again: a repeated call
            changes nothing. 1 to 255 characters, unique in the store. Left out, each call is a charge of its own.
        :return: the token after the charge.
        :raises TokenNotFound, TokenDisabled, TokenExpired: the key may not be used.
        :raises ModelNotAllowed: the token's model limits are enabled and do not list the model.
        :raises QuotaExceeded: the token, or the model, has less left. Nothing is charged then.
        :raises OperationConflict: the operation id was used for another call.
        :raises TypeError, ValueError: an argument is out of range, or a total would pass 2**63 - 1.
        """
        digest = key_digest(key)
        token, _ = self._take(lambda t: _of_key(t, digest), "charge", amount, model, operation_id, None)
        return token

    def reserve(
        self,
        key: str,
        amount: int,
        *,
        model: str | None = None,
        operation_id: str | None = None,
        expires_in: float = 600,
    ) -> str:
        """Charges ``amount`` units for work that is about to be done, until :meth:`settle` says what it came to.

        :param expires_in: seconds after which the reservation lapses: its units are given back before anything would
            be refused for want of them. A settle that comes later still charges.
        :return: the operation's id, for :meth:`settle`: the one given, or a new one.
        :raises: as :meth:`charge`.
        """
        rules.check_seconds("expires_in", expires_in)
        digest = key_digest(key)
        _, operation = self._take(
            lambda t: _of_key(t, digest), "reserve", amount, model, operation_id, float(expires_in)
        )
        return operation.id

    def settle(self, operation_id: str, amount: int) -> Token:
        """Sets the final amount of a reservation; 0 releases it.

        The amount may be more than was reserved, and more than is left: the work was done, so the token is overdrawn.
        A repeated call changes nothing.

        :return: the token after it.
        :raises OperationNotFound: there is no such operation, or it was pruned.
        :raises OperationConflict: it is no reservation, or was settled with another amount.
        :raises TokenNotFound: the token was deleted since.
        :raises TypeError, ValueError: an argument is out of range, or a total would pass 2**63 - 1.
        """
        rules.check_text("operation_id", operation_id)
        rules.check_amount(amount)

        def work(transaction: Transaction) -> Token:
            token, operation = find_operation(transaction, operation_id)
            if operation.kind != "reserve":
                raise OperationConflict(
                    f"operation {operation_id!r} is a {operation.kind}, only a reservation is settled"
                )
            if not operation.is_open:
                rules.check_replay(operation, final_amount=amount)
                return token
            token, operation = change_held(
                transaction, token, operation, amount, unlimited=token.unlimited_quota, now=self._now()
            )
            transaction.save_operation(dataclasses.replace(operation, final_amount=amount))
            return token

        return self._transact(work)

    def refund(self, operation_id: str, amount: int | None = None, *, refund_id: str | None = None) -> Token:
        """Gives units back that a charge or a settled reservation took.

        :param amount: how many; left out, all that are left of it.
        :param refund_id: names the refund, as ``operation_id`` names a charge: a repeated call changes nothing.
        :return: the token after it.
        :raises OperationNotFound: there is no such operation, or it was pruned.
        :raises QuotaExceeded: less is left of it. Refunds never give back more than was charged.
        :raises OperationConflict: it cannot be refunded, as it is an open reservation (settle it with 0), a refund or
            a grant; or the refund id was used for another call.
        :raises TokenNotFound: the token was deleted since.
        :raises TypeError, ValueError: an argument is out of range.
        """
        rules.check_text("operation_id", operation_id)
        if amount is not None:
            rules.check_amount(amount)
        if refund_id is not None:
            rules.check_text("refund_id", refund_id)

        def work(transaction: Transaction) -> Token:
            token, operation = find_operation(transaction, operation_id)
            made = None if refund_id is None else transaction.operation(refund_id)
            if made is not None:
                rules.check_replay(made, kind="refund", refund_of=operation_id, amount=amount)
                return token
            units = rules.refundable(operation, amount)
            now = self._now()
            token, operation = change_held(
                transaction, token, operation, operation.held - units, unlimited=operation.unlimited, now=now
            )
            transaction.save_operation(operation)
            transaction.insert_operation(
                Operation(
                    id=refund_id or _new_id(),
                    token_id=operation.token_id,
                    kind="refund",
                    amount=amount,
                    model=operation.model,
                    final_amount=units,
                    refund_of=operation_id,
                    created_at=now,
                    changed_at=now,
                )
            )
            return token

        return self._transact(work)

    # --- What an operator calls.

    def charge_by_id(
        self, token_id: int, amount: int, *, model: str | None = None, operation_id: str | None = None
    ) -> Token:
        """:meth:`charge`, for who has the token's id and not its key."""
        token, _ = self._take(lambda t: find_token(t, token_id), "charge", amount, model, operation_id, None)
        return token

    def grant(self, token_id: int, amount: int) -> Token:
        """Grants ``amount`` more quota units; a negative amount takes back what is available, never more.

        :return: the token after it.
        :raises TokenNotFound: there is no such token.
        :raises QuotaExceeded: more would be taken back than is available. Nothing is then.
        :raises TypeError, ValueError: the amount is out of range, or a total would pass 2**63 - 1.
        """
        rules.check_amount(amount, negative=True)

        def work(transaction: Transaction) -> Token:
            now = self._now()
            token = give_back_lapsed(transaction, find_token(transaction, token_id), now)
            token = rules.grant(token, amount)
            transaction.save(token)
            transaction.insert_operation(
                Operation(
                    id=_new_id(),
                    token_id=token_id,
                    kind="grant",
                    amount=amount,
                    final_amount=amount,
                    created_at=now,
                    changed_at=now,
                )
            )
            return token

        return self._transact(work)

    def history(self, token_id: int) -> Iterator[Operation]:
        """The operations of a token that are not pruned, the newest first, read page by page.

        What a reservation, a refund or a grant came to is its ``final_amount``, what a charge still holds after refunds
        its ``held``.
        """
        before = MAX_INTEGER
        while can_exist(token_id) and (page := self._history(token_id, before, _PAGE_SIZE)):
            yield from page
            before = page[-1].number

    def model_usage(self, token_id: int) -> dict[str, int]:
        """The quota units that each model has used of a token, charges that named no model left out."""
        usage = self._model_usage(token_id, token_id) if can_exist(token_id) else ()
        return {model: used for _, model, used in usage}

    def open_reservations(self) -> Iterator[Operation]:
        """The reservations that are not settled and hold units, lapsed or not, the oldest first, read page by page."""
        after = 0
        while page := self._open_reservations(after, _PAGE_SIZE):
            yield from page
            after = page[-1].number

    def prune(self, before: float) -> int:
        """Forgets operations that were finished before a time, and reservations that lapsed before it.

        A call that repeats a forgotten operation is a new one, and a forgotten one cannot be refunded any more: prune
        what is older than any retry. No total changes, but that lapsed reservations give their units back.

        :param before: Unix time in seconds.
        :return: how many operations were forgotten.
        :raises TypeError, ValueError: ``before`` is no time.
        """
        if not isinstance(before, (int, float)) or isinstance(before, bool):
            raise TypeError(f"before must be a number of Unix seconds, got {before!r}")
        if not math.isfinite(before):
            raise ValueError(f"before must be a number of Unix seconds, got {before!r}")

        def work(transaction: Transaction) -> tuple[int, int]:
            now = self._now()
            given_back = give_back_all_lapsed(transaction, min(before, now), now, _PAGE_SIZE)
            return given_back, transaction.forget(before, min(before, now), _PAGE_SIZE)

        forgotten = 0
        while True:
            # A transaction for each page, so that charges need not wait for all of them.
            given_back, count = self._transact(work)
            forgotten += count
            if not given_back and not count:
                return forgotten

    def _take(
        self,
        find: Callable[[Transaction], Token],
        kind: Kind,
        amount: int,
        model: str | None,
        operation_id: str | None,
        expires_in: float | None,
    ) -> tuple[Token, Operation]:
        """A charge, final or as a reservation."""
        rules.check_amount(amount)
        for what, text in (("model", model), ("operation_id", operation_id)):
            if text is not None:
                rules.check_text(what, text)

        def work(transaction: Transaction) -> tuple[Token, Operation]:
            token = find(transaction)
            token_id = id_of(token)
            made = None if operation_id is None else transaction.operation(operation_id)
            if made is not None:
                rules.check_replay(
                    made, kind=kind, token_id=token_id, amount=amount, model=model, expires_in=expires_in
                )
                return token, made
            now = self._now()
            token = give_back_lapsed(transaction, token, now)
            model_used = transaction.model_used(token_id, model) if model and token.model_limits_enabled else 0
            rules.check_allowed(token, amount, model, model_used, now)
            operation = Operation(
                id=operation_id or _new_id(),
                token_id=token_id,
                kind=kind,
                amount=amount,
                model=model,
                expires_in=expires_in,
                expires_at=None if expires_in is None else now + expires_in,
                final_amount=amount if expires_in is None else None,
                created_at=now,
            )
            token, operation = change_held(
                transaction, token, operation, amount, unlimited=token.unlimited_quota, now=now
            )
            transaction.insert_operation(operation)
            return token, operation

        return self._transact(work)


def _of_key(transaction: Transaction, digest: bytes) -> Token:
    token = transaction.load_by_digest(digest)
    if token is None:
        raise TokenNotFound("no token has this key")
    return token


def _new_id() -> str:
    return uuid.uuid4().hex
