"""The description of the endpoints beside the usage endpoint: what the middleware answers is what it says."""

import json
from datetime import datetime, timezone

import pytest
from client import PATH, call, environ, wrapped
from description import DESCRIPTION, check_answer
from jsonschema import ValidationError

from usage_middleware import MemoryTokenStore, NewAPI, StoreError, UsageMiddleware

ORIGIN = "https://app.example"
DAYS = PATH + "/days"
LOG = "/api/log/token"
PATHS = [path for path in DESCRIPTION["paths"] if path not in (PATH, PATH + "/")]
BILLING = [path for path in PATHS if "/billing/" in path]
NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc).timestamp()


class Store(MemoryTokenStore):
    """A store that fails for one key."""

    def get(self, key, /):
        if key == "broken":
            raise StoreError("broken")
        return super().get(key)


@pytest.fixture(scope="module")
def store():
    clock = [NOW - 50 * 24 * 3600]
    with Store(clock=lambda: clock[0]) as store:
        store.create(key="empty")
        store.create(key="unlimited", unlimited_quota=True)
        store.create(key="used", name="caf\u00e9", total_available=10**6, renewal="weekly", renewal_quota=10**6)
        _, token = store.create(key="disabled")
        store.update(token.id, enabled=False)
        store.create(key="overdrawn", total_available=10)
        store.settle(store.reserve("overdrawn", 10), 25)
        for number in range(120):
            clock[0] += 6 * 3600
            store.charge("used", number, model=f"m{number % 60}" if number % 7 else None, input_tokens=number)
        for number in range(60):
            store.charge("used", number, model=f"other{number}")
        store.refund(next(store.history(store.get("used").id)).id, 3)
        store.reserve("used", 50, expires_in=10**9)
        yield store


