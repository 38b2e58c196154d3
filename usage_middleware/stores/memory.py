"""Tokens in the memory of one process: for tests, demonstrations, and hosts that make their tokens at start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import TypeVar

from ..errors import StoreError
from ..forks import PerProcess
from ..operations import Operation
from ..tokens import Token, TokenRecord
from ..usage import DayUsage
from .base import QuotaStore
from .memory_content import Content
from .transaction import Transaction

_Result = TypeVar("_Result")


class MemoryTokenStore(QuotaStore):
    """Keep tokens in memory. They are gone with the process, and each process has its own.

    Even here only digests of keys are kept, so a dump of the memory shows only keys that were just in use.

    :param clock: returns Unix time; for tests.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Of each process: a child would inherit a lock that another thread held at the fork, for good.
        self._locks = PerProcess(threading.Lock)
        self._content: Content | None = Content()

    def __repr__(self) -> str:
        return "MemoryTokenStore()"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        with self._locks.get():
            content = self._open()
            try:
                result = work(content)
            except BaseException:
                content.undo()
                raise
            content.commit()
            return result

    def _get(self, digest: bytes) -> Token | None:
        with self._locks.get():
            return self._open().token_of_digest(digest)

    def _get_by_id(self, token_id: int) -> Token | None:
        with self._locks.get():
            return self._open().token(token_id)

    def _page(self, after: int, size: int) -> Sequence[Token]:
        with self._locks.get():
            return self._open().page(after, size)

    def _records(self, after: int, size: int) -> Sequence[TokenRecord]:
        with self._locks.get():
            return self._open().records(after, size)

    def _operation(self, operation_id: str) -> Operation | None:
        with self._locks.get():
            return self._open().operation(operation_id)

    def _find_operation(self, digest: bytes, idempotency_key: str) -> Operation | None:
        with self._locks.get():
            return self._open().operation_of_key(digest, idempotency_key)

    def _history(self, token_id: int, since: float, until: float, before: int, size: int) -> Sequence[Operation]:
        with self._locks.get():
            return self._open().history(token_id, since, until, before, size)

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        with self._locks.get():
            return self._open().open_reservations(after, size)

    def _count_finished(self, before: float, lapsed_before: float) -> int:
        with self._locks.get():
            return self._open().count_finished(before, lapsed_before)

    def _model_usage(self, token_id: int) -> dict[str, int]:
        with self._locks.get():
            return self._open().model_usage(token_id)

    def _usage_by_day(self, token_id: int, first_day: date, last_day: date) -> Sequence[DayUsage]:
        with self._locks.get():
            return self._open().usage_by_day(token_id, first_day, last_day)

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        with self._locks.get():
            return self._open().taken(digests)

    def _open(self) -> Content:
        """Return the content; the caller holds the lock."""
        content = self._content
        if content is None:
            raise StoreError("MemoryTokenStore is closed")
        # A second exception may have ended the last rollback early, or come just before a commit.
        content.undo()
        return content

    def close(self) -> None:
        self._content = None
