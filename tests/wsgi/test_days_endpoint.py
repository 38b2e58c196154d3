"""Usage by day over HTTP: which days are asked for, what is shown of them, and for which token."""

import json
from datetime import date, datetime, timedelta, timezone

import pytest
from client import PATH, ask, wrapped

from usage_middleware import DayUsage, MemoryTokenStore, StoreError, Token, UsageMiddleware
from usage_middleware.testing.fixtures import Clock

DAYS = PATH + "/days"
TODAY = date(2026, 11, 24)
DAY = 24 * 3600


def noon(day):
    return datetime(day.year, day.month, day.day, 12, tzinfo=timezone.utc).timestamp()


def clock_at_noon():
    clock = Clock()
    clock.now = noon(TODAY)
    return clock


@pytest.fixture
def clock():
    return clock_at_noon()


@pytest.fixture
def app(store):
    return UsageMiddleware(wrapped, store)


def get(app, key, query="", **options):
    return ask(app, path=options.pop("path", DAYS), authorization=f"Bearer {key}", QUERY_STRING=query, **options)


def error(message):
    return json.dumps({"success": False, "message": message}, separators=(",", ":")).encode()


# --- What is shown


def test_the_documented_example_to_the_byte(store, app, clock):
    key, _ = store.create(total_available=1000)
    store.charge(key, 1000, model="gpt-4o", input_tokens=600, output_tokens=200)
    key, _ = store.create(renewal="monthly", renewal_quota=1_000_000)
    clock.now = noon(date(2026, 11, 3))
    for _ in range(8):
        store.charge(key, 125, model="gpt-4o-mini", input_tokens=75, output_tokens=25)
    clock.now = noon(TODAY)
    for _ in range(4):
        store.charge(key, 125, model="gpt-4o", input_tokens=75, output_tokens=25)
    answer = get(app, key)
    assert answer.status == 200
    assert answer.body == (
        b'{"code":true,"message":"ok","data":{"object":"token_usage_days",'
        b'"start_date":"2026-10-26","end_date":"2026-11-24",'
        b'"used":1500,"requests":12,"input_tokens":900,"output_tokens":300,'
        b'"used_today":500,"held":0,"renewal":"monthly","renewal_quota":1000000,"renews_at":1796083200,"days":['
        b'{"date":"2026-11-03","used":1000,"requests":8,"input_tokens":600,"output_tokens":200,'
        b'"models":{"gpt-4o-mini":{"used":1000,"requests":8,"input_tokens":600,"output_tokens":200}}},'
        b'{"date":"2026-11-24","used":500,"requests":4,"input_tokens":300,"output_tokens":100,'
        b'"models":{"gpt-4o":{"used":500,"requests":4,"input_tokens":300,"output_tokens":100}}}]}}'
    )


def test_the_headers_are_those_of_the_endpoint(store, app):
    key, _ = store.create()
    usage, days = (dict(get(app, key, path=path, HTTP_ORIGIN="https://app.example").headers) for path in (PATH, DAYS))
    assert {**days, "Content-Length": ""} == {**usage, "Content-Length": ""}


def test_a_token_without_use(store, app):
    key, _ = store.create(total_available=5)
    data = get(app, key).json["data"]
    assert data == {
        "object": "token_usage_days",
        "start_date": "2026-10-26",
        "end_date": "2026-11-24",
        **dict.fromkeys(("used", "requests", "input_tokens", "output_tokens", "used_today", "held"), 0),
        "renewal": "",
        "renewal_quota": 0,
        "renews_at": 0,
        "days": [],
    }


def test_charges_without_a_model_and_names_as_json(store, app):
    key, _ = store.create(total_available=100)
    name = 'caf\u00e9 "\\ \u2028\U0001f511'
    store.charge(key, 1)
    store.charge(key, 2, model=name)
    (day,) = get(app, key).json["data"]["days"]
    assert {model: figures["used"] for model, figures in day["models"].items()} == {"": 1, name: 2}
    assert name[:4].encode() in get(app, key).body


