"""What Prometheus sees of a meter and of its store."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from contextlib import closing

import pytest
from client import call, environ
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from web_servers import GUNICORN, KEY, Connection, message, started

from usage_middleware import MemoryTokenStore, SQLiteTokenStore, StoreError, UsageMeter
from usage_middleware.testing.fixtures import Clock
from usage_middleware.wsgi.metrics import Metrics


@pytest.fixture
def store():
    with MemoryTokenStore() as store:
        yield store


@pytest.fixture
def metrics(store):
    return Metrics(store, registry=CollectorRegistry())


def samples(metrics):
    """Return the values that a scrape shows, by name and labels, without the times at which series began."""
    text = call(metrics.app, environ(path="/")).body.decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def app(environ, start_response):
    if environ["PATH_INFO"] == "/raise":
        raise ZeroDivisionError
    start_response(environ["QUERY_STRING"] or "200 OK", [("Content-Length", "2")])
    return [b"ok"]


def ask(meter, key=KEY, path="/", status="200 OK", **variables):
    if key is not None:
        variables["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return call(meter, environ(path=path, QUERY_STRING=status, **variables)).status


def test_requests_refusals_and_units_are_counted(store, metrics):
    store.create(key=KEY, total_available=100, model_limits={"mini": True})
    meter = UsageMeter(
        app,
        store,
        cost=7,
        model=lambda environ: environ.get("HTTP_X_MODEL"),
        on_settled=metrics.on_settled,
        on_refused=metrics.on_refused,
        throttle="1 per 30 days",
    )
    assert samples(metrics)["usage_settle_failures_total",] == 0

    assert [ask(meter, HTTP_X_MODEL="mini"), ask(meter)] == [200, 200]
    assert ask(meter, status="404 Not Found") == 404
    assert ask(meter, status="500 Failed") == 500
    with pytest.raises(ZeroDivisionError):
        ask(meter, path="/raise")
    assert ask(meter, key=None) == 401
    assert ask(meter, key="x" * 48) == 401
    assert ask(meter, key="x" * 48) == 429
    assert ask(meter, HTTP_X_MODEL="maxi") == 403
    assert ask(meter, HTTP_X_MODEL="\x00") == 400

    seen = samples(metrics)
    counters = ("usage_requests_total", "usage_refusals_total")
    counted = {name: value for name, value in seen.items() if name[0] in counters}
    assert counted == {
        ("usage_requests_total", "completed"): 2,
        ("usage_requests_total", "rejected"): 1,
        ("usage_requests_total", "failed"): 2,
        ("usage_refusals_total", "no_key"): 1,
        ("usage_refusals_total", "unknown"): 1,
        ("usage_refusals_total", "throttled"): 1,
        ("usage_refusals_total", "model_not_allowed"): 1,
        ("usage_refusals_total", "invalid_request"): 1,
    }
    assert seen["usage_units_total", "mini"] == 7
    assert seen["usage_units_total", ""] == 7
    assert seen["usage_added_seconds_count",] == 5
    assert 0 < seen["usage_added_seconds_sum",] < 5


def test_held_and_exhausted_quota_are_counted_apart(store, metrics):
    store.create(key=KEY, total_available=10)
    meter = UsageMeter(app, store, cost=7, on_refused=metrics.on_refused)
    operation = store.reserve(KEY, 5)
    assert ask(meter) == 429
    store.settle(operation, 5)
    assert ask(meter) == 402
    seen = samples(metrics)
    assert (seen["usage_refusals_total", "held"], seen["usage_refusals_total", "exhausted"]) == (1, 1)


def test_a_failed_settle_is_counted(tmp_path, metrics):
    class Failing(MemoryTokenStore):
        def settle(self, *args, **kwargs):
            raise StoreError("the disk is full")

    with Failing() as store:
        store.create(key=KEY, total_available=10)
        assert ask(UsageMeter(app, store, on_settled=metrics.on_settled)) == 200
    seen = samples(metrics)
    assert seen["usage_settle_failures_total",] == 1
    assert seen["usage_requests_total", "completed"] == 1


def test_only_the_first_hundred_models_have_a_label(store, metrics):
    store.create(key=KEY, total_available=1000)
    meter = UsageMeter(app, store, model=lambda environ: environ["HTTP_X"], on_settled=metrics.on_settled)
    for number in [*range(150), 0]:
        ask(meter, HTTP_X=f"model {number}")
    units = {labels[1]: value for labels, value in samples(metrics).items() if labels[0] == "usage_units_total"}
    assert len(units) == 101
    assert (units["model 0"], units["model 99"], units["other"]) == (2, 1, 50)


def test_tokens_and_reservations_are_counted():
    clock = Clock()
    now = int(time.time())
    with MemoryTokenStore(clock=clock) as store:
        clock.now = now - 1000
        key, _ = store.create(total_available=100)
        store.create()
        store.create(unlimited_quota=True)
        store.create(total_available=1, expires_at=now - 1)
        store.update(store.create(total_available=1)[1].id, enabled=False)
        store.reserve(key, 30, expires_in=1)
        clock.now = now
        other, _ = store.create(total_available=10)
        store.reserve(other, 4, expires_in=10_000)
        seen = samples(Metrics(store, registry=CollectorRegistry()))

    assert seen["usage_tokens", "active"] == 3
    assert seen["usage_tokens", "exhausted"] == 1
    assert seen["usage_tokens", "expired"] == 1
    assert seen["usage_tokens", "disabled"] == 1
    assert seen["usage_held_units",] == 34
    assert seen["usage_lapsed_reservations",] == 1


def test_a_store_is_not_read_at_every_scrape_nor_before_the_first(caplog):
    class Counted(MemoryTokenStore):
        reads = 0
        fails = False

        def tokens(self):
            self.reads += 1
            if self.fails:
                raise StoreError("canary")
            return super().tokens()

    with Counted() as store:
        metrics = Metrics(store, registry=CollectorRegistry())
        assert store.reads == 0
        store.create()
        assert [samples(metrics)["usage_tokens", "exhausted"] for _ in range(3)] == [1, 1, 1]
        assert store.reads == 1
        metrics._collector._fresh_until = 0.0
        store.fails = True
        with caplog.at_level(logging.ERROR):
            seen = samples(metrics)
        assert ("usage_tokens", "exhausted") not in seen
        assert ("usage_settle_failures_total",) in seen
        assert "Counted cannot be measured: StoreError" in caplog.text
        assert "canary" not in caplog.text


def test_no_label_has_a_key_a_token_or_a_name(store, metrics):
    store.create(key=KEY, name="Canary Ltd.", total_available=100)
    meter = UsageMeter(app, store, on_settled=metrics.on_settled, on_refused=metrics.on_refused)
    ask(meter)
    ask(meter, key="unknown" * 7)
    text = call(metrics.app, environ()).body.decode()
    assert set(re.findall(r"(\w+)=", text)) <= {"outcome", "reason", "model", "state", "le"}
    for secret in (KEY, "unknown" * 7, "Canary", "token_id"):
        assert secret not in text


def test_a_hook_that_fails_is_logged_and_the_client_does_not_notice(store, caplog):
    def fail(reason):
        raise ValueError(reason)

    assert ask(UsageMeter(app, store, on_refused=fail), key=None) == 401
    assert "on_refused failed" in caplog.text
    with pytest.raises(TypeError, match="on_refused"):
        UsageMeter(app, store, on_refused=5)


def test_without_the_package_the_error_says_how_to_install_it():
    program = "import sys; sys.modules['prometheus_client'] = None; import usage_middleware.wsgi.metrics"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "metrics need the package prometheus_client: pip install prometheus_client" in done.stderr


SERVED = """
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from usage_middleware import SQLiteTokenStore, UsageMeter
from usage_middleware.testing.fixtures import Clock
from usage_middleware.wsgi.metrics import Metrics

