"""The statements of a :class:`~usage_middleware.SQLAlchemyTokenStore`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Insert,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql

from ...checks import MAX_INTEGER
from ..rows import (
    DAY_COLUMNS,
    DAY_COUNTS,
    OPERATION_COLUMNS,
    TOKEN_COLUMNS,
)
from .sql_schema import model_usage, operations, retired_keys, tokens, usage_by_day

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


class Loads(NamedTuple):
    """What :meth:`.Transaction.load` reads of one token, wherever its id is known from."""

    #: The transaction that holds the lock on this row has the token.
    lock: Select[Any]
    made: Select[Any]
    lapsed: Select[Any]
    model_used: Select[Any]


def _loads(token_id: Any) -> Loads:
    of_token = operations.c.token_id == token_id
    return Loads(
        lock=select(*_token_columns).where(tokens.c.id == token_id).with_for_update(),
        made=_operations.where(of_token, operations.c.idempotency_key == bindparam("idempotency_key")),
        lapsed=_operations.where(of_token, operations.c.lapses_at <= bindparam("now"))
        .order_by(operations.c.lapses_at)
        .limit(bindparam("size")),
        model_used=select(model_usage.c.used).where(
            model_usage.c.token_id == token_id, model_usage.c.model == bindparam("model")
        ),
    )


_id_of_digest: Final = select(tokens.c.id).where(tokens.c.digest == bindparam("digest")).scalar_subquery()
_id_of_operation: Final = (
    select(operations.c.token_id).where(operations.c.id == bindparam("operation_id")).scalar_subquery()
)
# The key may be rotated while its row is waited for, so the row itself is looked for by its digest.
LOADS_BY_DIGEST: Final = _loads(_id_of_digest)._replace(lock=TOKEN_BY_DIGEST.with_for_update())
LOADS_BY_ID: Final = _loads(bindparam("token_id"))
LOADS_BY_OPERATION: Final = _loads(_id_of_operation)
LOCK_ALL: Final = (
    select(tokens.c.id).where(tokens.c.id.in_(bindparam("ids", expanding=True))).order_by(tokens.c.id).with_for_update()
)
MODEL_HELD: Final = select(func.coalesce(func.sum(operations.c.held), 0)).where(
    _of_token, operations.c.lapses_at.is_not(None), operations.c.model == bindparam("model")
)
LAPSED_TOKENS: Final = (
    select(operations.c.token_id)
    .where(operations.c.lapses_at <= bindparam("before"))
    .distinct()
    .limit(bindparam("size"))
)
UPDATE_TOKEN: Final = update(tokens).where(tokens.c.id == bindparam("of_token"))
INSERT_OPERATION: Final = insert(operations).inline()
UPDATE_OPERATION: Final = update(operations).where(operations.c.id == bindparam("of_operation"))
OF_RENEWED: Final = (
    update(operations)
    .where(operations.c.token_id == bindparam("of_token"), operations.c.lapses_at.is_not(None))
    .values(unlimited=False)
)
OF_DELETED: Final = (
    update(operations)
    .where(operations.c.token_id == bindparam("of_token"), operations.c.lapses_at.is_not(None))
    .values(held=0, lapses_at=None)
)
INSERT_TOKEN: Final = insert(tokens)
# Another process may have added one of them and deleted it again since the query for those that are taken.
DELETE_RETIRED: Final = delete(tokens).where(
    tokens.c.digest.in_(bindparam("digests", expanding=True)), exists().where(retired_keys.c.digest == tokens.c.digest)
)
IDS: Final = select(tokens.c.digest, tokens.c.id).where(tokens.c.digest.in_(bindparam("digests", expanding=True)))
RETIRE: Final = insert(retired_keys).from_select(
    ["digest"], select(tokens.c.digest).where(tokens.c.id == bindparam("token_id"))
)
DELETES: Final = (
    delete(model_usage).where(model_usage.c.token_id == bindparam("token_id")),
    delete(usage_by_day).where(usage_by_day.c.token_id == bindparam("token_id")),
    delete(tokens).where(tokens.c.id == bindparam("token_id")),
)
_is_finished: Final = or_(_is_settled, and_(_has_lapsed, operations.c.held == 0))
FINISHED: Final = (
    select(operations.c.number, operations.c.token_id)
    .where(_is_finished)
    .order_by(operations.c.number)
    .limit(bindparam("size"))
)
FORGET: Final = delete(operations).where(operations.c.number.in_(bindparam("numbers", expanding=True)), _is_finished)


_most: Final = literal_column(str(MAX_INTEGER), BigInteger)


def _adding(table: Table, counts: Sequence[str] = ()) -> tuple[Insert, Insert]:
    """Return the statement that adds to the figures of a row, or makes the row; for MySQL, and for PostgreSQL.

    :param counts: figures beside ``used`` that stop at the largest integer. The servers would refuse a larger sum.
    """

    def sums(added: Any) -> dict[str, Any]:
        plain = {name: table.c[name] + added[name] for name in ("used", *counts)}
        return plain | {name: case((table.c[name] > _most - added[name], _most), else_=plain[name]) for name in counts}

    on_mysql, on_postgresql = mysql.insert(table), postgresql.insert(table)
    return (
        on_mysql.on_duplicate_key_update(sums(on_mysql.inserted)),
        on_postgresql.on_conflict_do_update(
            index_elements=list(table.primary_key.columns), set_=sums(on_postgresql.excluded)
        ),
    )


ADD_MODEL_USAGE: Final = _adding(model_usage)
ADD_DAY: Final = _adding(usage_by_day, DAY_COUNTS)
