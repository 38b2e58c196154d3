"""An SQLite database and a store on it."""

import os
import tempfile
from pathlib import Path

import pytest
from sqlite_ledger import make_ledger
from sqlite_statements import watched_statements

from usage_middleware import SQLiteTokenStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.db"


@pytest.fixture
def store(path):
    with SQLiteTokenStore(path) as store:
        yield store


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Return the file of a ledger to which the calls can be made."""
    path = tmp_path_factory.mktemp("ledger") / "tokens.db"
    make_ledger(path)
    return path


@pytest.fixture
def statements():
    """Yield the statements of the connections that are opened from now on."""
    with watched_statements() as statements:
        yield statements


@pytest.fixture
def folder():
    """Yield a directory that another user may enter, too: the path to ``tmp_path`` is for its owner alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        # What is imported at its first use is imported by a user that may read it.
        with SQLiteTokenStore(os.path.join(name, "other.db")) as store:
            store.get("no-such-key")
        os.unlink(os.path.join(name, "other.db"))
        yield Path(name)
