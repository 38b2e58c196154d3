"""Redis and Memcached servers on the loopback interface."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest


class StorageServer:
    """A Redis or Memcached server in a process of its own, on a port that stays the same when it starts again."""

    def __init__(self, name, directory):
        self._directory = directory
        self.port = free_port()
        self.password = "canary-password" if name == "redis" else ""
        self.uri = f"{name}://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}"
        port = str(self.port)
        self._command = {
            "redis": [
                *("redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
                *("--requirepass", self.password),
            ],
            # Only root needs a user's name, and may name itself.
            "memcached": ["memcached", "-l", "127.0.0.1", "-p", port, *(["-u", "root"] if os.getuid() == 0 else [])],
        }[name]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self._command, cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port, self.process)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process):
    deadline = time.monotonic() + 20
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


PROGRAMS = {"redis": "redis-server", "memcached": "memcached"}


CLIENTS = {"redis": "redis", "memcached": "pymemcache"}


@contextmanager
def storage_server(name, directory):
    program = PROGRAMS[name]
    pytest.importorskip(CLIENTS[name])
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    server = StorageServer(name, directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
