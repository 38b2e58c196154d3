"""The contract of tokens: what an operator does with them."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import TokenNotFound
from ..stores.base import QuotaStore
from ..tokens import Token, id_of
from .fixtures import NOW, Clock, QuotaStoreFixtures
from .token_store import THREADS, ask

_MODEL_LIMITS = {"gpt-4o": True, "gpt-4o-mini": 500_000, "none": 0, "most": MAX_INTEGER, "\u6a21\u578b": 1}
# The arguments of create: for each field of a token, a value that is not its default.
_CREATED: dict[str, Any] = {
    "name": "caf\u00e9 \u4ee4\u724c \U0001f511 'quoted' \"\\",
    "total_available": MAX_INTEGER - 1000,
    "unlimited_quota": True,
    "model_limits": _MODEL_LIMITS,
    "model_limits_enabled": True,
    "expires_at": 4_102_444_800,
    "renewal": "weekly",
    "renewal_quota": 70,
}
_UPDATED: dict[str, Any] = {
    **{field: value for field, value in _CREATED.items() if field != "total_available"},
    "enabled": False,
    "renewal": "monthly",
}
# Fields that other calls set.
_MADE = {"id", "hint", "created_at", "renews_at", "total_used", "held"}

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
    pytest.param({"renewal": "hourly"}, ValueError, id="renewal hourly"),
    pytest.param({"renewal": None}, ValueError, id="renewal None"),
    pytest.param({"renewal_quota": 5}, ValueError, id="renewal_quota without renewal"),
    pytest.param({"renewal_quota": 0, "renewal": "daily"}, ValueError, id="renewal_quota 0"),
    pytest.param({"renewal_quota": -5, "renewal": "daily"}, ValueError, id="renewal_quota negative"),
    pytest.param({"renewal_quota": MAX_INTEGER + 1, "renewal": "daily"}, ValueError, id="renewal_quota too large"),
    pytest.param({"renewal_quota": "5", "renewal": "daily"}, TypeError, id="renewal_quota str"),
    pytest.param({"renewal_quota": True, "renewal": "daily"}, TypeError, id="renewal_quota bool"),
]
_BAD_TOTALS = [
    pytest.param({"total_available": -1}, ValueError, id="total_available negative"),
    pytest.param({"total_available": True}, TypeError, id="total_available bool"),
    pytest.param({"total_available": 10.0}, TypeError, id="total_available float"),
    pytest.param({"total_available": "10"}, TypeError, id="total_available str"),
    pytest.param({"total_available": MAX_INTEGER + 1}, ValueError, id="total_available too large"),
]
_BAD_IDS = [pytest.param(bad, id=repr(bad)) for bad in ("1", 1.0, True, None)]


class TokenContract(QuotaStoreFixtures):
    """Tokens are made, listed, changed and removed, with every field that they have."""

    def test_the_contract_knows_every_field(self) -> None:
        fields = {field.name for field in dataclasses.fields(Token)}
        assert {*_CREATED, *_MADE, "enabled"} == fields
        assert {*_UPDATED, *_MADE, "total_available"} == fields
        default = Token()
        for field, value in [*_CREATED.items(), *_UPDATED.items()]:
            assert value != getattr(default, field)

    # --- create

    def test_a_created_token_is_found_by_key_and_by_id(self, store: QuotaStore, clock: Clock) -> None:
        clock.to(0.5)
        key, token = store.create(name="Default Token", total_available=1000)
        assert token.id is not None
        expected = Token(name="Default Token", total_available=1000, created_at=int(NOW), id=token.id, hint=key[-4:])
        assert token == expected
        assert store.get(key) == token
        assert store.get_by_id(token.id) == token

    def test_every_field_is_kept(self, store: QuotaStore, clock: Clock) -> None:
        key, token = store.create(**_CREATED)
        assert {field: getattr(token, field) for field in _CREATED} == _CREATED
        assert token.renews_at > NOW
        _check_read(store, key, token)
        operation = store.reserve(key, 5)  # so that no field has its default
        store.charge(key, 2, model="gpt-4o")
        expected = dataclasses.replace(token, total_used=7, held=5)
        _check_read(store, key, expected)
        store.settle(operation, 5)
        _check_read(store, key, dataclasses.replace(expected, held=0))

    def test_every_field_outlives_the_store(self, store: QuotaStore, clock: Clock, tmp_path: Path) -> None:
        if not self.is_shared:
            pytest.skip("this store keeps nothing")
        key, token = store.create(**_CREATED)
        store.reserve(key, 5)
        token = store.update(id_of(token), **_UPDATED)
        with self.reopen(tmp_path) as reopened:
            reopened._clock = clock
            _check_read(reopened, key, token)
            assert list(reopened.history(id_of(token))) == list(store.history(id_of(token)))
            assert list(reopened.records()) == list(store.records())

    @pytest.mark.parametrize(
        ("limits", "enabled", "expected"),
        [
            pytest.param(None, None, False, id="no limits"),
            pytest.param({"gpt-4o": True}, None, True, id="limits are enabled if they are given"),
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

    # --- get_by_id, tokens

    def test_an_unknown_id_has_no_token(self, store: QuotaStore) -> None:
        for token_id in (1, 0, -1, MAX_INTEGER, MAX_INTEGER + 1):
            assert store.get_by_id(token_id) is None

    @pytest.mark.parametrize("token_id", _BAD_IDS)
    def test_an_id_is_an_int(self, store: QuotaStore, token_id: Any) -> None:
        store.create()
        for method in (store.get_by_id, store.update, store.rotate, store.delete, store.history, store.model_usage):
            with pytest.raises(TypeError, match="token id"):
                method(token_id)
        for change in (store.grant, store.charge_by_id):
            with pytest.raises(TypeError, match="token id"):
                change(token_id, 1)

    def test_tokens_come_by_id_and_are_all_there(self, store: QuotaStore) -> None:
        assert list(store.tokens()) == []
        created = [store.create(name=str(number))[1] for number in range(1100)]
        assert list(store.tokens()) == created

    def test_tokens_may_change_while_they_are_listed(self, store: QuotaStore) -> None:
        ids = [id_of(store.create()[1]) for _ in range(5)]
        listed = []
        for token in store.tokens():
            listed.append(token.id)
            store.delete(id_of(token))
        assert listed == ids
        assert list(store.tokens()) == []

    # --- update

    @pytest.mark.parametrize("field", _UPDATED)
    def test_update_changes_what_it_is_told(self, store: QuotaStore, clock: Clock, field: str) -> None:
        key, token = store.create(
            name="Before", total_available=7, model_limits={"a": 1}, model_limits_enabled=False, renewal="daily"
        )
        expected = dataclasses.replace(token, **{field: _UPDATED[field]})
        updated = store.update(id_of(token), **{field: _UPDATED[field]})
        if field == "renewal":
            assert updated.renews_at > token.renews_at
            expected = dataclasses.replace(expected, renews_at=updated.renews_at)
        assert updated == expected
        _check_read(store, key, expected)

    def test_an_update_without_changes_changes_nothing(self, store: QuotaStore) -> None:
        key, token = store.create(**_CREATED)
        assert store.update(id_of(token)) == token
        assert store.update(id_of(token), **{field: getattr(token, field) for field in _UPDATED}) == token
        _check_read(store, key, token)
        assert list(store.history(id_of(token))) == []

    def test_a_disabled_token_is_still_there_for_its_operator(self, store: QuotaStore) -> None:
        key, token = store.create()
        assert store.update(id_of(token), enabled=False) == dataclasses.replace(token, enabled=False)
        assert store.get(key) == dataclasses.replace(token, enabled=False)
        assert ask(store, key) == ask(store, "no-such-key")
        store.update(id_of(token), enabled=True)
        assert ask(store, key)[0] == "200 OK"

    @pytest.mark.parametrize(
        ("changes", "error"), [*_BAD_FIELDS, pytest.param({"enabled": 1}, TypeError, id="enabled")]
    )
    def test_a_bad_change_changes_nothing(
        self, store: QuotaStore, changes: dict[str, Any], error: type[Exception]
    ) -> None:
        _, token = store.create(name="Before")
        with pytest.raises(error):
            store.update(id_of(token), **{"expires_at": 5, **changes})
        assert store.get_by_id(id_of(token)) == token

    @pytest.mark.parametrize("field", [*sorted({*_MADE, "total_available"}), "total_granted", "key", "nonsense"])
    def test_other_fields_cannot_be_updated(self, store: QuotaStore, field: str) -> None:
        _, token = store.create()
        changes: dict[str, Any] = {field: 1}
        with pytest.raises(TypeError, match=field):
            store.update(id_of(token), **changes)
        assert store.get_by_id(id_of(token)) == token

    # --- delete

    def test_delete_removes_the_token(self, store: QuotaStore) -> None:
        key, token = store.create(total_available=5)
        _, other = store.create()
        store.charge(key, 5, model="gpt-4o")
        store.delete(id_of(token))
        assert store.get(key) is None
        assert store.get_by_id(id_of(token)) is None
        assert list(store.tokens()) == [other]

    def test_an_id_is_never_given_again(self, store: QuotaStore) -> None:
        _, token = store.create()
        store.delete(id_of(token))
        assert id_of(store.create()[1]) > id_of(token)

    def test_a_token_that_is_not_there_cannot_be_changed(self, store: QuotaStore) -> None:
        _, token = store.create()
        store.delete(id_of(token))
        for token_id in (id_of(token), 0, -1, MAX_INTEGER, MAX_INTEGER + 1):
            for method in (store.update, store.rotate, store.delete):
                with pytest.raises(TokenNotFound) as caught:
                    method(token_id)
                assert caught.value.token_id == token_id

    def test_threads_may_write_at_once(self, store: QuotaStore) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            created = list(pool.map(lambda number: store.create(name=str(number)), range(100)))
        assert sorted(int(token.name) for token in store.tokens()) == list(range(100))
        assert len({token.id for _, token in created}) == 100
        for key, token in created:
            assert store.get(key) == token


def _check_read(store: QuotaStore, key: str, expected: Token) -> None:
    """Check that every way of reading a token returns the same."""
    for read in (store.get(key), store.get_by_id(id_of(expected)), *store.tokens()):
        assert read == expected
        # 1 == True in Python, but not in the answer.
        assert read is not None
        assert [type(limit) for limit in read.model_limits.values()] == [
            type(limit) for limit in expected.model_limits.values()
        ]
    (record,) = store.records()
    assert record.token == expected
