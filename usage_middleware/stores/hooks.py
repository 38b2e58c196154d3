"""What a store brings: the hooks on which :class:`~usage_middleware.QuotaStore` is built.

A store locks, loads, saves and commits, and knows no rule. Each hook may raise
:class:`~usage_middleware.StoreError` if the database fails, and lets no other exception of a driver through.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Final, TypeVar

from ..operations import Operation
from ..tokens import Token, TokenRecord
from ..usage import DayUsage
from .findings import Finding
from .migrations import TablesState
from .transaction import Transaction

# How many lapsed reservations one transaction releases. A release is kept even if the charge is then refused. Other
# tokens' charges run between two such transactions, so many lapsed reservations delay only the call that needs their
# units.
MOST_LAPSED: Final = 200

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class StoreHooks(ABC):
    """The methods that a store implements."""

    #: Returns Unix time. A store sets it from its argument ``clock``.
    _clock: Callable[[], float] = staticmethod(time.time)

    @abstractmethod
    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        """Return what ``work`` returns, once its transaction is committed. An exception rolls it back.

        ``work`` has no effect beyond the transaction, because a database may require that it is retried.
        """

    @abstractmethod
    def _get(self, digest: bytes) -> Token | None:
        """Return the token of that digest: the request path, one look-up by index."""

    @abstractmethod
    def _get_by_id(self, token_id: int) -> Token | None:
        """Return the token of that id."""

    @abstractmethod
    def _page(self, after: int, size: int) -> Sequence[Token]:
        """Return up to ``size`` tokens with an id greater than ``after``, by id."""

    @abstractmethod
    def _records(self, after: int, size: int) -> Sequence[TokenRecord]:
        """Return the same tokens with all that is kept of them. What is returned of one token is of one moment."""

    @abstractmethod
    def _operation(self, operation_id: str) -> Operation | None:
        """Return the operation of that id."""

    @abstractmethod
    def _find_operation(self, digest: bytes, idempotency_key: str) -> Operation | None:
        """Return the operation of that idempotency key, of the token of that digest."""

    @abstractmethod
    def _history(self, token_id: int, since: float, until: float, before: int, size: int) -> Sequence[Operation]:
        """Return up to ``size`` operations of a token that were made from ``since`` on and before ``until``, with a
        ``number`` smaller than ``before``, the greatest first."""

    @abstractmethod
    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        """Return up to ``size`` open reservations that hold units, with a ``number`` greater than ``after``, in its
        order."""

    @abstractmethod
    def _count_finished(self, before: float, lapsed_before: float) -> int:
        """Return how many operations are finished (:meth:`.Operation.is_finished`), or will be when what has lapsed by
        ``lapsed_before`` is released."""

    @abstractmethod
    def _model_usage(self, token_id: int) -> dict[str, int]:
        """Return the units that each model has used of a token."""

    @abstractmethod
    def _usage_by_day(self, token_id: int, first_day: date, last_day: date) -> Sequence[DayUsage]:
        """Return what a token used from one day to another, both included, by day and then model."""

    @abstractmethod
    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        """Return those of ``digests`` that a token has here, or had: what :meth:`.QuotaStore.restore` leaves alone."""

    @abstractmethod
    def close(self) -> None:
        """Release what the store holds. It may be closed twice. Using a closed store raises :class:`StoreError`."""

    def health(self) -> Iterator[Finding]:
        """Check the database and yield one finding per check. Change nothing."""
        return iter(())

    def tables_state(self) -> TablesState:
        """Return whether the store's tables are there, and of which version. Make and change nothing."""
        return "current"

    def _now(self) -> float:
        return self._clock()


def pages(read: Callable[[int], Sequence[_Item]], place_of: Callable[[_Item], int], start: int) -> Iterator[_Item]:
    """Yield all that ``read`` returns, page by page. Nothing is locked or kept between two pages.

    :param read: returns the page behind a place; an empty one is the end.
    :param place_of: returns the place of an item.
    """
    place = start
    while page := read(place):
        yield from page
        place = place_of(page[-1])


def new_id() -> str:
    """Return an id for an operation.

    It is made before the transaction, so a transaction that is retried makes the same operation.
    """
    return secrets.token_hex(16)
