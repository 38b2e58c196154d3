"""Tokens in a database server: PostgreSQL, MySQL, MariaDB, and what speaks their protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
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

from ...errors import StoreError
from ...operations import Operation
from ...tokens import Token, TokenRecord
from ..base import QuotaStore
from ..findings import Finding
from ..rows import OPERATION_COLUMNS, TOKEN_COLUMNS, operation_of, operation_values, token_of, token_values
from ..transaction import Transaction
from . import sql_schema
from .database import POSTGRESQL, Database
from .sql_schema import MYSQL, model_usage, operations, retired_keys, tokens

_Result = TypeVar("_Result")

_token_columns: Final = [tokens.c.id, *(tokens.c[name] for name in TOKEN_COLUMNS)]

_by_digest: Final = select(*_token_columns).where(tokens.c.digest == bindparam("digest"))
_by_id: Final = select(*_token_columns).where(tokens.c.id == bindparam("id"))
# Whoever has the row's lock has the token (Transaction.load).
_lock_by_digest: Final = _by_digest.with_for_update()
_lock_by_id: Final = _by_id.with_for_update()
_count: Final = select(func.count()).select_from(tokens)
_page: Final = (
    select(*_token_columns, tokens.c.digest)
    .where(tokens.c.id > bindparam("after"))
    .order_by(tokens.c.id)
    .limit(bindparam("size"))
)
_insert_token: Final = insert(tokens)
_update_token: Final = update(tokens).where(tokens.c.id == bindparam("token_id"))
# One of them may have been added by another and deleted again, since the look at those that are taken.
_delete_retired: Final = delete(tokens).where(
    tokens.c.digest.in_(bindparam("digests", expanding=True)), exists().where(retired_keys.c.digest == tokens.c.digest)
)
_ids: Final = select(tokens.c.digest, tokens.c.id).where(tokens.c.digest.in_(bindparam("digests", expanding=True)))
# One statement sees one state of the database, and in each a digest that was ever given is in one of the two.
_taken: Final = union_all(
    *(select(t.c.digest).where(t.c.digest.in_(bindparam("digests", expanding=True))) for t in (tokens, retired_keys))
)
_retire: Final = insert(retired_keys).from_select(
    ["digest"], select(tokens.c.digest).where(tokens.c.id == bindparam("id"))
)
_delete_token: Final = delete(tokens).where(tokens.c.id == bindparam("id"))
_delete_model_usage: Final = delete(model_usage).where(model_usage.c.token_id == bindparam("id"))

_operation_columns: Final = [operations.c.number, *(operations.c[name] for name in OPERATION_COLUMNS)]
_operation: Final = select(*_operation_columns).where(operations.c.id == bindparam("id"))
_history: Final = (
    select(*_operation_columns)
    .where(operations.c.token_id == bindparam("token_id"), operations.c.number < bindparam("before"))
    .order_by(operations.c.number.desc())
    .limit(bindparam("size"))
)
_insert_operation: Final = insert(operations).inline()
_update_operation: Final = update(operations).where(operations.c.id == bindparam("operation_id"))
_lapsed_before: Final = (
    select(*_operation_columns).where(operations.c.lapses_at <= bindparam("before")).limit(bindparam("size"))
)
_lapsed: Final = select(*_operation_columns).where(
    operations.c.token_id == bindparam("token_id"), operations.c.lapses_at <= bindparam("now")
)
_open_reservations: Final = (
    select(*_operation_columns)
    .where(operations.c.lapses_at.is_not(None), operations.c.number > bindparam("after"))
    .order_by(operations.c.number)
    .limit(bindparam("size"))
)
_is_finished: Final = or_(
    and_(operations.c.final_amount.is_not(None), operations.c.changed_at < bindparam("before")),
    and_(
        operations.c.final_amount.is_(None),
        operations.c.held == 0,
        operations.c.expires_at <= bindparam("lapsed_before"),
    ),
)
_finished: Final = (
    select(operations.c.number, operations.c.token_id)
    .where(_is_finished)
    .order_by(operations.c.number)
    .limit(bindparam("size"))
)
_lock_all: Final = (
    select(tokens.c.id).where(tokens.c.id.in_(bindparam("ids", expanding=True))).order_by(tokens.c.id).with_for_update()
)
_forget: Final = delete(operations).where(operations.c.number.in_(bindparam("numbers", expanding=True)), _is_finished)

_model_usage: Final = select(model_usage).where(model_usage.c.token_id.between(bindparam("first"), bindparam("last")))
_of_model: Final = (model_usage.c.token_id == bindparam("of_token"), model_usage.c.model == bindparam("of_model"))
_model_used: Final = select(model_usage.c.used).where(*_of_model)
_add_model_used: Final = update(model_usage).where(*_of_model).values(used=model_usage.c.used + bindparam("units"))
_insert_model_used: Final = insert(model_usage)


class SQLAlchemyTokenStore(QuotaStore):
    """Keeps tokens in tables whose names begin with ``usage_``, made at the first use if there are none.

    :param url_or_engine: an SQLAlchemy URL such as ``"postgresql+psycopg://user:password@host/name"`` or
        ``"mysql+pymysql://…"``, or an :class:`~sqlalchemy.engine.Engine`, whose pool and options are then its owner's.
    :raises TypeError, ValueError: it is neither, or is of another database; SQLite has :class:`SQLiteTokenStore`.
    :raises ImportError: the database's driver is not installed.

    Nothing is connected before the first use. What a method returned is committed, and as durable as the server's
    settings make it (``synchronous_commit``, ``innodb_flush_log_at_trx_commit``).
    """

    def __init__(self, url_or_engine: str | URL | Engine) -> None:
        self._database = Database(url_or_engine, (*POSTGRESQL, *MYSQL))
        self._is_prepared = False

    def __repr__(self) -> str:
        return f"SQLAlchemyTokenStore({self._database.name!r})"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        self._prepare()
        return self._database.transact(lambda connection: work(_SQLTransaction(connection)))

    def _get(self, digest: bytes) -> Token | None:
        self._prepare()
        row = self._database.look_up(_by_digest, {"digest": digest})
        return token_of(row) if row else None

    def _find(self, token_id: int) -> Token | None:
        self._prepare()
        rows = self._database.read(_by_id, {"id": token_id})
        return token_of(rows[0]) if rows else None

    def _page(self, after: int, size: int) -> Sequence[tuple[Token, bytes]]:
        self._prepare()
        rows = self._database.read(_page, {"after": after, "size": size})
        return [(token_of(row), bytes(row.digest)) for row in rows]

    def _history(self, token_id: int, before: int, size: int) -> Sequence[Operation]:
        self._prepare()
        rows = self._database.read(_history, {"token_id": token_id, "before": before, "size": size})
        return [operation_of(row) for row in rows]

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        self._prepare()
        rows = self._database.read(_open_reservations, {"after": after, "size": size})
        return [operation_of(row) for row in rows]

    def _model_usage(self, first_id: int, last_id: int) -> Sequence[tuple[int, str, int]]:
        self._prepare()
        rows = self._database.read(_model_usage, {"first": first_id, "last": last_id})
        return [(row.token_id, row.model, row.used) for row in rows]

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        self._prepare()
        return {bytes(row.digest) for row in self._database.read(_taken, {"digests": list(digests)})}

    def count(self) -> int:
        self._prepare()
        return int(self._database.read(_count)[0][0])

    def has_tables(self) -> bool:
        """Whether this store's tables are there. They are made at the first use; this makes none."""
        try:
            return self._database.transact(sql_schema.is_current)
        except sql_schema.WrongTables as error:
            raise StoreError(f"{self._database.name} {error}") from None

    def health(self) -> Iterator[Finding]:
        from . import sql_health

        self._prepare()
        return iter(self._database.transact(lambda connection: list(sql_health.findings(connection))))

    def close(self) -> None:
        """Closes the connections, but for those of an engine that was handed in."""
        self._database.close()

    def _prepare(self) -> None:
        """Sees that the tables are there, once in a process."""
        if not self._is_prepared:
            if not self.has_tables():
                try:
                    self._database.transact(sql_schema.create)
                except sql_schema.WrongTables as error:
                    raise StoreError(f"{self._database.name} {error}") from None
            self._is_prepared = True


