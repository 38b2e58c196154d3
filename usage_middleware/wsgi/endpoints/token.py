"""``GET /api/usage/token``: what a key's token has left, and what it has used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...tokens import Token, wire_form
from .endpoint import TokenEndpoint

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class UsageEndpoint(TokenEndpoint):
    """Answer with a token's usage. The query is ignored."""

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        return f'{{"code":true,"message":"ok","data":{wire_form(token)}}}'
