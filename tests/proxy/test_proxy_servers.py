"""Proxy under real WSGI servers: a client, the server, the proxy and the service are connected by sockets.

If a server cannot do something, the test is an expected failure whose reason says what.
"""

from __future__ import annotations

import re
import socket
import struct
from contextlib import closing, contextmanager, suppress
from threading import Event

import psutil
import pytest
from proxy_servers import COMMANDS
from raw_service import WAIT, serving
from web_servers import Connection, message, started

pytestmark = [pytest.mark.servers, pytest.mark.slow]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BLOCK = b"x" * 65_536
FULL_SIZE = 10**9  # waitress accepts no larger request
SIZE = 96 * 1024**2
MOST_MEMORY = 48 * 1024**2  # waitress buffers up to 16 MiB for its client, and as much again while it sends


class Front:
    """A server whose proxy forwards to a service. ``handle`` is what the service does with its next connections."""

    def __init__(self, name, directory):
        self.name = name
        self.handle = None
        self._directory = directory

    @contextmanager
    def running(self):
        directory = self._directory
        with (
            serving(lambda connection: self.handle(connection)) as self.service,
            started(COMMANDS[self.name], directory / "none", directory / "log", UPSTREAM=self.service.url) as started_,
        ):
            self.process, self.port = psutil.Process(started_[0].pid), started_[1]
            yield self

    def connect(self):
        return closing(Connection(self.port))

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def memory(self):
        return sum(process.memory_info().rss for process in [self.process, *self.process.children(recursive=True)])


