"""How many round trips a call takes, counted by a proxy: what decides how fast a server that is a network away is."""

from __future__ import annotations

import dataclasses
from contextlib import closing, contextmanager

import pytest
from proxies import Proxy
from sqlalchemy import create_engine, make_url

from usage_middleware import Changes, Lookup, QuotaExceeded, SQLAlchemyTokenStore

pytestmark = [pytest.mark.servers]


@contextmanager
def counted(database, *, own=True, query=None, **options):
    """A store whose connection is open and whose statements were made, and its proxy."""
    with closing(Proxy(database.server.port)) as proxy:
        url = make_url(database.url).set(port=proxy.port).update_query_dict(query or {})
        engine = create_engine(url, **options)
        with SQLAlchemyTokenStore(url if own else engine) as store:
            key, token = store.create(total_available=10**6, model_limits={"m": 10**6})
            store.charge(key, 1, model="m", idempotency_key="first")
            store.settle(store.reserve(key, 1, model="m", idempotency_key="second"), 1)
            yield store, proxy, key, token
        engine.dispose()


def round_trips(proxy, call):
    before = proxy.round_trips
    call()
    return proxy.round_trips - before


def test_a_call_takes_few_round_trips(database):
    with counted(database) as (store, proxy, key, token):
        taken = {
            "look-up": round_trips(proxy, lambda: store.get(key)),
            "look-up of an unknown key": round_trips(proxy, lambda: store.get("unknown")),
            "charge": round_trips(proxy, lambda: store.charge(key, 1, model="m", idempotency_key="a")),
            "repeated charge": round_trips(proxy, lambda: store.charge(key, 1, model="m", idempotency_key="a")),
            "charge without model and key": round_trips(proxy, lambda: store.charge(key, 1)),
            "reserve and settle": round_trips(
                proxy, lambda: store.settle(store.reserve(key, 5, model="m", idempotency_key="b"), 3)
            ),
            "refund": round_trips(proxy, lambda: store.refund(store.find_operation(key, "a"))),
            "grant": round_trips(proxy, lambda: store.grant(token.id, 5, idempotency_key="c")),
            "refusal": round_trips(proxy, lambda: refused(store, key)),
        }
    assert taken == {
        "look-up": 1,
        "look-up of an unknown key": 1,
        "charge": 2,  # what is read, with the lock; what is written, with COMMIT
        "repeated charge": 2,  # nothing is saved
        "charge without model and key": 2,
        "reserve and settle": 4,
        "refund": taken["refund"],
        "grant": 2,
        "refusal": 2,
    }
    # find_operation reads through SQLAlchemy, which rolls back on MySQL.
    assert taken["refund"] == (4 if database.is_mysql else 3)


def refused(store, key):
    with pytest.raises(QuotaExceeded):
        store.charge(key, 10**9)


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}], ids=["default", "AUTOCOMMIT"])
@pytest.mark.parametrize("query", [{}, {"client_flag": "65536"}], ids=["no flag", "client_flag"])
def test_an_engine_of_the_host_takes_few_round_trips(database, query, options):
    """psycopg's pipelines need no option. PyMySQL sends statements one by one, unless the engine's owner has allowed
    several in one text. Each time, the owner's pool rolls back in the end, which psycopg does not send."""
    if query and not database.is_mysql:
        pytest.skip("is PyMySQL's option")
    with counted(database, own=False, query=query, **options) as (store, proxy, key, _):
        taken = (
            round_trips(proxy, lambda: store.get(key)),
            round_trips(proxy, lambda: store.charge(key, 1, model="m", idempotency_key="a")),
            round_trips(proxy, lambda: store.settle(store.reserve(key, 5, model="m", idempotency_key="b"), 3)),
        )
    if not database.is_mysql:
        assert taken == (1, 2, 4)
    else:
        assert taken == ((2, 3, 6) if query else (2, 11, 22))


def test_a_transaction_that_changes_nothing_is_not_begun(database):
    with counted(database) as (store, proxy, _, _):
        taken = round_trips(proxy, lambda: store._transact(lambda _: None))
    assert taken <= 1


def test_what_a_transaction_has_written_is_what_it_reads(database):
    """What is written waits for the next statement, or for COMMIT."""

    def work(transaction):
        place = Lookup(token_id=token.id, now=0.0, most_lapsed=1)
        before = transaction.load(place).token
        transaction.save(Changes(before=before, token=dataclasses.replace(before, name="new")))
        return transaction.load(place).token.name

    with counted(database) as (store, _, _, token):
        assert store._transact(work) == "new"
        assert store.get_by_id(token.id).name == "new"
