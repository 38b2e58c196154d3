"""The tokens of a new-api database, as new-api itself keeps them: nothing is written, and nothing has to be moved.

new-api (QuantumNous/new-api) has its tables in SQLite, MySQL or PostgreSQL. They differ with its age, so what a table
has is looked up once, and what it lacks has its default.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import (
    CHAR,
    URL,
    Connection,
    Engine,
    Inspector,
    NullPool,
    RowMapping,
    Select,
    and_,
    bindparam,
    case,
    column,
    create_engine,
    func,
    inspect,
    select,
    table,
    true,
)
from sqlalchemy.exc import NoSuchTableError, SQLAlchemyError

from ...errors import DamagedToken, StoreError
from ...keys import KEY_PATTERN, key_digest, key_hint
from ...tokens import Token, TokenRecord
from ..sql.database import POSTGRESQL, Database
from ..sql.sql_migrations import VERSION_TABLE
from ..sql.sql_schema import MYSQL
from ..sqlite import reading
from ..sqlite.sqlite_url import sqlite_path

_Result = TypeVar("_Result")
_NewAPITokenStore = TypeVar("_NewAPITokenStore", bound="NewAPITokenStore")

_PAGE_SIZE: Final = 1000
_NEEDED: Final = ("id", "key", "remain_quota")
_OPTIONAL: Final = (
    "status",
    "name",
    "created_time",
    "expired_time",
    "unlimited_quota",
    "model_limits_enabled",
    "model_limits",
    "used_quota",
)
_DISABLED: Final = 2  # Of the others, 3 (expired) and 4 (exhausted) are what the token's own numbers tell.
_ENABLED_USER: Final = 1

_can_exist: Final = re.compile(KEY_PATTERN).fullmatch
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "t", "true", "\x01"), True),
    **dict.fromkeys(("0", "f", "false", "\x00", ""), False),
}


class _Queries(NamedTuple):
    """What a database of this age is asked."""

    by_key: Select[Any]
    page: Select[Any]
    total: Select[Any]
    pads_keys: bool

    def key_of(self, row: RowMapping) -> str:
        """The key in a row; of the type char(48) without the blanks that stand behind a shorter one."""
        key = _text(row["key"])
        return key.rstrip(" ") if self.pads_keys else key


class NewAPITokenStore:
    """Answers from a database of new-api, and leaves it as it is.

    :param url_or_engine: an SQLAlchemy URL (``"postgresql://user:password@host/name"``, ``"mysql://…"``,
        ``"sqlite:///one-api.db"``), the path of an SQLite file, or an :class:`~sqlalchemy.engine.Engine`.
    :raises TypeError, ValueError: it is none of them.
    :raises ImportError: the database's driver is not installed.

    A :class:`~usage_middleware.TokenStore`: there is no charging, as new-api does that itself. Nothing is opened before
    the first use. What fails is a :class:`StoreError`, and the next call tries again. An SQLite file is opened anew
    for each call, so it may be replaced, and no connection is carried over a fork.

    A token is unknown where it is deleted, or its owner is deleted or banned. ``model_limits`` are the models of
    new-api's list, each without a limit of its own.
    """

    def __init__(self, url_or_engine: str | os.PathLike[str] | URL | Engine) -> None:
        if isinstance(url_or_engine, os.PathLike):
            url_or_engine = os.fspath(url_or_engine)
        path = _sqlite_path(url_or_engine)
        self._database = Database(url_or_engine, _DIALECTS) if path is None else _SQLiteFile(path)
        self._queries: _Queries | None = None

    def __repr__(self) -> str:
        return f"NewAPITokenStore({self._database.name!r})"

    def get(self, key: str, /) -> Token | None:
        """The token of ``key``, or ``None``. One that is disabled is returned too, with ``enabled`` false.

        :raises StoreError: the database failed, or is none of new-api.
        :raises DamagedToken: the token's row holds what no token can have.
        """
        if not isinstance(key, str):
            raise TypeError(f"a key must be a str, got {type(key).__name__}")
        if not _can_exist(key):
            return None
        queries, rows = self._read(lambda queries: queries.by_key, {"key": key})
        for row in rows:
            # MySQL compares by a collation: it ignores case, and most of them blanks at the end.
            if row["owned"] and queries.key_of(row) == key:
                return _token(row, key)
        return None

    def records(self) -> Iterator[TokenRecord | DamagedToken]:
        """Every token that is not deleted, by id, for another store's :meth:`QuotaStore.restore`.

        Those that new-api does not serve, disabled ones and those of a deleted or banned owner, have ``enabled`` false.
        A row that is no token comes as the error that :meth:`get` would raise. What is in a record is what new-api has,
        so another store may still refuse it: ``total_used`` may be negative.

        They are read page by page: memory does not grow, and no lock is held in between.
        """
        after = 0
        while True:
            queries, rows = self._read(lambda queries: queries.page, {"after": after, "size": _PAGE_SIZE})
            for row in rows:
                yield _record(row, queries.key_of(row))
            if not rows:
                return
            after = rows[-1]["id"]

    def count(self) -> int:
        """How many tokens :meth:`records` has."""
        _, (row,) = self._read(lambda queries: queries.total, {})
        return int(row["total"])

    def close(self) -> None:
        """Closes the connections, but for those of an engine that was handed in."""
        self._database.close()

    def __enter__(self: _NewAPITokenStore) -> _NewAPITokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(
        self, query: Callable[[_Queries], Select[Any]], parameters: dict[str, Any]
    ) -> tuple[_Queries, list[RowMapping]]:
        queries = self._queries
        if queries is None:
            queries = self._queries = self._database.look(_make_queries)
        if queries is None:
            raise StoreError(
                f"{self._database.name} is no database of new-api: it has no table 'tokens' with the columns "
                + ", ".join(_NEEDED)
            )
        try:
            rows = self._database.read(query(queries), parameters)
        except StoreError:
            # It may be that a newer new-api has changed the tables.
            self._queries = None
            raise
        return queries, [row._mapping for row in rows]  # _mapping is public in spite of its name


class _SQLiteFile(Database):
    """An SQLite file, of which a connection is made for each use."""

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
        self._reading = self._engine  # Its connections begin no transactions.

    def _look(self, work: Callable[[Connection], _Result]) -> _Result:
        return reading.look(self.name, lambda reader: self._look_with(reader, work))

    def _look_with(self, reader: sqlite3.Connection, work: Callable[[Connection], _Result]) -> _Result:
        self._reader.connection = reader  # which the engine asks for in this thread
        with self._reading.connect() as connection:
            return work(connection)

    def _explained(self, error: SQLAlchemyError) -> StoreError:
        if "readonly database" in str(error):
            return StoreError(
                f"{self.name} was left in the middle of a transaction, which new-api undoes when it is started"
            )
        return super()._explained(error)


_DIALECTS: Final = ("sqlite", *POSTGRESQL, *MYSQL)


def is_new_api(url: str) -> bool:
    """Whether the database of a server's URL is one of new-api, and has no tables of ours."""

    def look(connection: Connection) -> bool:
        return _make_queries(connection) is not None and not inspect(connection).has_table(VERSION_TABLE)

    database = Database(url, (*POSTGRESQL, *MYSQL))
    try:
        return database.look(look)
    finally:
        database.close()


