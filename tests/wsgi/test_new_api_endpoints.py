"""new-api's other endpoints: what clients of new-api ask beside the usage endpoint, point by point of the contract."""

import json
from datetime import datetime, timezone

import pytest
from client import PATH, ask, wrapped
from hypothesis import given
from hypothesis import strategies as st

from usage_middleware import (
    MemoryTokenStore,
    NewAPI,
    QuotaStore,
    SQLiteTokenStore,
    StoreError,
    Token,
    UsageMiddleware,
)
from usage_middleware.testing.fixtures import Clock

STATUS = "/api/status"
LOG = "/api/log/token"
ACCOUNT = "/api/user/self"
SUBSCRIPTION = "/dashboard/billing/subscription"
USED = "/dashboard/billing/usage"
BILLING = (SUBSCRIPTION, f"/v1{SUBSCRIPTION}", USED, f"/v1{USED}")
WITH_KEY = (LOG, ACCOUNT, *BILLING)
NOW = 1_795_500_000  # 2026-11-24, 06:00


def clock_at_start():
    clock = Clock()
    clock.now = NOW
    return clock


@pytest.fixture
def clock():
    return clock_at_start()


def make_app(store, **options):
    return UsageMiddleware(wrapped, store, new_api=NewAPI(**options))


@pytest.fixture
def app(store):
    return make_app(store)


def get(app, key, path, query="", **options):
    return ask(app, path=path, authorization=f"Bearer {key}", QUERY_STRING=query, **options)


def text(answer):
    """Return the body, where 1 is not 1.0 and true is not 1."""
    assert answer.status == 200
    return answer.body.decode()


# --- Off and on


@pytest.mark.parametrize("path", [STATUS, *WITH_KEY, "/v1/usage", "/v1/models"])
def test_by_default_the_paths_are_the_applications(store, path):
    key, _ = store.create()
    assert get(UsageMiddleware(wrapped, store), key, path).body == b"the wrapped application"


@pytest.mark.parametrize(
    "path",
    ["/v1/usage", "/v1/models", "/api", "/api/log", "/api/log/token/x", "/API/status", "/dashboard/billing", "/"],
)
def test_other_paths_are_the_applications(app, path):
    assert ask(app, path=path).body == b"the wrapped application"


@pytest.mark.parametrize("path", [STATUS, *WITH_KEY])
def test_methods_and_slashes_are_those_of_the_endpoint(store, app, path):
    key, _ = store.create(total_available=5)
    answer = get(app, key, path)
    assert get(app, key, path + "/") == answer
    assert get(app, key, path, method="HEAD") == answer._replace(body=b"")
    preflight = {
        "HTTP_ORIGIN": "https://app.example",
        "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "GET",
        "HTTP_ACCESS_CONTROL_REQUEST_HEADERS": "authorization, new-api-user",
    }
    assert ask(app, "OPTIONS", path, **preflight) == ask(app, "OPTIONS", PATH, **preflight)
    usage = get(app, key, PATH)
    assert {**dict(answer.headers), "Content-Length": ""} == {**dict(usage.headers), "Content-Length": ""}
    refused = ask(app, "POST", path)
    assert refused.status == 405
    assert refused.header("Allow") == "GET, HEAD, OPTIONS"


def test_the_paths_do_not_depend_on_that_of_the_endpoint(store):
    key, _ = store.create()
    app = UsageMiddleware(wrapped, store, path="/quota", new_api=NewAPI())
    assert get(app, key, LOG).status == get(app, key, "/quota").status == get(app, key, "/quota/days").status == 200


@pytest.mark.parametrize("path", [STATUS, LOG + "/", "/v1/dashboard/billing/usage"])
def test_two_endpoints_cannot_have_one_path(path):
    with pytest.raises(ValueError, match=r"^path must not be "):
        UsageMiddleware(wrapped, {}, path=path, new_api=NewAPI())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"quota_per_unit": "1"}, TypeError, id="a text for a unit"),
        pytest.param({"quota_per_unit": 1.0}, TypeError, id="a float for a unit"),
        pytest.param({"quota_per_unit": True}, TypeError, id="a bool for a unit"),
        pytest.param({"quota_per_unit": 0}, ValueError, id="a unit of nothing"),
        pytest.param({"display": "EUR"}, ValueError, id="another display"),
        pytest.param({"display": "tokens"}, ValueError, id="a display in small letters"),
        pytest.param({"system_name": None}, TypeError, id="no name"),
        pytest.param({"system_name": "\ud800"}, ValueError, id="a name that UTF-8 cannot carry"),
    ],
)
def test_an_impossible_argument_is_named(options, error):
    (name,) = options
    with pytest.raises(error, match=f"^{name} must be "):
        NewAPI(**options)


