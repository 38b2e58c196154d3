"""Tokens in an SQLite database: one file that any number of threads and processes of one machine share."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from ...operations import Operation
from ...tokens import Token, TokenRecord
from ..base import QuotaStore
from ..findings import Finding
from ..rows import OPERATION_COLUMNS, TOKEN_COLUMNS, operation_of, operation_values, token_of, token_values
from ..transaction import Transaction
from .connections import Connections

_Result = TypeVar("_Result")

_SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL", "EXTRA")  # sqlite.org/pragma.html#pragma_synchronous

_SELECT: Final = f"SELECT id, {', '.join(TOKEN_COLUMNS)} FROM tokens"
_BY_DIGEST: Final = f"{_SELECT} WHERE digest = ?"
_BY_ID: Final = f"{_SELECT} WHERE id = ?"
_TAKEN: Final = "SELECT 1 FROM tokens WHERE digest = ? UNION ALL SELECT 1 FROM retired_keys WHERE digest = ?"
_PAGE: Final = f"SELECT id, {', '.join(TOKEN_COLUMNS)}, digest FROM tokens WHERE id > ? ORDER BY id LIMIT ?"
# Adds nothing where the digest is taken. INSERT OR IGNORE would also ignore what else is wrong with a row.
_INSERT: Final = (
    f"INSERT INTO tokens ({', '.join(TOKEN_COLUMNS)}, digest) SELECT {', '.join('?' * len(TOKEN_COLUMNS))}, ?"
    " WHERE NOT EXISTS (SELECT 1 FROM retired_keys WHERE digest = ?)"
    " ON CONFLICT (digest) DO NOTHING"
)
_UPDATE: Final = f"UPDATE tokens SET {', '.join(f'{name} = ?' for name in TOKEN_COLUMNS)} WHERE id = ?"
_SELECT_OPERATION: Final = f"SELECT number, {', '.join(OPERATION_COLUMNS)} FROM operations"
_OPERATION: Final = f"{_SELECT_OPERATION} WHERE id = ?"
_HISTORY: Final = f"{_SELECT_OPERATION} WHERE token_id = ? AND number < ? ORDER BY number DESC LIMIT ?"
# The conditions are those of the partial index open_reservations, or SQLite would not use it.
_LAPSED: Final = f"{_SELECT_OPERATION} WHERE final_amount IS NULL AND held > 0 AND token_id = ? AND expires_at <= ?"
_LAPSED_BEFORE: Final = f"{_SELECT_OPERATION} WHERE final_amount IS NULL AND held > 0 AND expires_at <= ? LIMIT ?"
_OPEN_RESERVATIONS: Final = (
    f"{_SELECT_OPERATION} WHERE final_amount IS NULL AND held > 0 AND number > ? ORDER BY number LIMIT ?"
)
_INSERT_OPERATION: Final = (
    f"INSERT INTO operations ({', '.join(OPERATION_COLUMNS)}) VALUES ({', '.join('?' * len(OPERATION_COLUMNS))})"
)
_UPDATE_OPERATION: Final = (
    "UPDATE operations SET held = ?, unlimited = ?, final_amount = ?, changed_at = ? WHERE id = ?"
)
_FORGET: Final = (
    "DELETE FROM operations WHERE number IN (SELECT number FROM operations"
    " WHERE (final_amount IS NOT NULL AND changed_at < ?)"
    " OR (final_amount IS NULL AND held = 0 AND expires_at <= ?) ORDER BY number LIMIT ?)"
)
_MODEL_USAGE: Final = "SELECT token_id, model, used FROM model_usage WHERE token_id BETWEEN ? AND ?"
_MODEL_USED: Final = "SELECT used FROM model_usage WHERE token_id = ? AND model = ?"
_ADD_MODEL_USED: Final = (
    "INSERT INTO model_usage (token_id, model, used) VALUES (?, ?, ?)"
    " ON CONFLICT (token_id, model) DO UPDATE SET used = used + excluded.used"
)
_RETIRE: Final = "INSERT INTO retired_keys SELECT digest FROM tokens WHERE id = ?"


class SQLiteTokenStore(QuotaStore):
    """Keeps tokens in an SQLite database in WAL mode, made at the first use if there is none.

    :param path: the database file. It belongs on a local file system: SQLite's locks and its shared memory do not
        work over a network (sqlite.org/wal.html).
    :param timeout: how many seconds to wait for another process's lock before a :class:`StoreError`.
    :param synchronous: SQLite's ``synchronous``. ``"FULL"``: what a method returned has reached the disk.
        ``"NORMAL"``: a power failure may undo the last of it, and never damages the file.
    :param read_only: never writes; the database must be there.
    :raises TypeError, ValueError: an argument cannot be what it is meant to be. The database itself is first asked
        for by a method, and a :class:`StoreError` then says what is wrong with it: construction opens nothing,
        so that a server may fork afterwards, and a broken database does not keep the host from starting.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = 30.0,
        synchronous: str = "FULL",
        read_only: bool = False,
    ) -> None:
        name = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(name, str):
            raise TypeError(f"path must be a str or a path object, got {path!r}")
        if name in ("", ":memory:") or name.startswith("file:"):
            raise ValueError(
                f"path must name a file, got {name!r}; for tokens in memory use MemoryTokenStore: "
                "each connection of a pool would have an SQLite memory of its own"
            )
        if "\0" in name:
            raise ValueError("path must not contain NUL characters")
        if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
            raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
        if not 0 <= timeout <= 2_000_000 or math.isnan(timeout):  # SQLite counts milliseconds in 32 bits
            raise ValueError(f"timeout must be 0 to 2,000,000 seconds, got {timeout!r}")
        if synchronous not in _SYNCHRONOUS:
            raise ValueError(f"synchronous must be one of {', '.join(_SYNCHRONOUS)}, got {synchronous!r}")
        # Absolute, as a server may change its directory later.
        self._path = os.path.abspath(name)
        self._connections = Connections(self._path, timeout=timeout, synchronous=synchronous, read_only=bool(read_only))

    def __repr__(self) -> str:
        return f"SQLiteTokenStore({self._path!r})"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        with self._connections.write() as connection:
            return work(_SQLiteTransaction(connection))

    def _get(self, digest: bytes) -> Token | None:
        rows = self._connections.read(_BY_DIGEST, (digest,))
        return token_of(rows[0]) if rows else None

    def _find(self, token_id: int) -> Token | None:
        rows = self._connections.read(_BY_ID, (token_id,))
        return token_of(rows[0]) if rows else None

    def _page(self, after: int, size: int) -> Sequence[tuple[Token, bytes]]:
        return [(token_of(row), row[-1]) for row in self._connections.read(_PAGE, (after, size))]

    def _history(self, token_id: int, before: int, size: int) -> Sequence[Operation]:
        return [operation_of(row) for row in self._connections.read(_HISTORY, (token_id, before, size))]

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        return [operation_of(row) for row in self._connections.read(_OPEN_RESERVATIONS, (after, size))]

    def _model_usage(self, first_id: int, last_id: int) -> Sequence[tuple[int, str, int]]:
        return self._connections.read(_MODEL_USAGE, (first_id, last_id))

    def health(self) -> Iterator[Finding]:
        from . import sqlite_health

        return sqlite_health.findings(self._path)

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        return {digest for digest in digests if self._connections.read(_TAKEN, (digest, digest))}

    def count(self) -> int:
        ((count,),) = self._connections.read("SELECT count(*) FROM tokens", ())
        return int(count)

    def close(self) -> None:
        self._connections.close()


