"""The queries for a new-api database. Its tables differ with new-api's version."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CHAR,
    Connection,
    Inspector,
    RowMapping,
    Select,
    and_,
    bindparam,
    case,
    column,
    func,
    inspect,
    select,
    table,
    true,
)
from sqlalchemy.exc import NoSuchTableError

from .new_api_rows import text_of

_ENABLED_USER: Final = 1


class _Columns(NamedTuple):
    """The columns of a table that are read."""

    needed: tuple[str, ...]
    #: Columns that only a newer database has, or only an older one.
    optional: tuple[str, ...]

    def of(self, there: dict[str, Any]) -> list[str]:
        """Return the columns that a table has."""
        return [*self.needed, *(name for name in self.optional if name in there)]


_TOKENS: Final = _Columns(
    needed=("id", "key", "remain_quota"),
    optional=(
        "status",
        "name",
        "created_time",
        "expired_time",
        "unlimited_quota",
        "model_limits_enabled",
        "model_limits",
        "used_quota",
    ),
)
# Nothing about other people: the table also has addresses, channels, and notes for the operator.
_LOGS: Final = _Columns(
    needed=("id", "token_id", "type", "created_at", "quota"),
    optional=("model_name", "prompt_tokens", "completion_tokens", "use_time", "is_stream", "request_id"),
)

#: The columns without which a table of tokens is not one of new-api.
NEEDED: Final = _TOKENS.needed


class Queries(NamedTuple):
    """The queries for a database of this version."""

    by_key: Select[Any]
    page: Select[Any]
    total: Select[Any]
    #: ``None`` if the database has no log, or no index of it by token.
    log: Select[Any] | None
    pads_keys: bool

    def key_of(self, row: RowMapping) -> str:
        """Return the key in a row; a column of the type char(48) pads a shorter key with spaces,
        which are removed."""
        key = text_of(row["key"])
        return key.rstrip(" ") if self.pads_keys else key


def make_queries(connection: Connection) -> Queries | None:
    """Return the queries for this database, or ``None`` if it is not a new-api database."""
    inspector = inspect(connection)
    if {"tokens", "users"} & _views(inspector):
        return None
    token_columns = _columns(inspector, "tokens")
    user_columns = _columns(inspector, "users")
    if not token_columns.keys() >= set(_TOKENS.needed):
        return None
    # Without types: a boolean in one database is a number, bits or text in another. The driver's value shows which.
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
    rows = select(*(tokens.c[name] for name in _TOKENS.of(token_columns)), case((owned, 1), else_=0).label("owned"))
    rows = rows.select_from(source).where(is_there)
    return Queries(
        by_key=rows.where(tokens.c.key == bindparam("key")),
        page=rows.where(tokens.c.id > bindparam("after")).order_by(tokens.c.id).limit(bindparam("size")),
        total=select(func.count().label("total")).select_from(tokens).where(is_there),
        log=_log(inspector),
        pads_keys=isinstance(token_columns["key"], CHAR),
    )


def _log(inspector: Inspector) -> Select[Any] | None:
    there = _columns(inspector, "logs")
    if not there.keys() >= set(_LOGS.needed) or "logs" in _views(inspector):
        return None
    # An operator's database has many millions of rows, and one request of a key's holder must not read them all.
    if not any(index["column_names"][:1] == ["token_id"] for index in inspector.get_indexes("logs")):
        return None
    logs = table("logs", *map(column, there))
    return (
        select(*(logs.c[name] for name in _LOGS.of(there)))
        .where(
            logs.c.token_id == bindparam("token_id"),
            logs.c.type.in_(bindparam("types", expanding=True)),
            logs.c.created_at.between(bindparam("since"), bindparam("until")),
        )
        .order_by(logs.c.id.desc())
        .limit(bindparam("size"))
        .offset(bindparam("skipped"))
    )


def _views(inspector: Inspector) -> set[str]:
    """Return the names of the views of an SQLite file, in lower case.

    Reading a view may take for ever, and SQLite has no server that would limit it. new-api has no views.
    """
    return {name.lower() for name in inspector.get_view_names()} if inspector.dialect.name == "sqlite" else set()


def _columns(inspector: Inspector, name: str) -> dict[str, Any]:
    """Return the columns of a table with their types; none if there is no such table."""
    try:
        return {column["name"]: column["type"] for column in inspector.get_columns(name)}
    except NoSuchTableError:
        return {}
