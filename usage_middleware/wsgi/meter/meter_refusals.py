"""The meter's answers to requests that it refuses, in the form that LLM clients read.

One body has all that OpenAI's SDK reads and all that Anthropic's reads. The statuses suit both: they do not retry after
a 402 or 403, and retry a 429 twice, after as long as ``Retry-After`` says.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from werkzeug.exceptions import HTTPException

from ..refusals import CHALLENGE, INVALID_TOKEN, MALFORMED, NO_KEY, THROTTLED, UNAVAILABLE, UNKNOWN, Problem, Refused
from ..responses import sdk_error_body

EXPIRED: Final = "expired"
MODEL_NOT_ALLOWED: Final = "model not allowed"
EXHAUSTED: Final = "exhausted"
#: Open reservations hold the rest of the quota. Some of it will be released.
HELD: Final = "held"
#: One kind for each status of a faulty request body.
BODY_STATUSES: Final = (400, 411, 413, 415)

# By kind: the error type, as Anthropic names it, and the code, as OpenAI does.
_TYPES: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys((NO_KEY, MALFORMED, UNKNOWN, EXPIRED), ("authentication_error", "invalid_api_key")),
    THROTTLED: ("rate_limit_error", "rate_limit_exceeded"),
    MODEL_NOT_ALLOWED: ("permission_error", "model_not_allowed"),
    EXHAUSTED: ("billing_error", "insufficient_quota"),
    HELD: ("rate_limit_error", "quota_reserved"),
    UNAVAILABLE: ("api_error", "service_unavailable"),
    **{str(status): ("invalid_request_error", "invalid_request") for status in BODY_STATUSES},
    "413": ("request_too_large", "request_too_large"),
}


def problems(exhausted_status: int) -> dict[str, Problem]:
    """Return what each kind of refusal looks like."""
    unauthorized = _status_line(401)
    return {
        NO_KEY: Problem(
            unauthorized, "The request has no API key. Send it as Authorization: Bearer KEY.", (CHALLENGE,)
        ),
        MALFORMED: Problem(unauthorized, "What the request sends as its API key cannot be one.", (INVALID_TOKEN,)),
        UNKNOWN: Problem(unauthorized, "The API key is not valid.", (INVALID_TOKEN,)),
        EXPIRED: Problem(unauthorized, "The API key has expired.", (INVALID_TOKEN,)),
        THROTTLED: Problem(_status_line(429), "Too many requests with a wrong API key. Try again later."),
        MODEL_NOT_ALLOWED: Problem(_status_line(403), "The API key may not be used for this model."),
        EXHAUSTED: Problem(
            _status_line(exhausted_status),
            "The quota of the API key is used up, or less is left of it than the request may cost.",
            # Both SDKs obey this header, whatever the status.
            (("x-should-retry", "false"),),
        ),
        HELD: Problem(
            _status_line(429), "Requests that are still running have reserved the rest of the quota. Try again soon."
        ),
        UNAVAILABLE: Problem(_status_line(503), "The quota of the API key cannot be checked now. Try again later."),
        **{str(status): Problem(_status_line(status), HTTPStatus(status).phrase) for status in BODY_STATUSES},
    }


def error_body(kind: str, message: str) -> str:
    """Return the body of a refusal."""
    return sdk_error_body(*_TYPES[kind], message)


def refused_body(error: HTTPException) -> Refused | None:
    """Return the refusal for a faulty request body, or ``None`` if it is another error."""
    if error.code not in BODY_STATUSES or error.response is not None:
        return None
    return Refused(str(error.code), message=error.description or "")


def _status_line(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"