class _SQLiteTransaction:
    """The statements of one open transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def load(self, token_id: int) -> Token | None:
        row = self._execute(_BY_ID, (token_id,)).fetchone()
        return token_of(row) if row else None

    def load_by_digest(self, digest: bytes) -> Token | None:
        row = self._execute(_BY_DIGEST, (digest,)).fetchone()
        return token_of(row) if row else None

    def save(self, token: Token) -> None:
        self._execute(_UPDATE, (*token_values(token), token.id))

    def insert(self, records: Sequence[TokenRecord]) -> Sequence[int | None]:
        inserted = (
            self._execute(_INSERT, (*token_values(record.token), record.digest, record.digest)) for record in records
        )
        return [cursor.lastrowid if cursor.rowcount else None for cursor in inserted]

    def rekey(self, token: Token, digest: bytes) -> None:
        self._execute(_RETIRE, (token.id,))
        self._execute("UPDATE tokens SET digest = ? WHERE id = ?", (digest, token.id))
        self.save(token)

    def delete(self, token_id: int) -> None:
        self._execute(_RETIRE, (token_id,))
        self._execute("DELETE FROM model_usage WHERE token_id = ?", (token_id,))
        self._execute("DELETE FROM tokens WHERE id = ?", (token_id,))

    def operation(self, operation_id: str) -> Operation | None:
        row = self._execute(_OPERATION, (operation_id,)).fetchone()
        return operation_of(row) if row else None

    def insert_operation(self, operation: Operation) -> None:
        self._execute(_INSERT_OPERATION, operation_values(operation))

    def save_operation(self, operation: Operation) -> None:
        self._execute(
            _UPDATE_OPERATION,
            (operation.held, operation.unlimited, operation.final_amount, operation.changed_at, operation.id),
        )

    def lapsed(self, token_id: int, now: float) -> Sequence[Operation]:
        return [operation_of(row) for row in self._execute(_LAPSED, (token_id, now))]

    def lapsed_before(self, before: float, size: int) -> Sequence[Operation]:
        return [operation_of(row) for row in self._execute(_LAPSED_BEFORE, (before, size))]

    def model_used(self, token_id: int, model: str) -> int:
        row = self._execute(_MODEL_USED, (token_id, model)).fetchone()
        return row[0] if row else 0

    def add_model_used(self, token_id: int, model: str, units: int) -> None:
        self._execute(_ADD_MODEL_USED, (token_id, model, units))

    def forget(self, before: float, lapsed_before: float, size: int) -> int:
        return self._execute(_FORGET, (before, lapsed_before, size)).rowcount
