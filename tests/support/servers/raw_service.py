"""An HTTP service that a test writes byte by byte, listening on the loopback interface."""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import contextmanager, suppress

WAIT = 30.0  # seconds, for something that happens at once or never


class Connection:
    """The service's side of one connection."""

    def __init__(self, sock):
        self.socket = sock
        self.file = sock.makefile("rb")

    def head(self):
        """Return the request up to the empty line, as a start line and a list of headers."""
        start = self.file.readline().decode("latin-1").rstrip("\r\n")
        headers = []
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            headers.append((name, value))
        return start, headers

    def request(self):
        """Return the whole request: start line, headers, and the body as its headers frame it."""
        start, headers = self.head()
        fields = {name.lower(): value for name, value in headers}
        if "content-length" in fields:
            return start, headers, self.file.read(int(fields["content-length"]))
        if fields.get("transfer-encoding") == "chunked":
            return start, headers, b"".join(self.chunks())
        return start, headers, b""

    def chunks(self):
        while size := int(self.file.readline(), 16):
            yield self.file.read(size)
            assert self.file.readline() == b"\r\n"
        assert self.file.readline() == b"\r\n"

    def send(self, data):
        self.socket.sendall(data)

    def rest(self):
        """Return what the other side still sends until it closes the connection."""
        received = b""
        with suppress(ConnectionResetError):
            while piece := self.file.read1(65536):
                received += piece
        return received

    def is_closed_by_peer(self):
        """Wait until the other side closes the connection."""
        self.rest()
        return True

    def close(self):
        self.file.close()
        self.socket.close()


class Service:
    """Serve each connection by ``handle(connection)``, in a thread of its own.

    ``returned`` gets what ``handle`` returns or raises for each connection.
    """

    def __init__(self, handle, *, tls=None, host="127.0.0.1"):
        self._handle, self._tls = handle, tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self.returned = queue.SimpleQueue()
        self._threads = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def result(self):
        """Return what ``handle`` returned for the next connection that ended, or raise what it raised."""
        result = self.returned.get(timeout=WAIT)
        if isinstance(result, BaseException):
            raise result
        return result

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock):
        try:
            sock.settimeout(WAIT)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            connection = Connection(sock)
            try:
                self.returned.put(self._handle(connection))
            finally:
                connection.close()
        except BaseException as error:
            sock.close()
            self.returned.put(error)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for thread in (self._accepting, *self._threads):
            thread.join(WAIT)
            assert not thread.is_alive()


@contextmanager
def serving(handle, **options):
    service = Service(handle, **options)
    try:
        yield service
    finally:
        service.close()


def answering(answer):
    """Return a ``handle`` that reads one request, sends ``answer``, and returns the request."""

    def handle(connection):
        request = connection.request()
        connection.send(answer)
        return request

    return handle


def bodies(result):
    """Yield the pieces of a WSGI result, and close it at the end."""
    try:
        yield from result
    finally:
        if hasattr(result, "close"):
            result.close()