class _SQLTransaction:
    """The statements of one open transaction."""

    def __init__(self, connection: Connection) -> None:
        self._execute = connection.execute

    def load(self, token_id: int) -> Token | None:
        row = self._execute(_lock_by_id, {"id": token_id}).first()
        return token_of(row) if row else None

    def load_by_digest(self, digest: bytes) -> Token | None:
        row = self._execute(_lock_by_digest, {"digest": digest}).first()
        return token_of(row) if row else None

    def save(self, token: Token) -> None:
        self._execute(_update_token, {"token_id": token.id, **_values(token)})

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        wanted: dict[bytes, Token] = {}
        for record in records:
            wanted.setdefault(record.digest, record.token)
        taken = {bytes(digest) for (digest,) in self._execute(_taken, {"digests": list(wanted)})}
        new = [{"digest": digest, **_values(token)} for digest, token in wanted.items() if digest not in taken]
        if not new:
            return [None] * len(records)
        self._execute(_insert_token, new)
        digests = {"digests": [row["digest"] for row in new]}
        self._execute(_delete_retired, digests)
        rows = self._execute(_ids, digests)
        ids = {bytes(digest): token_id for digest, token_id in rows}
        return [ids.pop(record.digest, None) for record in records]

    def rekey(self, token: Token, digest: bytes) -> None:
        self._execute(_retire, {"id": token.id})
        self._execute(_update_token, {"token_id": token.id, "digest": digest, **_values(token)})

    def delete(self, token_id: int) -> None:
        for statement in (_retire, _delete_model_usage, _delete_token):
            self._execute(statement, {"id": token_id})

    def operation(self, operation_id: str) -> Operation | None:
        row = self._execute(_operation, {"id": operation_id}).first()
        return operation_of(row) if row else None

    def insert_operation(self, operation: Operation) -> None:
        fields = dict(zip(OPERATION_COLUMNS, operation_values(operation), strict=True))
        self._execute(_insert_operation, {**fields, "lapses_at": _lapses_at(operation)})

    def save_operation(self, operation: Operation) -> None:
        changes = {name: getattr(operation, name) for name in ("held", "unlimited", "final_amount", "changed_at")}
        changes["lapses_at"] = _lapses_at(operation)
        self._execute(_update_operation, {"operation_id": operation.id, **changes})

    def lapsed(self, token_id: int, now: float) -> Sequence[Operation]:
        return [operation_of(row) for row in self._execute(_lapsed, {"token_id": token_id, "now": now})]

    def lapsed_before(self, before: float, size: int) -> Sequence[Operation]:
        return [operation_of(row) for row in self._execute(_lapsed_before, {"before": before, "size": size})]

    def model_used(self, token_id: int, model: str) -> int:
        return self._execute(_model_used, {"of_token": token_id, "of_model": model}).scalar() or 0

    def add_model_used(self, token_id: int, model: str, units: int) -> None:
        # The lock of the token keeps others from adding the row in between.
        if not self._execute(_add_model_used, {"of_token": token_id, "of_model": model, "units": units}).rowcount:
            self._execute(_insert_model_used, {"token_id": token_id, "model": model, "used": units})

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        times = {"before": before, "lapsed_before": lapsed_before}
        rows = self._execute(_finished, {**times, "size": size}).all()
        if not rows:
            return 0
        # Their operations are written by nobody else then; what has changed until now is left.
        self._execute(_lock_all, {"ids": list({token_id for _, token_id in rows})}).all()
        return self._execute(_forget, {**times, "numbers": [number for number, _ in rows]}).rowcount


def _values(token: Token) -> dict[str, Any]:
    return dict(zip(TOKEN_COLUMNS, token_values(token), strict=True))


def _lapses_at(operation: Operation) -> float | None:
    return operation.expires_at if operation.is_open and operation.held else None
