"""The statements of a :class:`~usage_middleware.SQLAlchemyTokenStore`, and its transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    Insert,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql

from ...accounts import Account, Changes, Lookup
from ...operations import Operation
from ...tokens import Token, TokenRecord, id_of
from ...usage import DayUsage
from ..rows import (
    DAY_COLUMNS,
    OPERATION_COLUMNS,
    TOKEN_COLUMNS,
    changed_operation_values,
    changed_values,
    operation_of,
    operation_values,
    token_of,
    token_values,
)
from .session import Session
from .sql_schema import MYSQL, model_usage, operations, retired_keys, tokens, usage_by_day

_token_columns: Final = [tokens.c.id, *(tokens.c[name] for name in TOKEN_COLUMNS)]
_operation_columns: Final = [operations.c.number, *(operations.c[name] for name in OPERATION_COLUMNS)]
_operations: Final = select(*_operation_columns)
_of_token: Final = operations.c.token_id == bindparam("token_id")

# --- Queries outside of a transaction.

TOKEN_BY_DIGEST: Final = select(*_token_columns).where(tokens.c.digest == bindparam("digest"))
TOKEN_BY_ID: Final = select(*_token_columns).where(tokens.c.id == bindparam("token_id"))
COUNT: Final = select(func.count()).select_from(tokens)
PAGE: Final = (
    select(*_token_columns, tokens.c.digest)
    .where(tokens.c.id > bindparam("after"))
    .order_by(tokens.c.id)
    .limit(bindparam("size"))
)
# One statement sees one snapshot, and in each snapshot a digest that was ever assigned is in one of the two tables.
TAKEN: Final = union_all(
    *(select(t.c.digest).where(t.c.digest.in_(bindparam("digests", expanding=True))) for t in (tokens, retired_keys))
)
OPERATION: Final = _operations.where(operations.c.id == bindparam("operation_id"))
FIND_OPERATION: Final = _operations.where(
    operations.c.token_id == select(tokens.c.id).where(tokens.c.digest == bindparam("digest")).scalar_subquery(),
    operations.c.idempotency_key == bindparam("idempotency_key"),
)
HISTORY: Final = (
    _operations.where(
        _of_token,
        operations.c.created_at >= bindparam("since"),
        operations.c.created_at < bindparam("until"),
        operations.c.number < bindparam("before"),
    )
    .order_by(operations.c.number.desc())
    .limit(bindparam("size"))
)
# The index of a token's operations has all columns of the conditions, so only the operations of the page are read.
_page_of_log: Final = (
    select(operations.c.number)
    .where(
        _of_token,
        operations.c.kind.in_(bindparam("kinds", expanding=True)),
        operations.c.created_at >= bindparam("since"),
        operations.c.created_at < bindparam("until"),
    )
    .order_by(operations.c.number.desc())
    .limit(bindparam("size"))
    .offset(bindparam("skipped"))
    .subquery()
)
LOG: Final = _operations.join(_page_of_log, _page_of_log.c.number == operations.c.number).order_by(
    operations.c.number.desc()
)
OPEN_RESERVATIONS: Final = (
    _operations.where(operations.c.lapses_at.is_not(None), operations.c.number > bindparam("after"))
    .order_by(operations.c.number)
    .limit(bindparam("size"))
)
_is_settled: Final = and_(operations.c.final_amount.is_not(None), operations.c.changed_at < bindparam("before"))
_has_lapsed: Final = and_(operations.c.final_amount.is_(None), operations.c.expires_at <= bindparam("lapsed_before"))
COUNT_FINISHED: Final = select(func.count()).select_from(operations).where(or_(_is_settled, _has_lapsed))
MODEL_USAGE: Final = select(model_usage).where(model_usage.c.token_id.between(bindparam("first"), bindparam("last")))
COUNT_REQUESTS: Final = select(func.coalesce(func.sum(usage_by_day.c.requests), 0)).where(
    usage_by_day.c.token_id == bindparam("token_id")
)
USAGE_BY_DAY: Final = (
    select(usage_by_day.c.token_id, *(usage_by_day.c[name] for name in DAY_COLUMNS))
    .where(
        usage_by_day.c.token_id.between(bindparam("first"), bindparam("last")),
        usage_by_day.c.day.between(bindparam("first_day"), bindparam("last_day")),
    )
    .order_by(usage_by_day.c.token_id, usage_by_day.c.day, usage_by_day.c.model)
)

# --- Statements of a transaction.

# The transaction that holds the lock on this row has the token (Transaction.load).
_lock_by_digest: Final = TOKEN_BY_DIGEST.with_for_update()
_lock_by_id: Final = TOKEN_BY_ID.with_for_update()
_lock_by_operation: Final = (
    select(*_token_columns)
    .where(
        tokens.c.id
        == select(operations.c.token_id).where(operations.c.id == bindparam("operation_id")).scalar_subquery()
    )
    .with_for_update()
)
_lock_all: Final = (
    select(tokens.c.id).where(tokens.c.id.in_(bindparam("ids", expanding=True))).order_by(tokens.c.id).with_for_update()
)
_made: Final = _operations.where(_of_token, operations.c.idempotency_key == bindparam("idempotency_key"))
_lapsed: Final = (
    _operations.where(_of_token, operations.c.lapses_at <= bindparam("now"))
    .order_by(operations.c.lapses_at)
    .limit(bindparam("size"))
)
_model_used: Final = select(model_usage.c.used).where(
    model_usage.c.token_id == bindparam("token_id"), model_usage.c.model == bindparam("model")
)
_model_held: Final = select(func.coalesce(func.sum(operations.c.held), 0)).where(
    _of_token, operations.c.lapses_at.is_not(None), operations.c.model == bindparam("model")
)
_lapsed_tokens: Final = (
    select(operations.c.token_id)
    .where(operations.c.lapses_at <= bindparam("before"))
    .distinct()
    .limit(bindparam("size"))
)
_update_token: Final = update(tokens).where(tokens.c.id == bindparam("of_token"))
_insert_operation: Final = insert(operations).inline()
_update_operation: Final = update(operations).where(operations.c.id == bindparam("of_operation"))
_of_renewed: Final = (
    update(operations)
    .where(operations.c.token_id == bindparam("of_token"), operations.c.lapses_at.is_not(None))
    .values(unlimited=False)
)
_of_deleted: Final = (
    update(operations)
    .where(operations.c.token_id == bindparam("of_token"), operations.c.lapses_at.is_not(None))
    .values(held=0, lapses_at=None)
)
_insert_token: Final = insert(tokens)
# Another process may have added one of them and deleted it again since the query for those that are taken.
_delete_retired: Final = delete(tokens).where(
    tokens.c.digest.in_(bindparam("digests", expanding=True)), exists().where(retired_keys.c.digest == tokens.c.digest)
)
_ids: Final = select(tokens.c.digest, tokens.c.id).where(tokens.c.digest.in_(bindparam("digests", expanding=True)))
_retire: Final = insert(retired_keys).from_select(
    ["digest"], select(tokens.c.digest).where(tokens.c.id == bindparam("token_id"))
)
_deletes: Final = (
    delete(model_usage).where(model_usage.c.token_id == bindparam("token_id")),
    delete(usage_by_day).where(usage_by_day.c.token_id == bindparam("token_id")),
    delete(tokens).where(tokens.c.id == bindparam("token_id")),
)
_is_finished: Final = or_(_is_settled, and_(_has_lapsed, operations.c.held == 0))
_finished: Final = (
    select(operations.c.number, operations.c.token_id)
    .where(_is_finished)
    .order_by(operations.c.number)
    .limit(bindparam("size"))
)
_forget: Final = delete(operations).where(operations.c.number.in_(bindparam("numbers", expanding=True)), _is_finished)


def _adding(table: Table, figures: Sequence[str]) -> tuple[Insert, Insert]:
    """Return the statement that adds figures to those of a row, or makes the row; for MySQL, and for PostgreSQL."""
    on_mysql, on_postgresql = mysql.insert(table), postgresql.insert(table)
    return (
        on_mysql.on_duplicate_key_update({name: table.c[name] + on_mysql.inserted[name] for name in figures}),
        on_postgresql.on_conflict_do_update(
            index_elements=list(table.primary_key.columns),
            set_={name: table.c[name] + on_postgresql.excluded[name] for name in figures},
        ),
    )


_add_model_usage: Final = _adding(model_usage, ("used",))
_add_day: Final = _adding(usage_by_day, DAY_COLUMNS[2:])  # after the day and the model


class SQLTransaction:
    """The statements of one open transaction."""

    def __init__(self, session: Session) -> None:
        self._execute = session.execute
        self._dialect = 0 if session.dialect in MYSQL else 1

    def load(self, lookup: Lookup) -> Account | None:
        if lookup.operation_id is not None:
            row = self._execute(_lock_by_operation, {"operation_id": lookup.operation_id}).first()
        elif lookup.token_id is not None:
            row = self._execute(_lock_by_id, {"token_id": lookup.token_id}).first()
        else:
            row = self._execute(_lock_by_digest, {"digest": lookup.digest}).first()
        if row is None:
            return None
        token = token_of(row)
        operation = made = None
        if lookup.operation_id is not None:
            operation = self._operation(OPERATION, operation_id=lookup.operation_id)
            if operation is None:  # pruned before the token was locked
                return None
        if lookup.idempotency_key is not None:
            made = self._operation(_made, token_id=token.id, idempotency_key=lookup.idempotency_key)
        return Account(
            token=token,
            operation=operation,
            made=made,
            lapsed=self._lapsed(token, lookup),
            model=lookup.model,
            model_used=self._model_used(token, lookup.model),
        )

    def _operation(self, statement: Any, **parameters: Any) -> Operation | None:
        row = self._execute(statement, parameters).first()
        return None if row is None else operation_of(row)

    def _lapsed(self, token: Token, lookup: Lookup) -> Sequence[Operation]:
        if not token.held:
            return ()
        parameters = {"token_id": token.id, "now": lookup.now, "size": lookup.most_lapsed}
        return [operation_of(row) for row in self._execute(_lapsed, parameters)]

    def _model_used(self, token: Token, model: str | None) -> int:
        if model is None or not token.model_limits_enabled:
            return 0
        return self._execute(_model_used, {"token_id": token.id, "model": model}).scalar() or 0

    def save(self, changes: Changes) -> None:
        token_id = id_of(changes.token)
        values = changed_values(changes.before, changes.token)
        if values:
            self._execute(_update_token, {"of_token": token_id, **values})
        if changes.is_renewed:
            self._execute(_of_renewed, {"of_token": token_id})
        for before, after in changes.steps:
            if before is None:
                self._execute(_insert_operation, {**operation_values(after), "lapses_at": _lapses_at(after)})
            elif values := changed_operation_values(before, after):
                self._execute(_update_operation, {"of_operation": after.id, **values, "lapses_at": _lapses_at(after)})
        self._add_usage([(token_id, changes.model_usage(), changes.days())])

    def _add_usage(self, usages: Iterable[tuple[int, Mapping[str, int], Iterable[DayUsage]]]) -> None:
        models, days = [], []
        for token_id, model_used, used_by_day in usages:
            models += [{"token_id": token_id, "model": model, "used": units} for model, units in model_used.items()]
            days += [
                {"token_id": token_id, **{name: getattr(one, name) for name in DAY_COLUMNS}} for one in used_by_day
            ]
        if models:
            self._execute(_add_model_usage[self._dialect], models)
        if days:
            self._execute(_add_day[self._dialect], days)

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        wanted: dict[bytes, TokenRecord] = {}
        for record in records:
            wanted.setdefault(record.digest, record)
        taken = {bytes(digest) for (digest,) in self._execute(TAKEN, {"digests": list(wanted)})}
        new = {digest: record for digest, record in wanted.items() if digest not in taken}
        if not new:
            return [None] * len(records)
        self._execute(_insert_token, [{"digest": d, **token_values(record.token)} for d, record in new.items()])
        digests = {"digests": list(new)}
        self._execute(_delete_retired, digests)
        ids = {bytes(digest): token_id for digest, token_id in self._execute(_ids, digests)}
        self._add_usage((ids[d], record.model_usage, record.days) for d, record in new.items() if d in ids)
        return [ids.pop(record.digest, None) for record in records]

    def rekey(self, token_id: int, digest: bytes) -> None:
        self._execute(_retire, {"token_id": token_id})
        self._execute(_update_token, {"of_token": token_id, "digest": digest})

    def delete(self, token_id: int) -> None:
        self._execute(_of_deleted, {"of_token": token_id})
        for statement in (_retire, *_deletes):
            self._execute(statement, {"token_id": token_id})

    def model_held(self, token_id: int, model: str) -> int:
        return int(self._execute(_model_held, {"token_id": token_id, "model": model}).scalar() or 0)

    def lapsed_tokens(self, before: float, size: int) -> Sequence[int]:
        return list(self._execute(_lapsed_tokens, {"before": before, "size": size}).scalars())

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        times = {"before": before, "lapsed_before": lapsed_before}
        rows = self._execute(_finished, {**times, "size": size}).all()
        if not rows:
            return 0
        # Nothing else writes these operations any more. Those that were changed before this are left.
        self._execute(_lock_all, {"ids": list({token_id for _, token_id in rows})}).all()
        return int(self._execute(_forget, {**times, "numbers": [number for number, _ in rows]}).rowcount)


def _lapses_at(operation: Operation) -> float | None:
    return operation.expires_at if operation.is_holding else None
