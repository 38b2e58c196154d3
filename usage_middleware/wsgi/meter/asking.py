"""Ask an OpenAI-compatible service to state the usage of a stream, without the client noticing.

A stream has its usage only if ``stream_options.include_usage`` asks for it, in an event whose ``choices`` are empty.
Clients that have not asked do not expect that event: many read ``choices[0]``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from werkzeug.exceptions import BadRequest

from .figures import Figures
from .request_body import request_body
from .streams import MOST_EVENT, EventStream

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Bytes of an event, including comments. A larger event is passed on as it comes.
_MOST_HELD: Final = 2 * MOST_EVENT


def ask_for_usage(environ: WSGIEnvironment) -> bool:
    """Set ``stream_options.include_usage`` in a request for a stream.

    :return: whether the client has not set it, so that the event with the usage must be removed.
    :raises BadRequest: it is unclear whether this asks for a stream, or with which options.
    """
    body = request_body(environ)
    member = body.members.get("stream")
    stream = None if member is None else member.value
    if stream is None or stream is False:
        return False
    # Responses and messages always state their usage, and refuse unknown options. Only the path says which of them
    # answers: a client can add any member or header to hide the usage of another stream.
    if environ.get("PATH_INFO", "").rstrip("/").endswith(("/messages", "/responses")):
        return False
    # Some services take 1 and "true" for true.
    if stream is not True:
        raise BadRequest("The request's stream must be true or false.")
    member = body.members.get("stream_options")
    options = {} if member is None or member.value is None else member.value
    if not isinstance(options, dict):
        raise BadRequest("The request's stream_options must be an object.")
    # It comes last, because servers in Go accept names in any case and take the last.
    others = {name: value for name, value in options.items() if name != "include_usage"}
    body.set(environ, "stream_options", json.dumps({**others, "include_usage": True}))
    if options.get("include_usage") is True:
        return False
    environ["HTTP_ACCEPT_ENCODING"] = "identity"  # an event cannot be removed from a compressed stream
    return True


class UsageFilter:
    """Pass the events of a stream on, without the one that holds nothing but the usage.

    An event is passed on when it is complete. That delays no client, as half an event is of no use.
    """

    def __init__(self, stream: EventStream, figures: Figures) -> None:
        self._stream = stream
        self._figures = figures
        self._held = bytearray()  # the received part of an event that is not complete
        self._is_passed_on = False  # whether it is too large to be held

    def pass_on(self, data: bytes) -> bytes:
        """Read a chunk, and return what can be passed on by now."""
        stream, figures, held = self._stream, self._figures, self._held
        if not held and stream.skip(data):
            return data
        if b"\n" not in data and b"\r" not in data and not self._is_passed_on and len(held) + len(data) <= _MOST_HELD:
            held += data
            stream.read(data)
            return b""
        out = bytearray()
        for line in data.splitlines(keepends=True):
            held += line
            extra = figures.extra_events
            stream.read(line)
            if figures.extra_events > extra and not self._is_passed_on:
                held.clear()
            elif stream.is_between_events or self._is_passed_on or len(held) > _MOST_HELD:
                self._is_passed_on = not stream.is_between_events
                out += held
                held.clear()
        return bytes(out)

    def rest(self) -> bytes:
        """Read what came last, and return what is left to be passed on."""
        extra = self._figures.extra_events
        self._stream.end()
        rest = b"" if self._figures.extra_events > extra else bytes(self._held)
        self._held.clear()
        return rest
