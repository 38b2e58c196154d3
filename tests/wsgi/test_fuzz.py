"""Hostile requests: whatever an environment holds, the endpoint's answer is the one that the contract names.

What the contract expects is written here once more, a character at a time, and shares nothing with the package.
"""

import json
import logging
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usage_middleware import StoreError, Token, UsageMiddleware

ORIGIN = "https://app.example"
CONFIGURATIONS = [
    {},
    {"allow_origins": [ORIGIN, "null"]},
    {"allow_origins": (), "path": "/caf\u00e9"},
    {"path": "/"},
    # So many that no client is refused: it is there to read the client's address.
    {"throttle": "1000000000 per day"},
]
RAW_PATHS = ["/api/usage/token", "/api/usage/token", "/caf\xc3\xa9", "", "/api/usage/token"]
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
METHODS = "GET, HEAD, OPTIONS"
SEED = 20_270_115


# --- What the contract says


def strip(value):
    while value[:1] in (" ", "\t") and value:
        value = value[1:]
    while value[-1:] in (" ", "\t") and value:
        value = value[:-1]
    return value


def key_of(value):
    """Return the key that stores see, or ``None`` if the header is malformed: rules 7 to 9 of the contract."""
    value = strip(value)
    scheme, key = value[:6], value[6:]
    if [ord(character) | 0x20 for character in scheme] != [ord(character) for character in "bearer"]:
        return None
    if key[:1] != " ":
        return None
    while key[:1] == " ":
        key = key[1:]
    if not 1 <= len(key) <= 512:
        return None
    for character in key:
        if character == "," or not 0x21 <= ord(character) <= 0x7E:
            return None
    while key[:3] == "sk-":
        key = key[3:]
    return key if key else None


def outcome_of(key):
    """Return what the store below does when it is asked for a key: it knows any, and each has its kind."""
    return ("token", "unknown", "disabled", "StoreError", "RuntimeError", "no token")[sum(map(ord, key)) % 6]


def error_body(message):
    return b'{"success":false,"message":"' + message.encode() + b'"}'


def usage_body(key):
    text = '{"code":true,"message":"ok","data":{"object":"token_usage","name":%s,"total_granted":%d,"total_used":%d,'
    text += (
        '"total_available":3,"unlimited_quota":false,"model_limits":{},"model_limits_enabled":false,"expires_at":0}}'
    )
    return (text % (json.dumps(key), len(key) + 3, len(key))).encode()


def expected(environ, raw_path):
    """Return the status and body that a request must get; ``None`` if it belongs to the wrapped application."""
    if environ.get("PATH_INFO", "") not in (raw_path, raw_path + "/"):
        return None
    if environ["REQUEST_METHOD"] == "OPTIONS":
        return "204 No Content", None
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        return "405 Method Not Allowed", error_body("Method Not Allowed")
    value = environ.get("HTTP_AUTHORIZATION", "")
    if not strip(value):
        return "401 Unauthorized", error_body("No Authorization header")
    key = key_of(value)
    if key is None:
        return "401 Unauthorized", error_body("Invalid Bearer token")
    outcome = outcome_of(key)
    if outcome == "token":
        return "200 OK", usage_body(key)
    if outcome in ("unknown", "disabled"):
        return "401 Unauthorized", error_body("token not found")
    return "503 Service Unavailable", error_body("Service Unavailable")


# --- What is asked, and what is checked


class Malformed(BaseException):
    """The store was asked for what is not a key. The middleware would attribute an ``Exception`` to the store."""


class Store:
    def __init__(self):
        self.expected = None
        self.asked = 0

    def get(self, key):
        if type(key) is not str or key != self.expected:
            raise Malformed(f"{key!r} was asked for, {self.expected!r} was sent")
        self.asked += 1
        outcome = outcome_of(key)
        if outcome == "StoreError":
            raise StoreError(f"no row for {key}")
        if outcome == "RuntimeError":
            raise RuntimeError(f"no row for {key}")
        if outcome == "no token":
            return {"name": key}
        if outcome == "unknown":
            return None
        return Token(name=key, total_available=3, total_used=len(key), enabled=outcome == "token")


