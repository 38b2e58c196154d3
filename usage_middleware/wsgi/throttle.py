"""Throttle clients that guess keys: count failed authentication per client, with the package ``limits``.

Time is cut into windows, the same for every client, and a client may fail a number of times in each. So the start of
the next window is known without asking the storage, a failure costs one operation, and every storage of ``limits`` can
count it (Memcached does not have moving windows). The price: around the end of a window, a client may fail twice as
often.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from ..extras import how_to_install
from ..forks import PerProcess

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from limits.storage import Storage

logger = logging.getLogger("usage_middleware")

_MOST_CLIENTS: Final = 50_000  # in memory, about 300 bytes each
_TIMEOUT: Final = 1.0  # seconds that a request waits for a storage that does not answer
_PAUSE: Final = 5.0  # seconds for which a failed storage is not asked, so that a flood of requests does not wait for it
# Memcached takes a larger number of seconds for a date, which has long passed (its protocol.txt, "Expiration times").
_LONGEST: Final = 30 * 24 * 3600

#: Counts one more failure of a client in the window that begins at that Unix time. Returns how many there are.
_Count = Callable[[str, int], int]


class Throttle:
    """A limit of failures per client and window of time.

    :param limit: one limit in the notation of ``limits``, such as ``"20 per 20 minutes"``, up to 30 days.
    :param storage: the URI of a storage of ``limits``. ``memory://`` counts in each process by itself, and keeps
        the 50,000 clients that failed last; ``redis://host:6379``, ``memcached://host:11211`` and the like count over
        all processes, whose clocks must agree.
    :raises TypeError, ValueError: an argument cannot be used.
    :raises ImportError: the package ``limits`` is not installed.

    If the storage fails, that is logged, and no client is throttled meanwhile.
    """

    def __init__(self, limit: str, storage: str) -> None:
        self._amount, self._period, self._name = _parsed(limit)
        _check_storage(storage)
        self._storage = storage
        # A counter belongs to one process, as it holds a lock or a connection.
        self._counts: PerProcess[_Count] = PerProcess(self._open)
        self._asked_again_at = 0.0  # time.monotonic()

    def failed(self, environ: WSGIEnvironment) -> int:
        """Count a failed authentication.

        :return: 0 while the client may fail; otherwise the whole seconds, at least 1, after which it may again.
        """
        if time.monotonic() < self._asked_again_at:
            return 0
        now = int(time.time())
        begin = now - now % self._period
        try:
            failures = self._counts.get()(_client(environ), begin)
        except Exception as error:
            if time.monotonic() < self._asked_again_at:
                return 0  # another thread has just logged the failure
            self._asked_again_at = time.monotonic() + _PAUSE
            # The text comes from another package, and may quote the URI with its password.
            kind, reason = urlsplit(self._storage).scheme, type(error).__qualname__
            logger.error("throttle_storage (%s) failed: %s; no client is throttled for %d s", kind, reason, _PAUSE)
            return 0
        return begin + self._period - now if failures > self._amount else 0

    def _open(self) -> _Count:
        if urlsplit(self._storage).scheme == "memory":
            return _MemoryCounts().count
        storage = _open_storage(self._storage)

        def count(client: str, begin: int) -> int:
            # A second more than a window: Memcached forgets up to a second early.
            expiry = min(self._period + 1, _LONGEST)
            return storage.incr(f"usage-middleware/{self._name}/{begin}/{client}", expiry)

        return count


class _MemoryCounts:
    """The counts of one process. Keep at most 50,000 clients; drop the least recently failed.

    The ``MemoryStorage`` of ``limits`` will not do: its memory grows with the number of clients, it starts threads,
    and threads that count at once make it lose counts or raise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: OrderedDict[tuple[int, str], int] = OrderedDict()

    def count(self, client: str, begin: int) -> int:
        with self._lock:
            count = self._counts[begin, client] = self._counts.pop((begin, client), 0) + 1
            # Clients of past windows are at the front.
            while len(self._counts) > _MOST_CLIENTS or next(iter(self._counts))[0] < begin:
                self._counts.popitem(last=False)
        return count