def test_what_reservations_hold_is_used_and_held(store, app):
    key, _ = store.create(total_available=100)
    first = store.reserve(key, 30, model="m")
    store.reserve(key, 20)
    data = get(app, key).json["data"]
    assert (data["held"], data["used"], data["used_today"], data["requests"]) == (50, 50, 50, 2)
    store.settle(first, 10, input_tokens=3, output_tokens=4)
    data = get(app, key).json["data"]
    assert (data["held"], data["used"], data["input_tokens"], data["output_tokens"]) == (20, 30, 3, 4)


def test_the_days_add_up(store, app, clock):
    key, _ = store.create(total_available=10**6)
    for number in range(60):
        clock.now += DAY * (number % 3) / 2
        store.charge(key, number, model=f"m{number % 7}", input_tokens=number, output_tokens=1)
    data = get(app, key, "days=366").json["data"]
    for figure in ("used", "requests", "input_tokens", "output_tokens"):
        assert data[figure] == sum(day[figure] for day in data["days"])
        for day in data["days"]:
            assert day[figure] == sum(model[figure] for model in day["models"].values())
    assert data["used"] == get(app, key, path=PATH).json["data"]["total_used"]
    assert [day["date"] for day in data["days"]] == sorted({day["date"] for day in data["days"]})


@pytest.mark.parametrize("models", [49, 50, 51, 80])
def test_fifty_models_of_a_day_are_named_and_the_rest_is_summed(store, app, models):
    key, _ = store.create(total_available=10**6)
    for number in range(models):
        store.charge(key, 1000 - number, model=f"m{number}", input_tokens=2, output_tokens=1)
    (day,) = get(app, key).json["data"]["days"]
    named = {f"m{number}": 1000 - number for number in range(min(models, 50))}
    rest = sum(1000 - number for number in range(50, models))
    expected = {**named, "(other)": rest} if rest else named
    assert {model: figures["used"] for model, figures in day["models"].items()} == expected
    assert list(day["models"]) == list(expected)
    if rest:
        others = models - 50
        assert day["models"]["(other)"] == {
            "used": rest,
            "requests": others,
            "input_tokens": 2 * others,
            "output_tokens": others,
        }
    assert day["used"] == sum(figures["used"] for figures in day["models"].values())


@pytest.mark.parametrize("used", [1000, 1])
def test_a_model_that_has_the_name_of_the_rest(store, app, used):
    key, _ = store.create(total_available=10**6)
    store.charge(key, used, model="(other)")
    for number in range(60):
        store.charge(key, 100 + number, model=f"m{number}")
    body = get(app, key).body.decode()
    assert body.count('"(other)"') == 1
    (day,) = json.loads(body)["data"]["days"]
    assert day["used"] == used + sum(range(100, 160)) == sum(model["used"] for model in day["models"].values())


def test_models_that_used_the_same_are_told_by_name(store, app):
    key, _ = store.create(total_available=100)
    for model in ("b", "a", "c"):
        store.charge(key, 1, model=model)
    store.charge(key, 5, model="z")
    (day,) = get(app, key).json["data"]["days"]
    assert list(day["models"]) == ["z", "a", "b", "c"]


# --- Which days


