"""Bodies pass in both directions as they arrive, and when one side ends an exchange, it ends for the other side too.

Nothing here measures time. If something has to happen first, the other side waits for it.
"""

from __future__ import annotations

import io
import socket
import struct
import tracemalloc
from contextlib import ExitStack, suppress
from threading import Event

import pytest
from client import call, environ
from raw_service import WAIT, answering, bodies, serving
from werkzeug.exceptions import ClientDisconnected

from usage_middleware import Proxy, UpstreamError, UpstreamTimeout
from usage_middleware.wsgi.refusals import Refused

HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = HEAD + b"Content-Length: 6\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def started():
    """Return a ``start_response``, and the list of what it was called with."""
    calls = []

    def start_response(status, headers, exc_info=None):
        calls.append((status, headers))
        return calls.append

    return start_response, calls


class Input:
    """A request body in pieces, one for each read, which counts the bytes that were read."""

    def __init__(self, pieces):
        self._pieces = iter(pieces)
        self.size = 0

    def read(self, size):
        piece = next(self._pieces, b"")
        assert len(piece) <= size
        self.size += len(piece)
        return piece


@pytest.mark.parametrize(
    ("head", "first", "last"),
    [
        pytest.param(LENGTH, b"a", b"bcdef", id="a length"),
        pytest.param(HEAD + b"\r\n", b"a", b"bcdef", id="up to the end"),
        pytest.param(CHUNKED, b"1\r\na", b"\r\n5\r\nbcdef\r\n0\r\n\r\n", id="chunks, one without its line end"),
        pytest.param(CHUNKED, b"6\r\na", b"bcdef\r\n0\r\n\r\n", id="part of a chunk"),
    ],
)
def test_the_first_byte_passes_before_the_service_sends_the_second(head, first, last):
    has_head, has_first = Event(), Event()

    def handle(connection):
        connection.head()
        connection.send(head)
        assert has_head.wait(WAIT)
        connection.send(first)
        assert has_first.wait(WAIT)
        connection.send(last)

    with serving(handle) as service:
        start_response, calls = started()
        result = Proxy(service.url)(environ(), start_response)
        assert calls
        assert iter(result) is result
        has_head.set()
        assert next(result) == b"a"
        has_first.set()
        assert b"".join(bodies(result)) == b"bcdef"
        service.result()


