"""Tokens in the memory of one process: for tests, demonstrations, and hosts that make their tokens at start."""

from __future__ import annotations

import dataclasses
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from ..errors import StoreError
from ..operations import Operation
from ..tokens import Token, TokenRecord
from .base import QuotaStore
from .transaction import Transaction, id_of

_Result = TypeVar("_Result")


class MemoryTokenStore(QuotaStore):
    """Keeps tokens in memory; they are gone with the process, and each process has its own.

    Even here only digests of keys are kept, so a dump of the memory shows no key that was not just in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._content: _Content | None = _Content()

    def __repr__(self) -> str:
        return "MemoryTokenStore()"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        with self._lock:
            content = self._open()
            try:
                result = work(content)
            except BaseException:
                content.undo()
                raise
            content.commit()
            return result

    def _get(self, digest: bytes) -> Token | None:
        with self._lock:
            return self._open().load_by_digest(digest)

    def _find(self, token_id: int) -> Token | None:
        with self._lock:
            return self._open().load(token_id)

    def _page(self, after: int, size: int) -> Sequence[tuple[Token, bytes]]:
        with self._lock:
            return self._open().page(after, size)

    def _history(self, token_id: int, before: int, size: int) -> Sequence[Operation]:
        with self._lock:
            return self._open().history(token_id, before, size)

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        with self._lock:
            return self._open().open_reservations(after, size)

    def _model_usage(self, first_id: int, last_id: int) -> Sequence[tuple[int, str, int]]:
        with self._lock:
            return self._open().model_usage(first_id, last_id)

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        with self._lock:
            return self._open().taken(digests)

    def _open(self) -> _Content:
        """The content; the caller holds the lock."""
        if self._content is None:
            raise StoreError("MemoryTokenStore is closed")
        return self._content

    def close(self) -> None:
        self._content = None


class _Content:
    """What a memory store holds, and a transaction on it: each change leaves word of how to undo it."""

    def __init__(self) -> None:
        self._tokens: dict[int, Token] = {}
        self._ids: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._usage: dict[int, dict[str, int]] = {}
        self._retired: dict[bytes, bool] = {}
        self._operations: dict[str, Operation] = {}  # in the order of their numbers
        self._of_token: dict[int, list[str]] = {}  # their ids, in the same order
        self._holding: dict[int, dict[str, bool]] = {}  # the ids of open reservations that hold units
        self._last_id = 0
        self._last_number = 0
        self._undo: list[Callable[[], object]] = []

    def commit(self) -> None:
        self._undo.clear()

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def page(self, after: int, size: int) -> list[tuple[Token, bytes]]:
        there = (i for i in range(after + 1, self._last_id + 1) if i in self._tokens)
        return [(self._tokens[i], self._digests[i]) for i in islice(there, size)]

    def history(self, token_id: int, before: int, size: int) -> list[Operation]:
        ids = self._of_token.get(token_id, [])
        end = bisect_left(ids, before, key=lambda operation_id: self._operations[operation_id].number)
        return [self._operations[operation_id] for operation_id in reversed(ids[max(end - size, 0) : end])]

    def open_reservations(self, after: int, size: int) -> list[Operation]:
        operations = (self._operations[i] for holding in self._holding.values() for i in holding)
        later = (operation for operation in operations if operation.number > after)
        return sorted(later, key=lambda operation: operation.number)[:size]

    def model_usage(self, first_id: int, last_id: int) -> list[tuple[int, str, int]]:
        return [(i, *used) for i in range(first_id, last_id + 1) for used in self._usage.get(i, {}).items()]

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        return {digest for digest in digests if digest in self._ids or digest in self._retired}

    # --- Transaction

    def load(self, token_id: int) -> Token | None:
        return self._tokens.get(token_id)

    def load_by_digest(self, digest: bytes) -> Token | None:
        return self._tokens.get(self._ids.get(digest, 0))

    def save(self, token: Token) -> None:
        self._put(self._tokens, id_of(token), token)

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        return [self._insert(record.token, record.digest) for record in records]

    def _insert(self, token: Token, digest: bytes) -> int | None:
        if digest in self._ids or digest in self._retired:
            return None
        self._last_id += 1
        self._put(self._tokens, self._last_id, dataclasses.replace(token, id=self._last_id))
        self._put(self._digests, self._last_id, digest)
        self._put(self._ids, digest, self._last_id)
        return self._last_id

    def rekey(self, token: Token, digest: bytes) -> None:
        self._retire(id_of(token))
        self._put(self._digests, id_of(token), digest)
        self._put(self._ids, digest, id_of(token))
        self.save(token)

    def delete(self, token_id: int) -> None:
        self._retire(token_id)
        for mapping in (self._tokens, self._digests, self._usage):
            self._remove(mapping, token_id)

    def operation(self, operation_id: str) -> Operation | None:
        return self._operations.get(operation_id)

    def insert_operation(self, operation: Operation) -> None:
        self._last_number += 1
        ids = self._of_token.setdefault(operation.token_id, [])
        ids.append(operation.id)
        self._undo.append(ids.pop)
        self.save_operation(dataclasses.replace(operation, number=self._last_number))

    def save_operation(self, operation: Operation) -> None:
        self._put(self._operations, operation.id, operation)
        holding = self._holding.setdefault(operation.token_id, {})
        if operation.is_open and operation.held:
            self._put(holding, operation.id, True)
        else:
            self._remove(holding, operation.id)

    def lapsed(self, token_id: int, now: float) -> Sequence[Operation]:
        operations = [self._operations[operation_id] for operation_id in self._holding.get(token_id, {})]
        return [operation for operation in operations if operation.has_lapsed(now)]

    def lapsed_before(self, before: float, size: int) -> Sequence[Operation]:
        operations = (self._operations[i] for holding in self._holding.values() for i in holding)
        return list(islice((operation for operation in operations if operation.has_lapsed(before)), size))

    def model_used(self, token_id: int, model: str) -> int:
        return self._usage.get(token_id, {}).get(model, 0)

    def add_model_used(self, token_id: int, model: str, units: int) -> None:
        used = self.model_used(token_id, model)
        self._put(self._usage.setdefault(token_id, {}), model, used + units)

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        def is_finished(operation: Operation) -> bool:
            if operation.is_open:
                return not operation.held and operation.has_lapsed(lapsed_before)
            return operation.changed_at < before

        finished = list(islice(filter(is_finished, self._operations.values()), size))
        for operation in finished:
            self._remove(self._operations, operation.id)
        for token_id in {operation.token_id for operation in finished}:
            left = [i for i in self._of_token[token_id] if i in self._operations]
            self._put(self._of_token, token_id, left)
        return len(finished)

    def _retire(self, token_id: int) -> None:
        digest = self._digests[token_id]
        self._put(self._retired, digest, True)
        self._remove(self._ids, digest)

    def _put(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        if key in mapping:
            old = mapping[key]
            self._undo.append(lambda: mapping.__setitem__(key, old))
        else:
            self._undo.append(lambda: mapping.pop(key))
        mapping[key] = value

    def _remove(self, mapping: dict[Any, Any], key: Any) -> None:
        if key in mapping:
            old = mapping.pop(key)
            self._undo.append(lambda: mapping.__setitem__(key, old))
