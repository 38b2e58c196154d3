"""The middleware from the host's side: what passes through, what the constructor takes, and `bearer_key`."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from wsgiref.util import FileWrapper

import flask
import pytest
from client import PATH, ask, environ, wrapped

import usage_middleware
from usage_middleware import MemoryTokenStore, Token, UsageMiddleware, bearer_key

ORIGIN = "https://app.example"


# --- What passes through


class Stream:
    """A response of unknown length that records when it was closed."""

    def __init__(self):
        self.closed = 0

    def __iter__(self):
        yield b"a part"

    def close(self):
        self.closed += 1


class NeverAsked:
    def get(self, key):
        raise AssertionError("asked for a request that passes through")


def generator():
    yield b"a part"


@pytest.mark.parametrize(
    "make_result",
    [
        pytest.param(lambda: [b"a part"], id="list"),
        pytest.param(lambda: (b"a part",), id="tuple"),
        pytest.param(list, id="empty"),
        pytest.param(generator, id="generator"),
        pytest.param(lambda: FileWrapper(BytesIO(b"a part")), id="wsgi.file_wrapper"),
        pytest.param(Stream, id="object with close and without len"),
    ],
)
def test_the_very_same_objects_pass_through(make_result):
    result = make_result()
    called = []

    def app(environ, start_response):
        called.append((environ, start_response))
        return result

    def start_response(status, headers, exc_info=None):
        raise AssertionError("called by the middleware")

    given = environ("POST", "/v1/chat/completions", HTTP_AUTHORIZATION="Bearer key", HTTP_ORIGIN=ORIGIN)
    before = dict(given)
    # Not wrapped: so the server sees a list's length, the file of a file_wrapper, and `close`, and the application
    # the server's `exc_info` and `write()`.
    assert UsageMiddleware(app, NeverAsked())(given, start_response) is result
    ((passed_environ, passed_start_response),) = called
    assert passed_environ is given
    assert given == before
    assert passed_start_response is start_response


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_a_response_is_left_to_the_server_to_read_and_to_close(method):
    stream = Stream()
    app = UsageMiddleware(lambda environ, start_response: stream, {})
    assert app(environ(method, "/"), None) is stream
    assert stream.closed == 0
    assert list(stream) == [b"a part"]


@pytest.mark.parametrize("error", [RuntimeError("from the application"), KeyboardInterrupt(), SystemExit(3)])
def test_what_the_application_raises_passes_through(error):
    def app(environ, start_response):
        raise error

    with pytest.raises(type(error)) as caught:
        UsageMiddleware(app, {})(environ(path="/"), None)
    assert caught.value is error


def test_the_wrapped_application_is_not_called_for_the_endpoint():
    def app(environ, start_response):
        raise AssertionError("called")

    assert ask(UsageMiddleware(app, {})).status == 401


def test_the_wrapped_application_and_the_store_can_be_seen():
    store = MemoryTokenStore()
    middleware = UsageMiddleware(wrapped, store)
    assert middleware.app is wrapped
    assert middleware.store is store


def test_an_application_may_be_wrapped_twice():
    inner = UsageMiddleware(wrapped, {"inner": Token(name="Inner")}, path="/inner")
    app = UsageMiddleware(inner, {"outer": Token(name="Outer")}, path="/outer")
    assert ask(app, path="/inner", authorization="Bearer inner").json["data"]["name"] == "Inner"
    assert ask(app, path="/outer", authorization="Bearer outer").json["data"]["name"] == "Outer"
    assert ask(app, path="/").status == 404


def test_a_change_of_the_given_origins_is_not_noticed():
    origins = [ORIGIN]
    app = UsageMiddleware(wrapped, {}, allow_origins=origins)
    origins[0] = "https://other.example"
    assert ask(app, HTTP_ORIGIN=ORIGIN).header("Access-Control-Allow-Origin") == ORIGIN


# --- What the constructor takes


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"app": None}, TypeError, id="no app"),
        pytest.param({"app": "module:app"}, TypeError, id="the name of an app"),
        pytest.param({"store": None}, TypeError, id="no store"),
        pytest.param({"store": "tokens.db"}, TypeError, id="the name of a store"),
        pytest.param({"store": MemoryTokenStore().get}, TypeError, id="a function for a store"),
        pytest.param(
            {"store": type("Store", (), {"get": Token()})()}, TypeError, id="a store whose get is not a method"
        ),
        pytest.param({"path": None}, TypeError, id="path None"),
        pytest.param({"path": b"/usage"}, TypeError, id="path bytes"),
        pytest.param({"path": ["/usage"]}, TypeError, id="paths"),
        pytest.param({"path": ""}, ValueError, id="path empty"),
        pytest.param({"path": "x"}, ValueError, id="path without a slash"),
        pytest.param({"path": "https://app.example/usage"}, ValueError, id="a URL for a path"),
        pytest.param({"path": "/a?b"}, ValueError, id="path with a query"),
        pytest.param({"path": "/a#b"}, ValueError, id="path with a fragment"),
        pytest.param({"path": "/\ud800"}, ValueError, id="path that UTF-8 cannot carry"),
        pytest.param({"allow_origins": ORIGIN}, TypeError, id="one origin, no collection"),
        pytest.param({"allow_origins": ""}, TypeError, id="an empty str"),
        pytest.param({"allow_origins": b"*"}, TypeError, id="origins bytes"),
        pytest.param({"allow_origins": 5}, TypeError, id="origins int"),
        pytest.param({"allow_origins": None}, TypeError, id="origins None"),
        pytest.param({"allow_origins": True}, TypeError, id="origins bool"),
        pytest.param({"allow_origins": iter([ORIGIN])}, TypeError, id="origins that can be read once"),
        pytest.param({"allow_origins": [5]}, TypeError, id="an origin int"),
        pytest.param({"allow_origins": [b"https://app.example"]}, TypeError, id="an origin bytes"),
        pytest.param({"allow_origins": ["*"]}, ValueError, id="* in a list"),
        pytest.param({"allow_origins": [""]}, ValueError, id="an empty origin"),
        pytest.param({"allow_origins": ["app.example"]}, ValueError, id="an origin without a scheme"),
        pytest.param({"allow_origins": ["https://app.example/"]}, ValueError, id="an origin with a slash at its end"),
        pytest.param({"allow_origins": ["https://app.example/a"]}, ValueError, id="an origin with a path"),
        pytest.param({"allow_origins": [f"{ORIGIN}?a"]}, ValueError, id="an origin with a query"),
        pytest.param({"allow_origins": [f"{ORIGIN}#a"]}, ValueError, id="an origin with a fragment"),
        pytest.param({"allow_origins": ["https://me@app.example"]}, ValueError, id="an origin with a user"),
        pytest.param({"allow_origins": ["1https://app.example"]}, ValueError, id="a scheme that begins with a digit"),
        pytest.param({"allow_origins": ["https://App.Example"]}, ValueError, id="an origin in capitals"),
        pytest.param({"allow_origins": ["HTTPS://app.example"]}, ValueError, id="a scheme in capitals"),
        pytest.param({"allow_origins": ["https://*.app.example"]}, ValueError, id="a pattern"),
        pytest.param({"allow_origins": ["https://caf\u00e9.example"]}, ValueError, id="an origin that is not ASCII"),
        pytest.param({"allow_origins": [f"{ORIGIN}\r\nx-evil:1"]}, ValueError, id="an origin with a line feed"),
        pytest.param({"allow_origins": [f"{ORIGIN}, {ORIGIN}"]}, ValueError, id="two origins in one"),
        pytest.param({"allow_origins": [f"{ORIGIN},other.example"]}, ValueError, id="two hosts in one"),
        pytest.param({"allow_origins": [ORIGIN, "app.example"]}, ValueError, id="not the first one"),
    ],
)
def test_an_impossible_argument_is_named(arguments, error):
    (name,) = arguments
    given = {"app": wrapped, "store": {}, **arguments}
    with pytest.raises(error, match=rf"^{name} must "):
        UsageMiddleware(given.pop("app"), given.pop("store"), **given)


@pytest.mark.parametrize("arguments", [("module:app", {}), (wrapped, "tokens.db")])
def test_what_is_given_for_an_application_or_a_store_is_told(arguments):
    with pytest.raises(TypeError, match=r"got str$"):
        UsageMiddleware(*arguments)


@pytest.mark.parametrize(
    "origins",
    [
        pytest.param([ORIGIN], id="list"),
        pytest.param((ORIGIN,), id="tuple"),
        pytest.param({ORIGIN}, id="set"),
        pytest.param(frozenset([ORIGIN]), id="frozenset"),
        pytest.param({ORIGIN: "the app"}, id="dict"),
        pytest.param({ORIGIN: "the app"}.keys(), id="keys of a dict"),
        pytest.param({"the app": ORIGIN}.values(), id="values of a dict"),
        pytest.param([ORIGIN, ORIGIN], id="twice the same"),
        pytest.param(["http://localhost:3000", "null", "app+x://some-host", ORIGIN], id="other kinds of origins"),
    ],
)
def test_any_collection_of_origins_will_do(origins):
    app = UsageMiddleware(wrapped, {}, allow_origins=origins)
    assert ask(app, HTTP_ORIGIN=ORIGIN).header("Access-Control-Allow-Origin") == ORIGIN
    assert ask(app, HTTP_ORIGIN="https://other.example").header("Access-Control-Allow-Origin") is None


@pytest.mark.parametrize("origins", [(), [], set(), {}])
def test_any_empty_collection_turns_cors_off(origins):
    answer = ask(UsageMiddleware(wrapped, {}, allow_origins=origins), HTTP_ORIGIN=ORIGIN)
    assert answer.header("Access-Control-Allow-Origin") is None
    assert answer.header("Vary") is None


def test_the_options_go_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        UsageMiddleware(wrapped, {}, "/usage")


# --- In a host


@pytest.mark.parametrize(
    ("header", "key"),
    [
        pytest.param({}, None, id="no header"),
        pytest.param({"HTTP_AUTHORIZATION": ""}, None, id="empty"),
        pytest.param({"HTTP_AUTHORIZATION": "Basic a2V5"}, None, id="another scheme"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer"}, None, id="no key"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer sk-"}, None, id="the prefix alone"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer a b"}, None, id="two keys"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer a,b"}, None, id="comma"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer sk-abc"}, "abc", id="with the prefix"),
        pytest.param({"HTTP_AUTHORIZATION": " bearer  abc\t"}, "abc", id="without, and with spaces"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer sk-sk-abc"}, "abc", id="every prefix"),
    ],
)
def test_bearer_key(header, key):
    given = environ("POST", "/v1/chat/completions", **header)
    before = dict(given)
    assert bearer_key(given) == key
    assert given == before
    # The environment may be no more than the header.
    assert bearer_key(header) == key


def test_around_a_flask_application():
    app = flask.Flask("host")
    store = {"abc": Token(name="Default Token")}

    @app.get("/whoami")
    def whoami():
        token = store.get(bearer_key(flask.request.environ))
        return token.name if token else ("nobody", 401)

    app.wsgi_app = UsageMiddleware(app.wsgi_app, store)
    client = app.test_client()
    known = {"Authorization": "Bearer sk-abc"}

    usage = client.get(PATH, headers=known)
    assert usage.status_code == 200
    assert usage.json["data"]["name"] == "Default Token"
    assert client.get(PATH).json == {"success": False, "message": "No Authorization header"}
    head = client.head(PATH + "/", headers=known)
    assert (head.status_code, head.content_length, head.data) == (200, usage.content_length, b"")
    assert client.post(PATH, headers=known, data=b"unread").status_code == 405

    assert client.get("/whoami", headers=known).text == "Default Token"
    assert client.get("/whoami").status_code == 401
    assert client.get("/elsewhere").status_code == 404
    # Flask's own answer to OPTIONS, which ours must not hide.
    assert "GET" in client.options("/whoami").headers["Allow"]


# --- Types

# Never run. An unneeded `ignore` is an error itself, so each one asserts that mypy refuses its line.
TYPED_HOST = """
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from typing_extensions import assert_type

