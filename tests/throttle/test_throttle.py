"""Guessing keys: what counts, for which client, what the guesser gets and for how long."""

import tracemalloc

import pytest
from client import ask, call, environ, wrapped
from throttling import ADDRESS, BEARER, BEGIN, KEY, PERIOD, TOO_MANY, WRONG, guess, make_app, statuses

from usage_middleware import StoreError, UsageMiddleware
from usage_middleware.wsgi import throttle

# --- What counts


class Broken:
    def get(self, key):
        raise StoreError("broken")


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        pytest.param(WRONG, 401, id="unknown"),
        pytest.param("Bearer disabled", 401, id="disabled"),
        pytest.param("Bearer", 401, id="no key"),
        pytest.param("Basic a2V5", 401, id="another scheme"),
        pytest.param(f"{BEARER}, {BEARER}", 401, id="two keys"),
        pytest.param("Bearer " + "k" * 513, 401, id="too long"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_failed_authentication_counts(clock, authorization, status, method):
    app = make_app()
    for expected in (status, status, status, 429, 429):
        assert ask(app, method, authorization=authorization, REMOTE_ADDR=ADDRESS).status == expected
    # All kinds are counted together.
    assert guess(app).status == 429


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param({"authorization": BEARER}, 200, id="a valid key"),
        pytest.param({"authorization": f"Bearer sk-{KEY}", "method": "HEAD"}, 200, id="a valid key by HEAD"),
        pytest.param({}, 401, id="no header"),
        pytest.param({"authorization": " "}, 401, id="an empty header"),
        pytest.param({"method": "OPTIONS", "authorization": WRONG}, 204, id="OPTIONS"),
        pytest.param({"method": "POST", "authorization": WRONG}, 405, id="another method"),
        pytest.param({"path": "/other", "authorization": WRONG}, 404, id="another path"),
    ],
)
def test_anything_else_neither_counts_nor_is_throttled(clock, request_, status):
    app = make_app()
    before = [ask(app, REMOTE_ADDR=ADDRESS, **request_) for _ in range(10)]
    assert statuses(app, 5) == [401, 401, 401, 429, 429]
    after = ask(app, REMOTE_ADDR=ADDRESS, **request_)
    assert after.status == status
    assert [after] * 10 == before


def test_a_failure_of_the_store_does_not_count_against_the_client(clock):
    app = make_app(store=Broken())
    assert statuses(app, 10) == [503] * 10
    assert statuses(app, 4, "Bearer") == [401, 401, 401, 429]
    assert guess(app).status == 503


def test_a_valid_key_resets_nothing(clock):
    app = make_app()
    for _ in range(3):
        assert guess(app).status == 401
        assert guess(app, BEARER).status == 200
    assert guess(app).status == 429


def test_without_a_limit_no_client_is_throttled():
    app = UsageMiddleware(wrapped, {})
    assert statuses(app, 1000) == [401] * 1000


def test_failures_are_counted_in_the_process_where_nothing_else_is_said():
    app = UsageMiddleware(wrapped, {}, throttle="3 per hour")
    assert statuses(app, 5) == [401, 401, 401, 429, 429]


# --- Which client


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param("192.0.2.1", "192.0.2.1", True, id="one IPv4 address"),
        pytest.param("192.0.2.1", "192.0.2.2", False, id="two IPv4 addresses"),
        pytest.param("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True, id="one network of 64 bits"),
        pytest.param("2001:db8:0:1::1", "2001:DB8:0000:1::2", True, id="one network, written in two ways"),
        pytest.param("2001:db8:0:1::1", "2001:db8:0:2::1", False, id="two networks"),
        pytest.param("::ffff:192.0.2.1", "::ffff:192.0.2.2", False, id="two IPv4 addresses at a socket for both"),
        pytest.param("::ffff:192.0.2.1", "192.0.2.1", True, id="one IPv4 address at two sockets"),
        pytest.param("fe80::1%eth0", "fe80::1", True, id="with a zone"),
        pytest.param(None, "", True, id="absent and empty"),
        pytest.param("unix:", "192.0.2.1:4711", True, id="no addresses"),
        pytest.param("x" * 100_000, "\r\n \x00\xe9", True, id="nonsense"),
        pytest.param(None, "192.0.2.1", False, id="absent and an address"),
    ],
)
def test_clients(clock, storage, one, other, same):
    app = make_app("1 per hour", storage)
    first, second = (
        environ(HTTP_AUTHORIZATION=WRONG, **({} if a is None else {"REMOTE_ADDR": a})) for a in (one, other)
    )
    assert call(app, first).status == 401
    assert call(app, first).status == 429
    assert call(app, second).status == (429 if same else 401)


def test_two_applications_with_one_limit_and_storage_count_together_and_with_another_limit_do_not(clock, server):
    assert statuses(make_app(storage=server.uri), 2) == [401, 401]
    assert statuses(make_app(storage=server.uri), 2) == [401, 429]
    assert statuses(make_app("1 per 20 minutes", storage=server.uri), 2) == [401, 429]


# --- What the guesser gets


