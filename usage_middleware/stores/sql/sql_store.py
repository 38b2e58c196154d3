"""Tokens in a database server: PostgreSQL, MySQL, MariaDB, and what speaks their protocols."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import date
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable

from ...errors import StoreError
from ...operations import Kind, Operation
from ...tokens import Token, TokenRecord
from ...usage import DayUsage
from ..base import QuotaStore
from ..findings import Finding
from ..migrations import TablesState, WrongTables
from ..rows import operation_of, records_of, token_of
from ..transaction import Transaction
from . import sql_migrations, sql_statements
from .database import ANSWERS_WITHIN, DEFAULT_TIMEOUT, Database
from .dialects import POSTGRESQL
from .sql_schema import MYSQL
from .sql_transaction import MOST_DIGESTS, SQLTransaction

_Result = TypeVar("_Result")


class SQLAlchemyTokenStore(QuotaStore):
    """Keep tokens in tables whose names begin with ``usage_``. The first use creates them if they are missing.

    :param url_or_engine: an SQLAlchemy URL such as ``"postgresql+psycopg://user:password@host/name"`` or
        ``"mysql+pymysql://…"``, or an :class:`~sqlalchemy.engine.Engine`, whose pool and options are then its owner's.
    :param timeout: how many seconds a call waits for the server, including connecting, before a :class:`StoreError`.
    :param read_only: never write, and never create tables: they must be there.
    :param clock: returns Unix time; for tests.
    :raises TypeError, ValueError: the argument is neither, or names another kind of database; for SQLite there is
        :class:`SQLiteTokenStore`.
    :raises ImportError: the database's driver is not installed.

    Nothing is connected before the first use. A key that is refused is refused after 5 ms, within which a server that
    is near answers. What a method returned is committed, and as durable as the server's
    settings make it (``synchronous_commit``, ``innodb_flush_log_at_trx_commit``).
    """

    answers_within = ANSWERS_WITHIN

    def __init__(
        self,
        url_or_engine: str | URL | Engine,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._is_read_only = bool(read_only)
        self._database = Database(url_or_engine, (*POSTGRESQL, *MYSQL), timeout=timeout)
        self._is_prepared = False

    def __repr__(self) -> str:
        return f"SQLAlchemyTokenStore({self._database.name!r})"

    def _transact(self, work: Callable[[Transaction], _Result]) -> _Result:
        if self._is_read_only:
            raise StoreError(f"the store of {self._database.name} was opened read-only")
        self._prepare()
        return self._database.transact(lambda session: work(SQLTransaction(session)))

    def _get(self, digest: bytes) -> Token | None:
        self._prepare()
        row = self._database.look_up(sql_statements.TOKEN_BY_DIGEST, {"digest": digest})
        return token_of(row) if row else None

    def _get_by_id(self, token_id: int) -> Token | None:
        rows = self._read(sql_statements.TOKEN_BY_ID, token_id=token_id)
        return token_of(rows[0]) if rows else None

    def _page(self, after: int, size: int) -> Sequence[Token]:
        return [token_of(row) for row in self._read(sql_statements.PAGE, after=after, size=size)]

    def _records(self, after: int, size: int) -> Sequence[TokenRecord]:
        self._prepare()
        return self._database.look_at_one_moment(lambda connection: _records(connection, after, size))

    def _operation(self, operation_id: str) -> Operation | None:
        return next(iter(self._operations(sql_statements.OPERATION, operation_id=operation_id)), None)

    def _find_operation(self, digest: bytes, idempotency_key: str) -> Operation | None:
        found = self._operations(sql_statements.FIND_OPERATION, digest=digest, idempotency_key=idempotency_key)
        return next(iter(found), None)

    def _history(self, token_id: int, since: float, until: float, before: int, size: int) -> Sequence[Operation]:
        place = {"token_id": token_id, "since": since, "until": until, "before": before, "size": size}
        return self._operations(sql_statements.HISTORY, **place)

    def _log(
        self, token_id: int, kinds: Collection[Kind], since: int, until: int, offset: int, size: int
    ) -> Sequence[Operation]:
        times = {"since": float(since), "until": float(until + 1)}
        place = {"token_id": token_id, "kinds": list(kinds), "skipped": offset, "size": size}
        return self._operations(sql_statements.LOG, **place, **times)

    def _count_requests(self, token_id: int) -> int:
        return int(self._read(sql_statements.COUNT_REQUESTS, token_id=token_id)[0][0])

    def _open_reservations(self, after: int, size: int) -> Sequence[Operation]:
        return self._operations(sql_statements.OPEN_RESERVATIONS, after=after, size=size)

    def _count_finished(self, before: float, lapsed_before: float) -> int:
        return int(self._read(sql_statements.COUNT_FINISHED, before=before, lapsed_before=lapsed_before)[0][0])

    def _model_usage(self, token_id: int) -> dict[str, int]:
        rows = self._read(sql_statements.MODEL_USAGE, first=token_id, last=token_id)
        return {model: used for _, model, used in rows}

    def _usage_by_day(self, token_id: int, first_day: date, last_day: date) -> Sequence[DayUsage]:
        place = {"first": token_id, "last": token_id, "first_day": first_day, "last_day": last_day}
        return [DayUsage(*usage) for _, *usage in self._read(sql_statements.USAGE_BY_DAY, **place)]

    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        return {
            bytes(row.digest)
            for start in range(0, len(digests), MOST_DIGESTS)
            for row in self._read(sql_statements.TAKEN, digests=list(digests[start : start + MOST_DIGESTS]))
        }

    def count(self) -> int:
        return int(self._read(sql_statements.COUNT)[0][0])

    def _operations(self, statement: Executable, **parameters: Any) -> list[Operation]:
        return [operation_of(row) for row in self._read(statement, **parameters)]

    def _read(self, statement: Executable, **parameters: Any) -> Sequence[Any]:
        self._prepare()
        return self._database.read(statement, parameters)

    def has_tables(self) -> bool:
        """Return whether this store's tables are there, of this version or an earlier one. Make none."""
        return self.tables_state() != "none"

    def tables_state(self) -> TablesState:
        try:
            return self._database.look(sql_migrations.state)
        except WrongTables as error:
            raise StoreError(f"{self._database.name} {error}") from None

    def health(self) -> Iterator[Finding]:
        from . import sql_health

        self._prepare()
        return iter(self._database.look(lambda connection: list(sql_health.findings(connection))))

    def close(self) -> None:
        """Close the connections, except those of an engine that the caller handed in."""
        self._database.close()

    def _prepare(self) -> None:
        """Make sure once in each process that the tables are there."""
        if not self._is_prepared:
            if self.tables_state() != "current":
                if self._is_read_only:
                    raise StoreError(
                        f"{self._database.name} has not all tables of this version; open it once for writing"
                    )
                try:
                    self._database.prepare(sql_migrations.migrate)
                except WrongTables as error:
                    raise StoreError(f"{self._database.name} {error}") from None
            self._is_prepared = True


def _records(connection: Connection, after: int, size: int) -> list[TokenRecord]:
    rows = connection.execute(sql_statements.PAGE, {"after": after, "size": size}).all()
    page = [(token_of(row), bytes(row.digest)) for row in rows]
    if not page:
        return []
    ids = {"first": page[0][0].id, "last": page[-1][0].id}
    days = connection.execute(sql_statements.USAGE_BY_DAY, {**ids, "first_day": date.min, "last_day": date.max})
    return records_of(
        page,
        connection.execute(sql_statements.MODEL_USAGE, ids).all(),
        ((token_id, DayUsage(*usage)) for token_id, *usage in days.all()),
    )
