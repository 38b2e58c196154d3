"""A PostgreSQL database that does not know what its bytes mean."""

from __future__ import annotations

import databases
import pytest
from sqlalchemy import create_engine, make_url

from usage_middleware import SQLAlchemyTokenStore, StoreError

pytestmark = [pytest.mark.servers]


@pytest.fixture
def sql_ascii_url(postgresql):
    with postgresql.database() as url:
        name = make_url(url).database
        postgresql.execute(
            f"DROP DATABASE {name}",
            f"CREATE DATABASE {name} OWNER {databases.APPLICATION} ENCODING 'SQL_ASCII' TEMPLATE template0",
        )
        yield url


@pytest.mark.parametrize("own", [True, False], ids=["url", "engine"])
def test_sql_ascii_is_refused_with_the_remedy(sql_ascii_url, own):
    engine = create_engine(sql_ascii_url)
    with SQLAlchemyTokenStore(sql_ascii_url if own else engine) as store:
        for use in (lambda: store.get("sk-key"), store.create, lambda: list(store.tokens())):
            with pytest.raises(StoreError, match=r"SQL_ASCII.*make another database.*UTF8") as caught:
                use()
            assert databases.PASSWORD not in str(caught.value)
    engine.dispose()