def _client(environ: WSGIEnvironment) -> str:
    """Return the client that a failure counts against: an IPv4 address, or a 64-bit IPv6 network, as one host has all
    of it.

    RFC 4291 section 2.5.1 leaves the last 64 bits to the host, and RFC 8981 changes them every day. All requests whose
    ``REMOTE_ADDR`` is not an address (a server on a Unix socket) are one client, as they come through one proxy.
    """
    try:
        address = ip_address(environ.get("REMOTE_ADDR", ""))
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        # A socket for both protocols shows IPv4 clients this way (RFC 4291 section 2.5.5.2), all in one network.
        return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)


def _parsed(limit: str) -> tuple[int, int, str]:
    """Return the number of failures, the number of seconds, and a name for both that is the same in each process."""
    if not isinstance(limit, str):
        raise TypeError(f"throttle must be a str such as '20 per 20 minutes', or None, got {limit!r}")
    try:
        from limits import parse_many
    except ImportError as error:
        raise ImportError(f"throttle needs the package limits: {how_to_install('throttle')}") from error
    try:
        (item,) = parse_many(limit)
    except ValueError:
        raise ValueError(f"throttle must be one limit such as '20 per 20 minutes', got {limit!r}") from None
    period = item.get_expiry()
    if item.amount < 1 or period > _LONGEST:
        raise ValueError(f"throttle must be 1 or more in at most 30 days, got {limit!r}")
    return item.amount, period, f"{item.amount}/{period}"


def _check_storage(uri: str) -> None:
    """Raise an error if a storage URI cannot be used. No error quotes the URI, which may hold a password."""
    if not isinstance(uri, str):
        raise TypeError(f"throttle_storage must be a str such as 'redis://localhost:6379', got {type(uri).__name__}")
    from limits.errors import ConfigurationError

    try:
        parts = urlsplit(uri)
        if parts.scheme == "memory":
            return
        if not parts.netloc and not parts.path:
            raise ValueError
        _open_storage(uri)
    except (ConfigurationError, TypeError, ValueError):
        # Not chained: the original exception quotes the URI.
        raise ValueError(
            "throttle_storage must be a storage URI of the package limits whose client (redis, pymemcache, ...) is "
            "installed, such as 'memory://', 'redis://localhost:6379' or 'memcached://localhost:11211'"
        ) from None
    except Exception:
        # A Redis cluster is asked at once, and may be down. That is logged when the cluster is needed.
        return


def _open_storage(uri: str) -> Storage:
    from limits.storage import MemcachedStorage, Storage, storage_from_string

    storage = storage_from_string(uri, **_client_options(urlsplit(uri)))
    if not isinstance(storage, Storage):
        raise TypeError("a storage for asyncio cannot be used here")
    if isinstance(storage, MemcachedStorage):
        # limits would make a client for each thread, whose connection outlives the thread. These clients are safe to
        # share.
        client: Any = storage.storage
        storage.client_getter = lambda module, hosts, **options: client
        weakref.finalize(storage, client.close)
    return storage


def _client_options(uri: SplitResult) -> dict[str, float | str | bool]:
    """Return options that bound how long a client waits: by default, it waits for minutes or for ever.

    The URI of a Redis storage can set its own.
    """
    if uri.scheme == "memcached":
        pooling: dict[str, float | str | bool] = {"use_pooling": True} if "," in uri.netloc else {}
        return {"connect_timeout": _TIMEOUT, "timeout": _TIMEOUT, **pooling}
    if uri.scheme.startswith(("redis", "valkey")):
        return {"socket_connect_timeout": _TIMEOUT, "socket_timeout": _TIMEOUT}
    return {}
