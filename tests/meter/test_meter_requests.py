"""Which requests the meter lets through, what the application sees of them, and how the others are refused."""

import dataclasses
import io
import json
import logging

import pytest
from client import environ
from llm_answers import compact
from metering import KEY, Host, Metered, Served

from usage_middleware import (
    FromHeader,
    LLMUsage,
    MemoryTokenStore,
    PerRequest,
    StoreError,
    Token,
    UsageMeter,
    llm_key,
    requested_model,
)

OTHER = "o" * 20


def refusal(served):
    """Check the form of a refusal, and return its status, its code and its type."""
    headers = {name.lower(): value for name, value in served.headers}
    body = served.finish()
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert int(headers["content-length"]) == len(body)
    assert headers["cache-control"] == "no-store"
    assert headers["access-control-allow-origin"] == "*"
    content = json.loads(body)
    assert content.keys() == {"type", "error"}
    assert content["type"] == "error"
    error = content["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] is None
    assert error["message"].endswith((".", "Large", "Required"))
    assert KEY not in body.decode()
    return served.status, error["code"], error["type"]


def headers_of(served):
    return {name.lower(): value for name, value in served.headers}


# --- Refusals


@pytest.mark.parametrize(
    ("authorization", "challenge"),
    [
        pytest.param(None, "Bearer", id="none"),
        pytest.param("", "Bearer", id="empty"),
        pytest.param("Basic a2V5", 'Bearer error="invalid_token"', id="another scheme"),
        pytest.param("Bearer", 'Bearer error="invalid_token"', id="no key"),
        pytest.param(f"Bearer {KEY}, Bearer {KEY}", 'Bearer error="invalid_token"', id="two keys"),
        pytest.param("Bearer sk-", 'Bearer error="invalid_token"', id="nothing but the prefix"),
        pytest.param(f"Bearer {OTHER}", 'Bearer error="invalid_token"', id="unknown"),
    ],
)
def test_a_request_without_a_valid_key_is_refused(metered, authorization, challenge):
    metered = metered()
    variables = {} if authorization is None else {"HTTP_AUTHORIZATION": authorization}
    served = metered.serve(key=None, **variables)
    assert refusal(served) == (401, "invalid_api_key", "authentication_error")
    assert headers_of(served)["www-authenticate"] == challenge
    assert metered.app.environ is None
    assert metered.used == 0


def test_unknown_and_disabled_keys_get_the_same_answer(metered):
    metered = metered()
    _, other = metered.store.create(key=OTHER, total_available=5)
    metered.store.update(other.id, enabled=False)
    disabled, unknown = metered.serve(key=OTHER), metered.serve(key="u" * 20)
    assert disabled.heads == unknown.heads
    assert disabled.result == unknown.result
    assert refusal(disabled) == (401, "invalid_api_key", "authentication_error")


def test_an_expired_key_is_refused(metered):
    metered = metered()
    metered.store.update(metered.token_id, expires_at=1)
    served = metered.serve()
    assert refusal(served) == (401, "invalid_api_key", "authentication_error")
    assert b"expired" in served.finish()
    assert metered.used == 0


def test_a_used_up_key_is_refused(metered):
    metered = metered(cost=3, total_available=2)
    served = metered.serve()
    assert refusal(served) == (402, "insufficient_quota", "billing_error")
    assert headers_of(served)["x-should-retry"] == "false"
    assert "retry-after" not in headers_of(served)
    assert metered.app.environ is None


@pytest.mark.parametrize(
    ("status", "line"), [(402, "402 Payment Required"), (403, "403 Forbidden"), (429, "429 Too Many Requests")]
)
def test_the_status_for_a_used_up_key_can_be_chosen(metered, status, line):
    metered = metered(total_available=0, exhausted_status=status)
    served = metered.serve()
    assert refusal(served)[1] == "insufficient_quota"
    assert served.heads[0][0] == line
    assert headers_of(served)["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("available", "held", "status", "code"),
    [
        pytest.param(10, 10, 429, "quota_reserved", id="all is held"),
        pytest.param(10, 8, 429, "quota_reserved", id="most is held"),
        pytest.param(2, 2, 402, "insufficient_quota", id="too little was there in any case"),
    ],
)
def test_quota_that_open_reservations_hold_is_worth_a_retry(metered, available, held, status, code):
    metered = metered(cost=3, total_available=available)
    metered.store.reserve(KEY, held)
    served = metered.serve()
    assert refusal(served)[:2] == (status, code)
    assert headers_of(served).get("retry-after") == ("1" if status == 429 else None)
    assert ("x-should-retry" in headers_of(served)) is (status == 402)


def test_a_client_that_waits_for_a_reservation_succeeds(metered):
    metered = metered(cost=3, total_available=3)
    first = metered.serve()
    assert refusal(metered.serve())[1] == "quota_reserved"
    first.close()
    metered.store.refund(metered.settlement.operation_id)
    assert metered.serve().status == 200


def test_model_limits_are_enforced(metered):
    metered = metered(cost=3, model=requested_model)
    metered.store.update(metered.token_id, model_limits={"small": 5, "free": True}, model_limits_enabled=True)
    for model, expected in (("small", 200), ("large", 403), ("small", 402), ("free", 200), ("small", 402)):
        served = metered.serve("POST", body=compact({"model": model}), CONTENT_TYPE="application/json")
        assert served.status == expected, model
        if expected == 403:
            assert refusal(served) == (403, "model_not_allowed", "permission_error")
        served.finish()
    assert {s.model for s in metered.settlements} == {"small", "free"}


def test_a_fixed_model_is_charged(metered):
    metered = metered(model="one")
    metered.serve().finish()
    assert metered.settlement.model == "one"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b'{"model":"a","model":"b"}', 400, "invalid_request", id="two models"),
        pytest.param(b'{"model":5}', 400, "invalid_request", id="a number"),
        pytest.param(compact({"model": "x" * 256}), 400, "invalid_request", id="a long name"),
        pytest.param(compact({"model": "x\0"}), 400, "invalid_request", id="NUL"),
        pytest.param(compact({"model": "\ud800"}), 400, "invalid_request", id="half a character"),
        pytest.param(b'{"model":', 400, "invalid_request", id="not JSON"),
        pytest.param(b'{"a":"' + b"x" * 2**25 + b'"}', 413, "request_too_large", id="32 MiB"),
    ],
)
def test_a_body_without_a_readable_model_is_refused(metered, body, status, code):
    metered = metered(model=requested_model)
    served = metered.serve("POST", body=body, CONTENT_TYPE="application/json")
    assert refusal(served)[:2] == (status, code)
    assert metered.app.environ is None
    assert metered.used == 0