@pytest.fixture(scope="module", params=list(COMMANDS))
def front(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with Front(request.param, directory).running() as front:
        yield front
    # Only a truncated answer raises an exception to the server. A client that leaves is not an error of the proxy.
    log = (directory / "log").read_text(errors="replace")
    for frames, error in re.findall(r"^.*Traceback .*\n((?: .*\n)+)(\S.*)", log, re.MULTILINE):
        assert "UpstreamError" in error or "/wsgi/proxy/" not in frames, log


@pytest.fixture(autouse=True)
def every_result_was_taken(front):
    yield
    assert front.service.returned.empty()


def cannot(request, front, reasons):
    """Expect the test to fail on a server that cannot do something."""
    if front.name in reasons:
        request.applymarker(pytest.mark.xfail(reason=f"{front.name} {reasons[front.name]}", strict=True))


def test_a_request_and_its_answer_are_passed_on(front):
    def handle(connection):
        received = connection.request()
        connection.send(
            b"HTTP/1.1 207 Multi-Status\r\nSet-Cookie: a=1\r\nX-One: 1\r\nSet-Cookie: b=2\r\nETag: x\r\n"
            b"Connection: X-Secret\r\nX-Secret: 1\r\nContent-Length: 3\r\n\r\nabc"
        )
        return received

    front.handle = handle
    with front.connect() as connection:
        connection.send(
            message(
                *(b"POST", b"/caf%C3%A9/%e2%82%ac%20;x?a=%7e&&b", b"X-A: 1", b"Content-Type: text/plain"),
                *(b"Content-Length: 5", b"Connection: close, X-Drop", b"X-Drop: 1"),
                body=b"hello",
            )
        )
        answer = connection.read(b"POST")
        assert connection.rest() == b""

    start, headers, body = front.service.result()
    path = "/caf%C3%A9/%e2%82%ac%20;x"
    if front.name in ("wsgiref", "granian", "a2wsgi"):  # they do not pass the path on as it was written
        path = "/caf%C3%A9/%E2%82%AC%20;x"
    assert start == f"POST {path}?a=%7e&&b HTTP/1.1"
    assert body == b"hello"
    fields = dict(headers)
    assert fields["Host"] == f"127.0.0.1:{front.service.port}"
    assert fields["X-Forwarded-Host"] == "localhost"
    assert fields["X-Forwarded-For"] == "127.0.0.1"
    assert (fields["X-A"], fields["Content-Type"], fields["Content-Length"]) == ("1", "text/plain", "5")
    assert "X-Drop" not in fields
    assert len(fields) == len(headers)

    assert (answer.status, answer.body) == (207, b"abc")
    assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1", "b=2"]
    assert {name for name, _ in answer.headers} >= {"x-one", "etag", "via", "content-length"}
    assert "x-secret" not in dict(answer.headers)


def test_a_chunked_request_is_forwarded(front, request):
    cannot(
        request,
        front,
        {
            "wsgiref": "does not decode chunked requests",
            "uwsgi": "does not decode chunked requests for an application",
            "a2wsgi": "does not say that its input ends with the request",
        },
    )

    def handle(connection):
        received = connection.request()
        connection.send(OK)
        return received

    front.handle = handle
    with front.connect() as connection:
        connection.send(
            message(b"PUT", b"/", b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n10000\r\n%b\r\n0\r\n\r\n" % BLOCK)
        )
        answer = connection.read(b"PUT")
        assert (answer.status, answer.body) == (200, b"ok")
    assert front.service.result()[2] == b"abc" + BLOCK


def test_a_client_that_expects_100_continue_is_answered(front):
    def handle(connection):
        received = connection.request()
        connection.send(OK)
        return received

    front.handle = handle
    with front.socket() as client, client.makefile("rb") as file:
        client.sendall(message(b"POST", b"/", b"Content-Length: 3", b"Expect: 100-continue", b"Connection: close"))
        # PEP 3333 lets the server decide when to send it. wsgiref and uWSGI never do, and a client does not wait long.
        if front.name not in ("wsgiref", "uwsgi", "a2wsgi"):
            assert file.readline().startswith(b"HTTP/1.1 100 ")
            assert file.readline() == b"\r\n"
        client.sendall(b"abc")
        while not (line := file.readline()).startswith(b"HTTP/1"):
            pass
        assert b" 100 " in line or b" 200 " in line
    _, headers, body = front.service.result()
    assert body == b"abc"
    assert "Expect" not in dict(headers)


def test_the_first_byte_passes_before_the_service_sends_the_second(front):
    has_first = Event()

    def handle(connection):
        connection.head()
        connection.send(CHUNKED + b"5\r\nfirst\r\n")
        assert has_first.wait(WAIT)
        connection.send(b"6\r\nsecond\r\n0\r\n\r\n")

    front.handle = handle
    received = b""
    with front.socket() as client:
        client.sendall(message(b"GET", b"/", b"Connection: close"))
        while piece := client.recv(65536):
            received += piece
            if b"first" in received:
                has_first.set()
    front.service.result()
    assert b"second" in received


@pytest.mark.parametrize(
    ("sent", "hidden_by"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc", {}, id="a length"),
        pytest.param(
            CHUNKED + b"3\r\nabc\r\n",
            {
                "wsgiref": "ends an answer without a length by closing the connection",
                "uwsgi": "ends an answer without a length by closing the connection",
                "granian": "ends an answer as if it were complete when its iteration raises",
            },
            id="chunked",
        ),
    ],
)
def test_a_cut_answer_is_cut_for_the_client(front, request, sent, hidden_by):
    cannot(request, front, hidden_by)

    def handle(connection):
        connection.request()
        connection.send(sent)

    front.handle = handle
    received = b""
    with front.socket() as client, suppress(ConnectionResetError):
        client.sendall(message(b"GET", b"/"))
        client.settimeout(5)  # a server that keeps the connection has ended the answer
        with suppress(TimeoutError):
            while piece := client.recv(65536):
                received += piece
    front.service.result()
    head, _, body = received.partition(b"\r\n\r\n")
    if received and b"content-length: 6" not in head.lower():
        assert b"transfer-encoding: chunked" in head.lower(), "closing the connection ends the answer"
        assert not body.endswith(b"0\r\n\r\n")
    else:
        assert len(body) < 6


def test_the_service_sees_that_the_client_has_left(front, request):
    cannot(request, front, {"a2wsgi": "reads an answer to its end whether or not there is a client"})

    def handle(connection):
        connection.head()
        connection.send(CHUNKED)
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(4096):  # 256 MB, beyond what anything buffers
                connection.send(b"10000\r\n" + BLOCK + b"\r\n")
            return False
        return True

    front.handle = handle
    with front.socket() as client:
        client.sendall(message(b"GET", b"/"))
        assert client.recv(100)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert front.service.result()


@pytest.mark.parametrize("size", [2_000, 200_000])
@pytest.mark.parametrize("refusal", ["by the proxy", "by the service"])
def test_a_body_that_was_not_read_is_not_taken_for_a_request(front, size, refusal):
    def handle(connection):
        start, _ = connection.head()
        connection.send(OK if start.startswith("GET") else b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!")

    front.handle = handle
    # Some servers answer an upgrade to a WebSocket themselves.
    headers = [b"Upgrade: IRC/6.9", b"Connection: Upgrade"] if refusal == "by the proxy" else []
    body = b"GET /never HTTP/1.1\r\n\r\n" * (size // 23)
    with front.connect() as connection:
        connection.send(message(b"POST", b"/", *headers, b"Content-Length: %d" % len(body), body=body))
        answer = connection.read(b"POST")
        assert answer.status == (501 if refusal == "by the proxy" else 403)
        # The server announces that it closes the connection, or closes it, or understands the next request.
        if not answer.is_last:
            connection.send(message(b"GET", b"/next", b"Connection: close"))
            following = connection.read(b"GET")
            if following is not None:
                assert (following.status, following.body) == (200, b"ok")
                front.service.result()
        assert connection.rest() == b""
    if refusal == "by the service":
        front.service.result()


def test_a_large_answer_takes_little_memory(front, full):
    size = (FULL_SIZE if full else SIZE) // len(BLOCK) * len(BLOCK)

    def handle(connection):
        connection.head()
        connection.send(CHUNKED)
        for _ in range(size // len(BLOCK)):
            connection.send(b"10000\r\n" + BLOCK + b"\r\n")
        connection.send(b"0\r\n\r\n")

    front.handle = handle
    most, received = 0, 0
    with front.socket() as client:
        client.sendall(message(b"GET", b"/", b"Connection: close"))
        client.recv(100)
        before = front.memory()
        while piece := client.recv(1024**2):
            received += piece.count(b"x")
            most = max(most, front.memory() - before) if received % (4 * 1024**2) < len(piece) else most
    front.service.result()
    assert size - 1000 < received <= size + 1000
    assert most < MOST_MEMORY


def test_a_large_request_takes_little_memory(front, full):
    size = (FULL_SIZE if full else SIZE) // len(BLOCK) * len(BLOCK)

    def handle(connection):
        connection.head()
        left = size
        while left:
            left -= len(connection.file.read1(min(left, 1024**2)))
        connection.send(OK)

    front.handle = handle
    most = 0
    with front.connect() as connection:
        connection.send(message(b"PUT", b"/", b"Content-Length: %d" % size))
        before = front.memory()
        for number in range(size // len(BLOCK)):
            connection.send(BLOCK)
            if number % 64 == 0:
                most = max(most, front.memory() - before)
        answer = connection.read(b"PUT")
        assert (answer.status, answer.body) == (200, b"ok")
    front.service.result()
    assert most < MOST_MEMORY


def test_a_client_that_does_not_read_slows_the_service_down(front):
    limit = 256 * 1024**2
    is_held = Event()

    def handle(connection):
        connection.head()
        connection.send(CHUNKED)
        sent = 0
        connection.socket.settimeout(1)  # a second in which nothing passes
        with suppress(TimeoutError):
            while sent < limit:
                connection.socket.sendall(b"10000\r\n" + BLOCK + b"\r\n")
                sent += len(BLOCK)
        is_held.set()
        return sent

    front.handle = handle
    with front.socket() as client:
        client.sendall(message(b"GET", b"/"))
        assert is_held.wait(WAIT)
    assert front.service.result() < limit