def _sqlite_path(url_or_engine: str | URL | Engine) -> str | None:
    """The path of an SQLite file, where one is named."""
    if isinstance(url_or_engine, URL) and url_or_engine.get_backend_name() == "sqlite":
        url_or_engine = url_or_engine.set(drivername="sqlite").render_as_string()
    return sqlite_path(url_or_engine) if isinstance(url_or_engine, str) else None


def _make_queries(connection: Connection) -> _Queries | None:
    """What this database can be asked; ``None`` where it is none of new-api."""
    inspector = inspect(connection)
    token_columns = _columns(inspector, "tokens")
    user_columns = _columns(inspector, "users")
    if not token_columns.keys() >= set(_NEEDED):
        return None
    # Without types: what is a boolean in one database is a number, bits or text in another; the driver's value tells.
    tokens = table("tokens", *map(column, token_columns))
    users = table("users", *map(column, user_columns))
    is_there = tokens.c.deleted_at.is_(None) if "deleted_at" in token_columns else true()
    source: Any = tokens
    owned: Any = true()
    if "user_id" in token_columns and "id" in user_columns:
        source = tokens.outerjoin(users, users.c.id == tokens.c.user_id)
        owned = users.c.id.is_not(None)
        if "status" in user_columns:
            owned = and_(owned, users.c.status == _ENABLED_USER)
        if "deleted_at" in user_columns:
            owned = and_(owned, users.c.deleted_at.is_(None))
    names = [*_NEEDED, *(name for name in _OPTIONAL if name in token_columns)]
    rows = select(*(tokens.c[name] for name in names), case((owned, 1), else_=0).label("owned")).select_from(source)
    rows = rows.where(is_there)
    return _Queries(
        by_key=rows.where(tokens.c.key == bindparam("key")),
        page=rows.where(tokens.c.id > bindparam("after")).order_by(tokens.c.id).limit(bindparam("size")),
        total=select(func.count().label("total")).select_from(tokens).where(is_there),
        pads_keys=isinstance(token_columns["key"], CHAR),
    )


def _columns(inspector: Inspector, name: str) -> dict[str, Any]:
    """The columns of a table with their types; none where there is no such table."""
    try:
        return {column["name"]: column["type"] for column in inspector.get_columns(name)}
    except NoSuchTableError:
        return {}


def _record(row: RowMapping, key: str) -> TokenRecord | DamagedToken:
    if not _can_exist(key):
        return DamagedToken(row["id"], "it has no key that a client can send")
    try:
        return TokenRecord(token=_token(row, key), digest=key_digest(key))
    except DamagedToken as error:
        return error


def _token(row: RowMapping, key: str) -> Token:
    try:
        return Token(
            id=row["id"],
            name=_text(row.get("name")),
            total_available=_integer(row, "remain_quota"),
            total_used=_integer(row, "used_quota"),
            unlimited_quota=_boolean(row, "unlimited_quota"),
            model_limits={model: True for model in _text(row.get("model_limits")).split(",") if model},
            model_limits_enabled=_boolean(row, "model_limits_enabled"),
            expires_at=max(_integer(row, "expired_time"), 0),
            enabled=bool(row["owned"]) and _integer(row, "status") != _DISABLED,
            hint=key_hint(key),
            created_at=_integer(row, "created_time"),
        )
    except (TypeError, ValueError) as error:
        raise DamagedToken(row["id"], str(error)) from error


def _integer(row: RowMapping, name: str) -> int:
    value = row.get(name)
    if value is None:
        return 0
    if isinstance(value, (float, Decimal)) and value == value // 1:  # a column of another type
        return int(value)
    if not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value


def _boolean(row: RowMapping, name: str) -> bool:
    """A boolean, which databases hold as a number, as a bit (PyMySQL makes bytes of it), or as text."""
    value = row.get(name)
    if value is None or isinstance(value, (int, float, Decimal)):
        return bool(value)
    try:
        return _BOOLEANS[_text(value).lower()]
    except KeyError:
        raise ValueError(f"{name} must be a boolean, got {value!r}") from None


def _text(value: Any) -> str:
    """Text. A database without an encoding gives its bytes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)
