"""Tokens in an SQLite database: one file that any number of threads and processes of one machine share."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from ..errors import StoreError
from ..tokens import Token, encode_model_limits
from .base import QuotaStore
from .sqlite_connections import Connections

_SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL", "EXTRA")  # sqlite.org/pragma.html#pragma_synchronous

# In this order everywhere: the queries, the rows, and the values that are saved.
_VALUES: Final = (
    "hint",
    "name",
    "total_available",
    "total_used",
    "unlimited_quota",
    "model_limits",
    "model_limits_enabled",
    "expires_at",
    "enabled",
    "created_at",
)
_SELECT: Final = f"SELECT id, {', '.join(_VALUES)} FROM tokens"
_BY_DIGEST: Final = f"{_SELECT} WHERE digest = ?"
_BY_ID: Final = f"{_SELECT} WHERE id = ?"
_PAGE: Final = f"{_SELECT} WHERE id > ? ORDER BY id LIMIT ?"
_INSERT: Final = f"INSERT INTO tokens ({', '.join(_VALUES)}, digest) VALUES ({', '.join('?' * len(_VALUES))}, ?)"
_UPDATE: Final = f"UPDATE tokens SET {', '.join(f'{name} = ?' for name in _VALUES)} WHERE id = ?"
_RETIRE: Final = "INSERT INTO retired_keys SELECT digest FROM tokens WHERE id = ?"
_IS_TAKEN: Final = (
    "SELECT EXISTS (SELECT 1 FROM tokens WHERE digest = :digest)"
    " OR EXISTS (SELECT 1 FROM retired_keys WHERE digest = :digest)"
)


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
        name = os.fspath(path)
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

    @contextmanager
    def _transaction(self) -> Iterator[_SQLiteTransaction]:
        with self._connections.write() as connection:
            yield _SQLiteTransaction(connection)

    def _get(self, digest: bytes) -> Token | None:
        rows = self._connections.read(_BY_DIGEST, (digest,))
        return _token(rows[0]) if rows else None

    def _find(self, token_id: int) -> Token | None:
        rows = self._connections.read(_BY_ID, (token_id,))
        return _token(rows[0]) if rows else None

    def _page(self, after: int, size: int) -> Sequence[Token]:
        return [_token(row) for row in self._connections.read(_PAGE, (after, size))]

    def close(self) -> None:
        self._connections.close()


class _SQLiteTransaction:
    """The statements of one open transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def load(self, token_id: int) -> Token | None:
        row = self._execute(_BY_ID, (token_id,)).fetchone()
        return _token(row) if row else None

    def save(self, token: Token) -> None:
        self._execute(_UPDATE, (*_values(token), token.id))

    def insert(self, token: Token, digest: bytes) -> int:
        token_id = self._execute(_INSERT, (*_values(token), digest)).lastrowid
        assert token_id is not None
        return token_id

    def rekey(self, token: Token, digest: bytes) -> None:
        self._execute(_RETIRE, (token.id,))
        self._execute("UPDATE tokens SET digest = ? WHERE id = ?", (digest, token.id))
        self.save(token)

    def delete(self, token_id: int) -> None:
        self._execute(_RETIRE, (token_id,))
        self._execute("DELETE FROM tokens WHERE id = ?", (token_id,))

    def is_taken(self, digest: bytes) -> bool:
        (taken,) = self._execute(_IS_TAKEN, {"digest": digest}).fetchone()
        return bool(taken)


def _token(row: Sequence[Any]) -> Token:
    try:
        return Token(
            id=row[0],
            hint=row[1],
            name=row[2],
            total_available=row[3],
            total_used=row[4],
            unlimited_quota=row[5] == 1,
            model_limits={} if row[6] == "{}" else json.loads(row[6]),
            model_limits_enabled=row[7] == 1,
            expires_at=row[8],
            enabled=row[9] == 1,
            created_at=row[10],
        )
    except (TypeError, ValueError) as error:
        raise StoreError(f"token {row[0]} is damaged in the database: {error}") from error


def _values(token: Token) -> tuple[Any, ...]:
    return (
        token.hint,
        token.name,
        token.total_available,
        token.total_used,
        token.unlimited_quota,
        encode_model_limits(token.model_limits),
        token.model_limits_enabled,
        token.expires_at,
        token.enabled,
        token.created_at,
    )
