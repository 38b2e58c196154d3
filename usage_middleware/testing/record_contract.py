"""The contract of tokens that move from one store to another."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from typing import Any

import pytest

from ..checks import MAX_INTEGER
from ..errors import QuotaExceeded
from ..keys import key_digest
from ..stores.base import QuotaStore
from ..tokens import Token, TokenRecord
from ..usage import DayUsage
from .fixtures import TODAY, Clock, Holder, QuotaStoreFixtures

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
    pytest.param(Token(renewal="daily", renewal_quota=MAX_INTEGER, renews_at=253_402_300_799), id="renews"),
]
_DAYS = (
    DayUsage(date(1970, 1, 1), "", 0, 1, 0, 0),
    DayUsage(date(2028, 2, 29), "a", 5, 2, 3, 4),
    DayUsage(date(2028, 2, 29), "\u6a21\u578b", MAX_INTEGER, MAX_INTEGER, MAX_INTEGER, MAX_INTEGER),
)


def _record(
    key: str = "moved-key",
    model_usage: dict[str, int] | None = None,
    days: Sequence[DayUsage] = (),
    **fields: Any,
) -> TokenRecord:
    return TokenRecord(token=Token(**fields), digest=key_digest(key), model_usage=model_usage or {}, days=days)


def _day(**figures: Any) -> DayUsage:
    return DayUsage(
        **{"day": TODAY, "model": "a", "used": 1, "requests": 1, "input_tokens": 1, "output_tokens": 1, **figures}
    )


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
    pytest.param(lambda: _record(days=[_day(), _day(used=2)]), ValueError, "days", id="a day twice"),
    pytest.param(lambda: _record(days=[_day(used=-1)]), ValueError, "used in days", id="day with negative usage"),
    pytest.param(
        lambda: _record(days=[_day(requests=MAX_INTEGER + 1)]), ValueError, "requests", id="too many requests"
    ),
    pytest.param(lambda: _record(days=[_day(input_tokens=1.5)]), TypeError, "input_tokens", id="input_tokens float"),
    pytest.param(lambda: _record(days=[_day(output_tokens=True)]), TypeError, "output_tokens", id="output_tokens bool"),
    pytest.param(lambda: _record(days=[_day(model="a\0")]), ValueError, "days", id="day of a model with NUL"),
    pytest.param(lambda: _record(days=[_day(model=None)]), TypeError, "days", id="day of no model"),
    pytest.param(lambda: _record(days=[_day(day="2027-01-15")]), TypeError, "days", id="day str"),
    pytest.param(
        lambda: _record(days=[_day(day=datetime(2027, 1, 15, tzinfo=timezone.utc))]),
        TypeError,
        "days",
        id="day datetime",
    ),
    pytest.param(lambda: _record(renewal="daily", renews_at=5), ValueError, "renewal_quota", id="renewal of nothing"),
    pytest.param(
        lambda: _record(renewal="daily", renewal_quota=1, renews_at=2**40),
        ValueError,
        "renews_at",
        id="renews_at too large",
    ),
    pytest.param(
        lambda: _record(renewal="daily", renewal_quota=1, renews_at=-1),
        ValueError,
        "renews_at",
        id="renews_at negative",
    ),
]


class RecordContract(QuotaStoreFixtures):
    """Tokens move from one store to another with all that is known of them, except their operations."""

    # --- restore

    @pytest.mark.parametrize("token", _TOKENS)
    def test_a_restored_token_is_the_one_that_was(self, store: QuotaStore, token: Token) -> None:
        usage = {"a": 5, "\u6a21\u578b": 0}
        record = TokenRecord(token=token, digest=key_digest("moved-key"), model_usage=usage, days=_DAYS)
        store.create()  # takes an id that the other store may have used
        (token_id,) = store.restore([record])
        assert token_id is not None
        expected = dataclasses.replace(token, id=token_id)
        assert store.get("moved-key") == expected
        assert store.get_by_id(token_id) == expected
        # 1 == True in Python, but not in the answer.
        assert [type(limit) for limit in expected.model_limits.values()] == [
            type(limit) for limit in token.model_limits.values()
        ]
        *_, moved = store.records()
        assert moved.token == expected
        assert moved.digest == record.digest
        assert {model: used for model, used in moved.model_usage.items() if used} == {"a": 5}
        assert tuple(moved.days) == _DAYS
        assert list(store.usage_by_day(token_id, date.min, date.max)) == list(_DAYS)

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
        # Only once, as it was given once.
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
        # The key is not taken either.
        assert store.restore([_record(key="first")]) != [None]

    def test_no_records_are_nothing(self, store: QuotaStore) -> None:
        assert store.restore([]) == []
        assert store.restore(iter([])) == []
        assert list(store.records()) == []

    def test_records_come_page_by_page_and_are_all_there(self, store: QuotaStore) -> None:
        moved = [
            _record(key=f"key-number-{n}", name=str(n), model_usage={"a": n + 1, "b": 1}, days=(_day(used=n),))
            for n in range(2100)
        ]
        ids = store.restore(iter(moved))
        assert store.count() == 2100
        records = list(store.records())
        assert [record.token.id for record in records] == ids
        for record, original in zip(records, moved, strict=True):
            assert record == dataclasses.replace(
                original, token=dataclasses.replace(original.token, id=record.token.id)
            )

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

    def test_days_go_on_from_where_they_were(self, store: QuotaStore, clock: Clock) -> None:
        holder = Holder(store)
        holder.charge(5, model="a", input_tokens=3)
        (record,) = store.records()
        store.restore([dataclasses.replace(record, digest=key_digest("moved-key"))])
        token = store.charge("moved-key", 7, model="a", output_tokens=4)
        assert token.id is not None
        assert list(store.usage_by_day(token.id, date.min, date.max)) == [DayUsage(TODAY, "a", 12, 2, 3, 4)]
        assert holder.days == [DayUsage(TODAY, "a", 5, 1, 3, 0)]

    # --- records, count, taken

    def test_what_a_reservation_holds_counts_as_used(self, store: QuotaStore) -> None:
        key, _ = store.create(total_available=100)
        store.reserve(key, 30, model="a")
        (record,) = store.records()
        assert (record.token.total_used, record.token.total_available, record.model_usage) == (30, 70, {"a": 30})
        assert record.token.held == sum(day.used for day in record.days) == 30
        (token_id,) = store.restore([dataclasses.replace(record, digest=key_digest("moved-key"))])
        assert token_id is not None
        moved = store.get("moved-key")
        # The reservation is not moved, so nothing can release it.
        assert moved == dataclasses.replace(record.token, id=token_id, held=0)

    def test_the_figures_of_a_record_agree_while_it_is_charged(self, store: QuotaStore) -> None:
        key, _ = store.create(total_available=MAX_INTEGER)
        is_read = threading.Event()

        def charge() -> None:
            while not is_read.is_set():
                store.charge(key, 1, model="m")

        with ThreadPoolExecutor(1) as thread:
            charging = thread.submit(charge)
            try:
                read = [next(iter(store.records())) for _ in range(50)]
            finally:
                is_read.set()
            charging.result()
        for record in read:
            assert record.token.total_used == sum(record.model_usage.values()) == sum(day.used for day in record.days)

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
        new = store.rotate(rotated)
        before = list(store.records())
        taken = {key_digest(key) for key in ("there", "deleted", "rotated", new)}
        other = [hashlib.sha256(b"%d" % number).digest() for number in range(1100)]
        assert store.taken([*other, *taken]) == taken
        assert store.taken(other) == store.taken([]) == set()
        assert list(store.records()) == before
