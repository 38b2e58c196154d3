"""A store on each server in turn."""

from __future__ import annotations

import pytest

from usage_middleware import (
    SQLAlchemyTokenStore,
)


@pytest.fixture
def store(database):
    with SQLAlchemyTokenStore(database.url) as store:
        yield store
