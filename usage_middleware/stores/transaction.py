"""What a store does inside of one transaction, and the steps of the ledger that are built from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ..errors import OperationNotFound, TokenNotFound
from ..operations import MAX_INTEGER, Operation, hold
from ..tokens import Token, TokenRecord


class Transaction(Protocol):
    """One open write transaction of a store.

    Loading a token locks it: until the transaction ends nobody else writes it, its operations, or its model usage.
    """

    def load(self, token_id: int) -> Token | None:
        """The token of that id."""

    def load_by_digest(self, digest: bytes) -> Token | None:
        """The token that has this digest."""

    def save(self, token: Token) -> None:
        """Replaces the token of ``token.id``; its key stays."""

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        """Adds the tokens of ``records`` under their digests. Returns the id of each, which is never given again, or
        ``None`` where a token has the digest, or had it: a retired digest never returns."""

    def rekey(self, token: Token, digest: bytes) -> None:
        """Saves ``token`` under another digest, and retires the one that it had."""

    def delete(self, token_id: int) -> None:
        """Removes the token and its model usage, and retires its digest. Its operations stay until they are pruned."""

    def operation(self, operation_id: str) -> Operation | None:
        """The operation of that id."""

    def insert_operation(self, operation: Operation) -> None:
        """Adds an operation; its ``number`` is the store's to give."""

    def save_operation(self, operation: Operation) -> None:
        """Replaces the operation of ``operation.id``."""

    def lapsed(self, token_id: int, now: float) -> Sequence[Operation]:
        """The open reservations of a token that hold units and whose ``expires_at`` is ``now`` or earlier."""

    def lapsed_before(self, before: float, size: int) -> Sequence[Operation]:
        """Up to ``size`` such reservations of any token, whose ``expires_at`` is ``before`` or earlier."""

    def model_used(self, token_id: int, model: str) -> int:
        """The units that the operations of a token for that model hold."""

    def add_model_used(self, token_id: int, model: str, units: int) -> None:
        """Changes :meth:`model_used` by ``units``."""

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        """Removes up to ``size`` operations that are final and last changed before ``before``, or are open, hold
        nothing, and have an ``expires_at`` of ``lapsed_before`` or earlier. Returns how many."""


def find_token(transaction: Transaction, token_id: int) -> Token:
    """:raises TokenNotFound: there is no token of that id."""
    token = transaction.load(token_id) if can_exist(token_id) else None
    if token is None:
        raise TokenNotFound(f"there is no token {token_id}")
    return token


def find_operation(transaction: Transaction, operation_id: str) -> tuple[Token, Operation]:
    """An operation and its token, both locked.

    :raises OperationNotFound: there is no operation of that id.
    :raises TokenNotFound: its token was deleted.
    """
    operation = transaction.operation(operation_id)
    if operation is not None:
        token = find_token(transaction, operation.token_id)
        # Once more, as it may have changed until its token was locked.
        operation = transaction.operation(operation_id)
    if operation is None:
        raise OperationNotFound(f"there is no operation {operation_id!r}, or it was pruned")
    return token, operation


def change_held(
    transaction: Transaction, token: Token, operation: Operation, units: int, *, unlimited: bool, now: float
) -> tuple[Token, Operation]:
    """Makes the operation hold ``units``, and saves what that changes but for the operation itself."""
    before = operation.held
    token, operation = hold(token, operation, units, unlimited=unlimited, now=now)
    transaction.save(token)
    if operation.model is not None and units != before:
        transaction.add_model_used(operation.token_id, operation.model, units - before)
    return token, operation


def give_back(transaction: Transaction, token: Token, operation: Operation, now: float) -> Token:
    """Takes a lapsed reservation's units back to its token. It stays open: a late settle still charges."""
    token, operation = change_held(transaction, token, operation, 0, unlimited=operation.unlimited, now=now)
    transaction.save_operation(operation)
    return token


def give_back_lapsed(transaction: Transaction, token: Token, now: float) -> Token:
    """Gives back what all lapsed reservations of the token hold."""
    for operation in transaction.lapsed(id_of(token), now):
        token = give_back(transaction, token, operation, now)
    return token


def give_back_all_lapsed(transaction: Transaction, before: float, now: float, size: int) -> int:
    """Gives back what reservations hold that lapsed until ``before``, of the tokens of the first ``size`` of them.

    Returns how many of those ``size`` there were: 0 where nothing is left to give back.
    """
    lapsed = transaction.lapsed_before(before, size)
    for token_id in sorted({operation.token_id for operation in lapsed}):
        token = transaction.load(token_id)
        # Once more, as some may have been settled until their token was locked.
        for operation in transaction.lapsed(token_id, before):
            if token is None:
                transaction.save_operation(dataclasses.replace(operation, held=0))
            else:
                token = give_back(transaction, token, operation, now)
    return len(lapsed)


def id_of(token: Token) -> int:
    """The id of a token that a store has loaded, which always has one."""
    assert token.id is not None
    return token.id


def can_exist(token_id: object) -> bool:
    """Whether there could be a token of that id; a database would refuse to look for others.

    :raises TypeError: it is no ``int``.
    """
    if not isinstance(token_id, int) or isinstance(token_id, bool):
        # Without the value, which may be a key in the wrong place.
        raise TypeError(f"a token id must be an int, got {type(token_id).__name__}")
    return 0 < token_id <= MAX_INTEGER
