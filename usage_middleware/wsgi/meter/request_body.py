"""Reading the body of a request before the application, which can still read all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BytesIO
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Final, NamedTuple

from werkzeug.exceptions import (
    BadRequest,
    ClientDisconnected,
    LengthRequired,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)
from werkzeug.wsgi import get_content_length, get_input_stream

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: Bytes. A larger body is refused.
MOST_BODY: Final = 32 * 2**20
#: Bytes. A larger body waits for the application on disk.
MOST_IN_MEMORY: Final = 2**20
# Values in a body. Each takes some 60 bytes once it is parsed, so the size of the text does not bound memory.
_MOST_VALUES: Final = 2**20

_PIECE: Final = 2**16
_ENVIRON_KEY: Final = "usage_middleware.request_body"
_WHITE_SPACE: Final = re.compile(r"[ \t\n\r]*")
# In these, the same bytes are the same JSON, but for the letters in its strings.
_CHARSET: Final = re.compile(r'charset="?(?:utf-?(?:8|16|32)|us-ascii|iso-8859-1)"?')
# How a JSON object begins, complete or not.
_OBJECT: Final = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\n\r]*\{[ \t\n\r]*["}]')
_WANTED: Final = frozenset(("model", "stream", "stream_options"))
_DECODER: Final = json.JSONDecoder()


class Member(NamedTuple):
    """The value of a member of a JSON object, and the place of the member in the text."""

    value: object
    begin: int
    end: int


class RequestBody:
    """The body of one request.

    :raises RequestEntityTooLarge: it has more than 32 MiB.
    :raises LengthRequired: neither the client nor the server says where it ends.
    :raises UnsupportedMediaType: it is compressed, or JSON in an unusual charset.
    :raises BadRequest: it is malformed JSON, a JSON object that has a member twice, or was cut.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._file: IO[bytes] = BytesIO()
        self._text = ""
        #: The members of its JSON object that matter here, by their names without regard to case.
        self.members: dict[str, Member] = {}
        if environ.get("HTTP_CONTENT_ENCODING", "").strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType("This service does not take compressed requests.")
        try:
            size = self._read(environ)
            if size:
                self._hand_on(environ, size)
                self._parse(environ.get("CONTENT_TYPE", "").lower())
        except BaseException:
            self.close()
            raise

    def set(self, environ: WSGIEnvironment, name: str, text: str) -> None:
        """Set a member to the JSON value ``text``, for the application to read.

        The rest of the body stays the same byte by byte, including numbers that Python would write differently.
        """
        body = self._whole()
        member = self.members.get(name)
        if member is None:
            begin = body.index("{") + 1
            body = f'{body[:begin]}"{name}":{text},{body[begin:]}'
        else:
            body = f'{body[: member.begin]}"{name}":{text}{body[member.end :]}'
        self.close()
        data = body.encode("utf-8", "surrogatepass")
        self._file = BytesIO(data)
        self._hand_on(environ, len(data))

    def close(self) -> None:
        """Close the file that the body is in."""
        self._file.close()

    def _read(self, environ: WSGIEnvironment) -> int:
        length = get_content_length(environ)
        if length is None and "HTTP_TRANSFER_ENCODING" in environ and not environ.get("wsgi.input_terminated"):
            raise LengthRequired
        # One byte more, so that a body of exactly this size is known to end there.
        stream = get_input_stream(environ, max_content_length=MOST_BODY + 1)
        # HTTP/2 needs neither a length nor chunks, only a server that marks the end of the stream.
        expected = (MOST_BODY + 1 if environ.get("wsgi.input_terminated") else 0) if length is None else length
        size = 0
        while size < expected and (piece := stream.read(min(_PIECE, expected - size))):
            size += len(piece)
            if size > MOST_BODY:
                raise RequestEntityTooLarge
            if size > MOST_IN_MEMORY and isinstance(self._file, BytesIO):
                self._file = self._on_disk(self._file)
            self._file.write(piece)
        if length is not None and size < length:
            raise ClientDisconnected
        return size

    @staticmethod
    def _on_disk(file: BytesIO) -> IO[bytes]:
        on_disk = TemporaryFile()  # noqa: SIM115 - closed by close()
        on_disk.write(file.getbuffer())
        return on_disk

    def _hand_on(self, environ: WSGIEnvironment, size: int) -> None:
        self._file.seek(0)
        environ["wsgi.input"] = self._file
        environ["CONTENT_LENGTH"] = str(size)
        environ.pop("HTTP_TRANSFER_ENCODING", None)

    def _whole(self) -> str:
        self._file.seek(0)
        data = self._file.read()
        self._file.seek(0)
        # As json.loads() decodes: UTF-8, -16 or -32, as an upstream in Python may too.
        return data.decode(json.detect_encoding(data), "surrogatepass")

    def _parse(self, kind: str) -> None:
        try:
            text = self._whole()
            at = _skip(text, 0)
            if text.startswith("{", at):
                self._take_members(text)
                # RFC 8259 section 8.1 requires UTF-8. Some services decode what is declared, and read other members.
                if "charset" in _CHARSET.sub("", kind):
                    raise UnsupportedMediaType("This service takes JSON only in UTF-8.")
            elif "json" in kind and at < len(text):
                _check_value(text, at)
        except ValueError:
            self.members.clear()
            if kind == "" or "json" in kind or self._begins_like_an_object():
                raise BadRequest("The request's body is not valid JSON.") from None

    def _take_members(self, text: str) -> None:
        for name, member in _members(text):
            # Servers in Go accept names in any case, even a long s (U+017F). Services disagree about which of two
            # members with the same name counts.
            name = name.casefold()
            if name in _WANTED:
                if name in self.members:
                    raise BadRequest(f"The request has more than one {name}.")
                self.members[name] = member

    def _begins_like_an_object(self) -> bool:
        """Return whether a service that ignores the type of the body, and what follows an object, may read one."""
        self._file.seek(0)
        data = self._file.read()
        self._file.seek(0)
        return _OBJECT.match(data) is not None


