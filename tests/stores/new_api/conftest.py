"""Databases of new-api on each kind of server."""

import pytest
from gateway import KEY, KINDS, Gateway, database_url


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def url(kind, request, tmp_path):
    with database_url(kind, request, tmp_path) as url:
        yield url


@pytest.fixture
def gateway(kind, url):
    gateway = Gateway(kind, url)
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "name": "Alice", "remain_quota": 987655, "used_quota": 12345})
    return gateway


@pytest.fixture
def sqlite_gateway(tmp_path):
    gateway = Gateway("sqlite", f"sqlite:///{tmp_path / 'one-api.db'}")
    gateway.add_users()
    gateway.add({"user_id": 1, "key": KEY, "name": "Alice", "remain_quota": 987655, "used_quota": 12345})
    return gateway