def ask(store, path, key=None, method="GET", *, allow_origins="*", options=None, **variables):
    if key is not None:
        variables["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    app = UsageMiddleware(wrapped, store, new_api=options or NewAPI(), allow_origins=allow_origins)
    return call(app, environ(method, path, **variables))


def refused(path, status):
    return 200 if path == "/api/status" else status


ASKED = [
    *(pytest.param("GET", key, 200, id=key) for key in ("empty", "unlimited", "used", "overdrawn")),
    pytest.param("GET", None, 401, id="no header"),
    pytest.param("GET", "two keys", 401, id="malformed"),
    pytest.param("GET", "unknown", 401, id="unknown"),
    pytest.param("GET", "disabled", 401, id="disabled"),
    pytest.param("GET", "broken", 503, id="broken"),
    pytest.param("HEAD", "used", 200, id="HEAD 200"),
    pytest.param("HEAD", None, 401, id="HEAD 401"),
    pytest.param("HEAD", "broken", 503, id="HEAD 503"),
    pytest.param("OPTIONS", None, 204, id="OPTIONS"),
    pytest.param("POST", None, 405, id="POST"),
    pytest.param("get", None, 405, id="get"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("allow_origins", ["*", (ORIGIN,), ()], ids=["any origin", "listed origins", "no CORS"])
@pytest.mark.parametrize(("method", "key", "status"), ASKED)
def test_every_answer_is_described(store, method, key, status, allow_origins, path):
    answer = ask(store, path, key, method, allow_origins=allow_origins, HTTP_ORIGIN=ORIGIN)
    assert answer.status == (status if status in (204, 405) else refused(path, status))
    check_answer(answer, method, path)


QUERIES = [
    *((DAYS, query, 200) for query in ("days=1", "days=366", "start_date=2026-10-1&end_date=2026-11-30")),
    *((DAYS, query, 400) for query in ("days=0", "days=x", "start_date=2026-10-01", "other=1")),
    *((LOG, query, 200) for query in ("type=2", "type=6", "type=9", "p=1&page_size=3", "p=x", "start_timestamp=5")),
    *((path, "start_date=2026-10-01&end_date=2026-10-31", 200) for path in BILLING),
    *((path, "start_date=x", 200) for path in BILLING),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "query", "status"), QUERIES)
def test_every_answer_to_a_query_is_described(store, method, path, query, status):
    answer = ask(store, path, "used", method, QUERY_STRING=query)
    assert answer.status == status
    check_answer(answer, method, path)


@pytest.mark.parametrize("options", [NewAPI(display="TOKENS"), NewAPI(quota_per_unit=3, system_name="")])
@pytest.mark.parametrize("path", PATHS)
def test_every_answer_of_other_options_is_described(store, options, path):
    for key in ("empty", "unlimited", "used", "overdrawn"):
        check_answer(ask(store, path, key, options=options), "GET", path)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "/api/status"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_answer_to_a_guesser_is_described(store, method, path):
    app = UsageMiddleware(wrapped, store, new_api=NewAPI(), throttle="1 per 30 days")
    asked = environ(method, path, HTTP_AUTHORIZATION="Bearer unknown", REMOTE_ADDR="127.0.0.1")
    answers = [call(app, dict(asked)) for _ in range(4)]
    answer = next(answer for answer in answers if answer.status == 429)
    check_answer(answer, method, path)


# --- Its examples


def examples(path, status="200"):
    """Return what is shown of an endpoint, as bytes."""
    name = DESCRIPTION["paths"][path]["get"]["responses"][status]["$ref"].rpartition("/")[2]
    shown = DESCRIPTION["components"]["responses"][name]["content"]["application/json"]["examples"]
    return {
        name: json.dumps(example["value"], ensure_ascii=False, separators=(",", ":")).encode()
        for name, example in shown.items()
    }


def test_the_examples_are_real_answers(monkeypatch):
    clock = [0.0]
    with MemoryTokenStore(clock=lambda: clock[0]) as store:
        clock[0] = NOW - 21 * 24 * 3600
        store.create(key="one", name="Default Token", total_available=1000)
        store.create(key="days", renewal="monthly", renewal_quota=10**6)
        store.create(key="million", total_available=10**6)
        store.create(key="unlimited", unlimited_quota=True)
        for _ in range(8):
            store.charge("days", 125, model="gpt-4o-mini", input_tokens=75, output_tokens=25)
        clock[0] = NOW
        for _ in range(4):
            store.charge("days", 125, model="gpt-4o", input_tokens=75, output_tokens=25)
        store.charge("million", 12345)
        clock[0] = 1_795_500_000
        (row,) = json.loads(examples(LOG)["charged"])["data"]
        monkeypatch.setattr("usage_middleware.stores.ledger.new_id", lambda: row["request_id"])
        store.charge("one", 30, model="gpt-4o", input_tokens=20, output_tokens=5)

        def body(path, key, **options):
            return ask(store, path, key, **options).body

        version = ask(store, "/api/status").json["data"]["version"].encode()
        assert {name: shown.replace(b"0.1.0", version) for name, shown in examples("/api/status").items()} == {
            "dollars": body("/api/status", None),
            "units": body("/api/status", None, options=NewAPI(display="TOKENS")),
        }
        assert examples(DAYS) == {"used": body(DAYS, "days")}
        assert examples(DAYS, "400") == {"refused": body(DAYS, "days", QUERY_STRING="days=0")}
        assert examples(LOG) == {"charged": body(LOG, "one"), "empty": body(LOG, "unlimited")}
        assert examples("/api/user/self") == {"used": body("/api/user/self", "one")}
        for prefix in ("", "/v1"):
            subscription, used = (f"{prefix}/dashboard/billing/{name}" for name in ("subscription", "usage"))
            assert examples(subscription) == {
                "limited": body(subscription, "million"),
                "unlimited": body(subscription, "unlimited"),
            }
            assert examples(used) == {"used": body(used, "million")}
            assert examples(used, "401") == {
                "absent": body(used, None),
                "malformed": body(used, "two keys"),
                "unknown": body(used, "unknown"),
            }


# --- That it is not too lax


def changed(path, *place, to=None, remove=False):
    """Return a change of a value in the JSON of an answer."""
    return pytest.param(path, place, to, remove, id=f"{path} {place} {'gone' if remove else to!r}")


MUTANTS = [
    *(changed(DAYS, "data", name, remove=True) for name in ("used", "held", "renewal", "days", "used_today")),
    changed(DAYS, "data", "used", to=1.5),
    changed(DAYS, "data", "renewal", to="yearly"),
    changed(DAYS, "data", "more", to=1),
    changed(DAYS, "data", "days", 0, "date", to="2026-11-4"),
    changed(DAYS, "data", "days", -1, "models", "(other)", "used", to=None),
    changed(DAYS, "data", "days", -1, "models", "(other)", "requests", remove=True),
    *(changed(LOG, "data", 0, name, remove=True) for name in ("id", "model_name", "other", "is_stream", "ip")),
    changed(LOG, "data", 0, "model_name", to=None),
    changed(LOG, "data", 0, "is_stream", to=0),
    changed(LOG, "data", 0, "id", to=0),
    changed(LOG, "data", 0, "type", to=1),
    changed(LOG, "data", 0, "ip", to="192.0.2.1"),
    changed(LOG, "success", to=1),
    changed("/api/status", "data", "price", to=1),
    changed("/api/status", "data", "quota_per_unit", to="500000"),
    changed("/api/user/self", "data", "request_count", to=None),
    changed("/dashboard/billing/subscription", "hard_limit_usd", to="2"),
    changed("/dashboard/billing/subscription", "access_until", to=-1),
    changed("/dashboard/billing/usage", "total_usage", to=2.0),
]


@pytest.mark.parametrize(("path", "place", "to", "remove"), MUTANTS)
def test_it_does_not_describe_a_wrong_answer(store, path, place, to, remove):
    answer = ask(store, path, "used")
    check_answer(answer, "GET", path)
    value = answer.json
    *way, last = place
    part = value
    for step in way:
        part = part[step]
    if remove:
        del part[last]
    else:
        part[last] = to
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    headers = [(name, str(len(body)) if name == "Content-Length" else text) for name, text in answer.headers]
    with pytest.raises((AssertionError, ValidationError)):
        check_answer(answer._replace(headers=headers, body=body), "GET", path)
