"""A TCP proxy between a store and its server. It counts, delays, truncates, or stops what passes."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress

# With this option, close() sends a reset, so what is still on its way does not arrive.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forward to a port of this machine, byte for byte, until a test interferes.

    A *chunk* is what one ``recv`` returns: a request, an answer, or a part of one.

    :param delay: seconds that a chunk takes in each direction, so half of a round trip.
    """

    def __init__(self, port, *, delay=0.0):
        self._port = port
        self.delay = delay
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.round_trips = 0
        self.chunks = 0
        #: It is called with each chunk, and whether that comes from the client. It returns how many bytes are forwarded
        #: before both connections are closed, or ``None`` to forward all and close nothing.
        self.cut = None
        self._is_silent = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut_at(self, number, share=0.0):
        """Cut the connection on which the chunk of that number passes, counted from now, after a share of it."""
        passed = iter(range(1, number + 1))

        def cut(chunk, is_request):
            if next(passed, None) != number:
                return None
            self.cut = None
            return int(len(chunk) * share)

        self.cut = cut

    def fall_silent(self):
        """Accept connections and bytes from now on, and forward none: a network that drops every packet."""
        self._is_silent = True

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client):
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forward(client, server)

    def _forward(self, client, server):
        on_the_way = deque()  # (when it arrives, where to, chunk)
        was_request = False
        while not self._closed.is_set():
            wait = 0.1
            if on_the_way:
                # select() is too coarse for what is less than a millisecond away.
                wait = max(on_the_way[0][0] - time.perf_counter(), 0)
            for ready in select.select([client, server], [], [], wait)[0]:
                chunk = ready.recv(65536)
                if not chunk:
                    return
                if self._is_silent:
                    continue
                is_request = ready is client
                with self._lock:
                    self.chunks += 1
                    self.round_trips += is_request and not was_request
                    forwarded = self.cut and self.cut(chunk, is_request)
                if self._is_silent:
                    continue
                was_request = is_request
                target = server if is_request else client
                if forwarded is not None:
                    if forwarded:
                        target.sendall(chunk[:forwarded])
                    if not is_request or not forwarded:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    return
                on_the_way.append((time.perf_counter() + self.delay, target, chunk))
            while on_the_way and on_the_way[0][0] <= time.perf_counter():
                _, target, chunk = on_the_way.popleft()
                target.sendall(chunk)

    def close(self):
        self._closed.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()
