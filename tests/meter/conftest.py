import pytest
from metering import Metered

from usage_middleware import MemoryTokenStore, SQLiteTokenStore


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    with MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db") as store:
        yield store


@pytest.fixture
def metered(store):
    """Make a metered application over a store of each kind."""

    def make(app=None, **arguments):
        return Metered(store, app, **arguments)

    return make
