"""A real server that serves metered applications, and the clients that ask it."""

from __future__ import annotations

import itertools
import re
import socket
import struct
import time
from contextlib import closing, contextmanager

import psutil
from metered_rows import serve
from proxy_servers import commands
from raw_service import WAIT, serving
from web_servers import Connection, message, started

from usage_middleware import SQLiteTokenStore

COMMANDS = commands("metered_app")
keys = (f"key-of-a-test-{number:06}" for number in itertools.count())


class Front:
    """A server that serves metered applications, and the database that it charges."""

    def __init__(self, name, directory, command=None, **environment):
        self.name = name
        self._command = command or COMMANDS[name]
        self.directory = directory
        self.database = directory / "tokens.db"
        self._environment = environment

    @contextmanager
    def running(self):
        with (
            SQLiteTokenStore(self.database) as self.store,
            serving(serve) as service,
            started(
                self._command,
                self.database,
                self.directory / "log",
                UPSTREAM=service.url,
                **self._environment,
            ) as (process, self.port),
        ):
            self.process = psutil.Process(process.pid)
            yield self

    @property
    def log(self):
        return (self.directory / "log").read_text(errors="replace")

    def token(self, total_available=10_000):
        """Create a token, and return its key and its id."""
        key, token = self.store.create(key=next(keys), total_available=total_available)
        return key, token.id

    def connect(self):
        return closing(Connection(self.port))

    def ask(self, path, key, method=b"GET", *headers, body=b""):
        with self.connect() as connection:
            connection.send(request(path, key, method, b"Connection: close", *headers, body=body))
            return connection.read(method)

    def settled(self, token_id, count=1):
        """Wait until a token has that many operations and all are settled, and return them, oldest first.

        A server may close an answer a moment after it has sent the last byte. granian may never close it; then it is
        settled with a later request.
        """
        other, _ = self.token() if self.name == "granian" else ("", None)
        deadline = time.monotonic() + WAIT
        while True:
            operations = [o for o in self.store.history(token_id) if o.kind == "reserve"][::-1]
            if len(operations) == count and not any(o.is_open for o in operations):
                token = self.store.get_by_id(token_id)
                assert token.total_used == sum(o.final_amount for o in operations)
                return operations
            assert time.monotonic() < deadline, operations
            if other:
                self.ask("/direct/one/list", other)
            time.sleep(0.01)

    def memory(self):
        return sum(process.memory_info().rss for process in [self.process, *self.process.children(recursive=True)])


def request(path, key, method=b"GET", *headers, body=b""):
    return message(method, path.encode(), b"Authorization: Bearer " + key.encode(), *headers, body=body)


def leave(client):
    """Reset a connection, so that the other side notices at once."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def body_so_far(received):
    """Return the part of the body that was received, with its chunks decoded."""
    head, _, body = received.partition(b"\r\n\r\n")
    if b"chunked" not in head.lower():
        return body
    out = b""
    while match := re.match(rb"([0-9a-fA-F]+)\r\n", body):
        size = int(match[1], 16)
        out += body[match.end() : match.end() + size]
        body = body[match.end() + size + 2 :]
    return out
