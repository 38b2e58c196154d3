"""Whether the time of a refusal tells disabled keys from unknown ones when the tokens are in a database server."""

from __future__ import annotations

import time

import pytest
from client import environ
from test_timing import compare, host, measure

from usage_middleware import SQLAlchemyTokenStore, Token, UsageMiddleware
from usage_middleware.keys import make_key

KEYS = 40  # of each kind
LIMITS = {f"model {number}": number for number in range(30)}


class Near:
    """A store that says within which time it answers."""

    answers_within = 0.02

    def get(self, key):
        return Token(enabled=False) if key == "disabled" else None


@pytest.mark.parametrize("key", ["unknown", "disabled"])
def test_a_key_is_refused_when_its_store_would_have_answered(key):
    app = UsageMiddleware(host, Near())
    begun = time.perf_counter()
    app(environ(HTTP_AUTHORIZATION=f"Bearer {key}"), lambda *_: None)
    assert time.perf_counter() - begun >= Near.answers_within


@pytest.mark.slow
def test_model_limits_do_not_tell_a_disabled_key(database_url, full):
    if not full:
        pytest.skip("measured with --full")
    keys = {"unknown": ["sk-" + make_key() for _ in range(KEYS)], "disabled": []}
    with SQLAlchemyTokenStore(database_url) as store:
        for _ in range(KEYS):
            key, token = store.create(model_limits=LIMITS)
            store.update(token.id, enabled=False)
            keys["disabled"].append(key)
        app = UsageMiddleware(host, store)
        measure(app, keys, 1)
        assert not compare(*measure(app, keys, 50).values()).tells_apart
        # What is held back would tell them apart.
        app._endpoints["/api/usage/token"]._authentication._refused_after = 0.0
        assert compare(*measure(app, keys, 50).values()).tells_apart
