"""An SQLite file in which views have the names of new-api's tables: to read one may take for ever."""

import sqlite3
import subprocess
from contextlib import closing

import pytest
from command import SCRIPT

from usage_middleware import NewAPITokenStore, SQLiteTokenStore, StoreError, open_store
from usage_middleware.stores import is_new_api

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
TOKENS = "SELECT i AS id, 'key' || i AS key, 1 AS remain_quota, 1 AS user_id FROM n"
TABLE = "CREATE TABLE tokens (id INTEGER PRIMARY KEY, key TEXT, remain_quota INTEGER, user_id INTEGER)"


@pytest.fixture(
    params=[
        pytest.param([f"CREATE VIEW tokens AS {ENDLESS} {TOKENS}"], id="tokens"),
        pytest.param([f"CREATE VIEW Tokens AS {ENDLESS} {TOKENS}"], id="tokens in other letters"),
        pytest.param([TABLE, f"CREATE VIEW users AS {ENDLESS} SELECT i AS id, 1 AS status FROM n"], id="users"),
    ]
)
def path(request, tmp_path):
    path = tmp_path / "source.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in request.param:
            connection.execute(statement)
        if request.param[0] == TABLE:
            connection.execute("INSERT INTO tokens VALUES (1, 'the-key-of-a-holder', 5, -1)")
    return path


def test_it_is_not_read(path):
    with NewAPITokenStore(path) as store:
        for use in (lambda: store.get("the-key-of-a-holder"), store.count, lambda: next(store.records())):
            with pytest.raises(StoreError, match="is not a database of new-api"):
                use()


def test_it_is_not_taken_for_a_database_of_new_api(tmp_path, path):
    has_table = "users" in path.read_bytes().decode("latin-1")
    assert is_new_api(str(path)) == has_table
    if not has_table:
        with open_store(str(path), read_only=True) as store:
            assert isinstance(store, SQLiteTokenStore)
            with pytest.raises(StoreError, match=r"(?i)has a view 'tokens'"):
                store.get("the-key-of-a-holder")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_an_import_ends(tmp_path, path, options):
    before = path.read_bytes()
    done = subprocess.run(
        [SCRIPT, "import", *options, "--db", tmp_path / "new.db", path], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "a view 'tokens'" in done.stderr.lower()
    assert path.read_bytes() == before