def test_a_body_without_a_length_or_with_a_coding_is_refused(metered):
    served = metered(model=requested_model).serve("POST", HTTP_TRANSFER_ENCODING="chunked")
    assert refusal(served)[:2] == (411, "invalid_request")
    served = metered(model=requested_model, key=OTHER).serve(
        "POST", key=OTHER, body=b"{}", HTTP_CONTENT_ENCODING="gzip"
    )
    assert refusal(served)[:2] == (415, "invalid_request")


def test_the_body_of_a_client_without_a_key_is_not_read(metered):
    class Unread(io.BytesIO):
        def read(self, *size):
            raise AssertionError("read")

        readinto = readline = read

    metered = metered(model=requested_model)
    for key in (None, OTHER):
        served = metered.serve("POST", key=key, CONTENT_LENGTH="10", **{"wsgi.input": Unread()})
        assert served.status == 401


def test_a_function_of_the_host_may_refuse(metered):
    from werkzeug.exceptions import Conflict, NotFound

    def model(environ):
        raise {"/a": NotFound, "/b": Conflict}[environ["PATH_INFO"]]

    metered = metered(model=model)
    assert metered.serve(path="/a").status == 404
    assert metered.serve(path="/b").status == 409


def test_a_refusal_of_head_has_no_body(metered):
    metered = metered()
    served, get = metered.serve("HEAD", key=None), metered.serve("GET", key=None)
    assert served.heads == get.heads
    assert served.finish() == b""
    assert get.finish()


