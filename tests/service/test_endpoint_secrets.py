"""No output shows a key that is sent to an endpoint, nor a key in a place where it does not belong."""

import pytest
from canary import HEADERS, KEY, OTHER, QUOTING, STATES, Watch, assert_no_trace, put
from client import PATH, call, environ, wrapped

from usage_middleware import MemoryTokenStore, NewAPI, SQLiteTokenStore, UsageMiddleware, bearer_key

DAYS = PATH + "/days"
LOG = "/api/log/token"
ACCOUNT = "/api/user/self"
BILLING = ("/dashboard/billing/subscription", "/v1/dashboard/billing/usage")
PATHS = (DAYS, DAYS + "/", LOG, ACCOUNT, *BILLING)
# A key where none belongs: as the value of each parameter, and as the name of one.
QUERIES = [
    f"key={KEY}",
    f"{KEY}=1",
    f"days={KEY}",
    f"start_date={KEY}&end_date={OTHER}",
    f"type={KEY}&p={OTHER}&page_size={KEY}",
    "start_date=2026-01-01&end_date=2026-01-02",
]


@pytest.fixture
def watch(capfd):
    with Watch(capfd) as watch:
        yield watch


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    with MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db") as store:
        yield store


def ask(app, path, authorization, method="GET", query=""):
    asked = environ(
        method,
        path,
        HTTP_AUTHORIZATION=authorization,
        QUERY_STRING=query,
        HTTP_X_API_KEY=KEY,
        HTTP_COOKIE=f"key={KEY}",
        HTTP_ORIGIN=f"https://{KEY}.example",
        HTTP_NEW_API_USER=KEY,
    )
    answer = call(app, asked)
    assert_no_trace("an answer", [answer.status, answer.reason, answer.headers, answer.body])
    return answer.status


def make_app(store):
    app = UsageMiddleware(wrapped, store, new_api=NewAPI())
    assert_no_trace("the middleware", [repr(app), str(app), app.__dict__])
    return app


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("authorization", HEADERS)
def test_no_answer_and_no_log_has_it(watch, store, state, authorization):
    put(store, state)
    app = make_app(store)
    usage = ask(app, PATH, authorization)
    is_known = bearer_key({"HTTP_AUTHORIZATION": authorization}) is not None and state in ("valid", "expired")
    assert usage == (200 if is_known else 401)
    for path in PATHS:
        for method, status in (("GET", usage), ("HEAD", usage), ("OPTIONS", 204), (KEY, 405)):
            assert ask(app, path, authorization, method) == status
    assert ask(app, "/api/status", authorization) == 200


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", "Bearer unknown", ""])
def test_a_key_in_the_query_is_not_returned(watch, store, query, authorization):
    put(store, "valid")
    app = make_app(store)
    for path in (*PATHS, "/api/status", PATH):
        assert ask(app, path, authorization, query=query) in (200, 400, 401)


RAISING = [case for case in QUOTING if isinstance(case.values[0](KEY), BaseException)]


class FailingLater(MemoryTokenStore):
    """A store that knows its keys, and fails at every other call with its own message."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def fail(self, *arguments, **options):
        try:
            raise LookupError(f"no row for {KEY}")
        except LookupError as error:
            found = self._make(KEY)
            found.key = KEY
            raise found from error

    usage_by_day = log = count_requests = fail


@pytest.mark.parametrize("make", RAISING)
@pytest.mark.parametrize("prefix", ["", "sk-"])
def test_what_a_store_raises_is_logged_without_it(watch, make, prefix):
    with FailingLater(make) as store:
        put(store, "valid")
        app = make_app(store)
        for path, query in ((DAYS, ""), (LOG, ""), (ACCOUNT, ""), ("/dashboard/billing/usage", QUERIES[-1])):
            assert ask(app, path, f"Bearer {prefix}{KEY}", query=query) == 503
    assert watch.log.count("usage_middleware FailingLater failed: ") == 4
