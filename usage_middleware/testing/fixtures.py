"""Shared by the parts of the contract: a clock, a token with its key, and arguments that must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, Final

import pytest

from ..checks import MAX_INTEGER
from ..keys import strip_prefix
from ..operations import Operation
from ..stores.base import QuotaStore
from ..tokens import Token, id_of
from ..usage import DayUsage

#: What :class:`Clock` shows first: 15 January 2027, a Friday, 8:00 UTC.
NOW: Final = 1_800_000_000.0
TODAY: Final = date(2027, 1, 15)

BAD_AMOUNTS: Final = [
    pytest.param(-1, ValueError, id="negative"),
    pytest.param(MAX_INTEGER + 1, ValueError, id="too large"),
    pytest.param(True, TypeError, id="bool"),
    pytest.param(1.0, TypeError, id="float"),
    pytest.param("1", TypeError, id="str"),
]
BAD_TEXTS: Final = [
    pytest.param("", ValueError, id="empty"),
    pytest.param("x" * 256, ValueError, id="too long"),
    pytest.param("a\0b", ValueError, id="NUL"),
    pytest.param("\ud800", ValueError, id="not even text"),
    pytest.param(b"x", TypeError, id="bytes"),
    pytest.param(1, TypeError, id="int"),
]


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now

    def to(self, seconds: float) -> None:
        """Set the clock to a number of seconds after :data:`NOW`."""
        self.now = NOW + seconds

    def on(self, moment: str) -> None:
        """Set the clock to a moment in UTC, in the form of ISO 8601."""
        self.now = datetime.fromisoformat(moment).replace(tzinfo=timezone.utc).timestamp()


class Holder:
    """One token of a store, and its key, which a test charges."""

    def __init__(self, store: QuotaStore, **fields: Any) -> None:
        self.store = store
        key, token = store.create(**{"total_available": 1000, **fields})
        self.key = strip_prefix(key)
        self.id = id_of(token)

    @property
    def token(self) -> Token:
        """Read the token, and check that its figures agree."""
        token = self.store.get(self.key)
        assert token is not None
        assert token == self.store.get_by_id(self.id)
        operations = list(self.store.history(self.id))
        days = self.days
        # No test here prunes an operation that holds units and then reads usage by day.
        assert sum(day.used for day in days) == token.total_used
        assert all(min(day.used, day.requests, day.input_tokens, day.output_tokens) >= 0 for day in days)
        assert token.held == sum(operation.held for operation in operations if operation.is_open)
        models: dict[str, int] = {}
        for day in days:
            models[day.model] = models.get(day.model, 0) + day.used
        models.pop("", None)
        used = {model: units for model, units in self.store.model_usage(self.id).items() if units}
        assert used == {model: units for model, units in models.items() if units}
        return token

    @property
    def totals(self) -> tuple[int, int]:
        """What is used, and what is available."""
        token = self.token
        return token.total_used, token.total_available

    @property
    def held(self) -> int:
        """What open reservations hold."""
        return self.token.held

    @property
    def days(self) -> list[DayUsage]:
        """All usage by day."""
        return list(self.store.usage_by_day(self.id, date.min, date.max))

    @property
    def operations(self) -> list[Operation]:
        """All operations, the oldest first."""
        return list(self.store.history(self.id))[::-1]

    def charge(self, amount: int, **options: Any) -> Token:
        return self.store.charge(self.key, amount, **options)

    def charged(self, amount: int, **options: Any) -> Operation:
        """Charge, and return the operation."""
        self.charge(amount, **options)
        return next(self.store.history(self.id))

    def reserve(self, amount: int, **options: Any) -> Operation:
        return self.store.reserve(self.key, amount, **options)


class QuotaStoreFixtures:
    """The fixtures of every part of the contract of a :class:`~usage_middleware.QuotaStore`."""

    #: Whether :meth:`reopen` finds what the store keeps, also from other processes. False in memory.
    is_shared = True

    def make_store(self, tmp_path: Path) -> QuotaStore:
        """Return the store to test, without tokens."""
        raise NotImplementedError(f"{type(self).__name__} must have a method make_store(self, tmp_path)")

    def reopen(self, tmp_path: Path) -> QuotaStore:
        """Return another store over the same data as the store of :meth:`make_store`."""
        return self.make_store(tmp_path)

    @pytest.fixture
    def clock(self, store: QuotaStore) -> Iterator[Clock]:
        """Set the store's clock to stand still: ``QuotaStore`` takes the time from ``store._clock``."""
        own, store._clock = store._clock, (clock := Clock())
        yield clock
        store._clock = own

    @pytest.fixture
    def holder(self, store: QuotaStore) -> Holder:
        """Add a token with 1000 quota units."""
        return Holder(store)
