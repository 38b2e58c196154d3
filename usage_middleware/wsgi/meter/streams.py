"""Reading answers while they pass: event streams and JSON bodies, plain or compressed by gzip.

A reader is fed each chunk as it comes. It keeps only what it still needs, within a bound, and changes nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from .figures import Figures

#: Bytes. A longer line of an event stream, and longer data of one event, is not read.
MOST_EVENT: Final = 2**20
#: Bytes. A larger JSON body is not read.
MOST_JSON: Final = 16 * 2**20
# Values in one JSON text. Each takes some 60 bytes once it is parsed, so text alone does not bound memory.
_MOST_VALUES: Final = 2**20
# Decompressed bytes: at a time, and those after which a ratio that no text has ends the reading (deflate reaches 1032).
_PIECE: Final = 2**16
_MOST_UNCHECKED: Final = 16 * 2**20
_MOST_RATIO: Final = 100

_RESPONSE_ENDS: Final = (b"response.completed", b"response.incomplete", b"response.failed")
# JSON may escape any character. These prefixes begin escapes of letters and of the two other characters in the names
# that matter.
_ESCAPES: Final = (b"\\u006", b"\\u007", b"\\u002e", b"\\u002E", b"\\u005f", b"\\u005F")

_ZERO: Final = ("0", "0.", "0.0", "0.00", "0.000")  # RFC 9110 section 12.4.2

_LF: Final = 10
_CR: Final = 13
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


def parse_json(text: bytes | bytearray) -> Any:
    """Return the value of an untrusted JSON text.

    :raises ValueError: it is not JSON, is nested too deeply, or has too many values.
    """
    # JSON separates values by commas. Commas within strings count too, but text has few of them.
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MOST_VALUES:
        raise ValueError("too many values in one JSON text")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("a JSON text that is nested too deeply") from None


def may_matter(data: bytes) -> bool:
    """Return whether event data can hold what :class:`Figures` looks for.

    Parsing the data of every event would cost several times as much. A quotation mark within a JSON string is escaped,
    so a model's text is hardly ever taken for one of these names. If it is, the data is parsed and found to state
    nothing.
    """
    # OpenAI puts "usage":null into every event of a stream that was asked for its usage.
    if b'"usage' in data and data.count(b'"usage') > data.count(b'"usage":null') + data.count(b'"usage": null'):
        return True
    return (
        (b"error" in data and b'"error"' in data)
        or b"message_stop" in data
        or b"[DONE]" in data
        or (b"response." in data and any(kind in data for kind in _RESPONSE_ENDS))
        or (b"\\u00" in data and any(escape in data for escape in _ESCAPES))
    )


class EventStream:
    """Split a stream of server-sent events, cut into chunks anywhere, and read the figures in its events.

    WHATWG HTML section 9.2.6, "Interpreting an event stream". Unlike in the standard, a last event without a
    blank line after it counts: the service has stated the cost, even if the stream ends there.
    """

    __slots__ = ("_after_cr", "_at_begin", "_data", "_figures", "_kind", "_line", "_line_is_unread", "_size")

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._line = bytearray()  # the beginning of a line that is not complete
        self._line_is_unread = False  # whether that line is too long
        self._after_cr = False  # whether a line feed that follows belongs to the carriage return before it
        self._at_begin = True
        # The event that is not complete: its type, its data lines, and their size. Data that is too large is not kept.
        self._kind = b""
        self._data: list[bytes] = []
        self._size = 0

    @property
    def is_between_events(self) -> bool:
        """Whether no part of an incomplete event was fed."""
        return not (self._line or self._size or self._kind or self._line_is_unread)

    def skip(self, data: bytes) -> bool:
        """Skip a chunk of whole events that do not state the usage, and return whether it was one.

        Most chunks are.
        """
        if (
            not data.endswith((b"\n\n", b"\r\n\r\n"))
            or self._line
            or self._size
            or self._kind
            or self._line_is_unread
            or may_matter(data)
            or (b"error" in data and (b"event: error" in data or b"event:error" in data))
        ):
            return False
        self._after_cr = self._at_begin = False
        return True

    def feed(self, data: bytes) -> None:
        """Read the next chunk of the stream."""
        if not self.skip(data):
            self.read(data)

    def read(self, data: bytes) -> None:
        """Read the next chunk line by line, whatever is in it."""
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
            self._after_cr = False
        if not data:
            return
        lines = data.splitlines()
        last = data[-1]
        self._after_cr = last == _CR
        rest = b"" if last in (_LF, _CR) else lines.pop()
        if lines:
            lines[0] = self._joined(lines[0])
            for line in lines:
                self._take_line(line)
        if rest and not self._line_is_unread:
            self._line += rest
            if len(self._line) > MOST_EVENT:
                self._line.clear()
                self._line_is_unread = True

    def end(self) -> None:
        """Read what came last as if a line end and a blank line had followed."""
        if not self.is_between_events:
            self._take_line(self._joined(b""))
            self._take_line(b"")

    def _joined(self, rest: bytes) -> bytes:
        """Return the line that ends with ``rest``."""
        if self._line_is_unread:
            self._line_is_unread = False
            self._leave_event_unread()
            return b":"  # a comment
        if self._line:
            rest = bytes(self._line) + rest
            self._line.clear()
        return rest

    def _leave_event_unread(self) -> None:
        self._data.clear()
        self._size = MOST_EVENT + 1

    def _take_line(self, line: bytes) -> None:
        if self._at_begin:
            self._at_begin = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            self._take_event()
            return
        if len(line) > MOST_EVENT:
            self._leave_event_unread()
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            # The line feed that joins data lines counts, because a line may be empty.
            self._size += len(value) + 1
            if self._size > MOST_EVENT:
                self._leave_event_unread()
                return
            value = value.removeprefix(b" ")
            self._data.append(value)
            # A client that reads line by line acts on this line at once.
            if value == b"[DONE]" and len(self._data) == 1:
                self._figures.complete = True
        elif field == b"event":
            self._kind = value.removeprefix(b" ")

    def _take_event(self) -> None:
        kind, size, data = self._kind, self._size, b"\n".join(self._data)
        self._kind = b""
        self._size = 0
        self._data.clear()
        if kind == b"error":
            self._figures.failed = self._figures.complete = True
        elif size <= MOST_EVENT and may_matter(data):
            try:
                message = parse_json(data)
            except ValueError:
                return  # text, or JSON that no client can read either
            self._figures.take_event(message)


class JSONBody:
    """Collect a JSON body and read the figures in it at its end."""

    __slots__ = ("_body", "_figures", "_size")

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._body = bytearray()
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Keep the next chunk of the body."""
        self._size += len(data)
        if self._size <= MOST_JSON:
            self._body += data
        elif self._body:
            self._body = bytearray()

    def end(self) -> None:
        """Read the body that was collected."""
        body, self._body = self._body, bytearray()
        if not body:
            return
        try:
            message = parse_json(body)
        except ValueError:
            return
        self._figures.take_body(message)