class LogOfNoKeys(logging.Handler):
    key = None

    def emit(self, record):
        message = record.getMessage()
        if "Store failed" not in message:
            raise Malformed(message)
        # A short key may be a part of any word.
        if self.key and len(self.key) >= 16 and self.key in message:
            raise Malformed(f"{message!r} shows the key")


class Endpoint:
    """The middleware in one configuration, and requests to it whose answers are held against the contract."""

    def __init__(self, number):
        self.store = Store()
        self.passed = []
        self.raw_path = RAW_PATHS[number]
        self.listed = CONFIGURATIONS[number].get("allow_origins", "*")
        self.app = UsageMiddleware(self._host, self.store, **CONFIGURATIONS[number])
        self.log = LogOfNoKeys()
        self._result = [b"the wrapped application"]

    def _host(self, environ, start_response):
        self.passed.append(environ)
        return self._result

    def check(self, environ):
        """Send a request. Return the status of the answer, or ``None`` if it passed through."""
        before = dict(environ)
        started = []
        self.passed.clear()
        self.store.asked = 0
        self.store.expected = self.log.key = key_of(environ.get("HTTP_AUTHORIZATION", ""))
        result = self.app(environ, lambda status, headers: started.append((status, headers)))

        assert environ == before
        answer = expected(environ, self.raw_path)
        if answer is None:
            assert result is self._result
            (passed,) = self.passed
            assert passed is environ
            assert not started
            assert not self.store.asked
            return None
        assert not self.passed
        ((status, headers),) = started
        assert type(headers) is list
        assert status == answer[0]
        body = b"".join(result)
        assert body == (b"" if environ["REQUEST_METHOD"] == "HEAD" else answer[1] or b"")
        self._check_headers(headers, status[:3], answer[1], environ.get("HTTP_ORIGIN"))
        asks = self.store.expected is not None and environ["REQUEST_METHOD"] in ("GET", "HEAD")
        assert self.store.asked == asks
        return status[:3]

    def _check_headers(self, headers, status, body, origin):
        fields = dict(headers)
        assert len(fields) == len(headers)
        for name, value in headers:
            assert type(name) is type(value) is str
            for character in name + value:
                assert 0x20 <= ord(character) <= 0xFF
                assert not 0x7F <= ord(character) <= 0x9F
        assert fields["Cache-Control"] == "no-store"
        assert fields["X-Content-Type-Options"] == "nosniff"
        assert fields.get("Content-Length") == (None if body is None else str(len(body)))
        assert fields.get("Content-Type") == (None if body is None else "application/json; charset=utf-8")
        assert fields.get("Allow") == (METHODS if status in ("204", "405") else None)
        assert ("WWW-Authenticate" in fields) == (status == "401")
        assert ("Retry-After" in fields) == (status == "503")
        allowed = "*" if self.listed == "*" else origin if origin in self.listed else None
        assert fields.get("Access-Control-Allow-Origin") == allowed


@pytest.fixture
def endpoints():
    """Yield the endpoint in every configuration, and its logger without the handlers that would keep what they get."""
    made = [Endpoint(number) for number in range(len(CONFIGURATIONS))]
    logger = logging.getLogger("usage_middleware")
    for endpoint in made:
        logger.addHandler(endpoint.log)
    logger.propagate = False
    yield made
    logger.propagate = True
    for endpoint in made:
        logger.removeHandler(endpoint.log)


# --- Volume: near misses, quickly


class Str(str):
    """PEP 3333 wants a str itself; there are frameworks that put their own kind of str there."""

    __slots__ = ()


