"""The tables of a :class:`~usage_middleware.SQLAlchemyTokenStore`, as its statements use them.

Their names begin with ``usage_``, as the database may also have tables of the host service. :mod:`.sql_migrations`
makes them.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    Double,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from ...checks import TEXT_MAX_LENGTH

MYSQL: Final = ("mysql", "mariadb")

_UTF8_MAX_BYTES: Final = 4  # of one character


class _Identifier(TypeDecorator[str]):
    """Text that is compared byte for byte.

    MySQL compares text by a collation: most ignore case, and many ignore spaces at the end. Its binary strings are
    exact.
    """

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL:
            return dialect.type_descriptor(mysql.VARBINARY(TEXT_MAX_LENGTH * _UTF8_MAX_BYTES))
        return dialect.type_descriptor(String(TEXT_MAX_LENGTH))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        return value.encode() if value is not None and dialect.name in MYSQL else value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return bytes(value).decode() if value is not None and dialect.name in MYSQL else value


_Digest: Final = LargeBinary(32).with_variant(mysql.BINARY(32), *MYSQL)

_metadata = MetaData()

tokens = Table(
    "usage_tokens",
    _metadata,
    Column("id", BigInteger, primary_key=True),
    Column("hint", Text),
    Column("name", Text),
    Column("total_available", BigInteger),
    Column("total_used", BigInteger),
    Column("unlimited_quota", Boolean),
    Column("model_limits", Text),
    Column("model_limits_enabled", Boolean),
    Column("expires_at", BigInteger),
    Column("enabled", Boolean),
    Column("created_at", BigInteger),
    Column("renewal", Text),
    Column("renewal_quota", BigInteger),
    Column("renews_at", BigInteger),
    Column("held", BigInteger),
    Column("digest", _Digest),
)

# The digests of deleted and rotated keys, so that none of them can return.
retired_keys = Table("usage_retired_keys", _metadata, Column("digest", _Digest, primary_key=True))

operations = Table(
    "usage_operations",
    _metadata,
    Column("number", BigInteger, primary_key=True),
    Column("id", _Identifier),
    Column("token_id", BigInteger),
    Column("kind", Text),
    Column("amount", BigInteger),
    Column("idempotency_key", _Identifier),
    Column("model", _Identifier),
    Column("held", BigInteger),
    Column("unlimited", Boolean),
    Column("at_least", BigInteger),
    Column("expires_in", Double),
    Column("expires_at", Double),
    Column("final_amount", BigInteger),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("refund_of", _Identifier),
    Column("created_at", Double),
    Column("changed_at", Double),
    # The reservation's expires_at while it is open and holds units. An index on it finds what has lapsed and nothing
    # else; not every database has an index with a condition.
    Column("lapses_at", Double),
)

model_usage = Table(
    "usage_models",
    _metadata,
    Column("token_id", BigInteger, primary_key=True),
    Column("model", _Identifier, primary_key=True),
    Column("used", BigInteger),
)

usage_by_day = Table(
    "usage_days",
    _metadata,
    Column("token_id", BigInteger, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("model", _Identifier, primary_key=True),
    Column("used", BigInteger),
    Column("requests", BigInteger),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
)

TABLES: Final = frozenset(_metadata.tables)
