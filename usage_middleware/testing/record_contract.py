"""The contract of tokens that move from one store to another."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import QuotaExceeded, StoreError
from ..keys import key_digest
from ..stores.base import QuotaStore
from ..tokens import Token, TokenRecord

_NAME = "caf\u00e9 \u4ee4\u724c \U0001f511 'quoted' \"\\ \r\n\t"

_TOKENS = [
    pytest.param(Token(), id="nothing"),
    pytest.param(Token(name=_NAME, hint="ab\"'", created_at=1_700_000_000), id="texts"),
    pytest.param(Token(total_available=MAX_INTEGER - 1, total_used=1), id="all that can be granted"),
    pytest.param(Token(total_available=-30, total_used=130), id="overdrawn"),
    pytest.param(Token(total_available=-MAX_INTEGER, total_used=MAX_INTEGER), id="overdrawn by all"),
    pytest.param(Token(unlimited_quota=True, total_used=7, total_available=5), id="unlimited"),
    pytest.param(Token(enabled=False, expires_at=MAX_INTEGER, created_at=MAX_INTEGER), id="disabled"),
    pytest.param(Token(expires_at=-1), id="never expires"),
    pytest.param(Token(model_limits={"a": True, "b": 0, "\u6a21\u578b": MAX_INTEGER}), id="limits not enabled"),
    pytest.param(Token(model_limits={"a": 1}, model_limits_enabled=True), id="limits"),
    pytest.param(Token(model_limits_enabled=True), id="no model allowed"),
]


def _record(key: str = "moved-key", model_usage: dict[str, int] | None = None, **fields: Any) -> TokenRecord:
    return TokenRecord(token=Token(**fields), digest=key_digest(key), model_usage=model_usage or {})


_BAD_RECORDS = [
    pytest.param(lambda: _record(total_used=-1), ValueError, "total_used", id="total_used negative"),
    pytest.param(lambda: _record(total_used=MAX_INTEGER + 1), ValueError, "total_used", id="total_used too large"),
    pytest.param(
        lambda: _record(total_available=-MAX_INTEGER - 1), ValueError, "total_available", id="total_available too small"
    ),
    pytest.param(
        lambda: _record(total_available=MAX_INTEGER, total_used=1), ValueError, "total_granted", id="granted too much"
    ),
    pytest.param(lambda: _record(expires_at=MAX_INTEGER + 1), ValueError, "expires_at", id="expires_at too large"),
    pytest.param(lambda: _record(created_at=MAX_INTEGER + 1), ValueError, "created_at", id="created_at too large"),
    pytest.param(lambda: _record(name="a\0b"), ValueError, "name", id="name with NUL"),
    pytest.param(lambda: _record(hint="12345"), ValueError, "hint", id="hint too long"),
    pytest.param(lambda: _record(hint="a\0"), ValueError, "hint", id="hint with NUL"),
    pytest.param(lambda: _record(model_limits={"": 1}), ValueError, "model_limits", id="model without a name"),
    pytest.param(lambda: _record(model_usage={"a": -1}), ValueError, "amount", id="usage negative"),
    pytest.param(lambda: _record(model_usage={"a": MAX_INTEGER + 1}), ValueError, "amount", id="usage too large"),
    pytest.param(lambda: _record(model_usage={"a": True}), TypeError, "amount", id="usage bool"),
    pytest.param(lambda: _record(model_usage={"a" * 256: 1}), ValueError, "model_usage", id="usage of a long name"),
    pytest.param(lambda: TokenRecord(token=Token(), digest=b"short"), ValueError, "digest", id="digest too short"),
    pytest.param(
        lambda: TokenRecord(token=Token(), digest="0" * 32),  # type: ignore[arg-type]
        ValueError,
        "digest",
        id="digest str",
    ),
]


class RecordsContract:
    """What an operator relies upon who moves tokens from one store to another."""

    # --- restore

    @pytest.mark.parametrize("token", _TOKENS)
    def test_a_restored_token_is_the_one_that_was(self, store: QuotaStore, token: Token) -> None:
        record = TokenRecord(token=token, digest=key_digest("moved-key"), model_usage={"a": 5, "\u6a21\u578b": 0})
        store.create()  # takes an id that the other store may have given
        (token_id,) = store.restore([record])
        assert token_id is not None
        expected = dataclasses.replace(token, id=token_id)
        assert store.get("moved-key") == expected
        assert store.get_by_id(token_id) == expected
        # Equality takes 1 for True; the wire does not.
        assert [type(limit) for limit in expected.model_limits.values()] == [
            type(limit) for limit in token.model_limits.values()
        ]
        *_, moved = store.records()
        assert moved.token == expected
        assert moved.digest == record.digest
        assert {model: used for model, used in moved.model_usage.items() if used} == {"a": 5}

    def test_ids_are_those_of_the_new_store(self, store: QuotaStore) -> None:
        _, first = store.create()
        ids = store.restore([_record(key=f"key-number-{number}", id=1, name=str(number)) for number in range(3)])
        assert len({first.id, *ids}) == 4
        assert None not in ids
        for number, token_id in enumerate(ids):
            token = store.get(f"key-number-{number}")
            assert token is not None
            assert (token.id, token.name) == (token_id, str(number))
        _, last = store.create()
        assert last.id not in ids

    def test_a_taken_key_is_left_alone(self, store: QuotaStore) -> None:
        _, there = store.create(key="there", name="There", total_available=5)
        assert there.id is not None
        for key in ("deleted", "rotated"):
            store.create(key=key)
        _, deleted, rotated = [token.id for token in store.tokens()]
        assert deleted is not None
        assert rotated is not None
        store.delete(deleted)
        store.rotate(rotated)
        before = list(store.records())
        keys = ["new", "there", "deleted", "rotated", "new"]
        ids = store.restore([_record(key=key, name="Moved", model_usage={"a": 7}) for key in keys])
        assert [token_id is not None for token_id in ids] == [True, False, False, False, False]
        assert list(store.records())[:-1] == before
        assert store.get("there") == there
        assert store.model_usage(there.id) == {}
        assert store.get("deleted") is store.get("rotated") is None
        assert ids[0] is not None
        # Once, as it came once.
        assert store.model_usage(ids[0]) == {"a": 7}

    def test_restoring_again_changes_nothing(self, store: QuotaStore) -> None:
        records = [_record(key=f"key-number-{number}", model_usage={"a": number + 1}) for number in range(3)]
        store.restore(records)
        before = list(store.records())
        assert store.restore(records) == [None, None, None]
        assert store.restore(before) == [None, None, None]
        assert list(store.records()) == before

    @pytest.mark.parametrize(("make", "error", "what"), _BAD_RECORDS)
    def test_a_bad_record_refuses_its_batch(
        self, store: QuotaStore, make: Callable[[], TokenRecord], error: type[Exception], what: str
    ) -> None:
        bad = make()
        with pytest.raises(error, match=what) as caught:
            store.restore([_record(key="first"), bad, _record(key="last")])
        assert key_digest("moved-key").hex() not in str(caught.value)
        assert list(store.records()) == []
        assert store.get("first") is None
        # Neither is the key used up.
        assert store.restore([_record(key="first")]) != [None]

    def test_no_records_are_nothing(self, store: QuotaStore) -> None:
        assert store.restore([]) == []
        assert store.restore(iter([])) == []
        assert list(store.records()) == []

    def test_records_come_page_by_page_and_are_all_there(self, store: QuotaStore) -> None:
        moved = [_record(key=f"key-number-{n}", name=str(n), model_usage={"a": n + 1, "b": 1}) for n in range(2100)]
        ids = store.restore(iter(moved))
        assert store.count() == 2100
        records = list(store.records())
        assert [record.token.id for record in records] == ids
        assert [(record.token.name, record.digest, record.model_usage) for record in records] == [
            (record.token.name, record.digest, record.model_usage) for record in moved
        ]

    def test_a_restored_token_is_charged_from_where_it_was(self, store: QuotaStore) -> None:
        limits = {"capped": 100, "any": True}
        store.restore(
            [
                _record(
                    model_usage={"capped": 60, "gone": 5},
                    total_available=100,
                    total_used=65,
                    model_limits=limits,
                    model_limits_enabled=True,
                )
            ]
        )
        with pytest.raises(QuotaExceeded, match="capped"):
            store.charge("moved-key", 41, model="capped")
        token = store.charge("moved-key", 40, model="capped")
        assert (token.total_used, token.total_available) == (105, 60)
        with pytest.raises(QuotaExceeded):
            store.charge("moved-key", 61, model="any")
        assert token.id is not None
        assert store.model_usage(token.id) == {"capped": 100, "gone": 5}
        assert [operation.amount for operation in store.history(token.id)] == [40]

    def test_an_overdrawn_token_stays_so(self, store: QuotaStore) -> None:
        (token_id,) = store.restore([_record(total_available=-30, total_used=130)])
        with pytest.raises(QuotaExceeded):
            store.charge("moved-key", 1)
        assert token_id is not None
        assert store.grant(token_id, 40).total_available == 10

    # --- records, count, taken

    def test_what_a_reservation_holds_counts_as_used(self, store: QuotaStore) -> None:
        key, _ = store.create(total_available=100)
        store.reserve(key.removeprefix("sk-"), 30, model="a")
        (record,) = store.records()
        assert (record.token.total_used, record.token.total_available, record.model_usage) == (30, 70, {"a": 30})

    def test_a_record_shows_no_digest(self, store: QuotaStore) -> None:
        store.create(key="shown-key")
        (record,) = store.records()
        assert record.digest == hashlib.sha256(b"shown-key").digest()
        for shown in (repr(record.digest), record.digest.hex(), "shown-key"):
            assert shown not in repr(record)

    def test_deleted_tokens_are_neither_counted_nor_moved(self, store: QuotaStore) -> None:
        assert store.count() == 0
        ids = [store.create()[1].id for _ in range(3)]
        assert ids[1] is not None
        store.delete(ids[1])
        assert store.count() == 2
        assert [record.token.id for record in store.records()] == [ids[0], ids[2]]

    def test_a_key_is_taken_once_it_was_given(self, store: QuotaStore) -> None:
        for key in ("there", "deleted", "rotated"):
            store.create(key=key)
        _, deleted, rotated = [token.id for token in store.tokens()]
        assert deleted is not None
        assert rotated is not None
        store.delete(deleted)
        new = store.rotate(rotated).removeprefix("sk-")
        before = list(store.records())
        taken = {key_digest(key) for key in ("there", "deleted", "rotated", new)}
        other = [hashlib.sha256(b"%d" % number).digest() for number in range(1100)]
        assert store.taken([*other, *taken]) == taken
        assert store.taken(other) == store.taken([]) == set()
        assert list(store.records()) == before

    def test_a_closed_store_moves_nothing(self, store: QuotaStore) -> None:
        store.create()
        store.close()
        for use in (
            lambda: list(store.records()),
            lambda: store.restore([_record()]),
            lambda: store.count(),
            lambda: store.taken([key_digest("key")]),
        ):
            with pytest.raises(StoreError, match="closed"):
                use()
