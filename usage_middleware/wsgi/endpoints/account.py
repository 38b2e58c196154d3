"""``GET /api/user/self``: the account of a user of new-api, which the token of the key stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...stores.base import QuotaStore, TokenStore
from ...tokens import Token
from ..authentication import Authentication
from ..responses import ResponsesByOrigin, to_json
from .endpoint import TokenEndpoint

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class AccountEndpoint(TokenEndpoint):
    """Describe a token as new-api describes a user. The header ``New-Api-User`` is ignored."""

    def __init__(self, responses: ResponsesByOrigin, authentication: Authentication, store: TokenStore) -> None:
        super().__init__(responses, authentication)
        self._store = store

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        account = {
            "id": token.id or 0,
            "username": token.name,
            "display_name": token.name,
            "role": 1,  # an ordinary user
            "status": 1,  # enabled
            "group": "default",
            "quota": token.total_available,
            "used_quota": token.total_used,
            "request_count": self._request_count(token),
        }
        return to_json({"success": True, "message": "", "data": account})

    def _request_count(self, token: Token) -> int:
        # Other stores do not count requests.
        if isinstance(self._store, QuotaStore) and token.id is not None:
            return self._store.count_requests(token.id)
        return 0
