"""PostgreSQL behind PgBouncer in transaction mode: each transaction may have another connection to the server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from pgbouncer import pooled
from sqlalchemy import create_engine

from usage_middleware import SQLAlchemyTokenStore

pytestmark = [pytest.mark.servers]

THREADS = 8


@pytest.fixture(scope="module")
def through_pgbouncer(postgresql):
    with postgresql.database() as url, postgresql.not_durable(url), pooled(url) as pooled_url:
        yield pooled_url


@pytest.mark.parametrize("own", [True, False], ids=["url", "engine"])
def test_threads_that_use_everything(through_pgbouncer, own, full):
    rounds = 300 if full else 30
    # An owner has to say it, as the documentation does.
    engine = create_engine(through_pgbouncer, connect_args={"prepare_threshold": None})
    with SQLAlchemyTokenStore(through_pgbouncer if own else engine) as store:
        key, token = store.create(total_available=10**9, model_limits={"m": 10**9})

        def use(thread):
            for number in range(rounds):
                name = f"{thread}/{number}"
                store.charge(key, 5, model="m", idempotency_key=name)
                assert store.find_operation(key, name).held == 5
                store.refund(store.find_operation(key, name), 2, idempotency_key=f"{name}/refund")
                reservation = store.reserve(key, 7, model="m", idempotency_key=f"{name}/reserve")
                assert store.get(key).total_used > 0
                store.settle(reservation, 3)
                assert store.operation(reservation.id).final_amount == 3

        with ThreadPoolExecutor(THREADS) as threads:
            for used in [threads.submit(use, thread) for thread in range(THREADS)]:
                used.result()
        assert store.get(key).total_used == THREADS * rounds * 6
        assert len(list(store.history(token.id))) == THREADS * rounds * 3
    engine.dispose()


def test_processes_make_the_tables_once(postgresql):
    with postgresql.database() as url, pooled(url) as pooled_url, ThreadPoolExecutor(THREADS) as threads:
        stores = [SQLAlchemyTokenStore(pooled_url) for _ in range(THREADS)]
        made = list(threads.map(lambda store: store.create(total_available=1), stores))
        assert stores[0].count() == len({token.id for _, token in made}) == THREADS
        for store in stores:
            store.close()