def test_only_a_new_api_turns_them_on():
    with pytest.raises(TypeError, match=r"^new_api must be a NewAPI or None, got bool"):
        UsageMiddleware(wrapped, {}, new_api=True)


# --- Point 30: status


@pytest.mark.parametrize(
    ("options", "data"),
    [
        pytest.param(
            {},
            '"quota_per_unit":500000,"display_in_currency":true,"quota_display_type":"USD"',
            id="as new-api has it",
        ),
        pytest.param(
            {"quota_per_unit": 1000},
            '"quota_per_unit":1000,"display_in_currency":true,"quota_display_type":"USD"',
            id="another unit",
        ),
        pytest.param(
            {"display": "TOKENS"},
            '"quota_per_unit":500000,"display_in_currency":false,"quota_display_type":"TOKENS"',
            id="quota units as they are",
        ),
    ],
)
@pytest.mark.parametrize("authorization", [None, "Bearer unknown", "nonsense"])
def test_the_status_needs_no_key(options, data, authorization):
    answer = ask(make_app({}, system_name="caf\u00e9", **options), path=STATUS, authorization=authorization)
    version = answer.json["data"]["version"]
    assert type(version) is str
    expected = f'{{"success":true,"message":"","data":{{"system_name":"caf\u00e9","version":"{version}",{data}}}}}'
    assert text(answer) == expected
    # A client multiplies by it.
    assert "price" not in text(answer)


# --- Point 31: the log


def rows(app, key, query=""):
    answer = get(app, key, LOG, query).json
    assert list(answer) == ["success", "message", "data"]
    assert (answer["success"], answer["message"]) == (True, "")
    return answer["data"]


def test_a_row_has_every_field_in_its_type(store, app, clock):
    key, token = store.create(name="Default Token", total_available=1000)
    clock.now = NOW + 0.75
    store.charge(key, 30, model="gpt-4o", input_tokens=20, output_tokens=5)
    (operation,) = (one for one in store.history(token.id) if one.kind == "charge")
    assert text(get(app, key, LOG)) == (
        '{"success":true,"message":"","data":[{"id":1,"user_id":0,"created_at":1795500000,"type":2,"content":"",'
        '"username":"","token_name":"Default Token","model_name":"gpt-4o","quota":30,"prompt_tokens":20,'
        '"completion_tokens":5,"use_time":0,"is_stream":false,"channel":0,"channel_name":"","token_id":1,'
        f'"group":"default","ip":"","request_id":"{operation.id}","other":""}}]}}'
    )


def test_what_rows_there_are_and_what_they_add_up_to(store, app, clock):
    key, token = store.create(total_available=1000, renewal="daily", renewal_quota=1000)
    store.charge(key, 10, model="a")
    store.grant(token.id, 500)
    settled = store.reserve(key, 50, model="b")
    store.settle(settled, 40, input_tokens=7, output_tokens=8)
    store.reserve(key, 20)
    released = store.reserve(key, 25)
    store.settle(released, 0)
    store.refund(settled, 15)
    charged = store.reserve(key, 5)
    store.settle(charged, 5)
    store.refund(charged)
    clock.now += 24 * 3600
    store.charge(key, 1, model="after the renewal")
    data = rows(app, key)
    assert [(row["type"], row["quota"], row["model_name"]) for row in data] == [
        (2, 1, "after the renewal"),
        (6, 5, ""),
        (2, 5, ""),
        (6, 15, "b"),
        (2, 0, ""),
        (2, 0, ""),  # It lapsed.
        (2, 40, "b"),
        (2, 10, "a"),
    ]
    assert [row["id"] for row in data] == list(range(1, 9))
    assert (data[6]["prompt_tokens"], data[6]["completion_tokens"]) == (7, 8)
    used = sum(row["quota"] if row["type"] == 2 else -row["quota"] for row in data)
    assert used == store.get(key).total_used == 36
    assert all(row["model_name"] is not None for row in data)


