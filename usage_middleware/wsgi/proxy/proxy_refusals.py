"""The proxy's own answers, in the form of the meter's refusals."""

from __future__ import annotations

from typing import Final

from ..refusals import Problem
from ..responses import Responses, sdk_error_body

BAD_REQUEST: Final = "bad request"
LENGTH_REQUIRED: Final = "length required"
NOT_IMPLEMENTED: Final = "not implemented"
BAD_GATEWAY: Final = "bad gateway"
GATEWAY_TIMEOUT: Final = "gateway timeout"

_PROBLEMS: Final = {
    BAD_REQUEST: Problem("400 Bad Request", "The request is malformed."),
    LENGTH_REQUIRED: Problem("411 Length Required", "The server cannot read a request without a Content-Length."),
    NOT_IMPLEMENTED: Problem("501 Not Implemented", "The request asks for something that a proxy cannot do."),
    BAD_GATEWAY: Problem("502 Bad Gateway", "The service cannot be reached, or its answer is invalid."),
    GATEWAY_TIMEOUT: Problem("504 Gateway Timeout", "The service does not answer in time."),
}
# The error type, as Anthropic names it; the code is the kind.
_TYPES: Final = {
    **dict.fromkeys((BAD_REQUEST, LENGTH_REQUIRED, NOT_IMPLEMENTED), "invalid_request_error"),
    BAD_GATEWAY: "api_error",
    GATEWAY_TIMEOUT: "timeout_error",
}


def _error_body(kind: str, message: str) -> str:
    return sdk_error_body(_TYPES[kind], kind.replace(" ", "_"), message)


#: Without CORS, as only the service may allow that.
RESPONSES: Final = Responses(None, problems=_PROBLEMS, error_body=_error_body)