def request_body(environ: WSGIEnvironment) -> RequestBody:
    """Return the body of the request. The first call reads it."""
    body: RequestBody | None = environ.get(_ENVIRON_KEY)
    if body is None:
        body = environ[_ENVIRON_KEY] = RequestBody(environ)
    return body


def read_body(environ: WSGIEnvironment) -> RequestBody | None:
    """Return what :func:`request_body` returned, if it was called."""
    body: RequestBody | None = environ.get(_ENVIRON_KEY)
    return body


def close_request_body(environ: WSGIEnvironment) -> None:
    """Close what :func:`request_body` opened, if it was called."""
    body = read_body(environ)
    if body is not None:
        body.close()


def requested_model(environ: WSGIEnvironment) -> str | None:
    """Return the ``"model"`` of a JSON request body, for ``UsageMeter(model=requested_model)``.

    A request without a body, or with one that is not a JSON object, names no model. Then its token's model limits do
    not apply. So keep paths that take another kind of body (a form with a file) from holders that may not use them, or
    pass a function of your own that names their model.

    :param environ: the request's WSGI environment. ``wsgi.input`` is replaced, and can be read from its beginning.
    :raises werkzeug.exceptions.HTTPException: the body has more than 32 MiB, no length or a content coding, is cut or
        is malformed. The meter answers with its status.
    """
    member = request_body(environ).members.get("model")
    if member is None or member.value is None:
        return None
    if not isinstance(member.value, str):
        raise BadRequest("The request's model must be a string.")
    return member.value or None


def _members(text: str) -> Iterator[tuple[str, Member]]:
    """Yield the members of a JSON object one by one, so that no more than one of them is in memory.

    :raises ValueError: the text is not a JSON object, is nested too deeply, or has too many values.
    """
    _check_size(text)
    at = _skip(text, _expect(text, _skip(text, 0), "{"))
    if not text.startswith("}", at):
        while True:
            begin = at
            name, at = _decode(text, begin)
            if not isinstance(name, str):
                raise ValueError("a name must be a string")
            value, end = _decode(text, _skip(text, _expect(text, _skip(text, at), ":")))
            yield name, Member(value, begin, end)
            at = _skip(text, end)
            if not text.startswith(",", at):
                break
            at = _skip(text, at + 1)
    if _skip(text, _expect(text, at, "}")) != len(text):
        raise ValueError("more than one JSON value")


def _check_value(text: str, at: int) -> None:
    """:raises ValueError: the text that begins at ``at`` is not one JSON value."""
    _check_size(text)
    if _skip(text, _decode(text, at)[1]) != len(text):
        raise ValueError("more than one JSON value")


def _check_size(text: str) -> None:
    if text.count(",") + text.count("[") + text.count("{") > _MOST_VALUES:
        raise ValueError("too many values in one JSON text")


def _decode(text: str, at: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("a JSON text that is nested too deeply") from None


def _expect(text: str, at: int, character: str) -> int:
    if not text.startswith(character, at):
        raise ValueError(f"{character} is missing")
    return at + 1


def _skip(text: str, at: int) -> int:
    """Return the end of the white space that begins at ``at``."""
    match = _WHITE_SPACE.match(text, at)
    return match.end() if match else at
