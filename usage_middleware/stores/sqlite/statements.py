"""The SQL of a :class:`~usage_middleware.SQLiteTokenStore`, and its transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from ...accounts import Account, Changes, Lookup
from ...checks import MAX_INTEGER
from ...operations import Kind
from ...tokens import Token, TokenRecord, id_of
from ...usage import DayUsage
from ..rows import (
    DAY_COLUMNS,
    DAY_COUNTS,
    OPERATION_COLUMNS,
    TOKEN_COLUMNS,
    changed_operation_values,
    changed_values,
    day_of,
    operation_of,
    operation_values,
    records_of,
    token_of,
    token_values,
)


def _marks(columns: Sequence[str]) -> str:
    return ", ".join("?" * len(columns))


_TOKENS: Final = f"SELECT id, {', '.join(TOKEN_COLUMNS)} FROM tokens"
TOKEN_BY_DIGEST: Final = f"{_TOKENS} WHERE digest = ?"
TOKEN_BY_ID: Final = f"{_TOKENS} WHERE id = ?"
TAKEN: Final = "SELECT 1 FROM tokens WHERE digest = ? UNION ALL SELECT 1 FROM retired_keys WHERE digest = ?"
PAGE: Final = f"SELECT id, {', '.join(TOKEN_COLUMNS)}, digest FROM tokens WHERE id > ? ORDER BY id LIMIT ?"
# Adds nothing if the digest is taken. INSERT OR IGNORE would also ignore other faults of a row.
_INSERT: Final = (
    f"INSERT INTO tokens ({', '.join(TOKEN_COLUMNS)}, digest) SELECT {_marks(TOKEN_COLUMNS)}, ?"
    " WHERE NOT EXISTS (SELECT 1 FROM retired_keys WHERE digest = ?)"
    " ON CONFLICT (digest) DO NOTHING"
)
_RETIRE: Final = "INSERT INTO retired_keys SELECT digest FROM tokens WHERE id = ?"

_OPERATIONS: Final = f"SELECT number, {', '.join(OPERATION_COLUMNS)} FROM operations"
OPERATION: Final = f"{_OPERATIONS} WHERE id = ?"
_MADE: Final = f"{_OPERATIONS} WHERE token_id = ? AND idempotency_key = ?"
FIND_OPERATION: Final = (
    f"{_OPERATIONS} WHERE token_id = (SELECT id FROM tokens WHERE digest = ?) AND idempotency_key = ?"
)
HISTORY: Final = (
    f"{_OPERATIONS} WHERE token_id = ? AND created_at >= ? AND created_at < ? AND number < ?"
    " ORDER BY number DESC LIMIT ?"
)
# An index has all columns of the conditions, so the operations before the page are not read. A single kind uses another
# index.
_LOG: Final = (
    f"{_OPERATIONS} WHERE token_id = ? AND kind %s AND created_at >= ? AND created_at < ?"
    " ORDER BY number DESC LIMIT ? OFFSET ?"
)
_INSERT_OPERATION: Final = (
    f"INSERT INTO operations ({', '.join(OPERATION_COLUMNS)}) VALUES ({_marks(OPERATION_COLUMNS)})"
)

# Operation.is_holding, as the condition of the partial index open_reservations: SQLite uses the index for this wording
# only.
_IS_HOLDING: Final = "final_amount IS NULL AND held > 0"
OPEN_RESERVATIONS: Final = f"{_OPERATIONS} WHERE {_IS_HOLDING} AND number > ? ORDER BY number LIMIT ?"
_LAPSED: Final = f"{_OPERATIONS} WHERE {_IS_HOLDING} AND token_id = ? AND expires_at <= ? ORDER BY expires_at LIMIT ?"
_LAPSED_TOKENS: Final = f"SELECT DISTINCT token_id FROM operations WHERE {_IS_HOLDING} AND expires_at <= ? LIMIT ?"
_OF_RENEWED: Final = f"UPDATE operations SET unlimited = 0 WHERE {_IS_HOLDING} AND token_id = ? AND unlimited"
_OF_DELETED: Final = f"UPDATE operations SET held = 0 WHERE {_IS_HOLDING} AND token_id = ?"
_MODEL_HELD: Final = f"SELECT coalesce(sum(held), 0) FROM operations WHERE {_IS_HOLDING} AND token_id = ? AND model = ?"
# Operation.is_finished.
_IS_SETTLED: Final = "final_amount IS NOT NULL AND changed_at < ?"
_FORGET: Final = (
    f"DELETE FROM operations WHERE number IN (SELECT number FROM operations WHERE ({_IS_SETTLED})"
    " OR (final_amount IS NULL AND held = 0 AND expires_at <= ?) ORDER BY number LIMIT ?)"
)
COUNT_FINISHED: Final = (
    f"SELECT count(*) FROM operations WHERE ({_IS_SETTLED}) OR (final_amount IS NULL AND expires_at <= ?)"
)

MODEL_USAGE: Final = "SELECT model, used FROM model_usage WHERE token_id = ?"
_MODEL_USAGES: Final = "SELECT token_id, model, used FROM model_usage WHERE token_id BETWEEN ? AND ?"
_MODEL_USED: Final = "SELECT used FROM model_usage WHERE token_id = ? AND model = ?"
_ADD_MODEL_USAGE: Final = (
    "INSERT INTO model_usage (token_id, model, used) VALUES (?, ?, ?)"
    " ON CONFLICT (token_id, model) DO UPDATE SET used = used + excluded.used"
)
COUNT_REQUESTS: Final = "SELECT coalesce(sum(requests), 0) FROM usage_by_day WHERE token_id = ?"
USAGE_BY_DAY: Final = (
    f"SELECT {', '.join(DAY_COLUMNS)} FROM usage_by_day WHERE token_id = ? AND day BETWEEN ? AND ? ORDER BY day, model"
)
_USAGES_BY_DAY: Final = (
    f"SELECT token_id, {', '.join(DAY_COLUMNS)} FROM usage_by_day"
    " WHERE token_id BETWEEN ? AND ? ORDER BY token_id, day, model"
)
# A sum that is not a 64-bit integer becomes a REAL, which the table refuses, and the charge would fail with it.
_ADD_COUNTS: Final = ", ".join(
    f"{c} = CASE WHEN {c} > {MAX_INTEGER} - excluded.{c} THEN {MAX_INTEGER} ELSE {c} + excluded.{c} END"
    for c in DAY_COUNTS
)
_ADD_DAY: Final = (
    f"INSERT INTO usage_by_day (token_id, {', '.join(DAY_COLUMNS)}) VALUES (?, {_marks(DAY_COLUMNS)})"
    f" ON CONFLICT (token_id, day, model) DO UPDATE SET used = used + excluded.used, {_ADD_COUNTS}"
)


def log_of(kinds: Collection[Kind]) -> str:
    """Return the statement for a page of the operations of ``kinds``."""
    words = sorted(f"'{kind}'" for kind in kinds)
    return _LOG % (f"= {words[0]}" if len(words) == 1 else f"IN ({', '.join(words)})")


def records(connection: sqlite3.Connection, after: int, size: int) -> list[TokenRecord]:
    """Return a page of tokens with their usage. All is of one moment within one transaction."""
    page = [(token_of(row), row[-1]) for row in connection.execute(PAGE, (after, size))]
    if not page:
        return []
    ids = page[0][0].id, page[-1][0].id
    days = (
        (token_id, DayUsage(day_of(day, token_id), *figures))
        for token_id, day, *figures in connection.execute(_USAGES_BY_DAY, ids)
    )
    return records_of(page, connection.execute(_MODEL_USAGES, ids), days)


class SQLiteTransaction:
    """The statements of one open transaction. It has locked the whole database, so no row needs a lock."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def load(self, lookup: Lookup) -> Account | None:
        operation = None
        if lookup.operation_id is not None:
            row = self._execute(OPERATION, (lookup.operation_id,)).fetchone()
            if row is None:
                return None
            operation = operation_of(row)
            row = self._execute(TOKEN_BY_ID, (operation.token_id,)).fetchone()
        elif lookup.token_id is not None:
            row = self._execute(TOKEN_BY_ID, (lookup.token_id,)).fetchone()
        else:
            row = self._execute(TOKEN_BY_DIGEST, (lookup.digest,)).fetchone()
        if row is None:
            return None
        token = token_of(row)
        made = None
        if lookup.idempotency_key is not None:
            made = self._execute(_MADE, (token.id, lookup.idempotency_key)).fetchone()
        lapsed: Iterable[tuple[object, ...]] = ()
        if token.held:
            lapsed = self._execute(_LAPSED, (token.id, lookup.now, lookup.most_lapsed)).fetchall()
        return Account(
            token=token,
            operation=operation,
            made=None if made is None else operation_of(made),
            lapsed=[operation_of(row) for row in lapsed],
            model=lookup.model,
            model_used=self._model_used(token, lookup.model),
        )

    def _model_used(self, token: Token, model: str | None) -> int:
        if model is None or not token.model_limits_enabled:
            return 0
        row = self._execute(_MODEL_USED, (token.id, model)).fetchone()
        return row[0] if row else 0

    def save(self, changes: Changes) -> None:
        token_id = id_of(changes.token)
        self._update("tokens", changed_values(changes.before, changes.token), token_id)
        if changes.is_renewed:
            self._execute(_OF_RENEWED, (token_id,))
        for before, after in changes.steps:
            if before is None:
                self._execute(_INSERT_OPERATION, tuple(operation_values(after).values()))
            else:
                self._update("operations", changed_operation_values(before, after), after.id)
        self._add_usage(token_id, changes.model_usage(), changes.days())

    def _update(self, table: str, values: Mapping[str, object], row_id: object) -> None:
        if values:
            columns = ", ".join(f"{name} = ?" for name in values)
            self._execute(f"UPDATE {table} SET {columns} WHERE id = ?", (*values.values(), row_id))

    def _add_usage(self, token_id: int, models: Mapping[str, int], days: Iterable[DayUsage]) -> None:
        for model, units in models.items():
            self._execute(_ADD_MODEL_USAGE, (token_id, model, units))
        for one in days:
            self._execute(
                _ADD_DAY,
                (token_id, one.day.isoformat(), one.model, one.used, one.requests, one.input_tokens, one.output_tokens),
            )

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        return [self._insert(record) for record in records]

    def _insert(self, record: TokenRecord) -> int | None:
        values = tuple(token_values(record.token).values())
        cursor = self._execute(_INSERT, (*values, record.digest, record.digest))
        if not cursor.rowcount or cursor.lastrowid is None:
            return None
        self._add_usage(cursor.lastrowid, record.model_usage, record.days)
        return cursor.lastrowid

    def rekey(self, token_id: int, digest: bytes) -> None:
        self._execute(_RETIRE, (token_id,))
        self._execute("UPDATE tokens SET digest = ? WHERE id = ?", (digest, token_id))

    def delete(self, token_id: int) -> None:
        self._execute(_RETIRE, (token_id,))
        self._execute(_OF_DELETED, (token_id,))
        self._execute("DELETE FROM model_usage WHERE token_id = ?", (token_id,))
        self._execute("DELETE FROM usage_by_day WHERE token_id = ?", (token_id,))
        self._execute("DELETE FROM tokens WHERE id = ?", (token_id,))

    def model_held(self, token_id: int, model: str) -> int:
        return int(self._execute(_MODEL_HELD, (token_id, model)).fetchone()[0])

    def lapsed_tokens(self, before: float, size: int) -> Sequence[int]:
        return [token_id for (token_id,) in self._execute(_LAPSED_TOKENS, (before, size))]

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        return self._execute(_FORGET, (before, lapsed_before, size)).rowcount
