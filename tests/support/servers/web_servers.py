"""The WSGI servers, in processes on the loopback interface, and clients that read answers byte by byte."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import processes
from ports import free_port
from waiting import until_listening

from usage_middleware import SQLiteTokenStore

PATH = b"/api/usage/token"


KEY = "k" * 48


AUTHORIZATION = b"Authorization: Bearer sk-" + KEY.encode()


USAGE = (
    '{"code":true,"message":"ok","data":{"object":"token_usage","name":"Grüne Bohne","total_granted":1000,'
    '"total_used":0,"total_available":1000,"unlimited_quota":false,"model_limits":{},"model_limits_enabled":false,'
    '"expires_at":0}}'
).encode()


# A worker of gunicorn or granian that misses the signal to stop, as happens at times, is killed after so many seconds.
_STOP = 3


_MAKE_SERVER = (
    "import served, sys; from {} import make_server;"
    "make_server('127.0.0.1', int(sys.argv[1]), served.app{}).serve_forever()"
)


GUNICORN = ["-m", "gunicorn", "--bind=127.0.0.1:{port}", "--no-control-socket", f"--graceful-timeout={_STOP}"]


_GRANIAN = ["-m", "granian", "--host=127.0.0.1", "--port={port}", f"--workers-kill-timeout={_STOP}"]


PRELOAD_WORKERS = 3


SERVERS = {
    "wsgiref": ["-c", _MAKE_SERVER.format("wsgiref.simple_server", ""), "{port}"],
    "werkzeug": ["-c", _MAKE_SERVER.format("werkzeug.serving", ", threaded=True"), "{port}"],
    "gunicorn-sync": [*GUNICORN, "served:app"],
    "gunicorn-gthread": [*GUNICORN, "--worker-class=gthread", "--threads=4", "served:app"],
    "gunicorn-preload": [*GUNICORN, "--preload", f"--workers={PRELOAD_WORKERS}", "served:app"],
    "waitress": ["-m", "waitress", "--listen=127.0.0.1:{port}", "served:app"],
    "cheroot": ["-m", "cheroot", "--bind=127.0.0.1:{port}", "served:app"],
    "granian": [*_GRANIAN, "--interface=wsgi", "served:app"],
}


KEEP_ALIVE = {"gunicorn-gthread", "waitress", "cheroot", "granian"}


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]  # names in lower case
    body: bytes
    is_last: bool  # the server said that it closes the connection

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)


class Connection:
    """One connection to a server, read byte by byte, so that nothing between or after the answers is missed."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        # A server may answer and close before it has read everything. Its answer can still be read.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def read(self, method: bytes) -> Answer | None:
        """Return the answer to a request, or ``None`` if the server has closed the connection instead."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        status_line = re.fullmatch(rb"HTTP/1\.([01]) ([0-9]{3}) [^\r\n]*\r\n", line)
        assert status_line, line
        status = int(status_line[2])
        headers = list(self._headers())
        fields = dict(headers)
        if method == b"HEAD" or status == 204:
            body = b""
        elif "content-length" in fields:
            body = self._exactly(int(fields["content-length"]))
        elif fields.get("transfer-encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self._file.read()
        return Answer(status, headers, body, status_line[1] == b"0" or fields.get("connection") == "close")

    def rest(self) -> bytes:
        """Send no more, and return what the server sends until it closes the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        data = b""
        with suppress(ConnectionResetError):
            while more := self._file.read1():
                data += more
        return data

    def _headers(self) -> Iterator[tuple[str, str]]:
        while (line := self._file.readline()) != b"\r\n":
            field = re.fullmatch(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+): ?([^\r\n]*)\r\n", line)
            assert field, line
            yield field[1].decode().lower(), field[2].decode("latin-1")

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._exactly(size)
            assert self._file.readline() == b"\r\n"
        assert self._file.readline() == b"\r\n"

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        assert len(data) == size, data
        return data


def message(method: bytes, target: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((method + b" " + target + b" HTTP/1.1", b"Host: localhost", *headers, b"", body))


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    database: Path
    log: Path

    def connect(self) -> closing[Connection]:
        return closing(Connection(self.port))

    def ask(self, method: bytes, target: bytes, *headers: bytes, body: bytes = b"") -> Answer:
        """Return the answer to a request on a connection of its own. Nothing may follow the answer."""
        with self.connect() as connection:
            connection.send(message(method, target, *headers, b"Connection: close", body=body))
            answer = connection.read(method)
            assert answer is not None
            assert connection.rest() == b""
        return answer


@contextmanager
def running(name: str, directory: Path, **environment: str) -> Iterator[Server]:
    """Yield a server in a process of its own, over a database with one token."""
    database, log = directory / "tokens.db", directory / "log"
    with SQLiteTokenStore(database) as store:
        store.create(name="Grüne Bohne", total_available=1000, key=KEY)
    with started(SERVERS[name], database, log, **environment) as (_, port):
        yield Server(name, port, database, log)


@contextmanager
def started(
    arguments: list[str], database: Path, log: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yield the process that serves the database, and its port."""
    port = free_port()
    environment = processes.environment(
        **{"PYTHONWARNINGS": "default::ResourceWarning", "TOKENS_DATABASE": str(database), **environment}
    )
    command = [sys.executable, *(argument.format(port=port) for argument in arguments)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=database.parent, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until_listening(port, process, log)
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def check_log(log: Path) -> None:
    text = log.read_text(errors="replace")
    assert "Traceback" not in text, text
    # Python 3.13 and newer warn of it. Other warnings are a server's own: gunicorn leaves its listening socket open.
    assert "unclosed database" not in text, text
