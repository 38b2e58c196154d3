"""Quota usage of API keys, at ``/api/usage/token`` of any WSGI application."""

from typing import TYPE_CHECKING, Any

from .errors import DamagedToken as DamagedToken
from .errors import ModelNotAllowed as ModelNotAllowed
from .errors import OperationConflict as OperationConflict
from .errors import OperationNotFound as OperationNotFound
from .errors import QuotaError as QuotaError
from .errors import QuotaExceeded as QuotaExceeded
from .errors import StoreError as StoreError
from .errors import TokenDisabled as TokenDisabled
from .errors import TokenExpired as TokenExpired
from .errors import TokenNotFound as TokenNotFound
from .errors import UsageMiddlewareError as UsageMiddlewareError
from .operations import Operation as Operation
from .stores import NEED_SQLALCHEMY, load
from .stores import open_store as open_store
from .stores.base import QuotaStore as QuotaStore
from .stores.base import TokenStore as TokenStore
from .stores.memory import MemoryTokenStore as MemoryTokenStore
from .stores.sqlite.sqlite_store import SQLiteTokenStore as SQLiteTokenStore
from .tokens import Token as Token
from .wsgi.authentication import bearer_key as bearer_key
from .wsgi.middleware import UsageMiddleware as UsageMiddleware

if TYPE_CHECKING:
    from .stores.new_api.new_api_store import NewAPITokenStore as NewAPITokenStore
    from .stores.sql.sql_store import SQLAlchemyTokenStore as SQLAlchemyTokenStore


def __getattr__(name: str) -> Any:
    if name in NEED_SQLALCHEMY:
        return load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