def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

store = SQLiteTokenStore("tokens.db")
metrics = Metrics(store)
meter = UsageMeter(app, store, on_settled=metrics.on_settled)
application = DispatcherMiddleware(meter, {"/metrics": metrics.app})
"""


@pytest.mark.servers
@pytest.mark.slow
def test_the_processes_of_a_server_are_counted_together(tmp_path):
    (tmp_path / "served_metrics.py").write_text(SERVED)
    (tmp_path / "metrics").mkdir()
    database = tmp_path / "tokens.db"
    with SQLiteTokenStore(database) as store:
        store.create(key=KEY, total_available=1000)
    command = [*GUNICORN, "--workers=3", "--preload", "served_metrics:application"]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    with started(command, database, tmp_path / "log", **environment) as (_, port):
        for _ in range(30):
            get(port, b"/work")
        text = get(port, b"/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (requests,) = [s for s in families["usage_requests"].samples if s.labels.get("outcome") == "completed"]
    assert requests.value == 30
    assert {s.labels["state"]: s.value for s in families["usage_tokens"].samples}["active"] == 1


def get(port, path):
    with closing(Connection(port)) as connection:
        connection.send(message(b"GET", path, b"Authorization: Bearer " + KEY.encode(), b"Connection: close"))
        return connection.read(b"GET")
