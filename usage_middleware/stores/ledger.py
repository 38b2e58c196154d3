"""The ledger: how a store charges tokens. The rules are pure functions in :mod:`usage_middleware.operations`.

In one transaction, each method locks and loads an account, applies a rule to it, and saves what changes. A method that
returns has committed. A method that raises has changed nothing, except that it may have released lapsed reservations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import operations as rules
from ..accounts import Account, Changes, Lookup
from ..checks import can_exist, check_amount, check_seconds, check_text
from ..errors import OperationConflict, OperationNotFound, QuotaError, QuotaExceeded, TokenNotFound
from ..keys import key_digest
from ..operations import Kind, Operation
from ..renewal import renewed
from ..tokens import Token, id_of
from .hooks import MOST_LAPSED, StoreHooks, new_id
from .transaction import Transaction

# The arguments of a Lookup that name the account.
_Place = dict[str, Any]
# Returns what the account becomes, or None if the call is a repeated one.
_Rule = Callable[[Account, float], "Changes | None"]


class Ledger(StoreHooks):
    """Charging by key, and granting by token id."""

    # --- What the host application calls, by key.

    def charge(
        self,
        key: str,
        amount: int,
        *,
        model: str | None = None,
        idempotency_key: str | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
    ) -> Token:
        """Move ``amount`` quota units of the key's token from available to used.

        With unlimited quota they are added to used, and available stays. If model limits are enabled, the model must be
        listed and have that many units left; a charge without a model is not held to model limits.

        :param key: with or without its prefix ``sk-``.
        :param idempotency_key: names the charge, so that a caller that lost the answer can call again: a repeated call
            changes nothing. 1 to 255 characters, unique for the token. Left out, each call is a charge of its own.
        :param input_tokens: how many tokens a model read. They count in usage by day and do not affect the quota.
        :param output_tokens: how many tokens it wrote.
        :return: the token after the charge.
        :raises TokenNotFound, TokenDisabled, TokenExpired: the key may not be used.
        :raises ModelNotAllowed: the token's model limits are enabled and do not list the model.
        :raises QuotaExceeded: the token, or the model, has less left. Nothing is charged.
        :raises OperationConflict: the idempotency key was used for another call.
        :raises TypeError, ValueError: an argument is out of range, or a total would pass 2**63 - 1.
        """
        token, _ = self._take(
            {"digest": key_digest(key)},
            "charge",
            amount,
            model=model,
            idempotency_key=idempotency_key,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        return token

    def reserve(
        self,
        key: str,
        amount: int,
        *,
        at_least: int | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
        expires_in: float = 600,
    ) -> Operation:
        """Charge ``amount`` units for work that is about to be done, until :meth:`settle` says what it came to.

        :param at_least: if less than ``amount`` is left, but at least this much, take all of it. The operation's
            ``held`` is what was taken.
        :param expires_in: seconds after which the reservation lapses: its units are released before any later request
            is refused for lack of quota. A settle that comes later still charges.
        :return: the operation, for :meth:`settle`. ``replayed`` is true if an earlier call of the same idempotency
            key made it.
        :raises: as :meth:`charge`.
        """
        check_seconds("expires_in", expires_in)
        check_amount(amount)
        if at_least is not None:
            check_amount(at_least, "at_least")
            if at_least > amount:
                raise ValueError(f"at_least must not be more than the amount of {amount}, got {at_least}")
        _, operation = self._take(
            {"digest": key_digest(key)},
            "reserve",
            amount,
            at_least=at_least,
            model=model,
            idempotency_key=idempotency_key,
            expires_in=float(expires_in),
        )
        return operation

    def settle(
        self, operation: Operation | str, amount: int, *, input_tokens: int = 0, output_tokens: int = 0
    ) -> Token:
        """Set the final amount of a reservation; 0 releases it.

        The amount may be more than was reserved, and more than is left. The token is then overdrawn, as the work was
        done. A repeated call changes nothing.

        :param operation: what :meth:`reserve` returned, or its id.
        :return: the token after it.
        :raises OperationNotFound: there is no such operation, or it was pruned.
        :raises OperationConflict: it is not a reservation, or was settled with other figures.
        :raises TokenNotFound: the token was deleted since.
        :raises TypeError, ValueError: an argument is out of range, or a total would pass 2**63 - 1.
        """
        operation_id = _id_of(operation)
        check_amount(amount)
        tokens = {"input_tokens": input_tokens, "output_tokens": output_tokens}
        _check_tokens(**tokens)

        def rule(account: Account, now: float) -> Changes | None:
            operation = account.operation
            assert operation is not None
            if operation.kind != "reserve":
                raise OperationConflict(
                    f"operation {operation_id!r} is a {operation.kind}, only a reservation is settled",
                    operation_id=operation_id,
                )
            if not operation.is_open:
                rules.check_replay(operation, final_amount=amount, **tokens)
                return None
            return rules.settle(account, amount, now, **tokens)

        token, _ = self._change({"operation_id": operation_id}, rule)
        return token

    def refund(
        self, operation: Operation | str, amount: int | None = None, *, idempotency_key: str | None = None
    ) -> Token:
        """Return units that a charge or a settled reservation took.

        :param operation: the operation, or its id.
        :param amount: how many units; left out, all that are left of the operation.
        :param idempotency_key: names the refund, as it names a charge: a repeated call changes nothing.
        :return: the token after it.
        :raises OperationNotFound: there is no such operation, or it was pruned.
        :raises QuotaExceeded: less is left of the operation. Refunds never return more than was charged.
        :raises OperationConflict: the operation is an open reservation (settle it with 0), a refund or a grant, none of
            which can be refunded; or the idempotency key was used for another call.
        :raises TokenNotFound: the token was deleted since.
        :raises TypeError, ValueError: an argument is out of range.
        """
        operation_id = _id_of(operation)
        if amount is not None:
            check_amount(amount)
        refund_id = new_id()

        def rule(account: Account, now: float) -> Changes | None:
            if account.made is not None:
                rules.check_replay(account.made, kind="refund", refund_of=operation_id, amount=amount)
                return None
            made = Operation(
                id=refund_id,
                token_id=id_of(account.token),
                kind="refund",
                amount=amount,
                idempotency_key=idempotency_key,
                refund_of=operation_id,
                created_at=now,
            )
            return rules.refund(account, made, now)

        token, _ = self._change({"operation_id": operation_id, "idempotency_key": idempotency_key}, rule)
        return token

    # --- What an operator calls, by token id.

    def charge_by_id(
        self,
        token_id: int,
        amount: int,
        *,
        model: str | None = None,
        idempotency_key: str | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
    ) -> Token:
        """Like :meth:`charge`, by token id."""
        token, _ = self._take(
            {"token_id": token_id},
            "charge",
            amount,
            model=model,
            idempotency_key=idempotency_key,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        return token

    def grant(self, token_id: int, amount: int, *, idempotency_key: str | None = None) -> Token:
        """Grant ``amount`` more quota units; a negative amount takes back what is available, never more.

        :param idempotency_key: names the grant, as it names a charge, so that a payment that is reported twice grants
            once.
        :return: the token after it.
        :raises TokenNotFound: there is no such token.
        :raises QuotaExceeded: more would be taken back than is available. Then nothing is taken.
        :raises OperationConflict: the idempotency key was used for another call.
        :raises TypeError, ValueError: an argument is out of range, or a total would pass 2**63 - 1.
        """
        check_amount(amount, negative=True)
        grant_id = new_id()

        def rule(account: Account, now: float) -> Changes | None:
            if account.made is not None:
                rules.check_replay(account.made, kind="grant", amount=amount)
                return None
            return rules.grant(account, grant_id, idempotency_key, amount, now)

        token, _ = self._change({"token_id": token_id, "idempotency_key": idempotency_key}, rule)
        return token

    def _take(
        self, place: _Place, kind: Kind, amount: int, *, idempotency_key: str | None, **arguments: Any
    ) -> tuple[Token, Operation]:
        """Make a charge, final or as a reservation. ``arguments`` are fields of the operation."""
        check_amount(amount)
        model = arguments["model"]
        if model is not None:
            check_text("model", model)
        if kind == "charge":
            _check_tokens(arguments["input_tokens"], arguments["output_tokens"])
        operation_id = new_id()
        expires_in = arguments.get("expires_in")

        def rule(account: Account, now: float) -> Changes | None:
            if account.made is not None:
                rules.check_replay(account.made, kind=kind, amount=amount, **arguments)
                return None
            operation = Operation(
                id=operation_id,
                token_id=id_of(account.token),
                kind=kind,
                amount=amount,
                idempotency_key=idempotency_key,
                expires_at=None if expires_in is None else now + expires_in,
                created_at=now,
                **arguments,
            )
            return rules.take(account, operation, now)

        token, operation = self._change({**place, "idempotency_key": idempotency_key, "model": model}, rule)
        assert operation is not None
        return token, operation

    def _change(self, place: _Place, rule: _Rule) -> tuple[Token, Operation | None]:
        """Apply a rule to an account in a transaction.

        :return: the token after the change, and the operation that was made last or that a repeated call found.
        """
        if place.get("idempotency_key") is not None:
            check_text("idempotency_key", place["idempotency_key"])
        if "token_id" in place and not can_exist(place["token_id"]):
            raise token_not_found(place["token_id"])
        renewal_id = new_id()

        def work(transaction: Transaction) -> tuple[Token, Operation | None] | QuotaExceeded:
            now = self._now()
            account = transaction.load(Lookup(**place, now=now, most_lapsed=MOST_LAPSED))
            if account is None:
                raise _NoAccount
            if len(account.lapsed) >= MOST_LAPSED:
                account = dataclasses.replace(account, more_lapsed=True)
            current, due = rules.bring_up_to_date(account, now, renewal_id=renewal_id)
            try:
                changes = rule(current, now)
            except QuotaExceeded as error:
                if due is not None:
                    transaction.save(due)
                if error.model is not None:
                    error.held = transaction.model_held(id_of(account.token), error.model)
                if due is None:
                    raise
                # Returned, not raised, so that the release of lapsed reservations is committed.
                return _Again() if account.more_lapsed else error
            if changes is None:
                made = account.made or account.operation
                return renewed(account.token, now), made and dataclasses.replace(made, replayed=True)
            transaction.save(changes if due is None else due.then(changes))
            return changes.token, changes.steps[-1].after if changes.steps else None

        try:
            outcome = self._transact(work)
            while isinstance(outcome, _Again):
                outcome = self._transact(work)
        except _NoAccount:
            raise self._not_found(place) from None
        if isinstance(outcome, QuotaExceeded):
            raise outcome
        return outcome

    def _not_found(self, place: _Place) -> TokenNotFound | OperationNotFound:
        operation_id = place.get("operation_id")
        if operation_id is None:
            return token_not_found(place.get("token_id"))
        operation = self._operation(operation_id)
        if operation is None:
            return OperationNotFound(
                f"there is no operation {operation_id!r}, or it was pruned", operation_id=operation_id
            )
        return token_not_found(operation.token_id)


class _NoAccount(QuotaError):
    """There is no such token or operation."""


class _Again(QuotaExceeded):
    """The refusal is not final: more reservations have lapsed than one transaction releases."""


def token_not_found(token_id: int | None) -> TokenNotFound:
    text = "no token has this key" if token_id is None else f"there is no token {token_id}"
    return TokenNotFound(text, token_id=token_id)


def _check_tokens(input_tokens: int, output_tokens: int) -> None:
    check_amount(input_tokens, "input_tokens", unit="tokens")
    check_amount(output_tokens, "output_tokens", unit="tokens")


def _id_of(operation: Operation | str) -> str:
    operation_id = operation.id if isinstance(operation, Operation) else operation
    check_text("operation", operation_id)
    return operation_id