from usage_middleware import MemoryTokenStore, NewAPI, QuotaStore, SQLiteTokenStore, Token, TokenStore
from usage_middleware import UsageMiddleware, bearer_key

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    assert_type(bearer_key(environ), str | None)
    return []


class Legacy:
    def get(self, key: str) -> Token | None:
        return None


class OnlyTokens:
    def get(self, key: str, default: Token = Token()) -> Token:
        return default


class Nothing:
    def look_up(self, key: str) -> Token | None:
        return None


class OtherKeys:
    def get(self, key: int) -> Token | None:
        return None


class OtherValues:
    def get(self, key: str) -> str | None:
        return None


tokens: dict[str, Token] = {}
UsageMiddleware(app, tokens)
UsageMiddleware(app, {"key": Token(name="Default Token", model_limits={"gpt-4o": True, "gpt-4o-mini": 1000})})
UsageMiddleware(app, Legacy())
UsageMiddleware(app, OnlyTokens())
UsageMiddleware(app, MemoryTokenStore())
UsageMiddleware(app, SQLiteTokenStore("tokens.db"))
UsageMiddleware(app, Nothing())  # type: ignore[arg-type]
UsageMiddleware(app, OtherKeys())  # type: ignore[arg-type]
UsageMiddleware(app, OtherValues())  # type: ignore[arg-type]
UsageMiddleware(app, "tokens.db")  # type: ignore[arg-type]
UsageMiddleware(app, {"key": {"name": "a dict"}})  # type: ignore[dict-item]
UsageMiddleware("module:app", tokens)  # type: ignore[arg-type]

