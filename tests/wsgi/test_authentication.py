"""Authentication by itself: what the endpoints and the meter share, whatever a refusal looks like afterwards."""

import json
import time

import pytest
from client import environ

from usage_middleware import MemoryTokenStore, StoreError, Token
from usage_middleware.wsgi.authentication import Authentication, bearer_key
from usage_middleware.wsgi.refusals import (
    INVALID_TOKEN,
    MALFORMED,
    NO_KEY,
    PROBLEMS,
    THROTTLED,
    UNAVAILABLE,
    UNKNOWN,
    Problem,
    Refused,
)
from usage_middleware.wsgi.responses import ResponsesByOrigin
from usage_middleware.wsgi.throttle import Throttle

KEY = "k3y"
HELD = 0.0005
ORIGIN = "https://app.example"


def request(authorization=None, **variables):
    if authorization is not None:
        variables["HTTP_AUTHORIZATION"] = authorization
    return environ(REMOTE_ADDR="192.0.2.1", **variables)


def refused(authentication, given, question=None):
    """Return the refusal of a request, and the seconds that it took."""
    begun = time.perf_counter()
    with pytest.raises(Refused) as caught:
        authentication.ask(given, question or authentication.token)
    return caught.value, time.perf_counter() - begun


@pytest.mark.parametrize(
    ("authorization", "kind"),
    [
        pytest.param(None, NO_KEY, id="no header"),
        pytest.param(" \t", NO_KEY, id="an empty header"),
        pytest.param("Bearer", MALFORMED, id="no key"),
        pytest.param("Basic a2V5", MALFORMED, id="another scheme"),
        pytest.param("Bearer unknown", UNKNOWN, id="unknown"),
        pytest.param("Bearer disabled", UNKNOWN, id="disabled"),
    ],
)
def test_a_refusal_has_a_kind(authorization, kind):
    store = {KEY: Token(), "disabled": Token(enabled=False)}
    refusal, _ = refused(Authentication(store), request(authorization))
    assert (refusal.kind, refusal.retry_after) == (kind, 0)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(Token(name="One"), id="valid"),
        pytest.param(Token(name="One", expires_at=1), id="expired"),
        pytest.param(Token(name="One", total_available=-1), id="overdrawn"),
    ],
)
def test_a_known_key_is_answered_by_the_question(token):
    authentication = Authentication({KEY: token})
    assert authentication.ask(request(f"Bearer sk-{KEY}"), authentication.token) is token
    assert authentication.ask(request(f"Bearer {KEY}"), lambda key: key) == KEY


@pytest.mark.parametrize("authorization", [None, "Bearer"])
def test_without_a_key_nothing_is_asked(authorization):
    asked = []
    refused(Authentication({}), request(authorization), asked.append)
    assert asked == []


def test_a_key_may_be_found_elsewhere():
    authentication = Authentication({KEY: Token(name="One")}, key=lambda environ: environ.get("HTTP_X_API_KEY"))
    assert authentication.ask(request(HTTP_X_API_KEY=KEY), authentication.token).name == "One"
    assert refused(authentication, request(HTTP_X_API_KEY="unknown"))[0].kind == UNKNOWN
    assert refused(authentication, request())[0].kind == NO_KEY
    assert refused(authentication, request(f"Bearer {KEY}"))[0].kind == MALFORMED


def test_a_question_may_refuse_for_reasons_of_its_own():
    """What the meter does: it asks for more than a token, and has other reasons to refuse."""

    def reserve(key):
        raise Refused("used up", message="the quota is used up", retry_after=7)

    refusals = [refused(Authentication({}), request(f"Bearer {KEY}"), reserve) for _ in range(50)]
    refusal, _ = refusals[0]
    assert (refusal.kind, refusal.message, refusal.retry_after) == ("used up", "the quota is used up", 7)
    # It is not held: the fastest of many does not depend on what else the machine does.
    assert min(seconds for _, seconds in refusals) < HELD


@pytest.mark.parametrize("key", ["unknown", "disabled"])
def test_a_refused_key_is_held(key):
    authentication = Authentication({KEY: Token(), "disabled": Token(enabled=False)})
    # From the question on, as what comes before it does not depend on the key.
    asked_at = []

    def question(key):
        asked_at.append(time.perf_counter())
        return authentication.token(key)

    refused(authentication, request(f"Bearer {key}"), question)
    assert time.perf_counter() - asked_at[0] >= HELD - 0.00005


class Throttling:
    def __init__(self, seconds):
        self.seconds = seconds
        self.counted = 0

    def failed(self, environ):
        self.counted += 1
        return self.seconds