HOSTILE = ["\0", "\t", "\n", "\r", "\x0b", "\x1b", "\x7f", "\x80", "\x85", "\xa0", "\xad", "\xe9", "\xff"]
# What no server should send: characters beyond Latin-1, letters that some case mapping turns into ASCII, half a
# character.
HOSTILE += ["\u2003", "\u212a", "\u017f", "\u0131", "\uff22", "\u4ee4", "\ud800", "\U0001f511"]
KEYS = ["k", "sk-", "sk", "k" * 48, "sk-" + "k" * 48, "a-b-c", "=", "k" * 509, "sk-" + "k" * 509]
KEYS += ["k" * 511, "k" * 512, "k" * 513, "sk-" + "k" * 510, "sk-sk-", "sk-sk-k", "SK-k", "{", '"', "%00", "\\u0000"]
SCHEMES = ["Bearer"] * 8 + [
    "bearer",
    "BEARER",
    "bEaReR",
    "Basic",
    "Token",
    "Beare",
    "Bearerr",
    "",
    "Bearer:",
    '"Bearer"',
]
SPACES = [" "] * 6 + ["", "  ", "\t", " \t", "   ", "\xa0", "\r\n "]
AROUND = [""] * 8 + [" ", "\t", " \t ", "\xa0", "\n", "\x0c", "\x1c", "\x85"]
REQUEST_METHODS = ["GET"] * 12 + ["HEAD"] * 3 + ["OPTIONS"] * 2 + ["POST", "get", "Get", "", "GET ", "TRACE", "G\0T"]
ORIGINS = [ORIGIN, "null", "*", "", "https://app.example.evil.example", "https://app.example\r\nX-Evil: 1", "\ud800"]
# A proxy passes on whatever the client put there.
ADDRESSES = [
    "",
    "127.0.0.1",
    "::1",
    "2001:db8::1",
    "::ffff:192.0.2.1",
    "fe80::1%eth0",
    "[::1]",
    "192.0.2.1:80",
    "unix:",
]
# Ignored, or only passed on: servers differ in what they put there, and in what they leave out.
ANYTHING = [None, "", 0, -1, 2**70, "80", b"80", 1.5, [], (), {}, object()]
NOT_OURS = [
    "QUERY_STRING",
    "SCRIPT_NAME",
    "CONTENT_LENGTH",
    "CONTENT_TYPE",
    "SERVER_PORT",
    "REMOTE_ADDR",
    "REMOTE_PORT",
]
NOT_OURS += ["REMOTE_USER", "wsgi.input", "wsgi.errors", "wsgi.url_scheme", "HTTP_X_FORWARDED_FOR", "HTTP_COOKIE"]


