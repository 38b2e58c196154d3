"""Parse the answer of an HTTP service from the bytes of its connection, without input or output of its own.

A proxy has to be stricter than a client. :class:`http.client.HTTPResponse` drops the headers that follow a malformed
one, splits a header at a lone CR, takes 103 for the final answer, reads ``-5`` and ``1_0`` as sizes of chunks, and
returns a body that was cut off as if it were whole. It also cannot stop within a chunk to send more of the request.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

from ...errors import UpstreamError

# The limits of http.client: bytes of a line, and lines of a head or of a trailer.
_LINE_SIZE: Final = 65_536
_MOST_FIELDS: Final = 100
_MOST_INTERIM_ANSWERS: Final = 100

# RFC 9112 section 4. Many services send no reason, and some leave out the space before it.
_STATUS_LINE: Final = re.compile(rb"HTTP/(1\.[0-9]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?\r?\n")
# RFC 9110 section 5.5, without folded lines. White space before the colon is wrong, and RFC 9112 section 5.1
# requires that a proxy removes it.
_FIELD_LINE: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*:([\t -~\x80-\xff]*)\r?\n")
_CONTENT_LENGTH: Final = re.compile(r"[0-9]{1,18}")
# RFC 9112 section 7.1, with extensions, which a recipient ignores.
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?\r?\n")
_LINE_ENDS: Final = (b"\r\n", b"\n")


class Answer(NamedTuple):
    """The head of a final answer."""

    status: int
    reason: str
    version: str  # "1.1"
    headers: list[tuple[str, str]]
    has_body: bool


class AnswerReader:
    """Read one answer, from bytes that may be cut anywhere.

    :ivar parts: the :class:`Answer`, then the pieces of its body. ``None`` among them asks for more bytes, which the
        caller passes to :meth:`feed`. It raises :exc:`UpstreamError` if the answer is not valid or not complete.
    """

    def __init__(self, method: str) -> None:
        self.parts = self._read(method)
        self._data = b""
        self._at = 0  # the end of the part that has been used
        self._has_ended = False

    def feed(self, data: bytes) -> None:
        """Add received bytes. ``b""`` means the end of the connection."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0
        self._has_ended = not data

    def _read(self, method: str) -> Iterator[Answer | bytes | None]:
        for _ in range(_MOST_INTERIM_ANSWERS):
            line = yield from self._line()
            match = _STATUS_LINE.fullmatch(line)
            if match is None:
                raise UpstreamError("its answer has no valid status line")
            version, status, reason = match[1].decode(), int(match[2]), (match[3] or b"").decode("latin-1").strip()
            headers = yield from self._fields()
            if status == 101:
                raise UpstreamError("it switches to a protocol that it was not asked for")
            if status >= 200:
                break
        else:
            raise UpstreamError("it sends interim answers without end")
        is_chunked, length = _framing(version, headers)
        has_body = method != "HEAD" and status not in (204, 304) and length != 0
        yield Answer(status, reason, version, headers, has_body)
        if not has_body:
            return
        if is_chunked:
            yield from self._chunks()
        elif length is not None:
            yield from self._counted(length)
        else:
            yield from self._to_the_end()

    def _counted(self, size: int) -> Iterator[bytes | None]:
        while size:
            available = len(self._data) - self._at
            if not available:
                if self._has_ended:
                    raise UpstreamError(f"it closed the connection {size} bytes before the end")
                yield None
                continue
            piece = self._data[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes | None]:
        while True:
            match = _CHUNK_SIZE.fullmatch((yield from self._line()))
            if match is None:
                raise UpstreamError("its answer has a malformed chunk")
            size = int(match[1], 16)
            if not size:
                yield from self._fields()  # trailers, which WSGI cannot pass on
                return
            yield from self._counted(size)
            if (yield from self._line()) not in _LINE_ENDS:
                raise UpstreamError("its answer has a chunk that is longer than its size")

    def _to_the_end(self) -> Iterator[bytes | None]:
        while not self._has_ended:
            if self._at < len(self._data):
                yield self._data[self._at :]
                self._at = len(self._data)
            yield None

    def _line(self) -> Generator[None, None, bytes]:
        searched = 0  # bytes of the line
        while (end := self._data.find(b"\n", self._at + searched) + 1) == 0:
            searched = len(self._data) - self._at
            if searched > _LINE_SIZE:
                break
            if self._has_ended:
                raise UpstreamError("it closed the connection")
            yield None
        if not 0 < end - self._at <= _LINE_SIZE:
            raise UpstreamError(f"its answer has a line of more than {_LINE_SIZE} bytes")
        line = self._data[self._at : end]
        self._at = end
        return line

    def _fields(self) -> Generator[None, None, list[tuple[str, str]]]:
        """Read header or trailer lines up to the empty one."""
        fields: list[tuple[str, str]] = []
        while (line := (yield from self._line())) not in _LINE_ENDS:
            match = _FIELD_LINE.fullmatch(line)
            if match is None:
                raise UpstreamError("its answer has a malformed header")
            if len(fields) == _MOST_FIELDS:
                raise UpstreamError(f"its answer has more than {_MOST_FIELDS} headers")
            fields.append((match[1].decode(), match[2].strip(b" \t").decode("latin-1")))
        return fields


def _framing(version: str, headers: list[tuple[str, str]]) -> tuple[bool, int | None]:
    """Return whether the body is chunked, and its length if that is known otherwise (RFC 9112 section 6.3)."""
    codings = [value.lower() for name, value in headers if name.lower() == "transfer-encoding"]
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    if codings and (lengths or version == "1.0"):
        raise UpstreamError("its answer is framed by Transfer-Encoding and in another way")
    if codings and codings != ["chunked"]:
        raise UpstreamError("its answer has a Transfer-Encoding other than 'chunked'")
    if not lengths:
        return bool(codings), None
    if len(lengths) > 1 or not _CONTENT_LENGTH.fullmatch(lengths[0]):
        raise UpstreamError("its answer has no valid Content-Length")
    return False, int(lengths[0])
