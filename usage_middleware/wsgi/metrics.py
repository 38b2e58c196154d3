"""Metrics of a meter and of its store, for Prometheus. Needs the package ``prometheus_client``.

.. code-block:: python

    metrics = Metrics(store)
    meter = UsageMeter(app, store, on_settled=metrics.on_settled, on_refused=metrics.on_refused)
    application = DispatcherMiddleware(meter, {"/metrics": metrics.app})

No label shows keys, tokens or their names. If ``PROMETHEUS_MULTIPROC_DIR`` is set before the processes of a server
start, :attr:`Metrics.app` answers for all of them, as prometheus_client documents it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from ..extras import how_to_install
from ..stores.base import QuotaStore
from ..tokens import TOKEN_STATES, token_state

try:
    import prometheus_client
    from prometheus_client import multiprocess
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError:
    raise ImportError(f"metrics need the package prometheus_client: {how_to_install('metrics')}") from None

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from prometheus_client.registry import CollectorRegistry

    from .meter.settlement import Settlement

logger = logging.getLogger("usage_middleware")

_MOST_MODELS: Final = 100
_OTHER: Final = "other"
_BUCKETS: Final = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
)  # seconds
# The largest part of the time that is spent reading the store, and the least seconds between two reads.
_MOST_LOAD: Final = 0.05
_FEWEST_SECONDS: Final = 5.0


class Metrics:
    """Count what a meter does, and show what its store holds.

    :param store: whose tokens and reservations are shown.
    :param registry: where the metrics are registered; left out, prometheus_client's own.
    :raises ImportError: prometheus_client is not installed.
    :raises ValueError: the registry already has these metrics. Use one object for several meters.

    ======================================  ==========================================================================
    ``usage_requests_total{outcome}``       metered requests that were answered: ``completed``, ``rejected``,
                                            ``failed``, ``abandoned``
    ``usage_refusals_total{reason}``        requests that the meter has refused
    ``usage_units_total{model}``            quota units that were charged; the first 100 models of a process by name,
                                            the others as ``other``
    ``usage_settle_failures_total``         settlements that failed at first and are retried
    ``usage_added_seconds``                 how long the meter itself took for a request
    ``usage_tokens{state}``                 tokens that are ``active``, ``exhausted``, ``expired``, ``disabled``
    ``usage_held_units``                    quota units that open reservations hold
    ``usage_lapsed_reservations``           open reservations whose time has passed
    ======================================  ==========================================================================

    The last three read the whole store, so they are up to five seconds old, and older if reading takes long: it takes
    at most a twentieth of the time.
    """

    def __init__(self, store: QuotaStore, *, registry: CollectorRegistry | None = None) -> None:
        self.registry = prometheus_client.REGISTRY if registry is None else registry
        self._requests = prometheus_client.Counter(
            "usage_requests", "Metered requests that were answered.", ["outcome"], registry=self.registry
        )
        self._refusals = prometheus_client.Counter(
            "usage_refusals", "Requests that the meter has refused.", ["reason"], registry=self.registry
        )
        self._units = prometheus_client.Counter(
            "usage_units", "Quota units that were charged.", ["model"], registry=self.registry
        )
        self._failures = prometheus_client.Counter(
            "usage_settle_failures", "Settlements that the store did not take at once.", registry=self.registry
        )
        self._added = prometheus_client.Histogram(
            "usage_added_seconds",
            "How long the meter itself took for a request.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._collector = _StoreCollector(store)
        self.registry.register(self._collector)
        self._models: set[str] = set()
        self._lock = threading.Lock()

    def on_settled(self, settlement: Settlement) -> None:
        """Count a metered request: for ``UsageMeter(on_settled=…)``."""
        self._requests.labels(settlement.outcome).inc()
        self._units.labels(self._label(settlement.model or "")).inc(settlement.units)
        self._added.observe(settlement.added)
        if not settlement.settled:
            self._failures.inc()

    def on_refused(self, reason: str) -> None:
        """Count a request that the meter has refused: for ``UsageMeter(on_refused=…)``."""
        self._refusals.labels(reason).inc()

    def app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request for the metrics, as a WSGI application."""
        return prometheus_client.make_wsgi_app(self.exposed())(environ, start_response)  # type: ignore[no-any-return]

    def exposed(self) -> CollectorRegistry:
        """Return the registry that has the metrics of all processes."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self.registry
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(self._collector)
        return registry

    def _label(self, model: str) -> str:
        if model in self._models:
            return model
        with self._lock:
            if len(self._models) >= _MOST_MODELS:
                return _OTHER
            self._models.add(model)
        return model


class _StoreCollector(Collector):
    """Read the store for each request, unless it was read a moment ago."""

    def __init__(self, store: QuotaStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._families: list[GaugeMetricFamily] = []
        self._fresh_until = 0.0  # by time.monotonic()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the metrics, without reading the store. This is called at registration."""
        yield from _families({}, 0, 0)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return what the store holds. If it fails, return nothing, so that the other metrics are still shown."""
        with self._lock:
            begun = time.monotonic()
            if begun >= self._fresh_until:
                try:
                    self._families = self._read()
                except Exception as error:
                    # Only the type: the text may quote values of the database.
                    logger.error("%s cannot be measured: %s", type(self._store).__name__, type(error).__qualname__)
                    self._families = []
                ended = time.monotonic()
                self._fresh_until = ended + max((ended - begun) / _MOST_LOAD, _FEWEST_SECONDS)
            yield from self._families

    def _read(self) -> list[GaugeMetricFamily]:
        now = time.time()
        states = Counter(token_state(token, now) for token in self._store.tokens())
        held = lapsed = 0
        for operation in self._store.open_reservations():
            held += operation.held
            lapsed += operation.has_lapsed(now)
        return _families(states, held, lapsed)


def _families(states: dict[str, int], held: int, lapsed: int) -> list[GaugeMetricFamily]:
    tokens = GaugeMetricFamily("usage_tokens", "Tokens by state.", labels=["state"])
    for state in TOKEN_STATES:
        tokens.add_metric([state], states.get(state, 0))
    return [
        tokens,
        GaugeMetricFamily("usage_held_units", "Quota units that open reservations hold.", value=held),
        GaugeMetricFamily("usage_lapsed_reservations", "Open reservations whose time has passed.", value=lapsed),
    ]
