"""Tokens in an SQLite database: one file that any number of threads and processes of one machine share."""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import date
from typing import Any, Final, TypeVar

from ...errors import StoreError
from ...operations import Kind, Operation
from ...tokens import Token, TokenRecord
from ...usage import DayUsage
from ..base import QuotaStore
from ..findings import Finding
from ..migrations import TablesState, WrongTables
from ..rows import day_of, operation_of, token_of
from ..transaction import Transaction
from . import reading, sqlite_errors, statements
from .connections import Connections
from .statements import SQLiteTransaction

_Result = TypeVar("_Result")

_SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL", "EXTRA")  # sqlite.org/pragma.html#pragma_synchronous


class SQLiteTokenStore(QuotaStore):
    """Keep tokens in an SQLite database in WAL mode. The first use creates it if it is missing.

    :param path: the database file. It belongs on a local file system: SQLite's locks and its shared memory do not
        work over a network (sqlite.org/wal.html).
    :param timeout: how many seconds to wait for the lock of another process or thread before a :class:`StoreError`.
    :param synchronous: SQLite's ``synchronous``. ``"FULL"``: what a method returned has reached the disk.
        ``"NORMAL"``: a power failure may undo the last changes, but never damages the file.
    :param read_only: never write; the database must exist.
    :param clock: returns Unix time; for tests.
    :raises TypeError, ValueError: an argument cannot be used. Construction opens nothing, so that a server may fork
        afterwards, and a broken database does not keep the host from starting. The first method that uses the
        database raises a :class:`StoreError` if something is wrong with it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = 30.0,
        synchronous: str = "FULL",
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
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
        self._clock = clock
        self._is_read_only = bool(read_only)
        # Absolute, because a server may change its directory later.
        self._path = os.path.abspath(name)
        self._connections = Connections(
            self._path, timeout=timeout, synchronous=synchronous, read_only=self._is_read_only
        )

    def __repr__(self) -> str:
        return f"SQLiteTokenStore({self._path!r})"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        return self._connections.transact(lambda connection: work(SQLiteTransaction(connection)))

    def _get(self, digest: bytes) -> Token | None:
        rows = self._connections.read(statements.TOKEN_BY_DIGEST, (digest,))
        return token_of(rows[0]) if rows else None

    def _get_by_id(self, token_id: int) -> Token | None:
        rows = self._connections.read(statements.TOKEN_BY_ID, (token_id,))
        return token_of(rows[0]) if rows else None

    def _page(self, after: int, size: int) -> Sequence[Token]:
        return [token_of(row) for row in self._connections.read(statements.PAGE, (after, size))]

    def _records(self, after: int, size: int) -> Sequence[TokenRecord]:
        return self._connections.look_at_one_moment(lambda connection: statements.records(connection, after, size))

    def _operation(self, operation_id: str) -> Operation | None:
        return next(iter(self._operations(statements.OPERATION, operation_id)), None)

    def _find_operation(self, digest: bytes, idempotency_key: str) -> Operation | None:
        return next(iter(self._operations(statements.FIND_OPERATION, digest, idempotency_key)), None)

    def _history(self, token_id: int, since: float, until: float, before: int, size: int) -> Sequence[Operation]:
        return self._operations(statements.HISTORY, token_id, since, until, before, size)

    def _log(
        self, token_id: int, kinds: Collection[Kind], since: int, until: int, offset: int, size: int
    ) -> Sequence[Operation]:
        return self._operations(statements.log_of(kinds), token_id, since, float(until + 1), size, offset)

    def _count_requests(self, token_id: int) -> int:
        ((count,),) = self._connections.read(statements.COUNT_REQUESTS, (token_id,))
        return int(count)

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        return self._operations(statements.OPEN_RESERVATIONS, after, size)

    def _operations(self, sql: str, *parameters: Any) -> list[Operation]:
        return [operation_of(row) for row in self._connections.read(sql, parameters)]

    def _count_finished(self, before: float, lapsed_before: float) -> int:
        ((count,),) = self._connections.read(statements.COUNT_FINISHED, (before, lapsed_before))
        return int(count)

    def _model_usage(self, token_id: int) -> dict[str, int]:
        return dict(self._connections.read(statements.MODEL_USAGE, (token_id,)))

    def _usage_by_day(self, token_id: int, first_day: date, last_day: date) -> Sequence[DayUsage]:
        # With 50 models a day, a year has 18,300 rows. So each row is made in the cheapest way, and each date only
        # once.
        days = first_day.isoformat(), last_day.isoformat()
        rows = self._connections.read(statements.USAGE_BY_DAY, (token_id, *days))
        parsed = {day: day_of(day, token_id) for day in {row[0] for row in rows}}
        make = DayUsage._make
        return [make((parsed[day], m, used, requests, i, o)) for day, m, used, requests, i, o in rows]

    def health(self) -> Iterator[Finding]:
        from . import sqlite_health

        return sqlite_health.findings(self._path)

    def tables_state(self) -> TablesState:
        from . import sqlite_schema

        if not self._is_read_only and not os.path.exists(self._path):
            return "none"  # it will be made
        try:
            return reading.look(self._path, sqlite_schema.state)
        except WrongTables as error:
            raise StoreError(f"{self._path} {error}") from None
        except sqlite3.Error as error:
            raise sqlite_errors.explained(self._path, error, "read") from error

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        return {digest for digest in digests if self._connections.read(statements.TAKEN, (digest, digest))}

    def count(self) -> int:
        ((count,),) = self._connections.read("SELECT count(*) FROM tokens", ())
        return int(count)

    def close(self) -> None:
        self._connections.close()
