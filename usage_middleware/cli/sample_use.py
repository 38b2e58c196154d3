"""Made-up use for the demonstration: a few weeks of charges for several models, so that there is something to see."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Final

from ..stores.base import QuotaStore

_DAYS: Final = 45
_DAY: Final = 86_400
_MODELS: Final = (("gpt-4o", 5), ("gpt-4o-mini", 3))  # and how much each is used, relative to the others
_ON_A_WEEKEND: Final = 0.25  # of what is used on a weekday


class PastClock:
    """A store's clock that can be turned back."""

    def __init__(self) -> None:
        #: How many seconds it is turned back.
        self.seconds = 0.0

    def __call__(self) -> float:
        return time.time() - self.seconds


def use(store: QuotaStore, clock: PastClock, key: str, units: int) -> None:
    """Charge a key ``units`` in all, as if that had happened over the last weeks.

    :param clock: the clock of ``store``. It shows the present afterwards.
    """
    charges = list(_charges(random.Random(20)))
    weight = sum(share for _, _, share in charges)
    for number, (seconds_ago, model, share) in enumerate(charges, 1):
        clock.seconds = seconds_ago
        amount = units if number == len(charges) else int(units * share / weight)
        store.charge(key, amount, model=model, input_tokens=amount * 3, output_tokens=amount)
        units -= amount
        weight -= share
    clock.seconds = 0.0


def _charges(dice: random.Random) -> Iterator[tuple[float, str, float]]:
    """Yield charges, oldest first: how many seconds ago, for which model, and their share of the whole."""
    now = time.time()
    for days_ago in range(_DAYS - 1, -1, -1):
        seconds_ago = days_ago * _DAY
        busy = 1.0 if datetime.fromtimestamp(now - seconds_ago, timezone.utc).weekday() < 5 else _ON_A_WEEKEND
        for model, often in _MODELS:
            if dice.random() < 0.75:
                yield seconds_ago, model, busy * often * dice.uniform(0.4, 1.6)
    yield 0.0, _MODELS[0][0], 2.0