class Gunzipped:
    """Decompress a copy of a body for another reader."""

    __slots__ = ("_decompressor", "_feed", "_read", "_written")

    def __init__(self, feed: Callable[[bytes], None]) -> None:
        self._feed = feed
        self._decompressor: Any = None
        self._read = 0
        self._written = 0
        self._begin()

    def feed(self, data: bytes) -> None:
        """Decompress the next chunk of the body."""
        if self._decompressor is None:
            return
        try:
            for piece in self._pieces(data):
                self._feed(piece)
        except zlib.error:
            self._decompressor = None  # not gzip: the client cannot read it either

    def _begin(self) -> None:
        self._decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's header and check

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        self._read += len(data)
        piece = b""
        # After a piece of full size, the same input may yield more.
        while data or len(piece) == _PIECE:
            if self._decompressor.eof:
                # RFC 1952 section 2.2: a file may have several members.
                self._begin()
            piece = self._decompressor.decompress(data, _PIECE)
            self._written += len(piece)
            if self._written > max(_MOST_UNCHECKED, self._read * _MOST_RATIO):
                self._decompressor = None
                return
            if piece:
                yield piece
            data = self._decompressor.unused_data if self._decompressor.eof else self._decompressor.unconsumed_tail


def narrowed_encoding(accept_encoding: str) -> str:
    """Return an ``Accept-Encoding`` that asks for nothing but what a reader can decode: gzip, if the client takes it.

    Without the header, a service may choose any coding (RFC 9110 section 12.5.3).
    """
    for item in accept_encoding.lower().split(","):
        coding, _, weight = item.partition(";")
        if coding.strip() in ("gzip", "x-gzip", "*"):
            _, _, value = weight.partition("=")
            return "identity" if value.strip() in _ZERO else "gzip"
    return "identity"
