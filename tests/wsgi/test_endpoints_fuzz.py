"""Hostile requests to the other endpoints: they are refused like those to the usage endpoint, and read as the contract
says.

What the contract says of a query is written here once more, in another way, and shares nothing with the package.
"""

import json
import random
import re
from datetime import date, datetime, timedelta, timezone
from urllib.parse import quote, quote_plus, unquote_plus

import pytest
from client import PATH, call, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st

from usage_middleware import MemoryTokenStore, NewAPI, UsageMiddleware

DAYS = PATH + "/days"
LOG = "/api/log/token"
USED = "/dashboard/billing/usage"
OTHERS = (DAYS, DAYS + "/", LOG, "/api/user/self", "/dashboard/billing/subscription", f"/v1{USED}/")
TODAY = date(2026, 11, 24)
NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc).timestamp()
DAY = 24 * 3600
SEED = 20_271_015


@pytest.fixture(scope="module")
def served():
    """Yield the middleware, and what its one token did: (time, kind, units) of each charge and refund, the newest
    first."""
    clock = [NOW - 500 * DAY]
    chance = random.Random(SEED)
    made = []
    with MemoryTokenStore(clock=lambda: clock[0]) as store:
        store.create(key="key", total_available=10**9)
        _, token = store.create(key="disabled")
        store.update(token.id, enabled=False)
        while clock[0] < NOW:
            units = chance.randrange(1000)
            charge = store.reserve("key", units)
            store.settle(charge, units)
            made.append((clock[0], "charge", units))
            if chance.random() < 0.2:
                store.refund(charge)
                made.append((clock[0], "refund", units))
            clock[0] += chance.choice([60, 3600, DAY, 3 * DAY])
        clock[0] = NOW
        yield UsageMiddleware(wrapped, store, new_api=NewAPI(display="TOKENS")), made[::-1]


def ask(app, path, query="", method="GET", **variables):
    return call(app, {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, **variables})


# --- What the contract says


def parsed(query):
    """Return the parameters of a query, each with its values."""
    found = {}
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            found.setdefault(unquote_plus(name), []).append(unquote_plus(value))
    return found


def is_digits(text):
    return text != "" and all(character in "0123456789" for character in text)


def as_date(text):
    parts = text.split("-")
    if [len(part) for part in parts] not in ([4, 2, 2], [4, 1, 2], [4, 2, 1], [4, 1, 1]):
        return None
    if not all(is_digits(part) for part in parts):
        return None
    year, month, day = map(int, parts)
    try:
        return date(year, month, day)
    except ValueError:
        return None


def days_of(query):
    """Return the first and the last day that ``/days`` is asked for; ``None``: it is refused."""
    found = parsed(query)
    if any(len(values) > 1 for values in found.values()):
        return None
    found = {name: value for name, (value,) in found.items()}
    if not found:
        return TODAY - timedelta(29), TODAY
    if found.keys() == {"days"}:
        days = found["days"]
        if is_digits(days) and len(days) < 19 and 1 <= int(days) <= 366:
            return TODAY - timedelta(int(days) - 1), TODAY
        return None
    if found.keys() == {"start_date", "end_date"}:
        first, last = as_date(found["start_date"]), as_date(found["end_date"])
        if first and last and 0 <= (last - first).days < 366:
            return first, last
    return None


def number(found, name):
    """Return a parameter of the log: 0 if it is absent or not a number."""
    text = found.get(name, [""])[0]
    return int(text) if is_digits(text) and len(text) < 19 else 0


def rows_of(query, made):
    """Return the rows that the log has for a query: each one's number, second, kind and units."""
    found = parsed(query)
    kind = number(found, "type")
    since, until = number(found, "start_timestamp"), number(found, "end_timestamp")
    rows = [
        (int(at), what, units)
        for at, what, units in made
        if kind in (0, {"charge": 2, "refund": 6}[what]) and at >= since and (not until or int(at) <= until)
    ]
    numbered = [(place, *row) for place, row in enumerate(rows, 1)]
    if "p" not in found:
        return numbered[:1000]
    size = min(number(found, "page_size") or 100, 100)
    first = (max(number(found, "p"), 1) - 1) * size
    return numbered[first : first + size]


def used_of(query, made):
    """Return what was used on the days of a query, a refund booked on the day of its charge, which here is its own."""
    found = parsed(query)
    first, last = (as_date(found.get(name, [""])[0]) for name in ("start_date", "end_date"))
    days = (datetime.fromtimestamp(at, timezone.utc).date() for at, _, _ in made)
    is_limited = first is not None and last is not None
    return sum(
        units if what == "charge" else -units
        for day, (_, what, units) in zip(days, made, strict=True)
        if not is_limited or first <= day <= last
    )


# --- Queries that are nearly right

