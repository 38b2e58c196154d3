"""The tokens of a new-api database, as new-api itself keeps them. Nothing is written or moved.

new-api (QuantumNous/new-api) has its tables in SQLite, MySQL or PostgreSQL. The tables differ with new-api's
version, so what a table has is looked up once, and what it lacks has its default.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    RowMapping,
    Select,
    create_engine,
    inspect,
)

from ...checks import MAX_INTEGER
from ...errors import DamagedToken, StoreError
from ...keys import strip_prefix
from ...log import LOG_KINDS, LogEntry, LogKind
from ...tokens import Token, TokenRecord
from ..sql.attempts import Attempt
from ..sql.database import ANSWERS_WITHIN, Database
from ..sql.dialects import POSTGRESQL
from ..sql.sql_migrations import VERSION_TABLE
from ..sql.sql_schema import MYSQL
from ..sqlite import reading
from ..sqlite.sqlite_url import sqlite_path
from .new_api_rows import LOG_TYPES, can_be_sent, entry_of, record_of, token_of
from .queries import NEEDED, Queries, make_queries

_Result = TypeVar("_Result")
_NewAPITokenStore = TypeVar("_NewAPITokenStore", bound="NewAPITokenStore")

_PAGE_SIZE: Final = 1000
_MOST_LOG_ENTRIES: Final = 1000


class NewAPITokenStore:
    """Read the tokens of a new-api database, and leave it as it is.

    :param url_or_engine: an SQLAlchemy URL (``"postgresql://user:password@host/name"``, ``"mysql://…"``,
        ``"sqlite:///one-api.db"``), the path of an SQLite file, or an :class:`~sqlalchemy.engine.Engine`.
    :raises TypeError, ValueError: it is none of them.
    :raises ImportError: the database's driver is not installed.

    This is a :class:`~usage_middleware.TokenStore`: it does not charge, as new-api does that itself. Nothing is opened
    before the first use. A call that fails raises :class:`StoreError`, and the next call tries again. An SQLite file is
    opened again for each call, so it may be replaced, and no connection is carried over a fork.

    A token is unknown if it is deleted, or if its owner is deleted or banned. ``model_limits`` are the models of
    new-api's list, each without a limit of its own.
    """

    answers_within = ANSWERS_WITHIN

    def __init__(self, url_or_engine: str | os.PathLike[str] | URL | Engine) -> None:
        if isinstance(url_or_engine, os.PathLike):
            url_or_engine = os.fspath(url_or_engine)
        path = _sqlite_path(url_or_engine)
        self._database = Database(url_or_engine, _DIALECTS) if path is None else _SQLiteFile(path)
        self._queries: Queries | None = None

    def __repr__(self) -> str:
        return f"NewAPITokenStore({self._database.name!r})"

    def get(self, key: str, /) -> Token | None:
        """Return the token of ``key``, or ``None``. One that is disabled is returned too, with ``enabled`` false.

        :param key: with or without its prefix ``sk-``.
        :raises StoreError: the database failed, or is not one of new-api.
        :raises DamagedToken: the token's row holds what no token can have.
        """
        if not isinstance(key, str):
            raise TypeError(f"a key must be a str, got {type(key).__name__}")
        key = strip_prefix(key)
        if not can_be_sent(key):
            return None
        queries = self._look()
        for row in self._rows(queries.by_key, {"key": key}):
            # MySQL compares by a collation: it ignores case, and most collations also ignore spaces at the end.
            if row["owned"] and queries.key_of(row) == key:
                return token_of(row, key)
        return None

    def records(self) -> Iterator[TokenRecord | DamagedToken]:
        """Yield every token that is not deleted, by id, for another store's :meth:`QuotaStore.restore`.

        Tokens that new-api does not serve have ``enabled`` false: disabled ones, and those of a deleted or banned
        owner. A row that is not a token is yielded as the error that :meth:`get` would raise. A record has what new-api
        has, so another store may still refuse it: ``total_used`` may be negative.

        They are read page by page: memory does not grow, and no lock is held between pages.
        """
        after = 0
        while True:
            queries = self._look()
            rows = self._rows(queries.page, {"after": after, "size": _PAGE_SIZE})
            for row in rows:
                yield record_of(row, queries.key_of(row))
            if not rows:
                return
            after = rows[-1]["id"]

    def count(self) -> int:
        """Return how many tokens :meth:`records` yields."""
        (row,) = self._rows(self._look().total, {})
        return int(row["total"])

    def log(
        self,
        token_id: int,
        *,
        kinds: Collection[LogKind] = LOG_KINDS,
        since: int = 0,
        until: int = MAX_INTEGER,
        offset: int = 0,
        size: int = _MOST_LOG_ENTRIES,
    ) -> Sequence[LogEntry]:
        """Return what new-api logged of a token, the newest first, from an offset on. Only the newest 1000 entries
        count.

        The log is empty if new-api keeps it in another database, or is too old to have an index of the log by token.

        :param kinds: ``"charge"`` and ``"refund"``.
        :param since: Unix time in whole seconds: only what was logged then or later.
        :param until: Unix time in whole seconds: only what was logged then or earlier.
        :param offset: how many entries to leave out.
        :param size: how many entries to return at most.
        :raises StoreError: the database failed, or is not one of new-api.
        """
        size = min(size, _MOST_LOG_ENTRIES - offset)
        queries = self._look()
        if queries.log is None or size <= 0 or not kinds:
            return []
        types = [LOG_TYPES[kind] for kind in kinds]
        limits = {"since": since, "until": until, "skipped": offset, "size": size}
        return [entry_of(row) for row in self._rows(queries.log, {"token_id": token_id, "types": types, **limits})]

    def close(self) -> None:
        """Close the connections, except those of an engine that the caller handed in."""
        self._database.close()

    def __enter__(self: _NewAPITokenStore) -> _NewAPITokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> Queries:
        queries = self._queries
        if queries is None:
            queries = self._queries = self._database.look(make_queries)
        if queries is None:
            raise StoreError(
                f"{self._database.name} is not a database of new-api: it has no table 'tokens' with the columns "
                f"{', '.join(NEEDED)}, or a view 'tokens' or 'users'"
            )
        return queries

    def _rows(self, query: Select[Any], parameters: dict[str, Any]) -> list[RowMapping]:
        try:
            rows = self._database.read(query, parameters)
        except StoreError:
            # A newer new-api may have changed the tables.
            self._queries = None
            raise
        return [row._mapping for row in rows]  # _mapping is public in spite of its name


class _SQLiteFile(Database):
    """An SQLite file. Each use makes a connection of its own."""

    def __init__(self, path: str) -> None:
        if path in ("", ":memory:") or path.startswith("file:"):
            raise ValueError(f"path must name a file, got {path!r}")
        # Absolute, as a server may change its directory later.
        path = os.path.abspath(path)
        url = URL.create("sqlite", database=path)
        self._reader = threading.local()
        super().__init__(
            create_engine(url, creator=lambda: self._reader.connection, poolclass=NullPool, hide_parameters=True),
            _DIALECTS,
        )
        self.name = path

    def _look(self, attempt: Attempt, work: Callable[[Connection], _Result]) -> _Result:
        return reading.look(self.name, lambda reader: self._look_with(reader, work))

    def _look_with(self, reader: sqlite3.Connection, work: Callable[[Connection], _Result]) -> _Result:
        self._reader.connection = reader  # the engine asks for it in this thread
        with self._engine.connect() as connection:
            return work(connection)

    def _explained(self, error: Exception, attempt: Attempt) -> StoreError:
        if "readonly database" in str(error):
            return StoreError(
                f"{self.name} was left in the middle of a transaction, which new-api undoes when it is started"
            )
        return super()._explained(error, attempt)


_DIALECTS: Final = ("sqlite", *POSTGRESQL, *MYSQL)


def is_new_api(url: str) -> bool:
    """Return whether the database of a server's URL is a new-api database and has no tables of ours."""

    def look(connection: Connection) -> bool:
        return make_queries(connection) is not None and not inspect(connection).has_table(VERSION_TABLE)

    database = Database(url, (*POSTGRESQL, *MYSQL))
    try:
        return database.look(look)
    finally:
        database.close()


def _sqlite_path(url_or_engine: str | URL | Engine) -> str | None:
    """Return the path of the SQLite file, if the argument names one."""
    if isinstance(url_or_engine, URL) and url_or_engine.get_backend_name() == "sqlite":
        url_or_engine = url_or_engine.set(drivername="sqlite").render_as_string()
    return sqlite_path(url_or_engine) if isinstance(url_or_engine, str) else None