UsageMiddleware(app, tokens, path="/usage", allow_origins="*")
UsageMiddleware(app, tokens, allow_origins=["https://app.example"])
UsageMiddleware(app, tokens, allow_origins=frozenset(("https://app.example",)))
UsageMiddleware(app, tokens, allow_origins=())
UsageMiddleware(app, tokens, allow_origins=None)  # type: ignore[arg-type]
UsageMiddleware(app, tokens, throttle="20 per 20 minutes", throttle_storage="redis://localhost:6379")
UsageMiddleware(app, tokens, new_api=NewAPI())
UsageMiddleware(app, tokens, new_api=NewAPI(quota_per_unit=1000, display="TOKENS", system_name="Gateway"))
UsageMiddleware(app, tokens, new_api=None)
UsageMiddleware(app, tokens, new_api=True)  # type: ignore[arg-type]
NewAPI(display="EUR")  # type: ignore[arg-type]
NewAPI(1000)  # type: ignore[call-arg]
UsageMiddleware(app, tokens, throttle=None)
UsageMiddleware(app, tokens, throttle=20)  # type: ignore[arg-type]
UsageMiddleware(app, tokens, throttle_storage=None)  # type: ignore[arg-type]
UsageMiddleware(app, tokens, "/usage")  # type: ignore[call-arg]

wrapped: WSGIApplication = UsageMiddleware(UsageMiddleware(app, tokens), tokens, path="/other")

store: QuotaStore = MemoryTokenStore()
any_store: TokenStore = store
with SQLiteTokenStore("tokens.db") as opened:
    assert_type(opened, SQLiteTokenStore)
key, token = store.create(name="Default Token", model_limits={"gpt-4o": True})
assert_type(key, str)
assert_type(token, Token)
assert_type(token.total_granted, int)
token.name = "Other"  # type: ignore[misc]
Token("Default Token")  # type: ignore[call-arg]
"""


@pytest.mark.slow
def test_the_types_of_a_host_are_checked(tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    (tmp_path / "host.py").write_text(TYPED_HOST)
    # Types are looked for in installed packages; where this one is not installed but linked, it has to be shown.
    root = Path(usage_middleware.__file__).parent.parent
    shown = {} if root.name == "site-packages" else {"MYPYPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "host.py"],
        cwd=tmp_path,
        env={**os.environ, **shown},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
