"""What a :class:`~usage_middleware.SQLAlchemyTokenStore` does inside of one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Executable

from ...accounts import Account, Changes, Lookup
from ...operations import Operation
from ...tokens import TokenRecord, id_of
from ...usage import DayUsage
from ..rows import (
    DAY_COLUMNS,
    changed_operation_values,
    changed_values,
    operation_of,
    operation_values,
    token_of,
    token_values,
)
from . import sql_statements as sql
from .batches import Request, Rows
from .session import Session
from .sql_schema import MYSQL

# PostgreSQL takes up to 65,535 parameters, and one statement has each digest twice.
MOST_DIGESTS: Final = 5000


class SQLTransaction:
    """The statements of one open transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._execute = session.execute
        self._dialect = 0 if session.dialect in MYSQL else 1

    def load(self, lookup: Lookup) -> Account | None:
        loads, place = _place(lookup)
        requests: list[Request] = [(loads.lock, place)]
        requests.append((loads.lapsed, {**place, "now": lookup.now, "size": lookup.most_lapsed}))
        if lookup.operation_id is not None:
            requests.append((sql.OPERATION, place))
        if lookup.idempotency_key is not None:
            requests.append((loads.made, {**place, "idempotency_key": lookup.idempotency_key}))
        if lookup.model is not None:
            requests.append((loads.model_used, {**place, "model": lookup.model}))
        # Each statement sees what was committed when it began: all but the first are executed behind the row's lock.
        lock, lapsed, *others = self._session.read_together(requests)
        rows = lock()
        if not rows:
            return None
        token = token_of(rows[0])
        operation = made = None
        if lookup.operation_id is not None:
            operation = _first(others.pop(0)())
            if operation is None:  # pruned before the token was locked
                return None
        if lookup.idempotency_key is not None:
            made = _first(others.pop(0)())
        model_used = 0
        if lookup.model is not None and token.model_limits_enabled and (used := others[0]()):
            model_used = used[0][0]
        return Account(
            token=token,
            operation=operation,
            made=made,
            lapsed=[operation_of(row) for row in lapsed()] if token.held else (),
            model=lookup.model,
            model_used=model_used,
        )

    def save(self, changes: Changes) -> None:
        token_id = id_of(changes.token)
        requests: list[Request] = []
        values = changed_values(changes.before, changes.token)
        if values:
            requests.append((sql.UPDATE_TOKEN, {"of_token": token_id, **values}))
        if changes.is_renewed:
            requests.append((sql.OF_RENEWED, {"of_token": token_id}))
        for before, after in changes.steps:
            if before is None:
                requests.append((sql.INSERT_OPERATION, {**operation_values(after), "lapses_at": _lapses_at(after)}))
            elif values := changed_operation_values(before, after):
                place = {"of_operation": after.id, "lapses_at": _lapses_at(after)}
                requests.append((sql.UPDATE_OPERATION, {**place, **values}))
        requests += self._usage([(token_id, changes.model_usage(), changes.days())])
        self._session.write(requests)

    def _usage(self, usages: Iterable[tuple[int, Mapping[str, int], Iterable[DayUsage]]]) -> Iterator[Request]:
        add_model_usage, add_day = sql.ADD_MODEL_USAGE[self._dialect], sql.ADD_DAY[self._dialect]
        for token_id, model_used, used_by_day in usages:
            for model, units in model_used.items():
                yield add_model_usage, {"token_id": token_id, "model": model, "used": units}
            for one in used_by_day:
                yield add_day, {"token_id": token_id, **{name: getattr(one, name) for name in DAY_COLUMNS}}

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        ids: list[int | None] = []
        for start in range(0, len(records), MOST_DIGESTS):
            ids += self._insert(records[start : start + MOST_DIGESTS])
        return ids

    def _insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        wanted: dict[bytes, TokenRecord] = {}
        for record in records:
            wanted.setdefault(record.digest, record)
        taken = {bytes(digest) for (digest,) in self._execute(sql.TAKEN, {"digests": list(wanted)})}
        new = {digest: record for digest, record in wanted.items() if digest not in taken}
        if not new:
            return [None] * len(records)
        self._execute(sql.INSERT_TOKEN, [{"digest": d, **token_values(record.token)} for d, record in new.items()])
        digests = {"digests": list(new)}
        self._execute(sql.DELETE_RETIRED, digests)
        ids = {bytes(digest): token_id for digest, token_id in self._execute(sql.IDS, digests)}
        usage: dict[Executable, list[Any]] = {}
        for statement, parameters in self._usage(
            (ids[d], record.model_usage, record.days) for d, record in new.items() if d in ids
        ):
            usage.setdefault(statement, []).append(parameters)
        for statement, rows in usage.items():
            self._execute(statement, rows)
        return [ids.pop(record.digest, None) for record in records]

    def rekey(self, token_id: int, digest: bytes) -> None:
        self._execute(sql.RETIRE, {"token_id": token_id})
        self._execute(sql.UPDATE_TOKEN, {"of_token": token_id, "digest": digest})

    def delete(self, token_id: int) -> None:
        self._execute(sql.OF_DELETED, {"of_token": token_id})
        for statement in (sql.RETIRE, *sql.DELETES):
            self._execute(statement, {"token_id": token_id})

    def model_held(self, token_id: int, model: str) -> int:
        return int(self._execute(sql.MODEL_HELD, {"token_id": token_id, "model": model}).scalar() or 0)

    def lapsed_tokens(self, before: float, size: int) -> Sequence[int]:
        return list(self._execute(sql.LAPSED_TOKENS, {"before": before, "size": size}).scalars())

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        times = {"before": before, "lapsed_before": lapsed_before}
        rows = self._execute(sql.FINISHED, {**times, "size": size}).all()
        if not rows:
            return 0
        # Nothing else writes these operations any more. Those that were changed before this are left.
        self._execute(sql.LOCK_ALL, {"ids": list({token_id for _, token_id in rows})}).all()
        return int(self._execute(sql.FORGET, {**times, "numbers": [number for number, _ in rows]}).rowcount)


def _lapses_at(operation: Operation) -> float | None:
    return operation.expires_at if operation.is_holding else None


def _place(lookup: Lookup) -> tuple[sql.Loads, dict[str, Any]]:
    if lookup.operation_id is not None:
        return sql.LOADS_BY_OPERATION, {"operation_id": lookup.operation_id}
    if lookup.token_id is not None:
        return sql.LOADS_BY_ID, {"token_id": lookup.token_id}
    return sql.LOADS_BY_DIGEST, {"digest": lookup.digest}


def _first(rows: Rows) -> Operation | None:
    return operation_of(rows[0]) if rows else None