def test_refusals_have_cors_headers_for_the_listed_origins(store):
    metered = Metered(store, allow_origins=["https://app.example"])
    for origin, allowed in (
        ("https://app.example", "https://app.example"),
        ("https://other.example", None),
        (None, None),
    ):
        variables = {} if origin is None else {"HTTP_ORIGIN": origin}
        headers = headers_of(metered.serve(key=None, **variables))
        assert headers.get("access-control-allow-origin") == allowed
        assert headers["vary"] == "Origin"
    held = Metered(store, key=OTHER, total_available=1)
    store.reserve(OTHER, 1)
    assert headers_of(held.serve(key=OTHER))["access-control-expose-headers"] == "Retry-After"


def test_guessing_is_throttled(store):
    metered = Metered(store, throttle="2 per 30 days")
    for expected in (401, 401, 429, 429):
        served = metered.serve(key=OTHER, REMOTE_ADDR="192.0.2.1")
        assert served.status == expected
    assert refusal(served) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert int(headers_of(served)["retry-after"]) > 0
    # A valid key is not throttled, nor is a request without a key.
    assert metered.serve(REMOTE_ADDR="192.0.2.1").status == 200
    assert metered.serve(key=None, REMOTE_ADDR="192.0.2.1").status == 401


# --- A store that fails


class Broken(MemoryTokenStore):
    """A store whose named methods fail."""

    def __init__(self, *methods):
        super().__init__()
        self.methods = ()
        self.create(key=KEY, total_available=10)
        self.methods = methods

    def get(self, key, /):
        if "get" in self.methods:
            raise StoreError("the database is locked")
        return super().get(key)

    def reserve(self, key, amount, **options):
        if "reserve" in self.methods:
            raise RuntimeError(f"a bug with {key}")
        return super().reserve(key, amount, **options)


@pytest.mark.parametrize("method", ["get", "reserve"])
def test_a_request_is_refused_if_the_store_fails(method, caplog):
    app = Host()
    served = Served(UsageMeter(app, Broken(method)))
    assert refusal(served) == (503, "service_unavailable", "api_error")
    assert headers_of(served)["retry-after"] == "5"
    assert app.environ is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert KEY not in caplog.text


@pytest.mark.parametrize("method", ["get", "reserve"])
@pytest.mark.parametrize("chunks", [[b"a", b"b"], None])
def test_fail_open_serves_requests_if_the_store_fails(method, chunks, caplog):
    settled = []
    app = Host(chunks, headers=[("X-Usage-Cost", "5")])

    def listed(environ, start_response):
        app.environ = environ
        start_response(app.status, app.headers)
        return [b"ab"]

    cost = FromHeader("X-Usage-Cost", most=5)
    meter = UsageMeter(
        app if chunks else listed,
        Broken(method),
        cost=cost,
        fail_open=True,
        forward_key=False,
        on_settled=settled.append,
    )
    served = Served(meter, HTTP_X_USAGE_COST="1")
    assert served.finish() == b"ab"
    assert served.headers == [("Content-Type", "text/plain")]
    assert "HTTP_AUTHORIZATION" not in app.environ
    assert "HTTP_X_USAGE_COST" not in app.environ
    assert "usage_middleware.operation_id" not in app.environ
    app.environ["usage_middleware.charge"](5)
    assert not settled
    assert len(caplog.records) == 1
    # A key is still needed.
    assert Served(meter, key=None).status == 401


def test_fail_open_is_not_for_refusals():
    store = Broken()
    meter = UsageMeter(Host(), store, cost=11, fail_open=True)
    assert Served(meter).status == 402
    assert Served(meter, key=OTHER).status == 401


# --- What passes, and how


def test_the_application_finds_the_token_and_the_operation(metered):
    metered = metered(cost=3)
    served = metered.serve()
    found = metered.app.environ
    assert found is served.environ
    assert found["usage_middleware.token"] == dataclasses.replace(
        metered.token, total_available=1000, total_used=0, held=0
    )
    assert metered.store.operation(found["usage_middleware.operation_id"]).held == 3
    assert callable(found["usage_middleware.charge"])
    assert found["HTTP_AUTHORIZATION"] == f"Bearer {KEY}"


