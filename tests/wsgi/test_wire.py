"""The wire contract, line by line: what a client of ``/api/usage/token`` sees, from each kind of store."""

import json
import re

import pytest
from client import PATH, ask, call, environ, wrapped

from usage_middleware import StoreError, Token, UsageMiddleware

KEY = "k3y-with-a-dash"
BEARER = f"Bearer {KEY}"
MALFORMED = 'Bearer error="invalid_token"'


class Recorder(dict):
    """A dict as a store that notes what it was asked."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def get(self, key):
        self.asked.append(key)
        return super().get(key)


@pytest.fixture
def app(host):
    return UsageMiddleware(wrapped, host.store)


def refusal(message):
    return json.dumps({"success": False, "message": message}, separators=(",", ":")).encode()


# --- Which requests


@pytest.mark.parametrize("path", [PATH, PATH + "/"])
@pytest.mark.parametrize("query", ["", "key=other&token=x", "%00"])
def test_both_paths_are_answered_alike_and_the_query_is_ignored(host, app, path, query):
    host.add(KEY, name="One")
    answer = ask(app, path=path, authorization=BEARER, QUERY_STRING=query)
    assert answer.status == 200
    assert answer == ask(app, authorization=BEARER)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/api/usage/token//",
        "//api/usage/token",
        "/api/usage/token/x",
        "/api/usage/tokens",
        "/API/usage/token",
        "/api/usage/%74oken",
        "/api/usage/token\x00",
        "/api/usage/token\xa3",
        "/\xa3",
    ],
)
def test_any_other_path_is_not(app, path):
    assert ask(app, path=path, authorization=BEARER).body == b"the wrapped application"


def test_the_path_is_below_the_prefix_of_a_mounted_application(app):
    assert ask(app, SCRIPT_NAME="/prefix").status == 401
    assert ask(app, path="", SCRIPT_NAME=PATH).status == 404


@pytest.mark.parametrize(
    ("configured", "raw"),
    [
        pytest.param("/quota/X", "/quota/X", id="plain"),
        pytest.param("/quota/", "/quota", id="a slash at its end makes no difference"),
        pytest.param("/", "", id="the root of a mounted application"),
        pytest.param("/caf\u00e9", "/caf\u00c3\u00a9", id="UTF-8, as PATH_INFO has it"),
    ],
)
def test_the_path_is_configurable(configured, raw):
    app = UsageMiddleware(wrapped, {}, path=configured)
    assert ask(app, path=raw).status == 401
    assert ask(app, path=raw + "/").status == 401
    assert ask(app, path=PATH).status == 404


def test_path_info_may_be_absent():
    def answer(app):
        return b"".join(app({"REQUEST_METHOD": "GET"}, lambda *_: None))

    assert answer(UsageMiddleware(wrapped, {})) == b"the wrapped application"
    assert answer(UsageMiddleware(wrapped, {}, path="/")) == refusal("No Authorization header")


@pytest.mark.parametrize("authorization", [None, BEARER, "Bearer other", "nonsense"])
def test_head_is_get_without_its_body(host, app, authorization):
    host.add(KEY, name="caf\u00e9")
    get = ask(app, authorization=authorization)
    assert int(get.header("Content-Length")) == len(get.body) > 0
    assert ask(app, "HEAD", authorization=authorization) == get._replace(body=b"")


def test_options_needs_no_authorization(app):
    answer = ask(app, "OPTIONS")
    assert (answer.status, answer.reason, answer.body) == (204, "No Content", b"")
    assert answer.header("Allow") == "GET, HEAD, OPTIONS"
    assert answer.header("Access-Control-Allow-Headers") == "Authorization, Content-Type"
    # RFC 9110 section 8.6: a 204 has no Content-Length.
    assert answer.header("Content-Length") is None
    assert answer.header("Content-Type") is None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "get", "BREW"])
def test_another_method_is_refused(host, app, method):
    host.add(KEY)
    answer = call(app, environ(method, HTTP_AUTHORIZATION=BEARER))
    assert (answer.status, answer.reason) == (405, "Method Not Allowed")
    assert answer.body == refusal("Method Not Allowed")
    assert answer.header("Allow") == "GET, HEAD, OPTIONS"
    assert answer.header("WWW-Authenticate") is None


# --- Authorization


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        f"BEARER {KEY}",
        f"bEaReR {KEY}",
        f"Bearer    {KEY}",
        f"  Bearer {KEY}\t ",
        f"Bearer sk-{KEY}",
        f"\tbearer  sk-{KEY} ",
    ],
)
def test_the_key_is_found(host, app, value):
    host.add(KEY, name="Found")
    assert ask(app, authorization=value).json["data"]["name"] == "Found"


@pytest.mark.parametrize("value", [None, "", " ", "\t \t"])
def test_no_header(host, app, value):
    host.add(KEY)
    answer = ask(app, authorization=value)
    assert (answer.status, answer.reason) == (401, "Unauthorized")
    assert answer.body == refusal("No Authorization header")
    assert answer.header("WWW-Authenticate") == "Bearer"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("Bearer", id="no key"),
        pytest.param("Bearer ", id="no key but a space"),
        pytest.param("Bearer sk-", id="nothing left without the prefix"),
        pytest.param("Bearer sk-sk-", id="nothing left without two prefixes"),
        pytest.param(f"Bearer{KEY}", id="no space"),
        pytest.param(f"Bearer\t{KEY}", id="a tab for the space"),
        pytest.param(f"Bearer {KEY} {KEY}", id="two keys"),
        pytest.param(f"Bearer {KEY}, Bearer {KEY}", id="two headers, joined"),
        pytest.param(f"Bearer {KEY},", id="a comma"),
        pytest.param(f"{KEY}", id="no scheme"),
        pytest.param(f"Basic {KEY}", id="another scheme"),
        pytest.param(f"Bearerish {KEY}", id="a scheme that only begins alike"),
        pytest.param(f"X-Bearer {KEY}", id="a scheme that only ends alike"),
        pytest.param(f"Bearer {KEY}\x00", id="NUL"),
        pytest.param(f"Bearer {KEY}\n", id="a line feed"),
        pytest.param(f"Bearer {KEY}\x7f", id="DEL"),
        pytest.param(f"Bearer {KEY}\x85", id="a control character of Latin-1"),
        pytest.param(f"Bearer {KEY}\xa0", id="a no-break space"),
        pytest.param(f"Bearer {KEY}\xe9", id="Latin-1"),
        pytest.param(f"Bearer {KEY}\xc3\xa9", id="UTF-8"),
        pytest.param("Bearer " + "k" * 513, id="513 characters"),
        pytest.param("Bearer sk-" + "k" * 510, id="513 characters with the prefix"),
        pytest.param("Bearer " + "k" * 60_000, id="60 kB"),
        pytest.param("Bearer" + " " * 60_000, id="60 kB of spaces"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_malformed_header_never_reaches_the_store(value, method):
    store = Recorder({KEY: Token()})
    answer = ask(UsageMiddleware(wrapped, store), method, authorization=value)
    assert store.asked == []
    assert (answer.status, answer.reason) == (401, "Unauthorized")
    assert answer.body == (refusal("Invalid Bearer token") if method == "GET" else b"")
    assert answer.header("WWW-Authenticate") == MALFORMED


@pytest.mark.parametrize(
    ("written", "stripped"),
    [
        pytest.param("X", "X", id="one character"),
        pytest.param("sk-k", "k", id="one character behind the prefix"),
        pytest.param("k" * 512, "k" * 512, id="512 characters"),
        pytest.param("sk-" + "k" * 509, "k" * 509, id="512 characters with the prefix"),
        pytest.param("sk-sk-k", "k", id="every prefix"),
        pytest.param("SK-k", "SK-k", id="the prefix has a case"),
        pytest.param("a-b-c", "a-b-c", id="a dash is part of the key"),
        pytest.param("!\"#$%&'()*+-./:;<=>?@[\\]^_`{|}~", "!\"#$%&'()*+-./:;<=>?@[\\]^_`{|}~", id="any visible ASCII"),
        pytest.param("a=b==", "a=b==", id="base64"),
    ],
)
def test_stores_see_the_key_without_its_prefix(host, written, stripped):
    host.add(stripped, name="Found")
    assert ask(UsageMiddleware(wrapped, host.store), authorization=f"Bearer {written}").status == 200
    store = Recorder()
    ask(UsageMiddleware(wrapped, store), authorization=f"Bearer {written}")
    assert store.asked == [stripped]


def test_only_the_token_of_the_key_is_described(host, app):
    for name in ("one", "two", "three"):
        host.add(f"{KEY}-{name}", name=name)
    for name in ("two", "one", "three"):
        assert ask(app, authorization=f"{BEARER}-{name}").json["data"]["name"] == name
    assert ask(app, authorization=BEARER).status == 401
    assert ask(app, authorization=f"{BEARER}-ONE").status == 401


def test_unknown_deleted_and_disabled_keys_cannot_be_told_apart(host, app):
    host.add("disabled", name="Secret name", enabled=False)
    host.add("deleted")
    if isinstance(host.store, dict):
        del host.store["deleted"]
    else:
        host.store.delete(host.store.get("deleted").id)
    unknown = ask(app, authorization="Bearer unknown")
    assert (unknown.status, unknown.reason) == (401, "Unauthorized")
    assert unknown.body == refusal("token not found")
    assert unknown.header("WWW-Authenticate") == MALFORMED
    assert ask(app, authorization="Bearer disabled") == unknown
    assert ask(app, authorization="Bearer deleted") == unknown


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"expires_at": 1}, id="expired"),
        pytest.param({"total_used": 10, "total_available": 0}, id="exhausted"),
        pytest.param({"total_used": 10, "total_available": -5}, id="overdrawn"),
    ],
)
def test_a_token_that_stopped_still_tells_why(host, app, fields):
    host.add(KEY, **fields)
    data = ask(app, authorization=BEARER).json["data"]
    assert {field: data[field] for field in fields} == fields


# --- Success


def test_the_documented_example_to_the_byte(host, app):
    host.add(
        KEY,
        name="Default Token",
        total_available=987655,
        total_used=12345,
        model_limits={"gpt-4o-mini": 500000},
    )
    answer = ask(app, authorization=BEARER)
    assert (answer.status, answer.reason) == (200, "OK")
    assert answer.body == (
        b'{"code":true,"message":"ok","data":{"object":"token_usage","name":"Default Token",'
        b'"total_granted":1000000,"total_used":12345,"total_available":987655,"unlimited_quota":false,'
        b'"model_limits":{"gpt-4o-mini":500000},"model_limits_enabled":false,"expires_at":0}}'
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, {"name": "", "model_limits": {}, "expires_at": 0}, id="nothing known"),
        pytest.param({"total_available": 2**63 - 1}, {"total_granted": 2**63 - 1}, id="exact where floats are not"),
        pytest.param(
            {"total_available": -20, "total_used": 120},
            {"total_granted": 100, "total_available": -20},
            id="overdrawn is not clamped",
        ),
        pytest.param({"unlimited_quota": True}, {"unlimited_quota": True}, id="unlimited"),
        pytest.param({"model_limits_enabled": True}, {"model_limits_enabled": True}, id="limits enabled"),
        pytest.param(
            {"model_limits": {"a": True, "b": 0, "c": 1}, "model_limits_enabled": False},
            {"model_limits": {"a": True, "b": 0, "c": 1}, "model_limits_enabled": False},
            id="limits are sent while not enabled",
        ),
        pytest.param({"expires_at": 1893456000}, {"expires_at": 1893456000}, id="expires"),
        pytest.param({"expires_at": -1}, {"expires_at": 0}, id="-1 is never"),
        pytest.param(
            {"name": 'q"uo\\te</script>\n\t\x1b\u2028'}, {"name": 'q"uo\\te</script>\n\t\x1b\u2028'}, id="hostile name"
        ),
    ],
)
def test_values(host, app, fields, expected):
    host.add(KEY, **fields)
    data = ask(app, authorization=BEARER).json["data"]
    # Compared as JSON text, where true is not 1 and 1 is not 1.0.
    assert {name: json.dumps(data[name]) for name in expected} == {k: json.dumps(v) for k, v in expected.items()}
    assert data["total_granted"] == data["total_used"] + data["total_available"]


def test_a_success_has_exactly_these_keys_in_this_order(host, app):
    host.add(KEY)
    answer = ask(app, authorization=BEARER).json
    assert list(answer) == ["code", "message", "data"]
    assert answer["code"] is True
    assert answer["message"] == "ok"
    assert list(answer["data"]) == [
        "object",
        "name",
        "total_granted",
        "total_used",
        "total_available",
        "unlimited_quota",
        "model_limits",
        "model_limits_enabled",
        "expires_at",
    ]


# --- Bytes and headers


def test_bodies_are_compact_utf_8(host, app):
    host.add(KEY, name="caf\u00e9 \u4ee4\u724c \U0001f511", model_limits={"\u6a21\u578b": 1})
    answer = ask(app, authorization=BEARER)
    assert "caf\u00e9 \u4ee4\u724c \U0001f511".encode() in answer.body
    assert answer.body == json.dumps(answer.json, ensure_ascii=False, separators=(",", ":")).encode()
    assert int(answer.header("Content-Length")) == len(answer.body)


class Broken:
    def get(self, key):
        raise StoreError("broken")


EVERY_ANSWER = [
    pytest.param("GET", BEARER, 200, id="200"),
    pytest.param("HEAD", BEARER, 200, id="HEAD"),
    pytest.param("OPTIONS", None, 204, id="204"),
    pytest.param("GET", None, 401, id="no header"),
    pytest.param("GET", "Basic x", 401, id="malformed"),
    pytest.param("GET", "Bearer unknown", 401, id="unknown"),
    pytest.param("POST", None, 405, id="405"),
    pytest.param("GET", "Bearer broken", 503, id="503"),
]


HEADERS = {
    "Access-Control-Allow-Headers",
    "Access-Control-Allow-Methods",
    "Access-Control-Allow-Origin",
    "Access-Control-Expose-Headers",
    "Access-Control-Max-Age",
    "Allow",
    "Cache-Control",
    "Content-Length",
    "Content-Type",
    "Retry-After",
    "WWW-Authenticate",
    "X-Content-Type-Options",
}


class OneTokenOrBroken:
    def get(self, key):
        if key == "broken":
            raise StoreError("broken")
        return Token() if key == KEY else None


@pytest.mark.parametrize(("method", "authorization", "status"), EVERY_ANSWER)
def test_every_answer_has_these_headers(method, authorization, status):
    answer = ask(UsageMiddleware(wrapped, OneTokenOrBroken()), method, authorization=authorization)
    assert answer.status == status
    assert answer.header("Cache-Control") == "no-store"
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Access-Control-Allow-Origin") == "*"
    assert answer.header("Access-Control-Allow-Credentials") is None
    if answer.body:
        assert answer.header("Content-Type") == "application/json; charset=utf-8"
        assert int(answer.header("Content-Length")) == len(answer.body)
        assert not answer.body.startswith(b"\xef\xbb\xbf")
        assert not answer.body.endswith(b"\n")
    if status >= 400:
        assert list(answer.json) == ["success", "message"]
        assert answer.json["success"] is False
    # No client may mind their case (RFC 9110 section 5.1); some that are written by hand do.
    assert {name for name, _ in answer.headers} <= HEADERS
    for name, value in answer.headers:
        assert type(name) is str
        assert type(value) is str
        value.encode("latin-1")
        assert not re.search(r"[\x00-\x1f\x7f]", name + value)
        # PEP 3333, "Other HTTP Features"; RFC 9110 section 7.6.1
        assert name.lower() not in {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


def test_the_server_may_change_the_headers_it_is_given():
    app = UsageMiddleware(wrapped, {})
    for _ in range(2):
        given = []
        app({"REQUEST_METHOD": "GET", "PATH_INFO": PATH}, lambda status, headers, given=given: given.append(headers))
        assert type(given[0]) is list
        assert ("X-Added", "by the server") not in given[0]
        given[0].append(("X-Added", "by the server"))


# --- The store fails


class Returns:
    def __init__(self, value):
        self.value = value

    def get(self, key):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(StoreError("the database is gone"), id="StoreError"),
        pytest.param(RuntimeError("boom"), id="any exception"),
        pytest.param(KeyError(KEY), id="an exception that quotes the key"),
        pytest.param({"name": "a dict"}, id="no token"),
        pytest.param(False, id="False is not None"),
        pytest.param(Token(total_used=10**5000), id="a token that cannot be written"),
    ],
)
def test_a_failing_store_is_a_503(value, caplog):
    answer = ask(UsageMiddleware(wrapped, Returns(value)), authorization=BEARER)
    assert (answer.status, answer.reason) == (503, "Service Unavailable")
    assert answer.body == refusal("Service Unavailable")
    assert int(answer.header("Retry-After")) > 0
    assert answer.header("Access-Control-Expose-Headers") == "Retry-After"
    assert answer.header("WWW-Authenticate") is None
    (record,) = caplog.records
    assert record.name == "usage_middleware"
    assert record.levelname == "ERROR"
    assert "Returns" in record.getMessage()
    assert KEY not in caplog.text


def test_the_log_says_what_a_store_says_of_itself(caplog):
    ask(UsageMiddleware(wrapped, Returns(StoreError("tokens.db is a directory"))), authorization=BEARER)
    assert "tokens.db is a directory" in caplog.text


def test_the_log_says_what_a_store_returned(caplog):
    ask(UsageMiddleware(wrapped, Returns({"name": "a dict"})), authorization=BEARER)
    assert "Returns failed: StoreError: get() returned dict" in caplog.text


def test_the_log_shows_where_but_never_the_key(caplog):
    class Quotes:
        def get(self, key):
            return self.find(key)

        def find(self, key):
            try:
                raise LookupError(f"no row for {key}")
            except LookupError as error:
                raise StoreError(f"look-up of {key} failed") from error

    ask(UsageMiddleware(wrapped, Quotes()), authorization=BEARER)
    first, *places = caplog.records[0].getMessage().splitlines()
    assert first == "Quotes failed: StoreError"
    assert re.fullmatch(r"  .+\btest_wire\.py:\d+ in get", places[-2])
    assert re.fullmatch(r"  .+\btest_wire\.py:\d+ in find", places[-1])
    assert KEY not in caplog.text


def test_the_text_of_a_foreign_exception_is_not_logged(caplog):
    # It may quote the key in a form that is not recognised.
    ask(UsageMiddleware(wrapped, Returns(RuntimeError(f"no row for {KEY[::-1]}"))), authorization=BEARER)
    assert "Returns failed: RuntimeError" in caplog.text
    assert KEY[::-1] not in caplog.text


def test_an_exception_that_is_not_the_store_s_passes_on():
    class Interrupted:
        def get(self, key):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UsageMiddleware(wrapped, Interrupted())(
            {"REQUEST_METHOD": "GET", "PATH_INFO": PATH, "HTTP_AUTHORIZATION": BEARER}, lambda *_: None
        )


# --- CORS

LISTED = ["https://app.example", "http://localhost:3000"]


def cors(answer):
    return {name: value for name, value in answer.headers if name.startswith("Access-Control-") or name == "Vary"}


def test_a_preflight_is_told_what_is_allowed():
    answer = ask(
        UsageMiddleware(wrapped, {}),
        "OPTIONS",
        HTTP_ORIGIN="https://any.example",
        HTTP_ACCESS_CONTROL_REQUEST_METHOD="GET",
        HTTP_ACCESS_CONTROL_REQUEST_HEADERS="authorization, x-trace-id",
    )
    assert cors(answer) == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, x-trace-id",
        "Access-Control-Max-Age": "86400",
    }


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        pytest.param("", "", id="nothing asked for"),
        pytest.param(" , ,,", "", id="only commas"),
        pytest.param("AUTHORIZATION,content-type", "", id="those that are always allowed"),
        pytest.param("x-a, X-A,x-b", ", x-a, x-b", id="each once"),
        pytest.param("x y, x:y, x\tz, (x), \xe9, x\x00, x\r\nset-cookie, ok", ", ok", id="only valid names"),
        pytest.param(" x-a\t,\x0bx-b,x-c\xa0", ", x-a", id="only spaces and tabs around them"),
        pytest.param("!#$%&'*+-.^_`|~09azAZ", ", !#$%&'*+-.^_`|~09azAZ", id="all that a name may hold"),
    ],
)
def test_the_headers_that_a_preflight_asks_for(asked, allowed):
    answer = ask(UsageMiddleware(wrapped, {}), "OPTIONS", HTTP_ACCESS_CONTROL_REQUEST_HEADERS=asked)
    assert answer.header("Access-Control-Allow-Headers") == "Authorization, Content-Type" + allowed


@pytest.mark.parametrize(("method", "authorization", "status"), EVERY_ANSWER)
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://app.example", True),
        ("http://localhost:3000", True),
        ("http://app.example", False),
        ("https://app.example.evil.example", False),
        ("https://app.example:443", False),
        ("null", False),
        ("*", False),
        (None, False),
    ],
)
def test_a_list_of_origins(origin, allowed, method, authorization, status):
    app = UsageMiddleware(wrapped, OneTokenOrBroken(), allow_origins=LISTED)
    headers = {} if origin is None else {"HTTP_ORIGIN": origin}
    answer = ask(app, method, authorization=authorization, **headers)
    assert answer.status == status
    assert answer.header("Vary") == "Origin"
    assert answer.header("Access-Control-Allow-Origin") == (origin if allowed else None)
    assert answer.header("Access-Control-Allow-Credentials") is None
    if not allowed:
        assert cors(answer) == {"Vary": "Origin"}


@pytest.mark.parametrize(("method", "authorization", "status"), EVERY_ANSWER)
def test_cors_off(method, authorization, status):
    app = UsageMiddleware(wrapped, OneTokenOrBroken(), allow_origins=())
    answer = ask(app, method, authorization=authorization, HTTP_ORIGIN="https://app.example")
    assert answer.status == status
    assert cors(answer) == {}
