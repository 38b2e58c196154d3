"""Why a request is refused, apart from how the refusal looks: code raises :class:`Refused`, an endpoint renders it.

So one authentication serves endpoints whose refusals look different. A :class:`Problem` is what one kind of refusal
looks like, without its body; :mod:`.responses` puts both together.
"""

from __future__ import annotations

from typing import Final, NamedTuple

Header = tuple[str, str]

# The kinds that authentication and every endpoint know. They are plain text, so another package can add its own.
NO_KEY: Final = "no key"
MALFORMED: Final = "malformed"
#: Unknown, deleted or disabled: the answer must not show which.
UNKNOWN: Final = "unknown"
THROTTLED: Final = "throttled"
UNAVAILABLE: Final = "unavailable"
METHOD: Final = "method"
PARAMETER: Final = "parameter"
NOT_FOUND: Final = "not found"

METHODS: Final = "GET, HEAD, OPTIONS"


class Refused(Exception):
    """A request that does not get what it asked for.

    :param kind: which entry of the endpoint's table of problems it is.
    :param message: the message for the client, if the table's own does not say enough.
    :param retry_after: the seconds after which the client may retry; 0: it should not.
    """

    def __init__(self, kind: str, *, message: str = "", retry_after: int = 0) -> None:
        super().__init__(kind)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after


class Problem(NamedTuple):
    """What one kind of refusal looks like on the wire."""

    status: str
    message: str
    headers: tuple[Header, ...] = ()


# RFC 6750 section 3.1: a request without any credentials gets no error code, and invalid_token is also the error of a
# token that is expired, revoked or malformed.
CHALLENGE: Final = ("WWW-Authenticate", "Bearer")
INVALID_TOKEN: Final = ("WWW-Authenticate", 'Bearer error="invalid_token"')

PROBLEMS: Final[dict[str, Problem]] = {
    NO_KEY: Problem("401 Unauthorized", "No Authorization header", (CHALLENGE,)),
    MALFORMED: Problem("401 Unauthorized", "Invalid Bearer token", (INVALID_TOKEN,)),
    UNKNOWN: Problem("401 Unauthorized", "token not found", (INVALID_TOKEN,)),
    THROTTLED: Problem("429 Too Many Requests", "Too Many Requests"),
    UNAVAILABLE: Problem("503 Service Unavailable", "Service Unavailable"),
    METHOD: Problem("405 Method Not Allowed", "Method Not Allowed", (("Allow", METHODS),)),
    PARAMETER: Problem("400 Bad Request", "Bad Request"),
    NOT_FOUND: Problem("404 Not Found", "Not Found"),
}
