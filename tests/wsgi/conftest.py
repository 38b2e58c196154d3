"""A store of each kind, by the clock of the module that asks for it."""

import pytest

from usage_middleware import MemoryTokenStore, SQLiteTokenStore


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path, clock):
    if request.param == "memory":
        made = MemoryTokenStore(clock=clock)
    else:
        made = SQLiteTokenStore(tmp_path / "tokens.db", clock=clock)
    with made as store:
        yield store
