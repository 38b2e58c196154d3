"""What a store does within one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..accounts import Account, Changes, Lookup
from ..tokens import TokenRecord


class Transaction(Protocol):
    """One open write transaction of a store.

    Loading an account locks its token. Until the transaction ends, no other transaction writes the token, its
    operations, or its usage.
    """

    def load(self, lookup: Lookup) -> Account | None:
        """Return the account that ``lookup`` names; ``None`` if there is no such token or operation.

        The token is locked first, and everything else is read after that. A store over a database server uses as few
        round trips as possible.
        """

    def save(self, changes: Changes) -> None:
        """Write the fields of the token that differ, each step's operation, and what they add to the usage.

        A new operation gets its ``number`` here.
        """

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        """Add the tokens of ``records``, with their usage, under their digests.

        :return: the id of each, which is never used again, or ``None`` if a token has the digest or had it: a retired
            digest never returns.
        """

    def rekey(self, token_id: int, digest: bytes) -> None:
        """Put the token under another digest, and retire the one that it had."""

    def delete(self, token_id: int) -> None:
        """Remove the token with its usage, and retire its digest.

        Its operations stay until they are pruned; those that are open hold nothing any more.
        """

    def model_held(self, token_id: int, model: str) -> int:
        """Return the units that the token's open reservations for that model hold. Asked only before a refusal."""

    def lapsed_tokens(self, before: float, size: int) -> Sequence[int]:
        """Return the ids of up to ``size`` tokens that have reservations which hold units and lapsed by ``before``."""

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        """Remove up to ``size`` operations that are finished (:meth:`.Operation.is_finished`). Return how many."""
