"""The clock and the storages of a throttle."""

import pytest
from storage_servers import storage_server
from throttling import BEGIN, Clock

from usage_middleware.wsgi import throttle


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(BEGIN)
    monkeypatch.setattr(throttle, "time", clock)
    return clock


@pytest.fixture(params=["memory", "redis", "memcached"])
def storage(request, tmp_path):
    """Yield the URI of each storage, empty."""
    if request.param == "memory":
        yield "memory://"
        return
    with storage_server(request.param, tmp_path) as server:
        yield server.uri


@pytest.fixture(params=["redis", "memcached"])
def server(request, tmp_path):
    with storage_server(request.param, tmp_path) as server:
        yield server
