"""Redis and Memcached servers on the loopback interface."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from ports import free_port
from waiting import until_listening


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
        until_listening(self.port, self.process)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


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