def test_an_open_reservation_shows_what_it_holds(store, app):
    key, _ = store.create(total_available=100)
    store.reserve(key, 150, at_least=1)
    assert [row["quota"] for row in rows(app, key)] == [100]


@pytest.fixture(scope="module", params=["memory", "sqlite"])
def charged(request, tmp_path_factory):
    """Yield a token with 250 charges, each one second after the other, and every tenth refunded at once: app and
    key."""
    clock = clock_at_start()
    path = tmp_path_factory.mktemp("log") / "tokens.db"
    made = MemoryTokenStore(clock=clock) if request.param == "memory" else SQLiteTokenStore(path, clock=clock)
    with made as store:
        key, _ = store.create(total_available=10**6)
        for number in range(250):
            clock.now = NOW + number
            charge = store.reserve(key, number)
            store.settle(charge, number)
            if number % 10 == 0:
                store.refund(charge)
        yield make_app(store), key


def test_pages(charged):
    everything = rows(*charged)
    assert [row["id"] for row in everything] == list(range(1, 276))
    paged = [row for page in (1, 2, 3) for row in rows(*charged, f"p={page}")]
    assert paged == everything
    assert [len(rows(*charged, f"p={page}&page_size=100")) for page in (1, 2, 3, 4, 5)] == [100, 100, 75, 0, 0]
    assert rows(*charged, "p=29&page_size=10") == []
    assert rows(*charged, "p=28&page_size=10") == everything[270:]
    assert rows(*charged, "p=275&page_size=1") == everything[274:]


@pytest.mark.parametrize(
    ("query", "chosen"),
    [
        pytest.param("", slice(None), id="no parameter"),
        pytest.param("p=1", slice(100), id="a page"),
        pytest.param("p=1&page_size=100", slice(100), id="the largest page"),
        pytest.param("p=1&page_size=101", slice(100), id="a larger page"),
        pytest.param("p=1&page_size=0", slice(100), id="a page of no size"),
        pytest.param("p=2&page_size=-5", slice(100, 200), id="a page of a negative size"),
        pytest.param("p=0&page_size=5", slice(5), id="page 0"),
        pytest.param("p=-1&page_size=5", slice(5), id="a negative page"),
        pytest.param("p=x&page_size=5", slice(5), id="not a page"),
        pytest.param("p=2&page_size=5&p=1", slice(5, 10), id="the first counts"),
        pytest.param("page_size=5", slice(None), id="a size without a page"),
        pytest.param(f"p={'9' * 18}&page_size=100", slice(0), id="far beyond the end"),
        pytest.param(f"p={'9' * 400}&page_size=5", slice(5), id="not a page that could be"),
        pytest.param("type=0", slice(None), id="type 0"),
        pytest.param("type=", slice(None), id="no type"),
        pytest.param("type=x", slice(None), id="not a type"),
        pytest.param("type=1", slice(0), id="a type that is not kept"),
        pytest.param("key=other&foo", slice(None), id="unknown parameters"),
    ],
)
def test_parameters_of_the_log(charged, query, chosen):
    assert rows(*charged, query) == rows(*charged)[chosen]


def test_types(charged):
    everything = rows(*charged)
    for kind, count in ((2, 250), (6, 25)):
        found = rows(*charged, f"type={kind}")
        assert [row["id"] for row in found] == list(range(1, count + 1))
        assert [row["request_id"] for row in found] == [row["request_id"] for row in everything if row["type"] == kind]
        assert rows(*charged, f"type={kind}&p=2&page_size=10") == found[10:20]


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        pytest.param(f"start_timestamp={NOW + 240}", 240, 249, id="from"),
        pytest.param(f"end_timestamp={NOW + 9}", 0, 9, id="until"),
        pytest.param(f"start_timestamp={NOW + 50}&end_timestamp={NOW + 50}", 50, 50, id="one second"),
        pytest.param(f"start_timestamp={NOW + 60}&end_timestamp={NOW + 50}", 1, 0, id="none"),
        pytest.param(f"start_timestamp={NOW - 5}&end_timestamp={'9' * 18}", 0, 249, id="around all"),
        pytest.param("start_timestamp=0&end_timestamp=0", 0, 249, id="0"),
        pytest.param("start_timestamp=x&end_timestamp=", 0, 249, id="not a time"),
    ],
)
def test_times(charged, query, first, last):
    found = rows(*charged, query)
    assert sorted({row["created_at"] for row in found}) == list(range(NOW + first, NOW + last + 1))
    assert [row["id"] for row in found] == list(range(1, len(found) + 1))


