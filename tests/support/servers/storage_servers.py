"""Redis and Memcached servers on the loopback interface."""

import os
import subprocess
from contextlib import contextmanager

from ports import free_port
from programs import find_program
from waiting import until_listening


class StorageServer:
    """A Redis or Memcached server in a process of its own. It keeps its port when it starts again."""

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
            # Memcached needs a user's name only if root starts it. That may be root.
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


PROGRAMS = {"redis": ("redis-server", "redis-server"), "memcached": ("memcached", "memcached")}  # and their packages


CLIENTS = {"redis": "redis", "memcached": "pymemcache"}


@contextmanager
def storage_server(name, directory):
    find_program(*PROGRAMS[name])
    server = StorageServer(name, directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