@pytest.mark.parametrize("forward_key", [True, False])
def test_options_and_exempt_paths_pass_as_they_are(metered, forward_key):
    app = Host()
    metered = metered(app, exempt=("/static/",), forward_key=forward_key)
    for method, path, key in (("OPTIONS", "/v1", KEY), ("GET", "/static/x", KEY), ("GET", "/static/x", None)):
        served = metered.serve(method, path, key=key, HTTP_ACCEPT_ENCODING="br", HTTP_X_API_KEY="mine")
        assert served.finish() == b"done"
        assert app.environ is served.environ
        assert ("HTTP_AUTHORIZATION" in app.environ) is (forward_key and key is not None)
        assert app.environ["HTTP_ACCEPT_ENCODING"] == "br"
        assert app.environ["HTTP_X_API_KEY"] == "mine"
        assert not any(name.startswith("usage_middleware.") for name in app.environ)
    assert metered.used == 0
    assert metered.serve("GET", "/static/../v1", key=None).status == 401


def test_an_exempt_answer_is_the_same_object(metered):
    chunks = iter([b"a"])

    def app(environ, start_response):
        start_response("200 OK", [])
        return chunks

    assert metered(app, exempt=lambda environ: True).serve(key=None).result is chunks


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        pytest.param({"HTTP_AUTHORIZATION": f"Bearer sk-{KEY}"}, KEY, id="OpenAI"),
        pytest.param({"HTTP_X_API_KEY": f"sk-{KEY}"}, KEY, id="Anthropic"),
        pytest.param({"HTTP_X_API_KEY": f" {KEY}\t"}, KEY, id="white space"),
        pytest.param({"HTTP_X_GOOG_API_KEY": KEY}, KEY, id="Gemini"),
        pytest.param({"HTTP_AUTHORIZATION": f"Bearer {KEY}", "HTTP_X_API_KEY": OTHER}, KEY, id="OpenAI's comes first"),
        pytest.param({"HTTP_X_API_KEY": KEY, "HTTP_X_GOOG_API_KEY": OTHER}, KEY, id="Anthropic's before Gemini's"),
        pytest.param({"HTTP_AUTHORIZATION": "Basic abc", "HTTP_X_API_KEY": KEY}, None, id="another scheme"),
        pytest.param({"HTTP_AUTHORIZATION": "", "HTTP_X_API_KEY": KEY}, KEY, id="empty"),
        pytest.param({"HTTP_X_API_KEY": f"{KEY},{KEY}"}, None, id="two"),
        pytest.param({"HTTP_X_API_KEY": "sk-"}, None, id="nothing but the prefix"),
        pytest.param({"HTTP_X_API_KEY": "a b"}, None, id="a space"),
        pytest.param({}, None, id="none"),
    ],
)
def test_llm_key_finds_the_key_in_the_headers_of_each_client(store, headers, found):
    assert llm_key(environ(**headers)) == found
    metered = Metered(store, find_key=llm_key, forward_key=False)
    served = metered.serve(key=None, HTTP_USER_AGENT="client", **headers)
    assert served.status == (200 if found else 401)
    if found:
        assert found not in str({name: metered.app.environ.get(name) for name in headers})
        assert metered.app.environ["HTTP_USER_AGENT"] == "client"
    elif any(headers.values()):
        assert headers_of(served)["www-authenticate"] == 'Bearer error="invalid_token"'
    else:
        assert headers_of(served)["www-authenticate"] == "Bearer"


def test_a_malformed_key_in_another_header_counts_as_a_failure(store):
    metered = Metered(store, find_key=llm_key, throttle="1 per 30 days")
    statuses = [metered.serve(key=None, HTTP_X_API_KEY="a b", REMOTE_ADDR="192.0.2.1").status for _ in range(2)]
    assert statuses == [401, 429]


