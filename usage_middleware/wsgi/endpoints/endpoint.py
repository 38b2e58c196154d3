"""The base of all endpoints: methods, CORS, and the way from a key to an answer about its token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ...tokens import Token
from ..authentication import Authentication
from ..refusals import METHOD, Refused
from ..responses import Response, ResponsesByOrigin

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Endpoint(ABC):
    """Answer ``GET`` and ``HEAD`` alike. The caller leaves out the body of an answer to ``HEAD``."""

    def __init__(self, responses: ResponsesByOrigin) -> None:
        self._responses = responses

    def __call__(self, environ: WSGIEnvironment) -> Response:
        responses = self._responses.of(environ)
        method = environ["REQUEST_METHOD"]
        if method == "OPTIONS":
            return responses.preflight(environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", ""))
        try:
            if method != "GET" and method != "HEAD":
                raise Refused(METHOD)
            return responses.ok(self.body(environ))
        except Refused as refused:
            return responses.refusal(refused)

    @abstractmethod
    def body(self, environ: WSGIEnvironment) -> bytes:
        """Return the JSON body of a success.

        :raises Refused: the request is refused.
        """


class TokenEndpoint(Endpoint):
    """Describe the token of the key that a request carries."""

    def __init__(self, responses: ResponsesByOrigin, authentication: Authentication) -> None:
        super().__init__(responses)
        self._authentication = authentication

    def body(self, environ: WSGIEnvironment) -> bytes:
        # Parameters are read only after the token is found, so a refusal of the key is the same whatever else is wrong.
        authentication = self._authentication
        return authentication.ask(environ, lambda key: self.describe(authentication.token(key), environ).encode())

    @abstractmethod
    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        """Return the JSON text that answers a request with the key of ``token``. It may ask the store.

        :raises Refused: a parameter of the request is wrong.
        """
