"""``GET /api/log/token``: the charges and refunds of a token, newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...checks import MAX_INTEGER
from ...log import LOG_KINDS, KeepsLog, LogEntry, LogKind
from ...stores.base import TokenStore
from ...tokens import Token
from ..authentication import Authentication
from ..responses import ResponsesByOrigin, to_json
from .endpoint import TokenEndpoint
from .query import query_of, whole_number

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_MOST_ROWS: Final = 1000
_MOST_ROWS_OF_PAGE: Final = 100
_TYPES: Final[dict[LogKind, int]] = {"charge": 2, "refund": 6}


class LogEndpoint(TokenEndpoint):
    """Answer with a store's log in new-api's form. It is empty if the store does not keep one.

    As in new-api, a parameter that is not a number in its range is ignored.
    """

    def __init__(self, responses: ResponsesByOrigin, authentication: Authentication, store: TokenStore) -> None:
        super().__init__(responses, authentication)
        self._store = store if isinstance(store, KeepsLog) else None

    def describe(self, token: Token, environ: WSGIEnvironment) -> str:
        parameters = {name: whole_number(values[0]) or 0 for name, values in query_of(environ).items()}
        kind = parameters.get("type", 0)
        kinds = [name for name in LOG_KINDS if kind in (0, _TYPES[name])]
        offset, size = _page(parameters)
        rows = []
        if self._store is not None and token.id is not None and kinds and offset + size <= MAX_INTEGER:
            entries = self._store.log(
                token.id,
                kinds=kinds,
                since=parameters.get("start_timestamp", 0),
                until=parameters.get("end_timestamp", 0) or MAX_INTEGER,
                offset=offset,
                size=size,
            )
            rows = [_row(number, token, entry) for number, entry in enumerate(entries, offset + 1)]
        return to_json({"success": True, "message": "", "data": rows})


def _page(parameters: dict[str, int]) -> tuple[int, int]:
    """Return how many rows come before the page, and how many the page may have."""
    if "p" not in parameters:
        return 0, _MOST_ROWS
    size = min(parameters.get("page_size", 0) or _MOST_ROWS_OF_PAGE, _MOST_ROWS_OF_PAGE)
    return (max(parameters["p"], 1) - 1) * size, size


def _row(number: int, token: Token, entry: LogEntry) -> dict[str, Any]:
    # Every field of new-api's row, always of its type: clients are written in typed languages, and some call a method
    # of a text without a check. What is not known here has new-api's empty value.
    return {
        "id": number,
        "user_id": 0,
        "created_at": entry.created_at,
        "type": _TYPES[entry.kind],
        "content": "",
        "username": "",
        "token_name": token.name,
        "model_name": entry.model,
        "quota": entry.units,
        "prompt_tokens": entry.input_tokens,
        "completion_tokens": entry.output_tokens,
        "use_time": entry.seconds,
        "is_stream": entry.is_stream,
        "channel": 0,
        "channel_name": "",
        "token_id": token.id,
        "group": "default",
        "ip": "",
        "request_id": entry.id,
        "other": "",
    }