class Requests:
    """A seeded stream of environments, most of them nearly right."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        # random.choice costs more than the request that it is for.
        self._float = self._random.random

    def one_of(self, values):
        return values[int(self._float() * len(values))]

    def chance(self, probability):
        return self._float() < probability

    def text(self, length=12):
        alphabet = self.one_of((VISIBLE, "".join(map(chr, range(256))), HOSTILE, "sk-,"))
        return "".join(self.one_of(alphabet) for _ in range(int(self._float() * length)))

    def near(self, value):
        """``value``, often with one character more, less or other than it has."""
        if self.chance(0.5):
            return value
        at = int(self._float() * (len(value) + 1))
        inserted = self.one_of(HOSTILE) if self.chance(0.5) else self.one_of(VISIBLE)
        return value[:at] + self.one_of(("", inserted)) + value[at + self.one_of((0, 1)) :]

    def key(self):
        if self.chance(0.001):
            return "k" * 100_000
        return self.one_of(KEYS) if self.chance(0.6) else self.text(30)

    def authorization(self):
        if self.chance(0.1):
            return self.text(40)
        value = self.one_of(SCHEMES) + self.one_of(SPACES) + self.key()
        if self.chance(0.05):
            value += self.one_of((",", ", ", " ", " sk-")) + value
        return self.near(self.one_of(AROUND) + value + self.one_of(AROUND))

    def path(self, raw_path):
        if self.chance(0.75):
            return raw_path + self.one_of(("", "/"))
        return (
            self.near(raw_path + self.one_of(("", "/", "//", "/.", "?", "%2f"))) if self.chance(0.8) else self.text(40)
        )

    def environ(self, raw_path):
        made = {"REQUEST_METHOD": self.one_of(REQUEST_METHODS) if self.chance(0.95) else self.text()}
        if self.chance(0.99):
            made["PATH_INFO"] = self.path(raw_path)
        if self.chance(0.95):
            made["HTTP_AUTHORIZATION"] = self.authorization()
        if self.chance(0.2):
            made["HTTP_ORIGIN"] = self.near(self.one_of(ORIGINS))
        if self.chance(0.2):
            asked = (self.one_of(("x-a", "Authorization", "*", self.text())) for _ in range(int(self._float() * 5)))
            made["HTTP_ACCESS_CONTROL_REQUEST_HEADERS"] = self.one_of((",", ", ", " ", "\r\n")).join(asked)
        if self.chance(0.5):
            made["REMOTE_ADDR"] = self.near(self.one_of(ADDRESSES)) if self.chance(0.9) else self.text(40)
        if self.chance(0.1):
            made[self.one_of(NOT_OURS)] = self.one_of(ANYTHING)
        if self.chance(0.02):
            made = {name: Str(value) if type(value) is str else value for name, value in made.items()}
        return made


def test_many_near_misses(endpoints, full):
    count = 1_000_000 if full else 10_000
    requests = Requests(SEED)
    seen = Counter()
    begun = time.perf_counter()
    for number in range(count):
        endpoint = endpoints[number % len(endpoints)]
        environ = requests.environ(endpoint.raw_path)
        try:
            seen[endpoint.check(environ)] += 1
        except BaseException as error:
            error.args = (*error.args, f"request {number}: {environ!r}")
            raise
    seconds = time.perf_counter() - begun
    # The requests are of all kinds: each answer was met.
    assert all(seen[status] > count / 200 for status in (None, "200", "204", "401", "405", "503")), seen
    if full:
        print(f"{count:,} requests, {count / seconds:,.0f} a second: {dict(seen)}")


# --- Structure: what hypothesis generates, and shrinks

latin_1 = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=40)
native = st.one_of(latin_1, st.text(max_size=40), st.sampled_from(HOSTILE))
long_keys = st.builds(lambda prefix, n: prefix + "k" * n, st.sampled_from(["", "sk-"]), st.integers(500, 520))
authorizations = st.one_of(
    native,
    st.builds(
        lambda *parts: "".join(parts),
        st.sampled_from(AROUND),
        st.sampled_from(SCHEMES),
        st.sampled_from(SPACES),
        st.one_of(st.sampled_from(KEYS), st.text(VISIBLE, max_size=20), long_keys, native),
        st.sampled_from(["", ",", ", Bearer k", " k", "\0", "\n"]),
        st.sampled_from(AROUND),
    ),
)


@st.composite
def environs(draw, raw_path):
    fields = {"PATH_INFO": st.sampled_from([raw_path, raw_path + "/"]) | native, "HTTP_AUTHORIZATION": authorizations}
    fields["HTTP_ORIGIN"] = st.sampled_from(ORIGINS) | native
    fields["REMOTE_ADDR"] = st.sampled_from(ADDRESSES) | native
    fields["HTTP_ACCESS_CONTROL_REQUEST_HEADERS"] = native
    fields.update((name, st.sampled_from(ANYTHING) | native) for name in NOT_OURS)
    method = st.sampled_from(REQUEST_METHODS) | native
    return draw(st.fixed_dictionaries({"REQUEST_METHOD": method}, optional=fields))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_any_environment(endpoints, number, full):
    endpoint = endpoints[number]

    @settings(max_examples=10_000 if full else 50, deadline=None, database=None, derandomize=not full)
    @given(environs(endpoint.raw_path))
    def check(environ):
        endpoint.check(environ)

    check()
