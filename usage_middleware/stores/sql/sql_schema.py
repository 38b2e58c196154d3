"""The tables of a :class:`~usage_middleware.SQLAlchemyTokenStore`, and how a database comes by them.

Their names begin with ``usage_``, as they stand among the tables of a service that has its own.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from ...keys import HINT_LENGTH
from ...operations import ID_MAX_LENGTH

MYSQL: Final = ("mysql", "mariadb")
VERSION: Final = 1

_UTF8_MAX_BYTES: Final = 4  # of one character
# Any number that is ours alone: PostgreSQL's advisory locks are told apart by a number (its manual, 13.3.5).
_LOCK_NUMBER: Final = 7_216_885_309_340_021
_LOCK_NAME: Final = "usage_middleware"
_LOCK_SECONDS: Final = 60


class WrongTables(Exception):
    """The database cannot be used; the message goes on after its name."""


class _Identifier(TypeDecorator[str]):
    """Text that is the same only byte for byte.

    MySQL compares text by a collation: most ignore case, and many blanks at the end. Its binary strings are exact.
    """

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL:
            return dialect.type_descriptor(mysql.VARBINARY(ID_MAX_LENGTH * _UTF8_MAX_BYTES))
        return dialect.type_descriptor(String(ID_MAX_LENGTH))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        return value.encode() if value is not None and dialect.name in MYSQL else value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return bytes(value).decode() if value is not None and dialect.name in MYSQL else value


def _table(name: str, *columns: Column[Any]) -> Table:
    options: dict[str, Any] = {f"{dialect}_{k}": value for dialect in MYSQL for k, value in _MYSQL_OPTIONS.items()}
    return Table(name, _metadata, *columns, **options)


_MYSQL_OPTIONS: Final = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}
_Digest: Final = LargeBinary(32).with_variant(mysql.BINARY(32), *MYSQL)
_LongText: Final = Text().with_variant(mysql.LONGTEXT(), *MYSQL)

_metadata = MetaData()

schema = _table("usage_schema", Column("version", Integer, primary_key=True, autoincrement=False))

tokens = _table(
    "usage_tokens",
    Column("id", BigInteger, primary_key=True),
    Column("hint", String(HINT_LENGTH), nullable=False),
    Column("name", _LongText, nullable=False),
    Column("total_available", BigInteger, nullable=False),
    Column("total_used", BigInteger, nullable=False),
    Column("unlimited_quota", Boolean, nullable=False),
    Column("model_limits", _LongText, nullable=False),
    Column("model_limits_enabled", Boolean, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("digest", _Digest, nullable=False, unique=True),
)

# The digests of deleted and rotated keys, so that none of them can return.
retired_keys = _table("usage_retired_keys", Column("digest", _Digest, primary_key=True))

operations = _table(
    "usage_operations",
    Column("number", BigInteger, primary_key=True),
    Column("id", _Identifier, nullable=False, unique=True),
    Column("token_id", BigInteger, nullable=False),
    Column("kind", String(7), nullable=False),
    Column("amount", BigInteger),
    Column("model", _Identifier),
    Column("held", BigInteger, nullable=False),
    Column("unlimited", Boolean, nullable=False),
    Column("expires_in", Double),
    Column("expires_at", Double),
    Column("final_amount", BigInteger),
    Column("refund_of", _Identifier),
    Column("created_at", Double, nullable=False),
    Column("changed_at", Double, nullable=False),
    # Its expires_at while it is open and holds units, so that an index finds what has lapsed and nothing else: not
    # every database has an index with a condition.
    Column("lapses_at", Double),
)
Index("usage_operations_of_token", operations.c.token_id, operations.c.number)
_lapsing = operations.c.lapses_at.is_not(None)
Index("usage_lapsing_of_token", operations.c.token_id, operations.c.lapses_at, postgresql_where=_lapsing)
Index("usage_lapsing", operations.c.lapses_at, postgresql_where=_lapsing)

model_usage = _table(
    "usage_models",
    Column("token_id", BigInteger, primary_key=True, autoincrement=False),
    Column("model", _Identifier, primary_key=True),
    Column("used", BigInteger, nullable=False),
)


def is_current(connection: Connection) -> bool:
    """Whether the database has every table in its newest form. Reads only.

    :raises WrongTables: the database was made by a newer version, or by something else; without its name.
    """
    there = set(inspect(connection).get_table_names())
    if schema.name not in there:
        for name in sorted(there & _metadata.tables.keys()):
            raise WrongTables(f"has a table {name!r} that usage-middleware did not make; choose another database")
        return False
    version: int = connection.execute(select(schema.c.version)).scalar() or 0
    if version > VERSION:
        raise WrongTables(f"was made by a newer usage-middleware (its tables have version {version}); update this one")
    return version == VERSION


def create(connection: Connection) -> None:
    """Makes the tables, however many processes start at once. Commits.

    MySQL commits each statement by itself, so the version is what says that all is there, and comes last.
    """
    if connection.dialect.name in MYSQL:
        parameters = {"name": _LOCK_NAME, "seconds": _LOCK_SECONDS}
        if not connection.execute(text("SELECT GET_LOCK(:name, :seconds)"), parameters).scalar():
            raise WrongTables(f"is being prepared by another process for more than {_LOCK_SECONDS} s")
        try:
            _create(connection)
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _LOCK_NAME})
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK_NUMBER})
        _create(connection)


def _create(connection: Connection) -> None:
    if not is_current(connection):
        schema.create(connection, checkfirst=True)
        _metadata.create_all(connection, checkfirst=True)
        # It makes the indexes of those tables alone that were not there: a process may have died behind one of them.
        for table in _metadata.sorted_tables:
            for index in table.indexes:
                index.create(connection, checkfirst=True)
        connection.execute(schema.insert().values(version=VERSION))
        connection.commit()
