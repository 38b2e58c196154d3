"""Whether the time of an answer distinguishes unknown, deleted and disabled keys, as its bytes do not.

The middleware is called directly: whoever asks over a network sees the same difference under more noise. Nothing here
depends on how fast the machine is: the requests of each kind are shuffled into one stream, and compared by rank.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from typing import NamedTuple

import pytest
from client import PATH, environ

from usage_middleware import MemoryTokenStore, NewAPI, SQLiteTokenStore, UsageMiddleware, bearer_key
from usage_middleware.keys import make_key

pytestmark = pytest.mark.slow

REQUESTS = 10_000  # of each kind
KEYS = 100  # of each kind
UNLIKELY = 1e-4  # the p below which chance does not explain a difference
# Seconds
NEGLIGIBLE = 50e-9
SMALL = 20e-6


class Comparison(NamedTuple):
    """Two samples of times, in seconds, the second against the first."""

    difference: float  # of the medians
    low: float  # the difference's confidence interval, 99.8 % or more
    high: float
    p: float  # of two samples that differ so much, if nothing but chance makes them differ

    @property
    def tells_apart(self):
        return self.p < UNLIKELY and abs(self.difference) > NEGLIGIBLE

    def __str__(self):
        return f"{self.difference * 1e9:+6.0f} ns ({self.low * 1e9:+.0f} to {self.high * 1e9:+.0f}), p = {self.p:.2g}"


def compare(first, second):
    """Return whether two samples differ, by the rank-sum test of Mann and Whitney, and how much, by their medians."""
    low_1, high_1 = median_interval(first)
    low_2, high_2 = median_interval(second)
    difference = statistics.median(second) - statistics.median(first)
    return Comparison(difference, low_2 - high_1, high_2 - low_1, rank_sum_p(first, second))


def median_interval(sample, z=3.29):
    """Return the order statistics between which the median lies with 99.9 %, whatever the distribution."""
    ordered = sorted(sample)
    reach = z * math.sqrt(len(ordered)) / 2
    middle = (len(ordered) - 1) / 2
    return ordered[max(math.floor(middle - reach), 0)], ordered[min(math.ceil(middle + reach), len(ordered) - 1)]


def rank_sum_p(first, second):
    """Return the two-sided p of the rank-sum test, by its normal approximation with the correction for ties."""
    ranks_of_first, ties, rank = 0.0, 0, 0
    labelled = sorted([(value, True) for value in first] + [(value, False) for value in second])
    for _, group in itertools.groupby(labelled, key=lambda pair: pair[0]):
        of_first = [is_first for _, is_first in group]
        ranks_of_first += sum(of_first) * (rank + (len(of_first) + 1) / 2)
        rank += len(of_first)
        ties += len(of_first) ** 3 - len(of_first)
    n_1, n_2, n = len(first), len(second), rank
    u = ranks_of_first - n_1 * (n_1 + 1) / 2
    deviation = math.sqrt(n_1 * n_2 / 12 * (n + 1 - ties / (n * (n - 1))))
    return math.erfc(abs(u - n_1 * n_2 / 2) / deviation / math.sqrt(2)) if deviation else 1.0


def measure(app, keys, count, seed=1, path=PATH):
    """Return the seconds that a request with each key takes, by kind: ``count`` requests, in an order that nothing can
    guess.

    The requests of one key are one value, their median: where a key happens to lie in memory or in an index is no
    difference between kinds, however often it is asked for.
    """
    order = [key for some in keys.values() for key in some] * count
    random.Random(seed).shuffle(order)
    times = {key: [] for key in order}
    now = time.perf_counter
    gc.collect()
    gc.disable()
    try:
        for key in order:
            # Made for each request, as a server makes it.
            request = environ(path=path, HTTP_AUTHORIZATION=f"Bearer {key}")
            begun = now()
            app(request, _start_response)
            seconds = now() - begun
            times[key].append(seconds)
    finally:
        gc.enable()
    return {kind: [statistics.median(times[key]) for key in some] for kind, some in keys.items()}


def _start_response(status, headers):
    pass


def host(environ, start_response):
    raise AssertionError("called")


def make_keys(store):
    """Return keys of each kind, in a store among others."""
    made = {kind: [] for kind in ("unknown", "unknown too", "deleted", "disabled", "known")}
    for _ in range(KEYS):
        # Like every other key, but that it was never made.
        for kind in ("unknown", "unknown too"):
            made[kind].append("sk-" + make_key())
        for kind in ("deleted", "disabled", "known"):
            key, token = store.create(name="Default Token", total_available=1000)
            made[kind].append(key)
            if kind == "deleted":
                store.delete(token.id)
            if kind == "disabled":
                store.update(token.id, enabled=False)
    return made


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    made = MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db")
    with made as store:
        yield store


class Slower:
    """A store's ``get`` that takes a little longer to answer for some keys."""

    def __init__(self, store, keys):
        self._get = store.get
        self._keys = {key.removeprefix("sk-") for key in keys}

    def get(self, key):
        token = self._get(key)
        if key in self._keys:
            until = time.perf_counter() + SMALL
            while time.perf_counter() < until:
                pass
        return token


