"""Ports on the loopback interface for the servers that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port on which nothing listens.

    It is below those that systems give to clients, so it is still free when a server that was killed starts again. It
    is chosen at random, so that test runs at the same time hardly ever choose the same one.
    """
    for port in random.SystemRandom().sample(range(15_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")