def test_a_second_has_all_that_was_made_in_it(store, app, clock):
    key, _ = store.create(total_available=10)
    for fraction in (-0.01, 0, 0.5, 0.999, 1):
        clock.now = NOW + fraction
        store.charge(key, 1)
    found = rows(app, key, f"start_timestamp={NOW}&end_timestamp={NOW}")
    assert [row["created_at"] for row in found] == [NOW] * 3


def test_without_a_page_there_are_at_most_1000_rows():
    with MemoryTokenStore() as store:
        key, _ = store.create(total_available=10**6)
        for number in range(1005):
            store.charge(key, number)
        app = make_app(store)
        assert [row["quota"] for row in rows(app, key)] == list(range(1004, 4, -1))
        assert [row["quota"] for row in rows(app, key, "p=11&page_size=100")] == [4, 3, 2, 1, 0]


def test_only_the_rows_of_the_token(store, app):
    key, _ = store.create(total_available=10)
    other, _ = store.create(total_available=10)
    store.charge(other, 1, model="secret")
    assert rows(app, key) == []


def test_a_log_that_was_pruned(store, app, clock):
    key, _ = store.create(total_available=10)
    store.charge(key, 1)
    clock.now += 10
    store.prune(clock.now)
    assert rows(app, key) == []
    assert get(app, key, ACCOUNT).json["data"]["request_count"] == 1


def test_a_store_without_a_log_has_none():
    assert rows(make_app({"key": Token(id=1)}), "key") == []


# --- Points 32 and 33: billing


def billing(app, key, query=""):
    subscription = get(app, key, SUBSCRIPTION)
    used = get(app, key, USED, query)
    assert get(app, key, f"/v1{SUBSCRIPTION}") == subscription
    assert get(app, key, f"/v1{USED}", query) == used
    return text(subscription), text(used)


def subscription(limit, access_until=0):
    return (
        '{"object":"billing_subscription","has_payment_method":true,'
        f'"soft_limit_usd":{limit},"hard_limit_usd":{limit},"system_hard_limit_usd":{limit},'
        f'"access_until":{access_until}}}'
    )


def used(total):
    return f'{{"object":"list","total_usage":{total}}}'


@pytest.mark.parametrize(
    ("token", "options", "limit", "total"),
    [
        pytest.param({"total_available": 0}, {}, "0", "0", id="nothing"),
        pytest.param({"total_used": 1}, {}, "2e-06", "0.00019999999999999998", id="one unit"),
        pytest.param({"total_used": 12345, "total_available": 987655}, {}, "2", "2.469", id="the documented token"),
        pytest.param({"total_used": 500_000}, {}, "1", "100", id="a dollar"),
        pytest.param({"total_used": 250_000}, {}, "0.5", "50", id="whole cents have no fraction"),
        pytest.param({"total_used": 35_000}, {}, "0.07", "7.000000000000001", id="the quotient comes first"),
        pytest.param({"total_used": 5, "total_available": -10}, {}, "-1e-05", "0.001", id="overdrawn"),
        pytest.param(
            {"total_used": 3, "unlimited_quota": True}, {}, "100000000", "0.0006000000000000001", id="unlimited"
        ),
        pytest.param({"total_used": 3}, {"quota_per_unit": 3}, "1", "100", id="another unit"),
        pytest.param({"total_used": 1}, {"quota_per_unit": 3}, "0.3333333333333333", "33.33333333333333", id="thirds"),
        pytest.param({"total_used": 12345}, {"display": "TOKENS"}, "12345", "1234500", id="quota units"),
        pytest.param(
            {"total_used": 3, "unlimited_quota": True}, {"display": "TOKENS"}, "100000000", "300", id="unlimited units"
        ),
        pytest.param(
            {"total_used": 2**63 - 1}, {"display": "TOKENS"}, str(2**63 - 1), f"{2**63 - 1}00", id="exact however large"
        ),
        pytest.param(
            {"total_used": (2**53 + 1) * 500_000}, {}, str(2**53 + 1), f"{2**53 + 1}00", id="exact where floats are not"
        ),
    ],
)
def test_amounts(token, options, limit, total):
    app = make_app({"key": Token(**token)}, **options)
    assert billing(app, "key") == (subscription(limit), used(total))