@pytest.fixture(scope="module")
def used():
    """Yield the key of a token that used one unit on each of 800 days, of which the last is today; and the
    middleware."""
    clock = clock_at_noon()
    with MemoryTokenStore(clock=clock) as store:
        key, _ = store.create(total_available=1000)
        for ago in reversed(range(800)):
            clock.now = noon(TODAY - timedelta(ago))
            store.charge(key, 1)
        yield key, UsageMiddleware(wrapped, store)


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        pytest.param("", "2026-10-26", "2026-11-24", id="30 days"),
        pytest.param("days=1", "2026-11-24", "2026-11-24", id="today"),
        pytest.param("days=7", "2026-11-18", "2026-11-24", id="a week"),
        pytest.param("days=007", "2026-11-18", "2026-11-24", id="padded"),
        pytest.param("days=366", "2025-11-24", "2026-11-24", id="366 days"),
        pytest.param("days=%37", "2026-11-18", "2026-11-24", id="escaped"),
        pytest.param("start_date=2026-11-01&end_date=2026-11-30", "2026-11-01", "2026-11-30", id="a month"),
        pytest.param("end_date=2026-3-4&start_date=2026-3-1", "2026-03-01", "2026-03-04", id="unpadded"),
        pytest.param("start_date=2026-11-24&end_date=2026-11-24", "2026-11-24", "2026-11-24", id="one day"),
        pytest.param("start_date=2024-02-29&end_date=2025-02-28", "2024-02-29", "2025-02-28", id="a leap year"),
        pytest.param("start_date=2030-01-01&end_date=2030-12-31", "2030-01-01", "2030-12-31", id="in the future"),
        pytest.param("start_date=0001-01-01&end_date=0001-01-02", "0001-01-01", "0001-01-02", id="long ago"),
        pytest.param("start_date=9999-01-01&end_date=9999-12-31", "9999-01-01", "9999-12-31", id="at the end"),
    ],
)
def test_the_days_that_are_asked_for(used, query, first, last):
    key, app = used
    data = get(app, key, query).json["data"]
    assert (data["start_date"], data["end_date"]) == (first, last)
    begin = max(date.fromisoformat(first), TODAY - timedelta(799))
    days = [str(begin + timedelta(n)) for n in range(max((min(date.fromisoformat(last), TODAY) - begin).days + 1, 0))]
    assert [day["date"] for day in data["days"]] == days
    assert data["used"] == data["requests"] == len(days)
    # Whichever days are asked for.
    assert data["used_today"] == 1


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        *((f"days={value}", "days") for value in ("0", "367", "-1", "%2B7", "+7", "7.0", "7e0", "1_0", "x", "", "%FF")),
        ("days", "days"),
        ("days=%D9%A7", "days"),
        ("days=7%0A", "days"),
        (f"days={'9' * 5000}", "days"),
        ("days=7&days=7", "days"),
        ("days=7&start_date=2026-11-01&end_date=2026-11-02", "days"),
        ("days=7&end_date=2026-11-02", "days"),
        ("start_date=2026-11-01", "end_date"),
        ("end_date=2026-11-01", "start_date"),
        ("start_date=2026-11-02&end_date=2026-11-01", "end_date"),
        ("start_date=2026-11-01&end_date=2026-11-01&end_date=2026-11-01", "end_date"),
        ("start_date=2025-11-24&end_date=2026-11-25", "end_date"),
        ("start_date=0001-01-01&end_date=9999-12-31", "start_date"),
        *(
            (f"start_date={value}&end_date=2026-11-24", "start_date")
            for value in (
                "2026-02-30",
                "2026-13-01",
                "0000-01-01",
                "26-11-01",
                "202-11-01",
                "02026-11-01",
                "2026-11",
                "20261101",
                "2026-011-01",
                "",
            )
        ),
        ("start_date=2026-11-01&end_date=2026-11-24T00:00:00", "end_date"),
        ("start_date=2026-11-01&end_date=1795478400", "end_date"),
        ("day=7", "days"),
        ("DAYS=7", "days"),
    ],
)
def test_anything_else_is_refused_by_the_name_of_the_parameter(used, query, parameter):
    key, app = used
    answer = get(app, key, query)
    assert (answer.status, answer.reason) == (400, "Bad Request")
    assert list(answer.json) == ["success", "message"]
    assert parameter in answer.json["message"]
    assert get(app, key, query, method="HEAD") == answer._replace(body=b"")


def test_no_message_quotes_what_was_sent(store, app):
    key, _ = store.create()
    for query in ("days={}", "start_date={}&end_date=2026-11-24", "{}=1"):
        assert "cAnArY" not in get(app, key, query.format("cAnArY")).body.decode()


def test_today_is_the_stores(store, app, clock):
    key, _ = store.create(total_available=10)
    midnight = noon(TODAY) + DAY / 2
    clock.now = midnight - 1
    store.charge(key, 1)
    clock.now = midnight
    store.charge(key, 2)
    data = get(app, key, "days=1").json["data"]
    assert (data["start_date"], data["used"], data["used_today"]) == ("2026-11-25", 2, 2)


