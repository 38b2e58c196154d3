"""The contract of a store that only looks tokens up, which is all that the middleware needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..stores.base import TokenStore
from ..tokens import Token
from ..wsgi.middleware import UsageMiddleware

THREADS = 8

# Each returns another key that a client may also send, and that a careless look-up treats as the same: LIKE, GLOB, a
# collation that ignores case, a prefix search, text pasted into SQL.
_NEAR_MISSES = [
    pytest.param(str.swapcase, id="other case"),
    pytest.param(lambda key: key[:-1] + ("a" if key[-1] != "a" else "b"), id="another last character"),
    pytest.param(lambda key: key + "x", id="with one more character"),
    pytest.param(lambda key: key[:-1] + "%", id="LIKE, any text"),
    pytest.param(lambda key: "_" * len(key), id="LIKE, any character"),
    pytest.param(lambda key: key[:-1] + "*", id="GLOB"),
    pytest.param(lambda key: key + "'OR'1'='1", id="quote"),
    pytest.param(lambda key: "k" * 512, id="as long as a key may be"),
]


class TokenStoreContract:
    """What the middleware relies on: ``get`` finds exactly the key, returns ``None`` for others, changes nothing."""

    #: A key that the store holds, as stores see keys: without ``sk-``. Its token is enabled.
    key: str

    def make_store(self, tmp_path: Path) -> TokenStore:
        """Return the store to test."""
        raise NotImplementedError(f"{type(self).__name__} must have a method make_store(self, tmp_path)")

    def known_key(self, store: Any) -> str:
        """Return a key that ``store`` holds."""
        return self.key

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Any]:
        store = self.make_store(tmp_path)
        yield store
        if hasattr(store, "close"):
            store.close()

    def test_a_known_key_has_a_token(self, store: Any) -> None:
        token = store.get(self.known_key(store))
        assert isinstance(token, Token)
        assert token.enabled

    @pytest.mark.parametrize("miss", _NEAR_MISSES)
    def test_a_key_that_is_only_similar_has_none(self, store: Any, miss: Callable[[str], str]) -> None:
        key = self.known_key(store)
        if miss(key) == key:
            pytest.skip("this key has no such neighbour")
        assert store.get(miss(key)) is None

    def test_reading_changes_nothing(self, store: Any) -> None:
        key = self.known_key(store)
        first = store.get(key)
        for _ in range(10):
            ask(store, key)
        assert store.get(key) == first

    def test_threads_may_share_it(self, store: Any) -> None:
        key = self.known_key(store)
        expected = store.get(key)
        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(store.get, [key, "no-such-key"] * 100))
        assert answers == [expected, None] * 100

    def test_the_endpoint_answers_from_it(self, store: Any) -> None:
        key = self.known_key(store)
        token = store.get(key)
        status, answer = ask(store, key)
        assert status == "200 OK"
        assert answer["data"] == {
            "object": "token_usage",
            "name": token.name,
            "total_granted": token.total_granted,
            "total_used": token.total_used,
            "total_available": token.total_available,
            "unlimited_quota": token.unlimited_quota,
            "model_limits": token.model_limits,
            "model_limits_enabled": token.model_limits_enabled,
            "expires_at": max(token.expires_at, 0),
        }
        assert ask(store, "no-such-key")[0] == "401 Unauthorized"


def ask(store: TokenStore, key: str) -> tuple[str, Any]:
    """Ask the endpoint over ``store`` for ``key``. Return the status line and the decoded body."""
    answered: list[Any] = []
    middleware = UsageMiddleware(lambda environ, start_response: [], store)
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/usage/token",
        "HTTP_AUTHORIZATION": f"Bearer {key}",
    }
    body = b"".join(middleware(environ, lambda status, headers, exc_info=None: answered.append(status)))  # type: ignore[arg-type]
    return answered[0], json.loads(body)