def test_chunks_that_arrive_together_are_passed_on_together():
    with serving(answering(CHUNKED + b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n")) as service:
        assert list(bodies(Proxy(service.url)(environ(), started()[0]))) == [b"abc"]


@pytest.mark.parametrize("framing", [{"CONTENT_LENGTH": "2"}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_the_first_byte_passes_before_the_client_sends_the_second(framing):
    has_first = Event()

    def pieces():
        yield b"a"
        assert has_first.wait(WAIT)
        yield b"b"

    def handle(connection):
        _, headers = connection.head()
        if ("Content-Length", "2") in headers:
            first, rest = connection.file.read(1), connection.file.read
        else:
            chunks = connection.chunks()
            first, rest = next(chunks), lambda _: b"".join(chunks)
        has_first.set()
        body = first + rest(1)
        connection.send(HEAD + b"Content-Length: 2\r\n\r\n" + body)

    with serving(handle) as service:
        variables = {"wsgi.input": Input(pieces()), "wsgi.input_terminated": True, **framing}
        assert call(Proxy(service.url), environ("POST", **variables)).body == b"ab"
        service.result()


def test_the_first_byte_of_a_buffered_input_passes_before_the_second():
    # The input of wsgiref and of werkzeug is a buffered socket. Its read() waits for as many bytes as it is asked for.
    def handle(connection):
        connection.head()
        first = connection.file.read(1)
        client.sendall(b"b")
        connection.send(HEAD + b"Content-Length: 2\r\n\r\n" + first + connection.file.read(1))

    client, server = socket.socketpair()
    with serving(handle) as service, client, server, server.makefile("rb") as body:
        server.settimeout(WAIT)
        client.sendall(b"a")
        assert call(Proxy(service.url), environ("POST", CONTENT_LENGTH="2", **{"wsgi.input": body})).body == b"ab"
        service.result()


TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!"
BLOCK = b"x" * 16_384
UPLOAD = 64 * 1024 * 1024  # more than the buffers of any connection


def upload(size=UPLOAD):
    return Input(BLOCK for _ in range(size // len(BLOCK)))


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param("waits", id="keeps the connection, and reads no more"),
        pytest.param("closes", id="closes it"),
        pytest.param("resets", id="resets it"),
    ],
)
@pytest.mark.parametrize("framing", [{"CONTENT_LENGTH": str(UPLOAD)}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_a_refusal_before_the_body_is_read_is_passed_on(ending, framing):
    def handle(connection):
        connection.head()
        connection.send(TOO_LARGE)
        if ending == "waits":
            connection.is_closed_by_peer()
        elif ending == "resets":
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(handle) as service:
        body = upload()
        variables = {"wsgi.input": body, "wsgi.input_terminated": True, **framing}
        answer = call(Proxy(service.url), environ("POST", **variables))
        service.result()

    # After a reset, what the service had sent may be lost.
    assert (answer.status, answer.body) == (413, b"no!") or (ending == "resets" and answer.status == 502)
    assert body.size < UPLOAD


def test_a_service_that_refuses_gets_no_more_of_the_body():
    is_asked = Event()

    def handle(connection):
        connection.head()
        connection.send(TOO_LARGE[:-3])
        assert is_asked.wait(WAIT)
        connection.send(TOO_LARGE[-3:])
        return connection.is_closed_by_peer()

    def pieces():
        while True:
            if calls:
                is_asked.set()
                pytest.fail("it is read although the answer has begun")
            yield BLOCK

    start_response, calls = started()
    with serving(handle) as service:
        variables = {"wsgi.input": Input(pieces()), "CONTENT_LENGTH": str(UPLOAD)}
        result = Proxy(service.url)(environ("POST", **variables), start_response)
        is_asked.set()
        assert list(result) == [b"no!"]
        service.result()


def echo(connection):
    """Answer with the request's body, piece by piece, while it is read."""
    _, headers = connection.head()
    framing = dict(headers)
    if "Content-Length" in framing:
        connection.send(HEAD + f"Content-Length: {framing['Content-Length']}\r\n\r\n".encode())
        left = int(framing["Content-Length"])
        while left:
            piece = connection.file.read1(min(left, 65536))
            left -= len(piece)
            connection.send(piece)
    else:
        connection.send(CHUNKED)
        for chunk in connection.chunks():
            connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        connection.send(b"0\r\n\r\n")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_service_may_answer_while_it_reads(framing, full):
    size = (1024 if full else 24) * 1024 * 1024
    variables = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    if framing == "length":
        variables = {"CONTENT_LENGTH": str(size)}
    body = upload(size)

    with serving(echo) as service:
        tracemalloc.start()
        try:
            result = Proxy(service.url)(environ("POST", **variables, **{"wsgi.input": body}), started()[0])
            received = 0
            for piece in bodies(result):
                assert piece.count(b"x") == len(piece)
                received += len(piece)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        service.result()

    assert received == body.size == size
    assert peak < 2 * 1024 * 1024  # both sides of the connection are in this process


@pytest.mark.parametrize("moment", ["before the body", "within the body", "after the body"])
def test_the_service_sees_that_its_client_has_left(moment):
    def handle(connection):
        connection.head()
        connection.send(LENGTH + (b"abcdef" if moment == "after the body" else b"abc"))
        return connection.is_closed_by_peer()

    with serving(handle) as service:
        result = Proxy(service.url)(environ(), started()[0])
        if moment == "within the body":
            assert next(result) == b"abc"
        elif moment == "after the body":
            assert list(result) == [b"abcdef"]
            assert service.result()  # without waiting for close()
            service.returned.put(True)
        result.close()
        assert service.result()
        result.close()


def test_a_stream_without_end_stops_when_its_client_leaves():
    def handle(connection):
        connection.head()
        connection.send(HEAD + b"\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                connection.send(BLOCK)
        return True

    with serving(handle) as service:
        result = Proxy(service.url)(environ(), started()[0])
        assert next(result).startswith(b"xxx")
        result.close()
        assert service.result()


class Left(BaseException):
    """Not an Exception, like GreenletExit and SystemExit."""


@pytest.mark.parametrize("moment", ["reads the body", "starts the answer"])
def test_the_connection_is_closed_when_the_server_ends_the_request(moment):
    def handle(connection):
        connection.head()
        if moment == "starts the answer":
            connection.send(LENGTH)
        return connection.is_closed_by_peer()

    def leave(*_):
        raise Left

    def pieces():
        yield BLOCK
        raise Left

    body = {"wsgi.input": Input(pieces()), "CONTENT_LENGTH": "99999"} if moment == "reads the body" else {}
    with serving(handle) as service:
        with pytest.raises(Left):
            Proxy(service.url)(environ("POST", **body), leave)
        assert service.result()


@pytest.mark.parametrize("framing", [{"CONTENT_LENGTH": str(UPLOAD)}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_a_request_that_is_cut_is_cut_for_the_service(framing):
    def handle(connection):
        _, headers = connection.head()
        received = connection.file.read()
        if ("Transfer-Encoding", "chunked") in headers:
            return received == b"4000\r\n" + BLOCK + b"\r\n"  # and no last chunk
        return received == BLOCK

    def pieces():
        yield BLOCK
        raise OSError("the client is gone")

    with serving(handle) as service:
        variables = {"wsgi.input": Input(pieces()), "wsgi.input_terminated": True, **framing}
        with pytest.raises(OSError, match="the client is gone"):
            Proxy(service.url)(environ("POST", **variables), started()[0])
        assert service.result()


@pytest.mark.parametrize("error", [None, OSError("the client is gone")])
def test_a_body_that_ends_early_ends_the_answer_too(error):
    def handle(connection):
        connection.head()
        connection.send(LENGTH + b"abc")
        has_answer.set()
        return connection.is_closed_by_peer()

    def pieces():
        yield BLOCK
        assert has_answer.wait(WAIT)
        yield BLOCK
        if error is not None:
            raise error

    has_answer = Event()
    with serving(handle) as service:
        variables = {"wsgi.input": Input(pieces()), "CONTENT_LENGTH": str(UPLOAD)}
        result = Proxy(service.url)(environ("POST", **variables), started()[0])
        with pytest.raises(ClientDisconnected) as caught:
            list(result)
        assert caught.value.__cause__ is error or isinstance(caught.value.__cause__, Refused)
        assert service.result()


SILENCE = 0.2  # seconds, if nothing has to happen first


def test_a_service_that_is_silent_before_its_answer_is_a_504():
    def handle(connection):
        connection.request()
        return connection.is_closed_by_peer()

    with serving(handle) as service:
        answer = call(Proxy(service.url, read_timeout=SILENCE), environ())
        assert service.result()

    assert (answer.status, answer.reason, answer.json["error"]["code"]) == (504, "Gateway Timeout", "gateway_timeout")
    assert answer.json["error"]["type"] == "timeout_error"


def test_a_service_that_stops_reading_is_a_504():
    def handle(connection):
        connection.head()
        assert is_over.wait(WAIT)

    is_over = Event()
    with serving(handle) as service:
        variables = {"wsgi.input": upload(), "CONTENT_LENGTH": str(UPLOAD)}
        answer = call(Proxy(service.url, read_timeout=SILENCE), environ("POST", **variables))
        is_over.set()
        service.result()

    assert answer.status == 504


@pytest.mark.parametrize("sent", [LENGTH + b"abc", CHUNKED + b"3\r\nabc"])
def test_a_service_that_is_silent_within_its_answer_raises_a_timeout(sent):
    def handle(connection):
        connection.request()
        connection.send(sent)
        return connection.is_closed_by_peer()

    with serving(handle) as service:
        result = Proxy(service.url, read_timeout=1)(environ(), started()[0])
        assert next(result) == b"abc"
        with pytest.raises(UpstreamTimeout):
            next(result)
        assert service.result()  # closed, although the result was not


@pytest.mark.slow
def test_the_timeout_limits_a_silence_and_not_the_whole_answer():
    def handle(connection):
        connection.request()
        for byte in LENGTH[:-20]:
            connection.send(bytes([byte]))
            pause.wait(0.1)
        connection.send(LENGTH[-20:] + b"abcdef")

    pause = Event()
    with serving(handle) as service:
        assert call(Proxy(service.url, read_timeout=1.5), environ()).body == b"abcdef"
        service.result()


def test_a_reset_within_an_answer_raises_upstream_error():
    def handle(connection):
        connection.request()
        connection.send(LENGTH + b"abc")
        assert has_seen.wait(WAIT)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    has_seen = Event()
    with serving(handle) as service:
        result = Proxy(service.url)(environ(), started()[0])
        assert next(result) == b"abc"
        has_seen.set()
        with pytest.raises(UpstreamError):
            next(result)


def test_a_service_that_accepts_no_connection_is_a_502():
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(8):  # fill the queue of a listener that accepts none
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        answer = call(Proxy(f"http://127.0.0.1:{address[1]}", connect_timeout=SILENCE), environ())

    assert answer.status == 502


def test_many_connections_leave_nothing_open(monkeypatch):
    # A socket that is left open is a ResourceWarning, which is an error in the tests.
    with serving(answering(LENGTH + b"abcdef")) as service:
        application = Proxy(service.url)
        for _ in range(50):
            assert call(application, environ("POST", CONTENT_LENGTH="3", **{"wsgi.input": io.BytesIO(b"abc")})).body
            assert service.result()[2] == b"abc"
