"""What a store records of the past (operations, usage by model and by day), and how it is pruned."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import date
from itertools import islice
from typing import Final

from .. import operations as rules
from ..accounts import Lookup
from ..checks import MAX_INTEGER, can_exist, check_text, check_time
from ..keys import key_digest
from ..log import LOG_KINDS, LogEntry, LogKind, log_entry
from ..operations import Kind, Operation
from ..usage import DayUsage, day_of
from .hooks import MOST_LAPSED, StoreHooks, new_id, pages
from .transaction import Transaction

_PAGE_SIZE: Final = 1000
_OPERATIONS_OF: Final[dict[LogKind, tuple[Kind, ...]]] = {"charge": ("charge", "reserve"), "refund": ("refund",)}
_FOREVER: Final = sys.float_info.max  # MySQL has no infinity


class History(StoreHooks):
    """Operations and usage, by token id."""

    def operation(self, operation_id: str) -> Operation | None:
        """Return the operation of that id, or ``None`` if there is none or it was pruned."""
        check_text("operation_id", operation_id)
        return self._operation(operation_id)

    def find_operation(self, key: str, idempotency_key: str) -> Operation | None:
        """Return the operation that the key's token has under an idempotency key, or ``None``.

        A host calls this before it repeats work that it may already have done.
        """
        check_text("idempotency_key", idempotency_key)
        found = self._find_operation(key_digest(key), idempotency_key)
        return found and dataclasses.replace(found, replayed=True)

    def history(self, token_id: int, *, since: float | None = None, until: float | None = None) -> Iterator[Operation]:
        """Yield the operations of a token that are not pruned, the newest first, read page by page.

        ``final_amount`` is what a reservation, a refund, a grant or a renewal came to. ``held`` is what a charge still
        holds after refunds.

        :param since: Unix time: only operations made then or later.
        :param until: Unix time: only operations made before.
        """
        for what, moment in (("since", since), ("until", until)):
            if moment is not None:
                check_time(what, moment)
        begin = -_FOREVER if since is None else float(since)
        end = _FOREVER if until is None else float(until)
        return self._pages_of_history(token_id, begin, end) if can_exist(token_id) else iter(())

    def _pages_of_history(self, token_id: int, since: float, until: float) -> Iterator[Operation]:
        return pages(lambda before: self._history(token_id, since, until, before, _PAGE_SIZE), _number_of, MAX_INTEGER)

    def log(
        self,
        token_id: int,
        *,
        kinds: Collection[LogKind] = LOG_KINDS,
        since: int = 0,
        until: int = MAX_INTEGER,
        offset: int = 0,
        size: int = _PAGE_SIZE,
    ) -> Sequence[LogEntry]:
        """Return the charges and refunds of a token that are not pruned, the newest first, from an offset on.

        :param kinds: ``"charge"``, which includes reservations, and ``"refund"``.
        :param since: Unix time in whole seconds: only what was made then or later.
        :param until: Unix time in whole seconds: only what was made in that second or earlier.
        :param offset: how many entries to leave out.
        :param size: how many entries to return at most.
        """
        operations = [operation for kind in kinds for operation in _OPERATIONS_OF[kind]]
        if not operations or not can_exist(token_id) or offset + size > MAX_INTEGER:
            return []
        first, last = (max(-MAX_INTEGER, min(moment, MAX_INTEGER)) for moment in (since, until))
        return [log_entry(found) for found in self._log(token_id, operations, first, last, offset, size)]

    def _log(
        self, token_id: int, kinds: Collection[Kind], since: int, until: int, offset: int, size: int
    ) -> Sequence[Operation]:
        """Return up to ``size`` operations of a token, the newest first, after the ``offset`` newest.

        Only operations of ``kinds`` count that were made from ``since`` on and not later than the second ``until``.
        This is a hook: it works with every store, and a database overrides it with a query that uses an index.
        """
        operations = self._pages_of_history(token_id, since, until + 1)
        return list(islice((one for one in operations if one.kind in kinds), offset, offset + size))

    def model_usage(self, token_id: int) -> dict[str, int]:
        """Return the quota units that each model has used of a token; charges that named no model are left out."""
        return self._model_usage(token_id) if can_exist(token_id) else {}

    def usage_by_day(self, token_id: int, first_day: date, last_day: date) -> Sequence[DayUsage]:
        """Return what a token used on each UTC day from one to another, both included, by day and then model.

        Days and models on which nothing happened are left out. All days of a token add up to its ``total_used``,
        unless it had been used before it was imported, or before an upgrade from a version that did not count by day.
        """
        for what, day in (("first_day", first_day), ("last_day", last_day)):
            # A datetime is a date too, but not a day.
            if type(day) is not date:
                raise TypeError(f"{what} must be a datetime.date, got {type(day).__name__}")
        return self._usage_by_day(token_id, first_day, last_day) if can_exist(token_id) else []

    def today(self) -> date:
        """Return the UTC day on which a charge would be booked now."""
        return day_of(self._now())

    def count_requests(self, token_id: int) -> int:
        """Return how many charges and reservations were made, as usage by day counts them: pruned ones included."""
        return self._count_requests(token_id) if can_exist(token_id) else 0

    def _count_requests(self, token_id: int) -> int:
        """Return the sum of ``requests`` in a token's usage by day. A hook, as :meth:`_log`."""
        return sum(usage.requests for usage in self._usage_by_day(token_id, date.min, date.max))

    def open_reservations(self) -> Iterator[Operation]:
        """Yield the reservations that are not settled and hold units, lapsed or not, the oldest first, page by page."""
        return pages(lambda after: self._open_reservations(after, _PAGE_SIZE), _number_of, 0)

    def prune(self, before: float) -> int:
        """Delete operations that were finished before a time, and reservations that lapsed before it.

        A call that repeats a deleted operation makes a new one, and a deleted operation cannot be refunded any more:
        prune only what is older than any retry. Lapsed reservations are released. Otherwise no total changes, and usage
        by day stays.

        :param before: Unix time in seconds.
        :return: how many operations were deleted.
        :raises TypeError, ValueError: ``before`` is not a time.
        """
        check_time("before", before)
        before = float(before)
        lapsed_before = min(before, self._now())
        while token_ids := self._transact(lambda transaction: transaction.lapsed_tokens(lapsed_before, _PAGE_SIZE)):
            for token_id in token_ids:
                self._release_lapsed(token_id, lapsed_before)
        forgotten = 0
        # A transaction for each page, so that charges need not wait for all of them.
        while count := self._transact(lambda transaction: transaction.forget(before, lapsed_before, _PAGE_SIZE)):
            forgotten += count
        return forgotten

    def count_finished(self, before: float) -> int:
        """Return how many operations :meth:`prune` would delete."""
        check_time("before", before)
        return self._count_finished(float(before), min(float(before), self._now()))

    def _release_lapsed(self, token_id: int, before: float) -> None:
        renewal_id = new_id()

        def work(transaction: Transaction) -> None:
            account = transaction.load(Lookup(token_id=token_id, now=before, most_lapsed=MOST_LAPSED))
            if account is None:
                # Another program has removed the token, or its reservations would hold nothing.
                transaction.delete(token_id)
                return
            _, due = rules.bring_up_to_date(account, self._now(), renewal_id=renewal_id)
            if due is not None:
                transaction.save(due)

        self._transact(work)


def _number_of(operation: Operation) -> int:
    return operation.number