# --- For which token


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"expires_at": 1}, id="expired"),
        pytest.param({}, id="used up"),
    ],
)
def test_a_token_that_stopped_still_tells_why(store, app, changes):
    key, token = store.create(total_available=7)
    store.charge(key, 7, model="m")
    store.update(token.id, **changes)
    answer = get(app, key)
    assert (answer.status, answer.json["data"]["used"]) == (200, 7)


def test_only_the_days_of_the_token_are_told(store, app):
    key, _ = store.create(total_available=10)
    other, _ = store.create(total_available=10)
    store.charge(other, 5, model="secret")
    answer = get(app, key)
    assert answer.json["data"]["days"] == []
    assert b"secret" not in answer.body


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic x", "Bearer unknown", "Bearer disabled"])
@pytest.mark.parametrize("query", ["", "days=0"])
def test_a_refusal_is_that_of_the_endpoint_whatever_is_asked_for(store, app, authorization, query):
    _, token = store.create(key="disabled")
    store.update(token.id, enabled=False)
    usage = ask(app, authorization=authorization)
    assert usage.status == 401
    assert ask(app, path=DAYS, authorization=authorization, QUERY_STRING=query) == usage


def test_failures_are_counted_together_with_those_of_the_endpoint(store):
    app = UsageMiddleware(wrapped, store, throttle="2 per 30 days")
    paths = (PATH, DAYS, PATH, DAYS)
    assert [ask(app, path=path, authorization="Bearer wrong").status for path in paths] == [401, 401, 429, 429]


# --- Which requests


@pytest.mark.parametrize("path", [DAYS, DAYS + "/"])
def test_both_paths_are_answered_alike(store, app, path):
    key, _ = store.create()
    assert get(app, key, path=path) == get(app, key)
    assert get(app, key, path=path, method="HEAD") == get(app, key)._replace(body=b"")
    assert ask(app, "OPTIONS", path) == ask(app, "OPTIONS")
    assert ask(app, "POST", path) == ask(app, "POST")


def test_the_path_is_below_that_of_the_endpoint(store):
    app = UsageMiddleware(wrapped, store, path="/quota")
    assert ask(app, path="/quota/days").status == 401
    assert ask(app, path=DAYS).body == b"the wrapped application"
    assert ask(UsageMiddleware(wrapped, store, path="/"), path="/days").status == 401


@pytest.mark.parametrize("path", [PATH + "/Days", PATH + "/days//", PATH + "/days/1", PATH + "//days", PATH + "/day"])
def test_any_other_path_is_not(app, path):
    assert ask(app, path=path).body == b"the wrapped application"


def test_a_store_without_a_ledger_leaves_the_path_to_the_application():
    for store in ({"key": Token()}, type("Store", (), {"get": lambda self, key: None})()):
        app = UsageMiddleware(wrapped, store)
        assert get(app, "key").body == b"the wrapped application"


# --- The store fails


def test_a_store_that_fails_is_a_503_without_the_key_in_the_log(caplog):
    class Failing(MemoryTokenStore):
        def usage_by_day(self, token_id, first_day, last_day):
            raise StoreError("the disk is full")

    with Failing() as store:
        key, _ = store.create()
        answer = get(UsageMiddleware(wrapped, store), key)
    assert (answer.status, answer.body) == (503, error("Service Unavailable"))
    assert "Failing failed: StoreError: the disk is full" in caplog.text
    assert key.removeprefix("sk-") not in caplog.text


def test_a_store_whose_days_cannot_be_written_is_a_503(caplog):
    class Odd(MemoryTokenStore):
        def usage_by_day(self, token_id, first_day, last_day):
            return [DayUsage(TODAY, "\ud800", 1, 1, 0, 0)]

    with Odd() as store:
        key, _ = store.create()
        assert get(UsageMiddleware(wrapped, store), key).status == 503
    assert "Odd failed: UnicodeEncodeError" in caplog.text