# --- The comparison itself


def test_the_rank_sum_of_small_samples_is_the_known_one():
    # All 20 ways to choose three of six: u = 0 is one of them at either end. The normal approximation is near that.
    assert rank_sum_p([1, 2, 3], [4, 5, 6]) == pytest.approx(0.0495, abs=0.0001)
    assert rank_sum_p([1, 4, 5], [2, 3, 6]) == pytest.approx(0.8273, abs=0.0001)
    assert rank_sum_p([1, 1], [1, 1]) == 1
    # The first's ranks are 2, 2, 6 and 6, so u is 6 where 8 is the mean. Ties of three and of five take 144 / 56 off 9.
    z = 2 / math.sqrt(16 / 12 * (9 - 144 / 56))
    assert rank_sum_p([1, 1, 2, 2], [1, 2, 2, 2]) == pytest.approx(math.erfc(z / math.sqrt(2)))


def test_the_comparison_finds_a_small_shift_and_no_other():
    noise = random.Random(1)
    alike, other, shifted = ([noise.lognormvariate(0, 0.5) for _ in range(5000)] for _ in range(3))
    shifted = [value + 0.1 for value in shifted]
    found = compare(alike, shifted)
    assert found.p < 1e-6
    assert 0 < found.low < 0.1 < found.high
    nothing = compare(alike, other)
    assert nothing.p > 0.01
    assert nothing.low < 0 < nothing.high


def test_a_difference_of_20_microseconds_is_found(store, full):
    keys = make_keys(store)
    slower = Slower(store, keys["unknown too"])
    times = measure(lambda environ, _: slower.get(bearer_key(environ)), keys, REQUESTS // KEYS if full else 3)
    found = compare(times["unknown"], times["unknown too"])
    assert found.tells_apart
    assert found.high > SMALL


# --- The endpoints

OTHER_PATHS = [PATH + "/days", "/api/log/token", "/api/user/self", "/dashboard/billing/usage"]


@pytest.mark.parametrize("path", [PATH, *OTHER_PATHS])
def test_a_refusal_does_not_show_how_long_the_store_took(store, path, full):
    keys = make_keys(store)
    store.get = Slower(store, keys["unknown too"]).get
    app = UsageMiddleware(host, store, new_api=NewAPI())
    times = measure(app, keys, REQUESTS // KEYS if full else 3, path=path)
    assert not compare(times["unknown"], times["unknown too"]).tells_apart


@pytest.mark.parametrize("path", [PATH, *OTHER_PATHS])
def test_time_does_not_distinguish_unknown_deleted_and_disabled_keys(store, path, full):
    if not full:
        pytest.skip("measured with --full")
    keys = make_keys(store)
    times = measure(UsageMiddleware(host, store, new_api=NewAPI()), keys, REQUESTS // KEYS, path=path)
    print(f"\n{type(store).__name__}: unknown {statistics.median(times['unknown']) * 1e9:,.0f} ns")
    found = {kind: compare(times["unknown"], times[kind]) for kind in list(keys)[1:]}
    for kind, comparison in found.items():
        print(f"  {kind:12} {comparison}")
    assert not found["unknown too"].tells_apart
    assert not found["deleted"].tells_apart
    assert not found["disabled"].tells_apart
    assert found["known"].tells_apart
