"""What a :class:`~usage_middleware.MemoryTokenStore` holds."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from typing import Any

from ..accounts import Account, Changes, Lookup
from ..errors import StoreError
from ..operations import Operation
from ..tokens import Token, TokenRecord, id_of
from ..usage import DayUsage, add_up


class Content:
    """What a memory store holds, and a transaction on it.

    Each change appends its inverse to ``_undo``; rolling back runs them in reverse.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, Token] = {}
        self._ids: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._retired: dict[bytes, bool] = {}
        self._models: dict[int, dict[str, int]] = {}
        self._days: dict[int, dict[tuple[date, str], DayUsage]] = {}
        self._operations: dict[str, Operation] = {}  # in the order of their numbers
        self._of_token: dict[int, list[str]] = {}  # their ids, in the same order
        self._of_key: dict[tuple[int, str], str] = {}  # their ids, by token and idempotency key
        self._holding: dict[int, dict[str, bool]] = {}  # the ids of open reservations that hold units
        self._last_id = 0
        self._last_number = 0
        self._undo: list[Callable[[], object]] = []

    def commit(self) -> None:
        self._undo.clear()

    def undo(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    # --- What is read.

    def token(self, token_id: int) -> Token | None:
        return self._tokens.get(token_id)

    def token_of_digest(self, digest: bytes) -> Token | None:
        return self._tokens.get(self._ids.get(digest, 0))

    def page(self, after: int, size: int) -> list[Token]:
        there = (i for i in range(after + 1, self._last_id + 1) if i in self._tokens)
        return [self._tokens[i] for i in islice(there, size)]

    def records(self, after: int, size: int) -> list[TokenRecord]:
        return [self._record(token, id_of(token)) for token in self.page(after, size)]

    def _record(self, token: Token, token_id: int) -> TokenRecord:
        return TokenRecord(
            token=token,
            digest=self._digests[token_id],
            model_usage=self.model_usage(token_id),
            days=tuple(self.usage_by_day(token_id, date.min, date.max)),
        )

    def operation(self, operation_id: str) -> Operation | None:
        return self._operations.get(operation_id)

    def operation_of_key(self, digest: bytes, idempotency_key: str) -> Operation | None:
        return self._made(self._ids.get(digest, 0), idempotency_key)

    def _made(self, token_id: int, idempotency_key: str | None) -> Operation | None:
        if idempotency_key is None:
            return None
        return self._operations.get(self._of_key.get((token_id, idempotency_key), ""))

    def history(self, token_id: int, since: float, until: float, before: int, size: int) -> list[Operation]:
        ids = self._of_token.get(token_id, [])
        end = bisect_left(ids, before, key=lambda operation_id: self._operations[operation_id].number)
        operations = (self._operations[operation_id] for operation_id in reversed(ids[:end]))
        return list(islice((one for one in operations if since <= one.created_at < until), size))

    def open_reservations(self, after: int, size: int) -> list[Operation]:
        later = (operation for operation in self._all_holding() if operation.number > after)
        return sorted(later, key=lambda operation: operation.number)[:size]

    def count_finished(self, before: float, lapsed_before: float) -> int:
        released = (
            dataclasses.replace(one, held=0) if one.is_holding and one.has_lapsed(lapsed_before) else one
            for one in self._operations.values()
        )
        return sum(1 for operation in released if operation.is_finished(before, lapsed_before))

    def model_usage(self, token_id: int) -> dict[str, int]:
        return dict(self._models.get(token_id, {}))

    def usage_by_day(self, token_id: int, first_day: date, last_day: date) -> list[DayUsage]:
        days = sorted(self._days.get(token_id, {}).items())
        return [usage for (day, _), usage in days if first_day <= day <= last_day]

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        return {digest for digest in digests if digest in self._ids or digest in self._retired}

    def _all_holding(self) -> Iterator[Operation]:
        return (self._operations[i] for holding in self._holding.values() for i in holding)

    # --- Transaction

    def load(self, lookup: Lookup) -> Account | None:
        operation = None
        if lookup.operation_id is not None:
            operation = self._operations.get(lookup.operation_id)
            token = None if operation is None else self._tokens.get(operation.token_id)
        elif lookup.token_id is not None:
            token = self._tokens.get(lookup.token_id)
        else:
            token = self.token_of_digest(lookup.digest or b"")
        if token is None:
            return None
        holding = (self._operations[i] for i in self._holding.get(id_of(token), {}))
        return Account(
            token=token,
            operation=operation,
            made=self._made(id_of(token), lookup.idempotency_key),
            lapsed=list(islice((one for one in holding if one.has_lapsed(lookup.now)), lookup.most_lapsed)),
            model=lookup.model,
            model_used=self._models.get(id_of(token), {}).get(lookup.model or "", 0),
        )

    def save(self, changes: Changes) -> None:
        token_id = id_of(changes.token)
        self._put(self._tokens, token_id, changes.token)
        if changes.is_renewed:
            for operation_id in list(self._holding.get(token_id, {})):
                self._save_operation(dataclasses.replace(self._operations[operation_id], unlimited=False))
        for before, after in changes.steps:
            if before is None:
                self._insert_operation(after)
            else:
                self._save_operation(after)
        self._add_model_usage(token_id, changes.model_usage())
        self._add_days(token_id, changes.days())

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        return [self._insert(record) for record in records]

    def _insert(self, record: TokenRecord) -> int | None:
        if record.digest in self._ids or record.digest in self._retired:
            return None
        self._last_id += 1
        self._put(self._tokens, self._last_id, dataclasses.replace(record.token, id=self._last_id))
        self._put(self._digests, self._last_id, record.digest)
        self._put(self._ids, record.digest, self._last_id)
        self._add_model_usage(self._last_id, record.model_usage)
        self._add_days(self._last_id, record.days)
        return self._last_id

    def rekey(self, token_id: int, digest: bytes) -> None:
        self._retire(token_id)
        self._put(self._digests, token_id, digest)
        self._put(self._ids, digest, token_id)

    def delete(self, token_id: int) -> None:
        self._retire(token_id)
        for operation_id in list(self._holding.get(token_id, {})):
            self._save_operation(dataclasses.replace(self._operations[operation_id], held=0))
        for mapping in (self._tokens, self._digests, self._models, self._days):
            self._remove(mapping, token_id)

    def model_held(self, token_id: int, model: str) -> int:
        holding = (self._operations[i] for i in self._holding.get(token_id, {}))
        return sum(operation.held for operation in holding if operation.model == model)

    def lapsed_tokens(self, before: float, size: int) -> Sequence[int]:
        lapsed = {operation.token_id for operation in self._all_holding() if operation.has_lapsed(before)}
        return sorted(lapsed)[:size]

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        finished = list(
            islice((one for one in self._operations.values() if one.is_finished(before, lapsed_before)), size)
        )
        for operation in finished:
            self._remove(self._operations, operation.id)
            if operation.idempotency_key is not None:
                self._remove(self._of_key, (operation.token_id, operation.idempotency_key))
        for token_id in {operation.token_id for operation in finished}:
            left = [i for i in self._of_token[token_id] if i in self._operations]
            self._put(self._of_token, token_id, left)
        return len(finished)

    def _insert_operation(self, operation: Operation) -> None:
        if operation.id in self._operations:
            raise StoreError(f"operation {operation.id} is made already")
        self._last_number += 1
        self._append(self._of_token.setdefault(operation.token_id, []), operation.id)
        if operation.idempotency_key is not None:
            self._put(self._of_key, (operation.token_id, operation.idempotency_key), operation.id)
        self._save_operation(dataclasses.replace(operation, number=self._last_number))

    def _save_operation(self, operation: Operation) -> None:
        number = operation.number or self._operations[operation.id].number
        self._put(self._operations, operation.id, dataclasses.replace(operation, number=number))
        holding = self._holding.setdefault(operation.token_id, {})
        if operation.is_holding:
            self._put(holding, operation.id, True)
        else:
            self._remove(holding, operation.id)

    def _add_model_usage(self, token_id: int, usage: Mapping[str, int]) -> None:
        models = self._models.setdefault(token_id, {})
        for model, units in usage.items():
            self._put(models, model, models.get(model, 0) + units)

    def _add_days(self, token_id: int, days: Sequence[DayUsage]) -> None:
        booked = self._days.setdefault(token_id, {})
        for usage in days:
            place = (usage.day, usage.model)
            self._put(booked, place, add_up([usage, *([booked[place]] if place in booked else ())])[0])

    def _retire(self, token_id: int) -> None:
        digest = self._digests[token_id]
        self._put(self._retired, digest, True)
        self._remove(self._ids, digest)

    # The inverse is appended first, as an exception may arrive between any two lines. So an inverse may run for a
    # change that was never made.

    def _put(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        if key in mapping:
            old = mapping[key]
            self._undo.append(lambda: mapping.__setitem__(key, old))
        else:
            self._undo.append(lambda: mapping.pop(key, None))
        mapping[key] = value

    def _remove(self, mapping: dict[Any, Any], key: Any) -> None:
        if key in mapping:
            old = mapping[key]
            self._undo.append(lambda: mapping.__setitem__(key, old))
            del mapping[key]

    def _append(self, items: list[str], item: str) -> None:
        length = len(items)
        self._undo.append(lambda: items.__delitem__(slice(length, None)))
        items.append(item)