@pytest.mark.parametrize(
    ("key", "headers", "left"),
    [
        pytest.param(KEY, {"HTTP_COOKIE": f"a=1; key={KEY}", "HTTP_HOST": "h"}, {"HTTP_HOST"}, id="in a cookie"),
        pytest.param(KEY, {"HTTP_X_KEY": KEY, "HTTP_X_COPY": f"sk-{KEY}"}, set(), id="in two headers"),
        pytest.param("h", {"HTTP_X_KEY": "sk-h", "HTTP_HOST": "hh"}, {"HTTP_HOST"}, id="short"),
    ],
)
def test_every_header_with_the_key_is_removed(store, key, headers, left):
    store.create(key="sk-" + key, total_available=5)
    app = Host()
    served = Served(UsageMeter(app, store, key=lambda environ: key, forward_key=False), key=None, **headers)
    assert served.status == 200
    assert {name for name in app.environ if name in headers} == left


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (None, "identity"),
        ("", "identity"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("GZIP", "gzip"),
        ("br;q=1.0, gzip;q=0.8", "gzip"),
        ("br, x-gzip", "gzip"),
        ("*", "gzip"),
        ("br", "identity"),
        ("identity", "identity"),
        ("gzip;q=0", "identity"),
        ("gzip; q=0.000", "identity"),
        ("*;q=0", "identity"),
        ("gzipped", "identity"),
    ],
)
def test_codings_that_cannot_be_read_are_not_requested(metered, sent, seen):
    metered = metered()
    metered.serve(**({} if sent is None else {"HTTP_ACCEPT_ENCODING": sent}))
    assert metered.app.environ["HTTP_ACCEPT_ENCODING"] == seen


def test_less_is_reserved_if_no_more_is_left(metered):
    metered = metered(cost=FromHeader("X-Usage-Cost", most=500, least=5), total_available=100)
    served = metered.serve()
    assert metered.token.held == 100
    served.finish()
    assert metered.settled() == (100, "reserved", "completed")
    assert metered.settlement.reserved == 100
    assert metered.serve().status == 402


def test_a_host_may_have_a_cost_of_its_own(metered):
    class PerPath(PerRequest):
        def most(self, environ):
            return len(environ["PATH_INFO"])

        least = most

    metered = metered(cost=PerPath(9))
    metered.serve(path="/12").finish()
    assert metered.settlement.reserved == 3


@pytest.mark.parametrize(("most", "least", "error"), [("5", 5, TypeError), (-1, -1, ValueError), (1, 2, ValueError)])
def test_wrong_bounds_of_a_cost_are_raised_to_the_host(metered, most, least, error):
    class Wrong(PerRequest):
        def most(self, environ):
            return most

        def least(self, environ):
            return least

    metered = metered(cost=Wrong(1))
    with pytest.raises(error):
        metered.serve()
    assert metered.used == 0


def test_the_reservation_lapses_after_expires_in(tmp_path):
    with MemoryTokenStore() as store:
        metered = Metered(store, expires_in=1234)
        metered.serve()
        (operation,) = store.open_reservations()
        assert operation.expires_in == 1234


# --- Construction


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"app": None}, TypeError),
        ({"store": {}}, TypeError),
        ({"store": {KEY: Token()}}, TypeError),
        ({"cost": 1.5}, TypeError),
        ({"cost": "1"}, TypeError),
        ({"cost": True}, TypeError),
        ({"cost": -1}, ValueError),
        ({"cost": LLMUsage}, TypeError),
        ({"exempt": "/static/"}, TypeError),
        ({"model": ""}, ValueError),
        ({"model": 5}, TypeError),
        ({"key": "HTTP_X_KEY"}, TypeError),
        ({"abandoned": "charged"}, ValueError),
        ({"expires_in": 0}, ValueError),
        ({"expires_in": "1h"}, TypeError),
        ({"exhausted_status": 404}, ValueError),
        ({"exhausted_status": "402"}, ValueError),
        ({"on_settled": []}, TypeError),
        ({"allow_origins": "https://app.example"}, TypeError),
        ({"throttle": "often"}, ValueError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error):
    arguments = {"app": Host(), "store": MemoryTokenStore(), **arguments}
    with pytest.raises(error):
        UsageMeter(arguments.pop("app"), arguments.pop("store"), **arguments)
