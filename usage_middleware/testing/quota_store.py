"""The contract of a :class:`~usage_middleware.QuotaStore`: what its operator does with tokens."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import StoreError, TokenNotFound
from ..stores.base import QuotaStore
from ..tokens import Token
from .ledger_contract import LedgerContract
from .record_contract import RecordsContract
from .token_store import THREADS, TokenStoreContract, ask

# No client can send these, but a host may ask for them: a padding collation and C strings that end at NUL.
_IMPOSSIBLE_KEYS = [
    pytest.param(lambda key: "", id="empty"),
    pytest.param(lambda key: key + " ", id="space at the end"),
    pytest.param(lambda key: " " + key, id="space at the beginning"),
    pytest.param(lambda key: key + "\0", id="NUL at the end"),
    pytest.param(lambda key: "caf\u00e9 \u4ee4\u724c", id="not ASCII"),
    pytest.param(lambda key: "\ud800", id="not even text"),
]


_EVERY_FIELD: dict[str, Any] = {
    "name": "caf\u00e9 \u4ee4\u724c \U0001f511 'quoted' \"\\",
    "total_available": MAX_INTEGER,
    "unlimited_quota": True,
    "model_limits": {"gpt-4o": True, "gpt-4o-mini": 500_000, "none": 0, "most": MAX_INTEGER, "\u6a21\u578b": 1},
    "model_limits_enabled": False,
    "expires_at": 4_102_444_800,
}

_BAD_FIELDS = [
    pytest.param({"name": None}, TypeError, id="name None"),
    pytest.param({"name": b"bytes"}, TypeError, id="name bytes"),
    pytest.param({"name": "a\0b"}, ValueError, id="name with NUL"),
    pytest.param({"name": "\ud800"}, ValueError, id="name that UTF-8 cannot carry"),
    pytest.param({"unlimited_quota": 1}, TypeError, id="unlimited_quota int"),
    pytest.param({"unlimited_quota": None}, TypeError, id="unlimited_quota None"),
    pytest.param({"model_limits": ["gpt-4o"]}, TypeError, id="model_limits list"),
    pytest.param({"model_limits": {"gpt-4o": False}}, TypeError, id="model_limits False"),
    pytest.param({"model_limits": {"gpt-4o": 1.5}}, TypeError, id="model_limits float"),
    pytest.param({"model_limits": {"gpt-4o": -1}}, ValueError, id="model_limits negative"),
    pytest.param({"model_limits": {"gpt-4o": MAX_INTEGER + 1}}, ValueError, id="model_limits too large"),
    pytest.param({"model_limits": {"": 1}}, ValueError, id="model without a name"),
    pytest.param({"model_limits": {"a\0b": 1}}, ValueError, id="model with NUL"),
    pytest.param({"model_limits": {1: 1}}, TypeError, id="model int"),
    pytest.param({"model_limits_enabled": 0}, TypeError, id="model_limits_enabled int"),
    pytest.param({"expires_at": "2030-01-01"}, TypeError, id="expires_at str"),
    pytest.param({"expires_at": 1.5}, TypeError, id="expires_at float"),
    pytest.param({"expires_at": MAX_INTEGER + 1}, ValueError, id="expires_at too large"),
]
_BAD_TOTALS = [
    pytest.param({"total_available": -1}, ValueError, id="total_available negative"),
    pytest.param({"total_available": True}, TypeError, id="total_available bool"),
    pytest.param({"total_available": 10.0}, TypeError, id="total_available float"),
    pytest.param({"total_available": "10"}, TypeError, id="total_available str"),
    pytest.param({"total_available": MAX_INTEGER + 1}, ValueError, id="total_available too large"),
]
_BAD_KEYS = [
    pytest.param("", ValueError, id="empty"),
    pytest.param("sk-", ValueError, id="prefix alone"),
    pytest.param("canary key", ValueError, id="space"),
    pytest.param("canary,key", ValueError, id="comma"),
    pytest.param("canary\n", ValueError, id="line feed at the end"),
    pytest.param("canary\0", ValueError, id="NUL"),
    pytest.param("canary-cl\u00e9", ValueError, id="not ASCII"),
    pytest.param("canary" * 100, ValueError, id="too long"),
    pytest.param(b"canary", TypeError, id="bytes"),
]
_BAD_IDS = [pytest.param(bad, id=repr(bad)) for bad in ("1", 1.0, True, None)]


class QuotaStoreContract(LedgerContract, RecordsContract, TokenStoreContract):
    """What hosts and operators rely upon in a :class:`QuotaStore`. The store that is made must be empty."""

    def make_store(self, tmp_path: Path) -> QuotaStore:
        """Returns the store to test, without tokens."""
        raise NotImplementedError(f"{type(self).__name__} must have a method make_store(self, tmp_path)")

    def known_key(self, store: QuotaStore) -> str:
        key, _ = store.create(name="Known", total_available=1000, model_limits={"gpt-4o": 500})
        return key.removeprefix("sk-")

    @pytest.mark.parametrize("impossible", _IMPOSSIBLE_KEYS)
    def test_any_text_may_be_asked_for(self, store: QuotaStore, impossible: Callable[[str], str]) -> None:
        assert store.get(impossible(self.known_key(store))) is None

    # --- create

    def test_a_made_key_has_the_shape_that_clients_expect(self, store: QuotaStore) -> None:
        keys = {store.create()[0] for _ in range(10)}
        assert len(keys) == 10
        for key in keys:
            assert re.fullmatch("sk-[0-9A-Za-z]{48}", key)

    def test_a_created_token_is_found_by_key_and_by_id(self, store: QuotaStore) -> None:
        before = int(time.time())
        key, token = store.create(name="Default Token", total_available=1000)
        assert before <= token.created_at <= time.time()
        assert token.id is not None
        assert token == Token(
            name="Default Token", total_available=1000, id=token.id, hint=key[-4:], created_at=token.created_at
        )
        assert store.get(key.removeprefix("sk-")) == token
        assert store.get_by_id(token.id) == token

    def test_every_field_is_kept(self, store: QuotaStore) -> None:
        key, token = store.create(**_EVERY_FIELD)
        read = store.get(key.removeprefix("sk-"))
        assert read == token
        assert read is not None
        assert {field: getattr(read, field) for field in _EVERY_FIELD} == _EVERY_FIELD
        # Equality takes 1 for True; the wire does not.
        assert read.model_limits["gpt-4o"] is True

    @pytest.mark.parametrize(
        ("limits", "enabled", "expected"),
        [
            pytest.param(None, None, False, id="no limits"),
            pytest.param({"gpt-4o": True}, None, True, id="limits are enabled where they are given"),
            pytest.param({"gpt-4o": True}, False, False, id="limits given, not enabled"),
            pytest.param(None, True, True, id="enabled without any: no model is allowed"),
        ],
    )
    def test_model_limits_enabled(
        self, store: QuotaStore, limits: dict[str, int | bool] | None, enabled: bool | None, expected: bool
    ) -> None:
        _, token = store.create(model_limits=limits, model_limits_enabled=enabled)
        assert token.model_limits_enabled is expected

    @pytest.mark.parametrize(("fields", "error"), _BAD_FIELDS + _BAD_TOTALS)
    def test_a_bad_field_is_refused_at_once(
        self, store: QuotaStore, fields: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error, match=next(iter(fields))):
            store.create(**fields)
        assert list(store.tokens()) == []

    @pytest.mark.parametrize("key", ["legacy-key-0001", "sk-legacy-key-0001", "!~'\"%_\\", "k", "k" * 512])
    def test_an_operator_may_bring_a_key(self, store: QuotaStore, key: str) -> None:
        written, token = store.create(key=key)
        stripped = key.removeprefix("sk-")
        assert written.removeprefix("sk-") == stripped
        assert store.get(stripped) == token
        assert ask(store, stripped)[0] == "200 OK"

    def test_only_one_prefix_is_stripped(self, store: QuotaStore) -> None:
        written, token = store.create(key="sk-sk-twice")
        assert written == "sk-sk-twice"
        assert store.get("sk-twice") == token
        assert store.get("twice") is None

    @pytest.mark.parametrize(("key", "error"), _BAD_KEYS)
    def test_a_key_that_no_client_could_send_is_refused(
        self, store: QuotaStore, key: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error) as caught:
            store.create(key=key)
        assert "canary" not in str(caught.value)
        assert list(store.tokens()) == []

    def test_a_key_is_given_once(self, store: QuotaStore) -> None:
        store.create(key="legacy-canary-0001", name="First")
        for key in ("legacy-canary-0001", "sk-legacy-canary-0001"):
            with pytest.raises(ValueError, match="in use") as caught:
                store.create(key=key)
            assert "canary" not in str(caught.value)
        assert [token.name for token in store.tokens()] == ["First"]

    # --- find, tokens

    def test_an_unknown_id_has_no_token(self, store: QuotaStore) -> None:
        assert store.get_by_id(1) is None
        assert store.get_by_id(0) is None
        assert store.get_by_id(-1) is None
        assert store.get_by_id(MAX_INTEGER) is None
        assert store.get_by_id(MAX_INTEGER + 1) is None

    @pytest.mark.parametrize("token_id", _BAD_IDS)
    def test_an_id_is_an_int(self, store: QuotaStore, token_id: Any) -> None:
        store.create()
        for method in (store.get_by_id, store.update, store.rotate, store.delete):
            with pytest.raises(TypeError, match="token id"):
                method(token_id)

    def test_tokens_come_by_id_and_are_all_there(self, store: QuotaStore) -> None:
        assert list(store.tokens()) == []
        created = [store.create(name=str(number))[1] for number in range(1100)]
        assert list(store.tokens()) == created

    def test_tokens_may_change_while_they_are_listed(self, store: QuotaStore) -> None:
        ids = [_id(store.create()[1]) for _ in range(5)]
        listed = []
        for token in store.tokens():
            listed.append(token.id)
            store.delete(_id(token))
        assert listed == ids
        assert list(store.tokens()) == []

    # --- update

    @pytest.mark.parametrize(
        "changes", [{field: value} for field, value in _EVERY_FIELD.items() if field != "total_available"]
    )
    def test_update_changes_what_it_is_told(self, store: QuotaStore, changes: dict[str, Any]) -> None:
        key, token = store.create(name="Before", total_available=7, model_limits={"a": 1})
        expected = dataclasses.replace(token, **changes)
        assert store.update(_id(token), **changes) == expected
        assert store.get(key.removeprefix("sk-")) == expected

    def test_a_disabled_token_is_still_there_for_its_operator(self, store: QuotaStore) -> None:
        key, token = store.create()
        stripped = key.removeprefix("sk-")
        assert store.update(_id(token), enabled=False) == dataclasses.replace(token, enabled=False)
        assert store.get(stripped) == dataclasses.replace(token, enabled=False)
        assert ask(store, stripped) == ask(store, "no-such-key")
        store.update(_id(token), enabled=True)
        assert ask(store, stripped)[0] == "200 OK"

    @pytest.mark.parametrize(
        ("changes", "error"), [*_BAD_FIELDS, pytest.param({"enabled": 1}, TypeError, id="enabled")]
    )
    def test_a_bad_change_changes_nothing(
        self, store: QuotaStore, changes: dict[str, Any], error: type[Exception]
    ) -> None:
        _, token = store.create(name="Before")
        with pytest.raises(error):
            store.update(_id(token), **{"expires_at": 5, **changes})
        assert store.get_by_id(_id(token)) == token

    @pytest.mark.parametrize(
        "field", ["total_available", "total_used", "total_granted", "id", "hint", "created_at", "key", "nonsense"]
    )
    def test_other_fields_cannot_be_updated(self, store: QuotaStore, field: str) -> None:
        _, token = store.create()
        with pytest.raises(TypeError, match=field):
            store.update(_id(token), **{field: 1})  # type: ignore[arg-type]
        assert store.get_by_id(_id(token)) == token

    # --- rotate, delete

    def test_rotate_gives_a_new_key_and_stops_the_old_one(self, store: QuotaStore) -> None:
        old, token = store.create(name="Rotated", total_available=7)
        new = store.rotate(_id(token))
        assert re.fullmatch("sk-[0-9A-Za-z]{48}", new)
        assert store.get(old.removeprefix("sk-")) is None
        assert store.get(new.removeprefix("sk-")) == dataclasses.replace(token, hint=new[-4:])

    def test_delete_removes_the_token(self, store: QuotaStore) -> None:
        key, token = store.create()
        _, other = store.create()
        store.delete(_id(token))
        assert store.get(key.removeprefix("sk-")) is None
        assert store.get_by_id(_id(token)) is None
        assert list(store.tokens()) == [other]

    def test_an_id_is_never_given_again(self, store: QuotaStore) -> None:
        _, token = store.create()
        store.delete(_id(token))
        assert _id(store.create()[1]) > _id(token)

    def test_a_key_that_was_given_up_never_returns(self, store: QuotaStore) -> None:
        _, deleted = store.create(key="deleted-key")
        _, rotated = store.create(key="rotated-key")
        store.delete(_id(deleted))
        store.rotate(_id(rotated))
        for key in ("deleted-key", "rotated-key"):
            with pytest.raises(ValueError, match="never returns"):
                store.create(key=key)
            assert store.get(key) is None

    def test_a_token_that_is_not_there_cannot_be_changed(self, store: QuotaStore) -> None:
        _, token = store.create()
        store.delete(_id(token))
        for token_id in (_id(token), 0, -1, MAX_INTEGER, MAX_INTEGER + 1):
            for method in (store.update, store.rotate, store.delete):
                with pytest.raises(TokenNotFound, match=str(token_id)):
                    method(token_id)

    # --- the store as a whole

    def test_threads_may_write_at_once(self, store: QuotaStore) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            created = list(pool.map(lambda number: store.create(name=str(number)), range(100)))
        assert sorted(int(token.name) for token in store.tokens()) == list(range(100))
        assert len({token.id for _, token in created}) == 100
        for key, token in created:
            assert store.get(key.removeprefix("sk-")) == token

    def test_no_key_is_shown(self, store: QuotaStore) -> None:
        key, token = store.create()
        for shown in (repr(store), repr(token), repr(list(store.tokens()))):
            assert key.removeprefix("sk-") not in shown

    def test_a_closed_store_says_so(self, store: QuotaStore) -> None:
        with store:
            _, token = store.create()
        store.close()
        for use in (
            lambda: store.get("key"),
            lambda: store.get_by_id(_id(token)),
            lambda: list(store.tokens()),
            lambda: store.create(),
            lambda: store.update(_id(token), name="x"),
            lambda: store.rotate(_id(token)),
            lambda: store.delete(_id(token)),
        ):
            with pytest.raises(StoreError, match="closed"):
                use()


def _id(token: Token) -> int:
    assert token.id is not None, "a store gives each token an id"
    return token.id