dates = st.one_of(
    st.dates(date(2025, 1, 1), date(2027, 12, 31)).map(str),
    st.dates().map(str),
    st.builds(lambda day: f"{day.year}-{day.month}-{day.day}", st.dates(date(2026, 1, 1), date(2026, 12, 31))),
    st.from_regex(r"[0-9]{1,5}-[0-9]{1,3}-[0-9]{1,3}", fullmatch=True),
)
numbers = st.one_of(
    st.integers(-1, 370).map(str),
    st.integers(int(NOW) - 600 * DAY, int(NOW) + DAY).map(str),
    st.integers(0, 10**20).map(str),
    st.sampled_from(
        ["", "0", "2", "6", "7.0", "+7", " 7", "7 ", "0x7", "\uff17", "\u0667", "1e2", "1_0", "007", "NaN"]
    ),
)
values = st.one_of(numbers, dates, st.text(max_size=8))
names = st.sampled_from(
    ["days", "start_date", "end_date", "type", "p", "page_size", "start_timestamp", "end_timestamp"]
)
encoders = st.sampled_from([quote, quote_plus, lambda text: "".join(f"%{byte:02x}" for byte in text.encode())])


@st.composite
def queries(draw, names):
    parts = draw(st.lists(st.tuples(names, values), max_size=4))
    encode = draw(encoders)
    query = "&".join(f"{name}={encode(value)}" for name, value in parts)
    return draw(st.sampled_from([query, query, query, query + "&", "&" + query]))


@st.composite
def likely(draw, *names):
    """Return every name at most once, with a value that is likely to be right."""
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    kinds = {"days": numbers, "start_date": dates, "end_date": dates}
    return "&".join(f"{name}={quote(draw(kinds.get(name, numbers)))}" for name in chosen)


def fuzz(strategy, full, quick=150):
    def decorate(check):
        settings_ = settings(max_examples=20_000 if full else quick, deadline=None, database=None, derandomize=not full)
        settings_(given(strategy)(check))()

    return decorate


def test_any_query_of_days(served, full):
    app, made = served
    pair = st.builds(lambda first, last: f"start_date={first}&end_date={last}", dates, dates)

    @fuzz(st.one_of(queries(names), likely("days", "start_date", "end_date"), pair), full)
    def check(query):
        answer = ask(app, DAYS, query, HTTP_AUTHORIZATION="Bearer key")
        expected = days_of(query)
        if expected is None:
            assert answer.status == 400
            assert re.search("days|start_date|end_date", answer.json["message"])
            return
        first, last = expected
        assert answer.status == 200
        data = answer.json["data"]
        assert (data["start_date"], data["end_date"]) == (str(first), str(last))
        assert data["used"] == used_of(f"start_date={first}&end_date={last}", made)
        assert data["used_today"] == used_of(f"start_date={TODAY}&end_date={TODAY}", made)


def test_any_query_of_the_log(served, full):
    app, made = served

    @fuzz(st.one_of(queries(names), likely("type", "p", "page_size", "start_timestamp", "end_timestamp")), full)
    def check(query):
        answer = ask(app, LOG, query, HTTP_AUTHORIZATION="Bearer key")
        assert answer.status == 200
        kinds = {2: "charge", 6: "refund"}
        rows = [(row["id"], row["created_at"], kinds[row["type"]], row["quota"]) for row in answer.json["data"]]
        assert rows == rows_of(query, made)


def test_any_query_of_billing(served, full):
    app, made = served

    @fuzz(st.one_of(queries(names), likely("start_date", "end_date")), full)
    def check(query):
        answer = ask(app, USED, query, HTTP_AUTHORIZATION="Bearer key")
        assert answer.status == 200
        assert answer.json["total_usage"] == used_of(query, made) * 100


# --- Requests that are refused, and environments that no server should send

native = st.one_of(st.text(st.characters(max_codepoint=255), max_size=30), st.text(max_size=20))
schemes = st.sampled_from(["Bearer", "Bearer", "bearer", "Basic", ""])
keys = st.one_of(st.sampled_from(["key", "sk-key", "unknown", "disabled", "two keys", "k" * 513, "a,b"]), native)
authorizations = st.one_of(native, st.builds(lambda scheme, key: f"{scheme} {key}", schemes, keys))
methods = st.sampled_from(["GET", "GET", "HEAD", "OPTIONS", "POST", "get", ""])


def test_a_refusal_is_that_of_the_usage_endpoint_whatever_is_sent(served, full):
    app, _ = served
    requests = st.fixed_dictionaries(
        {"REQUEST_METHOD": methods, "QUERY_STRING": st.one_of(queries(names), native)},
        optional={
            "HTTP_AUTHORIZATION": authorizations,
            "HTTP_ORIGIN": native,
            "HTTP_ACCESS_CONTROL_REQUEST_HEADERS": native,
            "HTTP_NEW_API_USER": native,
        },
    )

    @fuzz(requests, full, quick=60)
    def check(variables):
        usage = call(app, {**variables, "PATH_INFO": PATH})
        for path in OTHERS:
            answer = call(app, {**variables, "PATH_INFO": path})
            if usage.status == 200:
                assert answer.status == (
                    400 if path.startswith(DAYS) and days_of(variables["QUERY_STRING"]) is None else 200
                )
            elif "/billing/" in path and usage.status != 204:
                assert answer.status == usage.status
                if answer.body:
                    message = json.loads(answer.body)["error"]["message"]
                    assert message == usage.json["message"]
                unsized = [
                    [header for header in one.headers if header[0] != "Content-Length"] for one in (answer, usage)
                ]
                assert unsized[0] == unsized[1]
            else:
                assert answer == usage