@pytest.mark.parametrize(("expires_at", "access_until"), [(0, 0), (-1, 0), (1_893_456_000, 1_893_456_000)])
def test_until_when_there_is_access(expires_at, access_until):
    app = make_app({"key": Token(expires_at=expires_at)})
    assert billing(app, "key")[0] == subscription("0", access_until)


@given(st.integers(0, 2**63 - 1), st.integers(1, 10**9))
def test_a_total_is_the_nearest_float_or_a_whole_number(units, unit):
    app = make_app({"key": Token(total_used=units)}, quota_per_unit=unit)
    limit = json.loads(billing(app, "key")[0])["hard_limit_usd"]
    assert limit == units / unit or limit * unit == units
    assert type(limit) is int or not limit.is_integer()


@pytest.fixture
def spread(store, clock):
    """Return the key of a token that used 1, 10, 100 and 1000 units on four days, of which the last is today."""
    clock.now = datetime(2026, 9, 1, tzinfo=timezone.utc).timestamp()
    key, _ = store.create(total_available=10**6)
    for units, day in ((1, 1), (10, 2), (100, 29)):
        clock.now = datetime(2026, 9, day, 23, 59, 59, tzinfo=timezone.utc).timestamp()
        store.charge(key, units)
    clock.now = NOW
    store.charge(key, 1000)
    return key


@pytest.mark.parametrize(
    ("query", "units"),
    [
        ("", 1111),
        ("start_date=2026-09-01&end_date=2026-11-24", 1111),
        ("start_date=2020-01-01&end_date=2030-01-01", 1111),
        ("start_date=2026-09-02&end_date=2026-09-29", 110),
        ("start_date=2026-9-2&end_date=2026-9-2", 10),
        ("start_date=2026-10-01&end_date=2026-10-31", 0),
        ("start_date=2026-09-30&end_date=2026-11-25", 1000),
        ("start_date=2026-09-02&end_date=2026-09-01", 0),
        # What is not two dates is not a limit: new-api ignores all of it.
        ("start_date=2026-09-02", 1111),
        ("start_date=2026-09-02&end_date=tomorrow", 1111),
        ("start_date=1725148800&end_date=1725235200", 1111),
        ("start_date=2026-09-31&end_date=2026-11-24", 1111),
    ],
)
def test_what_was_used_on_some_days(store, spread, query, units):
    app = make_app(store, display="TOKENS")
    assert billing(app, spread, query)[1] == used(str(units * 100) if units else "0")


def test_days_around_everything_have_what_was_used_before_days_were_kept(store, clock):
    key, _ = store.create(total_available=100)
    # As of a database that is older than usage by day.
    record = next(store.records())
    with MemoryTokenStore(clock=clock) as other:
        other.restore([type(record)(token=Token(total_used=77, created_at=NOW - 10**6), digest=record.digest)])
        app = make_app(other, display="TOKENS")
        assert billing(app, key, "start_date=2026-11-01&end_date=2026-11-30")[1] == used("7700")
        assert billing(app, key, "start_date=2026-11-20&end_date=2026-11-30")[1] == used("0")


def test_dates_without_days_are_not_a_limit():
    app = make_app({"key": Token(total_used=500_000, id=1)})
    assert billing(app, "key", "start_date=2026-09-02&end_date=2026-09-01")[1] == used("100")


def test_the_balance(store, app):
    key, _ = store.create(total_available=1_000_000)
    store.charge(key, 300_000)
    limit, total = (json.loads(body) for body in billing(app, key))
    assert limit["hard_limit_usd"] - total["total_usage"] / 100 == pytest.approx(1.4)


# --- Point 34: the account


def test_the_key_stands_for_its_account(store, app):
    key, _ = store.create(name="caf\u00e9", total_available=100)
    store.charge(key, 30)
    store.settle(store.reserve(key, 5), 0)
    expected = (
        '{"success":true,"message":"","data":{"id":1,"username":"caf\u00e9","display_name":"caf\u00e9","role":1,'
        '"status":1,"group":"default","quota":70,"used_quota":30,"request_count":2}}'
    )
    assert text(get(app, key, ACCOUNT)) == expected
    assert text(get(app, key, ACCOUNT, HTTP_NEW_API_USER="77")) == expected


