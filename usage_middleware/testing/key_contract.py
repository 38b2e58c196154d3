"""The contract of keys: how they are made, chosen, found, and retired."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import TokenNotFound
from ..keys import strip_prefix
from ..stores.base import QuotaStore
from ..tokens import id_of
from .fixtures import Holder, QuotaStoreFixtures
from .token_store import ask

# No client can send these, but a host may look them up. They test padding collations and C strings that end at NUL.
_IMPOSSIBLE_KEYS = [
    pytest.param(lambda key: "", id="empty"),
    pytest.param(lambda key: key + " ", id="space at the end"),
    pytest.param(lambda key: " " + key, id="space at the beginning"),
    pytest.param(lambda key: key + "\0", id="NUL at the end"),
    pytest.param(lambda key: "caf\u00e9 \u4ee4\u724c", id="not ASCII"),
    pytest.param(lambda key: "\ud800", id="not even text"),
    pytest.param(lambda key: "SK-" + key, id="another prefix"),
]
_BAD_KEYS = [
    pytest.param("", ValueError, id="empty"),
    pytest.param("sk-", ValueError, id="prefix alone"),
    pytest.param("sk-sk-", ValueError, id="prefixes alone"),
    pytest.param("canary key", ValueError, id="space"),
    pytest.param("canary,key", ValueError, id="comma"),
    pytest.param("canary\n", ValueError, id="line feed at the end"),
    pytest.param("canary\0", ValueError, id="NUL"),
    pytest.param("canary-cl\u00e9", ValueError, id="not ASCII"),
    pytest.param("canary" * 100, ValueError, id="too long"),
    pytest.param(b"canary", TypeError, id="bytes"),
]


class KeyContract(QuotaStoreFixtures):
    """A key is found exactly, with or without its prefix, and never returns once it is retired."""

    @pytest.mark.parametrize("impossible", _IMPOSSIBLE_KEYS)
    def test_any_text_may_be_asked_for(self, holder: Holder, impossible: Callable[[str], str]) -> None:
        key, store = impossible(holder.key), holder.store
        assert store.get(key) is None
        assert store.find_operation(key, "work") is None
        for use in (store.charge, store.reserve):
            with pytest.raises(TokenNotFound):
                use(key, 1)

    def test_a_made_key_has_the_shape_that_clients_expect(self, store: QuotaStore) -> None:
        keys = {store.create()[0] for _ in range(10)}
        assert len(keys) == 10
        for key in keys:
            assert re.fullmatch("sk-[0-9A-Za-z]{48}", key)

    @pytest.mark.parametrize("prefix", ["", "sk-", "sk-sk-sk-"])
    def test_a_key_is_the_same_with_any_number_of_prefixes(self, holder: Holder, prefix: str) -> None:
        key, store = prefix + holder.key, holder.store
        assert store.get(key) == holder.token
        store.charge(key, 1)
        operation = store.reserve(key, 1, idempotency_key="work")
        assert store.find_operation(key, "work") == operation
        assert holder.totals == (2, 998)
        with pytest.raises(ValueError, match="in use"):
            store.create(key=key)

    def test_what_create_returns_is_charged_as_it_is(self, store: QuotaStore) -> None:
        assert store.charge(store.create(total_available=1)[0], 1).total_used == 1

    @pytest.mark.parametrize("key", ["legacy-key-0001", "sk-legacy-key-0001", "sk-sk-twice", "!~'\"%_\\", "k" * 512])
    def test_an_operator_may_bring_a_key(self, store: QuotaStore, key: str) -> None:
        written, token = store.create(key=key)
        stripped = strip_prefix(key)
        assert strip_prefix(written) == stripped
        assert store.get(stripped) == store.get(key) == store.get(written) == token
        assert ask(store, stripped)[0] == "200 OK"

    @pytest.mark.parametrize(("length", "hint"), [(1, ""), (23, ""), (24, "wxyz"), (48, "wxyz")])
    def test_a_short_key_has_no_hint(self, store: QuotaStore, length: int, hint: str) -> None:
        # A person who reads the database has the digest too, and could guess the rest of a short key.
        key = ("k" * 60 + "wxyz")[-length:]
        _, token = store.create(key=key)
        assert token.hint == hint
        assert store.get(key) == token

    @pytest.mark.parametrize(("key", "error"), _BAD_KEYS)
    def test_a_key_that_no_client_could_send_is_refused(
        self, store: QuotaStore, key: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error) as caught:
            store.create(key=key)
        assert "canary" not in str(caught.value)
        assert list(store.tokens()) == []

    @pytest.mark.parametrize("key", [None, b"key", 5])
    def test_a_key_is_a_str(self, holder: Holder, key: Any) -> None:
        store = holder.store
        for use in (
            lambda: store.get(key),
            lambda: store.charge(key, 1),
            lambda: store.reserve(key, 1),
            lambda: store.find_operation(key, "work"),
        ):
            with pytest.raises(TypeError, match=f"key .* {type(key).__name__}$"):
                use()

    def test_a_key_is_given_once(self, store: QuotaStore) -> None:
        store.create(key="legacy-canary-0001", name="First")
        for key in ("legacy-canary-0001", "sk-legacy-canary-0001"):
            with pytest.raises(ValueError, match="in use") as caught:
                store.create(key=key)
            assert "canary" not in str(caught.value)
        assert [token.name for token in store.tokens()] == ["First"]

    def test_rotate_gives_a_new_key_and_stops_the_old_one(self, holder: Holder) -> None:
        store, token = holder.store, holder.token
        new = store.rotate(holder.id)
        assert re.fullmatch("sk-[0-9A-Za-z]{48}", new)
        assert store.get(holder.key) is None
        with pytest.raises(TokenNotFound):
            holder.charge(1)
        assert store.get(new) == dataclasses.replace(token, hint=new[-4:])
        assert store.charge(new, 1).total_used == 1

    def test_a_key_that_was_given_up_never_returns(self, store: QuotaStore) -> None:
        _, deleted = store.create(key="deleted-key")
        _, rotated = store.create(key="rotated-key")
        store.delete(id_of(deleted))
        store.rotate(id_of(rotated))
        for key in ("deleted-key", "rotated-key"):
            with pytest.raises(ValueError, match="never returns"):
                store.create(key=key)
            assert store.get(key) is None

    def test_no_key_is_shown(self, store: QuotaStore) -> None:
        key, token = store.create(total_available=5)
        operation = store.reserve(key, 5)
        shown = [repr(store), repr(token), repr(list(store.tokens())), repr(operation), repr(list(store.records()))]
        with pytest.raises(Exception, match="quota units") as caught:
            store.charge(key, MAX_INTEGER)
        for text in (*shown, repr(caught.value)):
            assert strip_prefix(key) not in text
