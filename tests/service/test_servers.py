"""The middleware under real WSGI servers: processes on the loopback interface, asked byte by byte.

What a server must do by itself is not asserted here. Where one keeps something from the application, a comment says
so, and the expectation is what is left to promise.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from waiting import DEADLINE, until
from web_servers import (
    AUTHORIZATION,
    KEEP_ALIVE,
    KEY,
    PATH,
    PRELOAD_WORKERS,
    SERVERS,
    USAGE,
    Answer,
    Server,
    check_log,
    message,
    running,
)

from usage_middleware import SQLiteTokenStore, StoreError, Token, TokenStore, UsageMiddleware

METHOD_NOT_ALLOWED = b'{"success":false,"message":"Method Not Allowed"}'
NO_AUTHORIZATION = b'{"success":false,"message":"No Authorization header"}'
INVALID_TOKEN = b'{"success":false,"message":"Invalid Bearer token"}'

EVERY_ANSWER = [
    ("access-control-allow-origin", "*"),
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
]
# What servers add, and the served application's name of its process.
NOT_OURS = {"connection", "date", "keep-alive", "served-by", "server"}


@pytest.fixture(scope="module", params=list(SERVERS))
def one_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp(request.param)
    with running(request.param, directory) as server:
        yield server
    check_log(server.log)


@pytest.fixture
def server(one_server: Server) -> Iterator[Server]:
    yield one_server
    # pytest shows it if the test has failed.
    print(one_server.log.read_text(errors="replace")[-5000:])


def ours(answer: Answer) -> list[tuple[str, str]]:
    return sorted(header for header in answer.headers if header[0] not in NOT_OURS)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"], ids=["GET", "HEAD"])
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(PATH, id="plain"),
        pytest.param(PATH + b"/", id="with a slash"),
        pytest.param(PATH + b"?token=other&a=/b", id="with a query"),
        pytest.param(PATH + b"/?", id="with a slash and an empty query"),
        pytest.param(b"/prefix" + PATH, id="below SCRIPT_NAME"),
        pytest.param(b"/prefix" + PATH + b"/", id="below SCRIPT_NAME with a slash"),
    ],
)
def test_usage(server: Server, method: bytes, target: bytes) -> None:
    answer = server.ask(method, target, AUTHORIZATION)

    assert answer.status == 200
    assert answer.body == (USAGE if method == b"GET" else b"")
    assert ours(answer) == sorted(
        [*EVERY_ANSWER, ("content-type", "application/json; charset=utf-8"), ("content-length", str(len(USAGE)))]
    )


@pytest.mark.parametrize("method", [b"GET", b"HEAD"], ids=["GET", "HEAD"])
def test_no_key(server: Server, method: bytes) -> None:
    answer = server.ask(method, PATH)

    assert answer.status == 401
    assert answer.body == (NO_AUTHORIZATION if method == b"GET" else b"")
    assert answer.header("www-authenticate") == "Bearer"
    assert answer.header("content-length") == str(len(NO_AUTHORIZATION))


def test_preflight(server: Server) -> None:
    answer = server.ask(
        b"OPTIONS",
        PATH,
        b"Origin: https://app.example",
        b"Access-Control-Request-Method: GET",
        b"Access-Control-Request-Headers: authorization,x-client",
    )

    assert answer.status == 204
    headers = ours(answer)
    # wsgiref adds it to every empty response.
    with suppress(ValueError):
        headers.remove(("content-length", "0"))
    assert headers == sorted(
        [
            *EVERY_ANSWER,
            ("access-control-allow-headers", "Authorization, Content-Type, x-client"),
            ("access-control-allow-methods", "GET, HEAD, OPTIONS"),
            ("access-control-max-age", "86400"),
            ("allow", "GET, HEAD, OPTIONS"),
        ]
    )


OTHER_KEY = b"Authorization: Bearer sk-" + b"o" * 48


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(AUTHORIZATION, OTHER_KEY, id="known and unknown"),
        pytest.param(OTHER_KEY, AUTHORIZATION, id="unknown and known"),
        pytest.param(AUTHORIZATION, AUTHORIZATION, id="the same twice"),
        pytest.param(OTHER_KEY.replace(b"A", b"a", 1), AUTHORIZATION, id="names in other case"),
    ],
)
def test_two_authorization_headers(server: Server, first: bytes, second: bytes) -> None:
    answer = server.ask(b"GET", PATH, first, second)

    if server.name == "cheroot":
        # This server passes only the last one to the application, which cannot know that there was another.
        assert answer.body == server.ask(b"GET", PATH, second).body
    else:
        assert (answer.status, answer.body) == (401, INVALID_TOKEN)


@pytest.mark.parametrize(
    ("value", "body"),
    [
        pytest.param(b"", NO_AUTHORIZATION, id="empty"),
        pytest.param(b" \t ", NO_AUTHORIZATION, id="white space"),
        pytest.param(b"Bearer", INVALID_TOKEN, id="no key"),
        pytest.param(b"Bearer sk-", INVALID_TOKEN, id="nothing but the prefix"),
        pytest.param(b"Basic a2V5Og==", INVALID_TOKEN, id="another scheme"),
        pytest.param(b"Bearer %b\0" % KEY.encode(), INVALID_TOKEN, id="NUL"),
        pytest.param(b"Bearer \0%b" % KEY.encode(), INVALID_TOKEN, id="NUL in front"),
        pytest.param(b"Bearer \x01%b" % KEY.encode(), INVALID_TOKEN, id="control character"),
        pytest.param(b"Bearer %b\x7f" % KEY.encode(), INVALID_TOKEN, id="DEL"),
        pytest.param(b"Bearer \xa0%b" % KEY.encode(), INVALID_TOKEN, id="Latin-1"),
        pytest.param("Bearer é%s".encode() % KEY.encode(), INVALID_TOKEN, id="UTF-8"),
        pytest.param(b"Bearer " + b"k" * 60_000, INVALID_TOKEN, id="60 kB"),
    ],
)
def test_malformed_authorization(server: Server, value: bytes, body: bytes) -> None:
    answer = server.ask(b"GET", PATH, b"Authorization: " + value)

    refused_by_the_server = answer.status in (400, 431)
    # granian drops a header that is not ASCII.
    dropped = server.name == "granian" and not value.isascii() and answer.body == NO_AUTHORIZATION
    assert refused_by_the_server or (answer.status == 401 and (answer.body == body or dropped)), answer
    assert server.ask(b"GET", PATH, AUTHORIZATION).body == USAGE


@pytest.mark.parametrize(
    ("target", "path"),
    [
        pytest.param(b"/%A3", b"/\xa3", id="encoded"),
        pytest.param(PATH + b"%A3", PATH + b"\xa3", id="encoded behind ours"),
        pytest.param(b"/\xa3", b"/\xa3", id="raw"),
    ],
)
def test_path_that_is_not_utf8(server: Server, target: bytes, path: bytes) -> None:
    answer = server.ask(b"GET", target)

    if server.name == "werkzeug":
        # This server decodes the path as UTF-8, and a raw byte as Latin-1, before it encodes it for the application.
        path = path.replace(b"\xa3", b"\xc2\xa3" if b"\xa3" in target else "\N{REPLACEMENT CHARACTER}".encode())
    refused_by_the_server = answer.status == 400 and b"\xa3" in target
    assert refused_by_the_server or (answer.status, answer.body) == (200, b"GET [] " + path)


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        pytest.param(b"GET", [AUTHORIZATION], 200, id="GET"),
        pytest.param(b"HEAD", [AUTHORIZATION], 200, id="HEAD"),
        pytest.param(b"HEAD", [], 401, id="HEAD without a key"),
        pytest.param(b"DELETE", [], 405, id="DELETE"),
    ],
)
def test_the_next_request_on_a_connection(server: Server, method: bytes, headers: list[bytes], status: int) -> None:
    with server.connect() as connection:
        connection.send(message(method, PATH, *headers))
        answer = connection.read(method)
        assert answer is not None
        assert answer.status == status
        assert answer.is_last is (server.name not in KEEP_ALIVE)
        if answer.is_last:
            assert connection.rest() == b""
            return
        connection.send(message(b"GET", PATH, AUTHORIZATION))
        second = connection.read(b"GET")
        assert second is not None
        assert second.body == USAGE


# No application reads these bodies. A server that takes one for requests answers it.
SMALL = message(b"GET", b"/smuggled")
LARGE = SMALL * 3000  # more than 100 kB


def with_length(body: bytes) -> dict[str, Any]:
    return {"headers": [b"Content-Length: %d" % len(body)], "body": body}


def in_chunks(body: bytes) -> dict[str, Any]:
    pieces = [body[start : start + 8192] for start in range(0, len(body), 8192)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return {"headers": [b"Transfer-Encoding: chunked"], "body": coded}


@pytest.mark.parametrize(
    ("method", "expected"), [(b"POST", (405, METHOD_NOT_ALLOWED)), (b"GET", (200, USAGE))], ids=["POST", "GET"]
)
@pytest.mark.parametrize(
    "unread",
    [
        pytest.param(with_length(SMALL), id="small"),
        pytest.param(with_length(LARGE), id="large"),
        pytest.param(in_chunks(SMALL), id="small in chunks"),
        pytest.param(in_chunks(LARGE), id="large in chunks"),
    ],
)
def test_unread_body(
    server: Server,
    request: pytest.FixtureRequest,
    method: bytes,
    expected: tuple[int, bytes],
    unread: dict[str, Any],
) -> None:
    if server.name == "cheroot" and b"Transfer-Encoding: chunked" in unread["headers"]:
        # cheroot does so with every application that leaves such a body unread.
        request.applymarker(pytest.mark.xfail(reason="cheroot takes the unread chunks for the next request"))
    with server.connect() as connection:
        connection.send(message(method, PATH, AUTHORIZATION, *unread["headers"], body=unread["body"]))
        answer = connection.read(method)
        assert answer is not None
        assert (answer.status, answer.body) == expected
        if answer.is_last:
            assert connection.rest() == b""
        else:
            # HTTP lets a server close the connection unannounced, but not misunderstand what comes next.
            connection.send(message(b"GET", b"/next"))
            following = connection.read(b"GET")
            assert following is None or following.body == b"GET [] /next"
    assert server.ask(b"GET", PATH, AUTHORIZATION).body == USAGE


def test_request_body_reaches_the_host(server: Server) -> None:
    body = bytes(range(256)) * 400

    assert server.ask(b"POST", b"/body", b"Content-Length: %d" % len(body), body=body).body == body


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        pytest.param(b"GET", b"/", b"GET [] /", id="another path"),
        pytest.param(b"DELETE", PATH + b"s/1?a=b", b"DELETE [] /api/usage/tokens/1", id="a path that begins like ours"),
        pytest.param(b"PUT", b"/prefix/a", b"PUT [/prefix] /a", id="below SCRIPT_NAME"),
    ],
)
def test_another_path_reaches_the_host(server: Server, method: bytes, target: bytes, body: bytes) -> None:
    answer = server.ask(method, target)

    assert (answer.status, answer.body) == (200, body)
    assert ours(answer) == [("content-length", str(len(body))), ("content-type", "text/plain")]


def test_stream_is_closed_once(server: Server) -> None:
    log = Path(f"{server.database}-closed")

    assert server.ask(b"GET", b"/stream").body == b"one, two, three"

    # A server may close it a moment after it has sent the last of it.
    until(log.exists)
    server.ask(b"GET", b"/")
    assert log.read_text() == "closed\n"


def test_store_used_before_the_server_forks(tmp_path: Path) -> None:
    created = 0
    with running("gunicorn-preload", tmp_path, KEY_ASKED_AT_IMPORT=KEY) as server:
        # Made in another process while the server runs: each worker must find it.
        with SQLiteTokenStore(server.database) as store:
            key, _ = store.create(name="made meanwhile")
        answered: set[str | None] = set()
        deadline = time.monotonic() + DEADLINE
        while len(answered) < PRELOAD_WORKERS and time.monotonic() < deadline:
            for answer in _ask_each_worker(server, message(b"GET", PATH, b"Authorization: Bearer " + key.encode())):
                assert b"made meanwhile" in answer.body
                answered.add(answer.header("served-by"))
            for answer in _ask_each_worker(server, message(b"POST", b"/create")):
                assert answer.status == 200
                created += 1
        assert len(answered) == PRELOAD_WORKERS
    check_log(server.log)
    with closing(sqlite3.connect(server.database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM tokens").fetchone() == (created + 2,)


def _ask_each_worker(server: Server, data: bytes) -> Iterator[Answer]:
    """Ask each worker once. A sync worker with half a request accepts no other connection, so each goes to another
    worker.

    Only a worker that is still starting is left out.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(PRELOAD_WORKERS)]
        for connection in connections:
            connection.send(data[:10])
        for connection in connections:
            connection.send(data[10:])
            answer = connection.read(data.split()[0])
            assert answer is not None
            yield answer