def test_the_answer(clock):
    app = make_app()
    assert statuses(app, 3) == [401] * 3
    answer = guess(app)
    assert (answer.status, answer.reason, answer.body) == (429, "Too Many Requests", TOO_MANY)
    assert sorted(answer.headers) == [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Expose-Headers", "Retry-After"),
        ("Cache-Control", "no-store"),
        ("Content-Length", str(len(TOO_MANY))),
        ("Content-Type", "application/json; charset=utf-8"),
        ("Retry-After", str(PERIOD)),
        ("X-Content-Type-Options", "nosniff"),
    ]
    assert ask(app, "HEAD", authorization=WRONG, REMOTE_ADDR=ADDRESS) == answer._replace(body=b"")


@pytest.mark.parametrize(
    ("allow_origins", "origin", "expected"),
    [
        pytest.param((), "https://app.example", {}, id="CORS off"),
        pytest.param(["https://app.example"], "https://other.example", {"Vary": "Origin"}, id="another origin"),
        pytest.param(
            ["https://app.example"],
            "https://app.example",
            {
                "Vary": "Origin",
                "Access-Control-Allow-Origin": "https://app.example",
                "Access-Control-Expose-Headers": "Retry-After",
            },
            id="a listed origin",
        ),
    ],
)
def test_cors(clock, allow_origins, origin, expected):
    app = make_app(allow_origins=allow_origins)
    statuses(app, 3)
    answer = guess(app, HTTP_ORIGIN=origin)
    assert answer.status == 429
    names = ("Vary", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers")
    assert {name: answer.header(name) for name in names if answer.header(name)} == expected


def test_which_keys_there_are_cannot_be_told_from_the_answers(clock):
    keys = ("Bearer wrong", "Bearer disabled")
    unknown, disabled = (
        [guess(make, key) for _ in range(6)] for make, key in zip((make_app(), make_app()), keys, strict=True)
    )
    assert unknown == disabled
    assert [answer.status for answer in unknown] == [401, 401, 401, 429, 429, 429]


# --- For how long


@pytest.mark.parametrize(
    ("second", "retry_after"),
    [
        pytest.param(0, PERIOD, id="as the window begins"),
        pytest.param(0.25, PERIOD, id="a quarter of a second later"),
        pytest.param(17, PERIOD - 17, id="17 s later"),
        pytest.param(PERIOD - 1, 1, id="a second before its end"),
        pytest.param(PERIOD - 0.001, 1, id="a millisecond before its end"),
    ],
)
def test_retry_after_is_true(clock, storage, second, retry_after):
    app = make_app(storage=storage)
    clock.now = BEGIN + second
    assert statuses(app, 4) == [401, 401, 401, 429]
    assert guess(app).header("Retry-After") == str(retry_after)
    clock.now += retry_after - 1
    if retry_after > 1:
        assert guess(app).header("Retry-After") == "1"
    clock.now += 1
    assert statuses(app, 4) == [401, 401, 401, 429]


@pytest.mark.slow
def test_a_failure_while_throttled_does_not_extend_it(clock):
    app = make_app()
    statuses(app, 1000)
    clock.now += PERIOD - 1
    assert statuses(app, 1000) == [429] * 1000
    clock.now += 1
    assert guess(app).status == 401


def test_a_clock_that_is_set_back_locks_no_client_out(clock):
    app = make_app()
    clock.now += 24 * 3600
    statuses(app, 10)
    clock.now -= 24 * 3600
    assert statuses(app, 4) == [401, 401, 401, 429]


# --- Memory


@pytest.mark.slow
def test_memory_is_bounded_whatever_number_of_addresses_come(clock, monkeypatch, full):
    if not full:
        monkeypatch.setattr(throttle, "_MOST_CLIENTS", throttle._MOST_CLIENTS // 10)
    most = throttle._MOST_CLIENTS
    app = make_app()
    one = environ(HTTP_AUTHORIZATION="Bearer two,keys")  # counts, and is refused without asking the store

    def flood(start, stop):
        for number in range(start, stop):
            one["REMOTE_ADDR"] = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            assert call(app, one).status == 401
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        filled = flood(0, 2 * most)
        assert filled < 400 * most
        assert flood(2 * most, 1_000_000 if full else 6 * most) < filled * 1.1
        # Counts of past windows are dropped.
        clock.now += PERIOD
        assert flood(0, 1) < filled / 2
    finally:
        tracemalloc.stop()


def test_which_client_is_dropped_in_a_flood_of_addresses(clock, monkeypatch):
    monkeypatch.setattr(throttle, "_MOST_CLIENTS", 100)
    app = make_app()
    assert statuses(app, 3) == [401] * 3
    for number in range(1000):
        guess(app, address=f"10.0.{number // 250}.{number % 250}")
        # A guesser that goes on is not dropped.
        if number % 50 == 0:
            assert guess(app).status == 429
    # A client that begins now is counted, and the least recently failed client is dropped.
    assert statuses(app, 4, address="192.0.2.2") == [401, 401, 401, 429]
    statuses(app, 4, address="192.0.2.3")
    for number in range(100):
        guess(app, address=f"10.1.0.{number}")
    assert guess(app, address="192.0.2.3").status == 401
