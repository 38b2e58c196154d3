"""new-api's other endpoints, for clients that ask them too: ``new_api=NewAPI(…)``.

new-api (QuantumNous/new-api) is the gateway that the clients were written for. Without these endpoints, some
clients show nothing or call a valid key wrong. Only ``/api/status`` says what a quota unit is.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ...stores.base import TokenStore
from ..authentication import Authentication
from ..responses import ResponsesByOrigin, to_json
from .account import AccountEndpoint
from .billing import SubscriptionEndpoint, UsedEndpoint
from .endpoint import Endpoint
from .request_log import LogEndpoint

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_DISPLAYS: Final = ("USD", "TOKENS")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAPI:
    """Turn on new-api's other endpoints, and say what a quota unit is.

    :param quota_per_unit: how many quota units are one US dollar. Clients that do not ask ``/api/status``
        assume 500,000, whatever this is.
    :param display: whether clients that ask ``/api/status`` show dollars or quota units.
    :param system_name: what clients call this service.
    :raises TypeError, ValueError: an argument cannot be used.
    """

    quota_per_unit: int = 500_000
    display: Literal["USD", "TOKENS"] = "USD"
    system_name: str = "usage-middleware"

    def __post_init__(self) -> None:
        if type(self.quota_per_unit) is not int:
            raise TypeError(f"quota_per_unit must be an int of quota units, got {self.quota_per_unit!r}")
        if self.quota_per_unit < 1:
            raise ValueError(f"quota_per_unit must be 1 or more quota units, got {self.quota_per_unit}")
        if self.display not in _DISPLAYS:
            raise ValueError(f"display must be 'USD' or 'TOKENS', got {self.display!r}")
        if not isinstance(self.system_name, str):
            raise TypeError(f"system_name must be a str, got {self.system_name!r}")
        try:
            self.system_name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"system_name must be text that UTF-8 can carry, got {self.system_name!r}") from None

    @property
    def divisor(self) -> int:
        """How many quota units are one unit of what clients show."""
        return self.quota_per_unit if self.display == "USD" else 1


class StatusEndpoint(Endpoint):
    """``GET /api/status``: what a client must know before it asks for a key's usage. It does not need a key."""

    def __init__(self, responses: ResponsesByOrigin, options: NewAPI) -> None:
        super().__init__(responses)
        status = {
            "system_name": options.system_name,
            "version": _version(),
            "quota_per_unit": options.quota_per_unit,
            "display_in_currency": options.display == "USD",
            "quota_display_type": options.display,
        }
        self._body = to_json({"success": True, "message": "", "data": status}).encode()

    def body(self, environ: WSGIEnvironment) -> bytes:
        return self._body


def new_api_endpoints(
    options: NewAPI,
    store: TokenStore,
    authentication: Authentication,
    responses: ResponsesByOrigin,
    billing_responses: ResponsesByOrigin,
) -> dict[str, Endpoint]:
    """Return the endpoints by their paths.

    :param billing_responses: for the endpoints that were first OpenAI's. Their errors look like OpenAI's.
    """
    subscription = SubscriptionEndpoint(billing_responses, authentication, options.divisor)
    used = UsedEndpoint(billing_responses, authentication, options.divisor, store)
    return {
        "/api/status": StatusEndpoint(responses, options),
        "/api/log/token": LogEndpoint(responses, authentication, store),
        "/api/user/self": AccountEndpoint(responses, authentication, store),
        "/dashboard/billing/subscription": subscription,
        "/v1/dashboard/billing/subscription": subscription,
        "/dashboard/billing/usage": used,
        "/v1/dashboard/billing/usage": used,
    }


def _version() -> str:
    try:
        return importlib.metadata.version("usage-middleware")
    except importlib.metadata.PackageNotFoundError:  # a copy that is not installed
        return ""
