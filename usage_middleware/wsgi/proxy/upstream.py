"""One request to an HTTP service and its answer, on a connection of its own."""

from __future__ import annotations

import selectors
import ssl
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Final

from werkzeug.exceptions import ClientDisconnected

from ...errors import UpstreamError, UpstreamTimeout
from .answers import Answer, AnswerReader

if TYPE_CHECKING:
    from socket import socket

    from .forwarding import RequestBody

_READ_SIZE: Final = 65_536


class Exchange:
    """One request and its answer. The caller must always close it.

    :param connection: a connection that is not open yet. Its timeout applies to connecting.
    :param read_timeout: how many seconds the service may neither send nor take anything.
    :raises UpstreamError: the connection cannot be opened.

    A service may answer before it has read the whole request. If it refuses the request, the rest is not sent.
    Otherwise it is sent while the answer is read.
    """

    def __init__(self, connection: HTTPConnection, read_timeout: float) -> None:
        try:
            connection.connect()
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise UpstreamError(f"it cannot be connected to: {_reason(error)}") from error
            raise
        self._connection = connection
        self._socket: socket = connection.sock
        self._read_timeout = read_timeout
        self._socket.settimeout(read_timeout)
        self._selector: selectors.BaseSelector | None = None
        self._body: RequestBody | None = None  # None: the service gets no more of the request
        self._unsent = memoryview(b"")
        self._parts: Iterator[Answer | bytes | None] = iter(())
        self._failure: UpstreamError | None = None
        self._has_answered = False

    def close(self) -> None:
        """Close the connection. A service that is still sending sees that its client is gone."""
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        self._connection.close()
        self._parts, self._failure = iter(()), None

    def ask(self, method: str, head: bytes, body: RequestBody) -> Answer:
        """Send a request and return the head of the final answer."""
        self._reader = AnswerReader(method)
        self._parts = self._reader.parts
        self._body = body
        # Sent together: the buffers of a new connection are empty and take both without waiting.
        self._unsent = memoryview(head if body.ended else head + body.read())
        self._send()
        for part in self._parts:
            if isinstance(part, Answer):
                if part.status >= 300:
                    self._body = None
                self._has_answered = True
                return part
            self._reader.feed(self._receive())
        raise AssertionError("an answer without a head is an UpstreamError")

    def read(self) -> bytes:
        """Return the next part of the body as soon as it arrives, or ``b""`` at its end.

        :raises UpstreamError: the body is incomplete.
        :raises ClientDisconnected: the service is still reading the request, which is incomplete.
        """
        if self._failure is not None:
            raise self._failure
        pieces: list[bytes] = []
        try:
            for part in self._parts:
                if isinstance(part, bytes):
                    pieces.append(part)
                elif pieces:  # what arrives together goes on together, as each piece costs a server a call and a packet
                    break
                else:
                    self._reader.feed(self._receive())
        except UpstreamError as error:
            if not pieces:
                raise
            self._failure = error  # raised after the pieces that came before it
        return b"".join(pieces)

    def _receive(self) -> bytes:
        """Wait for more of the answer. Meanwhile, send what the service takes of the request."""
        while self._body is not None:
            data = self._receive_within(0)
            if data is not None:
                return data
            if self._can_send():
                if not self._unsent:
                    self._unsent = memoryview(self._next_block(self._body))
                self._send()
        data = self._receive_within(self._read_timeout)
        if data is None:
            raise UpstreamTimeout(f"it has been silent for {self._read_timeout:g} s")
        return data

    def _next_block(self, body: RequestBody) -> bytes:
        """Wait for the client to send more of its request."""
        try:
            return body.read()
        except Exception as error:
            if not self._has_answered:
                raise
            raise ClientDisconnected from error

    def _receive_within(self, seconds: float) -> bytes | None:
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(_READ_SIZE)
        # A TLS connection may be readable without any of the answer, as session tickets come before it.
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return None
        except OSError as error:
            raise UpstreamError(f"the connection broke: {_reason(error)}") from error

    def _can_send(self) -> bool:
        """Wait until the service has sent something or takes more. Return whether it takes more."""
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        ready = self._selector.select(self._read_timeout)
        if not ready:
            raise UpstreamTimeout(f"it has taken none of the request for {self._read_timeout:g} s")
        return bool(ready[0][1] & selectors.EVENT_WRITE)

    def _send(self) -> None:
        """Send as much of the block as the service takes."""
        self._socket.settimeout(self._read_timeout)
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except OSError:
            self._body = None  # it takes no more, and may have sent an answer that says why
            return
        if not self._unsent and self._body is not None and self._body.ended:
            self._body = None


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
