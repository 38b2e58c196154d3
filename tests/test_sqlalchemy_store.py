"""What :class:`SQLAlchemyTokenStore` does on real servers: the contract, its tables, its statements, and what it keeps.

``test_sqlalchemy_failures.py`` has what it does when servers, connections and processes fail.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import databases
import pytest
from sqlalchemy import NullPool, create_engine, event, make_url, select

from usage_middleware import OperationConflict, SQLAlchemyTokenStore, StoreError, UsageMiddleware, open_store
from usage_middleware.stores import sql_schema
from usage_middleware.stores.sql_database import Database
from usage_middleware.testing import QuotaStoreContract
from usage_middleware.tokens import TokenRecord, key_digest

MOST = 2**63 - 1


class TestSQLAlchemyTokenStore(QuotaStoreContract):
    @pytest.fixture(scope="class")
    def one_store(self, shared_database):
        """A connection costs more than most tests, so that one store serves them until one of them closes it."""
        stores = [SQLAlchemyTokenStore(shared_database.url)]
        yield stores
        stores[-1].close()

    @pytest.fixture
    def store(self, database, one_store, request):
        store = one_store[-1]
        yield store
        if "closed" in request.node.name:
            store.close()
            one_store.append(SQLAlchemyTokenStore(database.url))


@pytest.fixture
def store(database):
    with SQLAlchemyTokenStore(database.url) as store:
        yield store


def create(store, **fields):
    """Adds a token; returns its key as stores see it, and the token."""
    key, token = store.create(**{"total_available": 1000, **fields})
    return key.removeprefix("sk-"), token


# --- Tables

# Makes tables, or dies after the first statement that makes something.
CRASH = """
import os, signal, sys
from sqlalchemy import Engine, event
from usage_middleware import SQLAlchemyTokenStore

@event.listens_for(Engine, "after_cursor_execute")
def after(connection, cursor, statement, *rest):
    if statement.split()[0] in ("CREATE", "INSERT"):
        os.kill(os.getpid(), signal.SIGKILL)

crashes = 0
while True:
    pid = os.fork()
    if not pid:
        SQLAlchemyTokenStore(sys.argv[1]).find(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != signal.SIGKILL or crashes == int(sys.argv[2]):
        break
    crashes += 1
print(crashes)
"""


def tables_of(database):
    """All that the server says of the tables of a store."""
    with create_engine(database, poolclass=NullPool).connect() as connection:
        if connection.dialect.name == "postgresql":
            return sorted(
                (table, column, kind)
                for table, column, kind in connection.exec_driver_sql(
                    "SELECT table_name, column_name, data_type FROM information_schema.columns "
                    "WHERE table_schema = 'public' UNION "
                    "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
                )
            )
        names = [name for (name,) in connection.exec_driver_sql("SHOW TABLES")]
        tables = [connection.exec_driver_sql(f"SHOW CREATE TABLE {name}").one()[1] for name in sorted(names)]
        # Indexes are in the order in which they were made.
        return [sorted(line.rstrip(",") for line in table.splitlines()) for table in tables]


def test_processes_that_die_while_they_make_tables_hinder_none(database_server, database_url):
    # MariaDB commits each statement, so that each process comes one further; PostgreSQL none, so all die at once.
    most = 3 if database_server.driver.startswith("postgresql") else 30
    done = subprocess.run([sys.executable, "-c", CRASH, database_url, str(most)], stdout=subprocess.PIPE, check=True)
    crashes = int(done.stdout)
    assert crashes == 3 if most == 3 else crashes > len(sql_schema._metadata.tables)
    with SQLAlchemyTokenStore(database_url) as store, database_server.database() as other:
        create(store)
        with SQLAlchemyTokenStore(other) as in_one_go:
            create(in_one_go)
        assert tables_of(database_url) == tables_of(other)