class BrokenStore:
    def get(self, key: str) -> Token | None:
        raise StoreError("the database is locked")


TOKENS = {KEY: Token()}


@pytest.mark.parametrize(
    ("method", "path", "authorization", "store", "status"),
    [
        pytest.param("GET", "/api/usage/token", f"Bearer {KEY}", TOKENS, "200 OK", id="GET"),
        pytest.param("HEAD", "/api/usage/token", f"Bearer {KEY}", TOKENS, "200 OK", id="HEAD"),
        pytest.param("OPTIONS", "/api/usage/token", "", TOKENS, "204 No Content", id="OPTIONS"),
        pytest.param("GET", "/api/usage/token", "", TOKENS, "401 Unauthorized", id="no key"),
        pytest.param("HEAD", "/api/usage/token", "", TOKENS, "401 Unauthorized", id="HEAD without a key"),
        pytest.param("POST", "/api/usage/token", "", TOKENS, "405 Method Not Allowed", id="POST"),
        pytest.param("GET", "/api/usage/token", f"Bearer {KEY}", BrokenStore(), "503 Service Unavailable", id="503"),
        pytest.param("GET", "/other", "", TOKENS, "200 OK", id="pass-through"),
        pytest.param("HEAD", "/other", "", TOKENS, "200 OK", id="pass-through of HEAD"),
    ],
)
def test_wsgi_conformance(method: str, path: str, authorization: str, store: TokenStore, status: str) -> None:
    """``wsgiref.validate`` on both sides: what the middleware answers, and how it calls the wrapped application."""
    started: list[str] = []
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "HTTP_AUTHORIZATION": authorization,
    }
    setup_testing_defaults(environ)

    def host(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"host"]

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        started.append(status)
        return lambda data: None

    response = validator(UsageMiddleware(validator(host), store))(environ, start_response)
    with closing(response):
        list(response)

    assert started == [status]