def test_an_account_of_a_store_that_knows_neither_ids_nor_requests():
    data = get(make_app({"key": Token(name="One", total_used=3)}), "key", ACCOUNT).json["data"]
    assert (data["id"], data["used_quota"], data["request_count"]) == (0, 3, 0)


# --- Point 35: refusals


def openai(message):
    body = {"error": {"message": message, "type": "new_api_error", "param": "", "code": ""}}
    return json.dumps(body, separators=(",", ":")).encode()


@pytest.fixture
def disabled(store):
    key, token = store.create()
    store.update(token.id, enabled=False)
    return key


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic x", "Bearer a,b", "Bearer unknown", "disabled"])
@pytest.mark.parametrize("path", WITH_KEY)
def test_a_refusal_is_that_of_the_endpoint(app, disabled, authorization, path):
    if authorization == "disabled":
        authorization = f"Bearer {disabled}"
    usage = ask(app, authorization=authorization)
    refused = ask(app, path=path, authorization=authorization, QUERY_STRING="p=1&start_date=x")
    assert usage.status == 401
    if path in BILLING:
        assert refused.body == openai(usage.json["message"])
        length = ("Content-Length", str(len(refused.body)))
        usage = usage._replace(body=refused.body, headers=[length, *usage.headers[1:]])
    assert refused == usage


@pytest.mark.parametrize("path", BILLING)
def test_another_method_is_refused_as_openai_does(app, path):
    answer = ask(app, "DELETE", path)
    assert (answer.status, answer.body) == (405, openai("Method Not Allowed"))


def test_failures_are_counted_over_all_endpoints(store):
    app = UsageMiddleware(wrapped, store, new_api=NewAPI(), throttle="5 per 30 days")
    first = [ask(app, path=path, authorization="Bearer wrong").status for path in (PATH, *WITH_KEY[:4])]
    assert first == [401] * 5
    for path in (PATH, PATH + "/days", *WITH_KEY):
        answer = ask(app, path=path, authorization="Bearer wrong")
        assert answer.status == 429
        assert int(answer.header("Retry-After")) > 0
        if path in BILLING:
            assert answer.body == openai("Too Many Requests")
    assert ask(app, path=STATUS).status == 200


@pytest.mark.parametrize("fields", [{"expires_at": 1}, {"total_used": 5, "total_available": -5}])
@pytest.mark.parametrize("path", WITH_KEY)
def test_a_token_that_stopped_still_tells_why(path, fields):
    assert get(make_app({"key": Token(**fields)}), "key", path).status == 200


class Failing(MemoryTokenStore):
    """A store that has only keys."""

    def log(self, *args, **options):
        raise StoreError("the disk is full")

    count_requests = usage_by_day = log


@pytest.mark.parametrize("path", [LOG, ACCOUNT, USED])
def test_a_store_that_fails_is_a_503(caplog, path):
    with Failing() as store:
        key, _ = store.create()
        answer = get(make_app(store), key, path, "start_date=2026-09-02&end_date=2026-09-01")
    assert answer.status == 503
    assert int(answer.header("Retry-After")) > 0
    assert answer.body == (openai("Service Unavailable") if path == USED else ask_unavailable())
    assert "Failing failed: StoreError: the disk is full" in caplog.text
    assert key.removeprefix("sk-") not in caplog.text


def ask_unavailable():
    return b'{"success":false,"message":"Service Unavailable"}'


def test_a_store_of_another_kind_may_keep_a_log():
    """What a store brings for it is a method; it need not be a ledger."""
    from usage_middleware import LogEntry

    class Legacy:
        def get(self, key):
            return Token(id=7)

        def log(self, token_id, *, kinds, since, until, offset, size):
            asked.append((token_id, list(kinds), since, offset, size))
            return [LogEntry("charge", NOW, 5, seconds=3, is_stream=True)]

    asked = []
    assert not isinstance(Legacy(), QuotaStore)
    (row,) = rows(make_app(Legacy()), "key", "p=3&page_size=7&type=2&start_timestamp=9")
    assert asked == [(7, ["charge"], 9, 14, 7)]
    assert (row["id"], row["quota"], row["use_time"], row["is_stream"], row["token_id"]) == (15, 5, 3, True, 7)