@pytest.mark.parametrize(
    ("authorization", "counted"),
    [
        pytest.param(None, 0, id="no header"),
        pytest.param(f"Bearer {KEY}", 0, id="valid"),
        pytest.param("Bearer broken", 0, id="the store fails"),
        pytest.param("Bearer", 1, id="malformed"),
        pytest.param("Bearer unknown", 1, id="unknown"),
        pytest.param("Bearer disabled", 1, id="disabled"),
    ],
)
def test_a_guess_is_counted_once(authorization, counted):
    class Store(dict):
        def get(self, key):
            if key == "broken":
                raise StoreError("broken")
            return super().get(key)

    throttle = Throttling(30)
    authentication = Authentication(Store({KEY: Token(), "disabled": Token(enabled=False)}), throttle=throttle)
    if authorization == f"Bearer {KEY}":
        authentication.ask(request(authorization), authentication.token)
    else:
        refusal, _ = refused(authentication, request(authorization))
        assert (refusal.kind == THROTTLED) == bool(counted)
        assert refusal.retry_after == (30 if counted else 5 if refusal.kind == UNAVAILABLE else 0)
    assert throttle.counted == counted


def test_what_counts_elsewhere_counts_here():
    """One throttle may stand behind several authentications."""
    throttle = Throttle("2 per 30 days", "memory://")
    first, second = Authentication({}, throttle=throttle), Authentication({}, throttle=throttle)
    kinds = [refused(one, request("Bearer unknown"))[0].kind for one in (first, second, first, second)]
    assert kinds == [UNKNOWN, UNKNOWN, THROTTLED, THROTTLED]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(StoreError("gone"), id="StoreError"),
        pytest.param(RuntimeError(f"no row for {KEY}"), id="an exception that quotes the key"),
        pytest.param(StoreError(f"no row for {KEY!r}"), id="a StoreError that quotes the key"),
    ],
)
def test_a_question_that_fails_is_logged_without_the_key(error, caplog):
    def question(key):
        raise error

    refusal, _ = refused(Authentication({}), request(f"Bearer {KEY}"), question)
    assert (refusal.kind, refusal.retry_after) == (UNAVAILABLE, 5)
    assert caplog.records[0].getMessage().startswith(f"dict failed: {type(error).__name__}")
    assert KEY not in caplog.text


def test_what_a_store_returns_must_be_a_token(caplog):
    authentication = Authentication({KEY: "a text"})
    assert refused(authentication, request(f"Bearer {KEY}"))[0].kind == UNAVAILABLE
    assert "get() returned str, which is not a Token" in caplog.text


def test_a_disabled_and_an_unknown_key_of_a_ledger():
    store = MemoryTokenStore()
    key, token = store.create()
    store.update(token.id, enabled=False)
    authentication = Authentication(store)
    assert refused(authentication, request(f"Bearer {key}"))[0].kind == UNKNOWN


# --- How a refusal is written


def test_a_family_of_endpoints_has_its_own_problems_and_error_bodies():
    responses = ResponsesByOrigin(
        [ORIGIN],
        problems={**PROBLEMS, "used up": Problem("402 Payment Required", "Used up", (("X-Should-Retry", "false"),))},
        error_body=lambda kind, message: json.dumps({"error": {"code": kind, "message": message}}),
    )
    listed, other = responses.of({"HTTP_ORIGIN": ORIGIN}), responses.of({})
    status, headers, body = listed.refusal(Refused("used up", retry_after=3))
    assert status == "402 Payment Required"
    assert json.loads(body) == {"error": {"code": "used up", "message": "Used up"}}
    assert dict(headers) == {
        "Content-Length": str(len(body)),
        "Content-Type": "application/json; charset=utf-8",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Access-Control-Allow-Origin": ORIGIN,
        "Access-Control-Expose-Headers": "Retry-After",
        "Vary": "Origin",
        "X-Should-Retry": "false",
        "Retry-After": "3",
    }
    _, headers, _ = other.refusal(Refused("used up", retry_after=3))
    assert "Access-Control-Expose-Headers" not in dict(headers)
    status, headers, body = listed.refusal(Refused(UNKNOWN, message="no such key"))
    assert (status, json.loads(body)["error"]["message"]) == ("401 Unauthorized", "no such key")
    assert INVALID_TOKEN in headers


def test_the_key_of_a_bearer_header_is_the_default():
    assert Authentication({}).ask(request("Bearer sk-abc"), lambda key: key) == bearer_key(request("Bearer sk-abc"))
