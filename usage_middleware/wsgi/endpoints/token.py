"""``GET /api/usage/token``: what is left of the token of a key, and what was used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...tokens import Token, wire_form
from .endpoint import TokenEndpoint

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class UsageEndpoint(TokenEndpoint):
    """The endpoint that the package is named after. It ignores the query."""

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        return '{"code":true,"message":"ok","data":%s}' % wire_form(token)
