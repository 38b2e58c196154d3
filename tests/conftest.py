import dataclasses
from pathlib import Path

import pytest

pytest.register_assert_rewrite("usage_middleware.testing")

from usage_middleware import MemoryTokenStore, SQLiteTokenStore, Token  # noqa: E402 - after the line above
from usage_middleware.tokens import with_prefix  # noqa: E402


class Host:
    """A token store of some kind, filled by the test in terms of the wire."""

    def __init__(self, store):
        self.store = store

    def add(self, key, **fields):
        """Puts a token under ``key``, with any fields: those too that only a ledger or an operator brings about."""
        if isinstance(self.store, dict):
            self.store[key] = Token(**fields)
            return
        # Stores see keys stripped; what is brought may still have the prefix.
        _, token = self.store.create(key=with_prefix(key))
        self.store._transact(lambda transaction: transaction.save(dataclasses.replace(token, **fields)))


@pytest.fixture(params=["dict", "memory", "sqlite"])
def host(request, tmp_path):
    if request.param == "dict":
        yield Host({})
        return
    with MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db") as store:
        yield Host(store)


@pytest.fixture(scope="session")
def readme():
    return (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="Run the evidence at its full size: hours of charges, kills and cuts instead of a minute.",
    )


@pytest.fixture
def full(request):
    """Whether a test is to run at its full size."""
    return request.config.getoption("--full")
