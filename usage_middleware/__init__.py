"""Quota usage of API keys, at ``/api/usage/token`` of any WSGI application."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .accounts import Account as Account
from .accounts import Changes as Changes
from .accounts import Lookup as Lookup
from .accounts import Step as Step
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
from .errors import UpstreamError as UpstreamError
from .errors import UpstreamTimeout as UpstreamTimeout
from .errors import UsageMiddlewareError as UsageMiddlewareError
from .log import LogEntry as LogEntry
from .operations import Operation as Operation
from .stores import NEED_SQLALCHEMY, load
from .stores import open_store as open_store
from .stores.base import QuotaStore as QuotaStore
from .stores.base import TokenStore as TokenStore
from .stores.findings import Finding as Finding
from .stores.memory import MemoryTokenStore as MemoryTokenStore
from .stores.sqlite.sqlite_store import SQLiteTokenStore as SQLiteTokenStore
from .stores.transaction import Transaction as Transaction
from .tokens import Token as Token
from .tokens import TokenRecord as TokenRecord
from .usage import DayUsage as DayUsage
from .wsgi.authentication import bearer_key as bearer_key
from .wsgi.authentication import llm_key as llm_key
from .wsgi.endpoints.new_api import NewAPI as NewAPI
from .wsgi.middleware import UsageMiddleware as UsageMiddleware

if TYPE_CHECKING:
    from .stores.new_api.new_api_store import NewAPITokenStore as NewAPITokenStore
    from .stores.sql.sql_store import SQLAlchemyTokenStore as SQLAlchemyTokenStore
    from .wsgi.meter.costs import Cost as Cost
    from .wsgi.meter.costs import CostReader as CostReader
    from .wsgi.meter.costs import FromHeader as FromHeader
    from .wsgi.meter.costs import PerRequest as PerRequest
    from .wsgi.meter.costs import Usage as Usage
    from .wsgi.meter.llm_usage import LLMUsage as LLMUsage
    from .wsgi.meter.llm_usage import Prices as Prices
    from .wsgi.meter.llm_usage import per_million as per_million
    from .wsgi.meter.request_body import requested_model as requested_model
    from .wsgi.meter.settlement import Settlement as Settlement
    from .wsgi.meter.usage_meter import UsageMeter as UsageMeter
    from .wsgi.proxy import Proxy as Proxy

__all__ = [
    "Account",
    "Changes",
    "Cost",
    "CostReader",
    "DamagedToken",
    "DayUsage",
    "Finding",
    "FromHeader",
    "LLMUsage",
    "LogEntry",
    "Lookup",
    "MemoryTokenStore",
    "ModelNotAllowed",
    "NewAPI",
    "NewAPITokenStore",
    "Operation",
    "OperationConflict",
    "OperationNotFound",
    "PerRequest",
    "Prices",
    "Proxy",
    "QuotaError",
    "QuotaExceeded",
    "QuotaStore",
    "SQLAlchemyTokenStore",
    "SQLiteTokenStore",
    "Settlement",
    "Step",
    "StoreError",
    "Token",
    "TokenDisabled",
    "TokenExpired",
    "TokenNotFound",
    "TokenRecord",
    "TokenStore",
    "Transaction",
    "UpstreamError",
    "UpstreamTimeout",
    "Usage",
    "UsageMeter",
    "UsageMiddleware",
    "UsageMiddlewareError",
    "bearer_key",
    "llm_key",
    "open_store",
    "per_million",
    "requested_model",
]

# The modules of the meter and of the proxy. They need werkzeug and http.client, whose imports take as long as those of
# everything else here.
_LATER = {
    **dict.fromkeys(("Cost", "CostReader", "FromHeader", "PerRequest", "Usage"), ".wsgi.meter.costs"),
    **dict.fromkeys(("LLMUsage", "Prices", "per_million"), ".wsgi.meter.llm_usage"),
    "Proxy": ".wsgi.proxy",
    "Settlement": ".wsgi.meter.settlement",
    "UsageMeter": ".wsgi.meter.usage_meter",
    "requested_model": ".wsgi.meter.request_body",
}


def __getattr__(name: str) -> Any:
    if name in NEED_SQLALCHEMY:
        return load(name)
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
