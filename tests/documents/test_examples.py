"""The programs in examples/, each started as its reader starts it, and asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from places import EXAMPLES
from ports import free_port
from programs import find_program
from waiting import until_listening, until_logged
from werkzeug.exceptions import NotFound
from werkzeug.test import Client

from usage_middleware import Token, UsageMiddleware

PATH = "/api/usage/token"
COMMAND = r"curl -H 'Authorization: Bearer (?P<key>sk-\S+)' http://127\.0\.0\.1:(?P<port>\d+)/api/usage/token"

STOPS_WITHIN = 15.0  # seconds
# What Ctrl-C sends. If the tests run in the background of a shell, it may be ignored, and children inherit that.
STOP = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT


class Program(NamedTuple):
    """A program, and what it is expected to answer."""

    name: str
    available: int = 1_000_000
    used: int = 0
    expires_at: int = 0
    page: tuple[int, bytes] = (200, b"")  # at "/", from the wrapped application

    @property
    def usage(self) -> bytes:
        data = {
            "object": "token_usage",
            "name": "Demo",
            "total_granted": self.available + self.used,
            "total_used": self.used,
            "total_available": self.available,
            "unlimited_quota": False,
            "model_limits": {},
            "model_limits_enabled": False,
            "expires_at": self.expires_at,
        }
        return json.dumps({"code": True, "message": "ok", "data": data}, separators=(",", ":")).encode()


LEGACY_PROXY = Program("legacy_proxy.py", page=(200, b"legacy service: GET / HTTP/1.1"))
PROGRAMS = (
    Program("flask_app.py", page=(200, b"Hello from Flask.")),
    Program("metered_flask.py", page=(404, b"<title>404 Not Found</title>")),
    Program("idempotent_flask.py", page=(404, b"<title>404 Not Found</title>")),
    Program("django_project.py", page=(200, b"Hello from Django.")),
    Program("wrap_old_application.py", page=(200, b"Quinces")),
    Program(
        "legacy_table.py",
        available=987655,
        used=12345,
        expires_at=1924992000,
        page=(404, b"<title>404 Not Found</title>"),
    ),
    LEGACY_PROXY,
    Program("fastapi_app.py", page=(200, b"Hello from FastAPI.")),
    *[
        Program(f"meter_{name}.py", page=(401, b'"code":"invalid_api_key"'))
        for name in ("flask", "legacy_service", "llm", "stated_cost", "opentelemetry")
    ],
)


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    body: bytes


@dataclass(frozen=True)
class Running:
    """A program that is running."""

    program: Program
    command: str
    key: str
    port: int
    stderr: Path

    def ask(self, method: str, path: str, authorization: str | None = None, body: bytes | None = None) -> Answer:
        headers = {} if authorization is None else {"Authorization": authorization}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())


@pytest.fixture(
    scope="module", params=[pytest.param(program, id=program.name.removesuffix(".py")) for program in PROGRAMS]
)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program: Program = request.param
    port = free_port()
    folder = tmp_path_factory.mktemp(program.name.removesuffix(".py"))
    environment = {**os.environ, "PYTHONWARNINGS": "default::ResourceWarning", "TMPDIR": str(folder)}
    environment.pop("USAGE_MIDDLEWARE_DB", None)
    stdout, stderr = folder / "stdout", folder / "stderr"

    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / program.name, str(port)], cwd=folder, env=environment, stdout=out, stderr=err
        )
    try:
        command = wait_until_served(process, port, stdout, stderr)
        yield Running(program, command[0], command["key"], port, stderr)
        process.send_signal(STOP)
        process.wait(STOPS_WITHIN)
    finally:
        process.kill()
        process.wait()

    said = stderr.read_text()
    assert "Traceback" not in said
    assert "ResourceWarning" not in said


@pytest.fixture
def example(running: Running) -> Iterator[Running]:
    yield running
    print(running.stderr.read_text())  # pytest shows it if the test failed


def wait_until_served(process: subprocess.Popen[bytes], port: int, stdout: Path, stderr: Path) -> re.Match[str]:
    """Wait until the program has printed its curl command and accepts connections. Return the command."""
    command = until_logged(COMMAND, stdout, process)
    assert int(command["port"]) == port
    assert command.start() == 0, stdout.read_text()
    until_listening(port, process, stderr)
    return command


def test_every_program_is_in_the_table() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert programs == {program.name for program in PROGRAMS}


def test_each_program_answers_the_usage_of_its_key(example: Running) -> None:
    answer = example.ask("GET", PATH, f"Bearer {example.key}")

    assert (answer.status, answer.body) == (200, example.program.usage)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        pytest.param(PATH + "/", "sk-", id="slash"),
        pytest.param(PATH, "", id="without-sk"),
        pytest.param(PATH + "/", "", id="slash-without-sk"),
        pytest.param(PATH + "?t=1", "sk-", id="query"),
    ],
)
def test_the_usage_is_the_same_for_each_form_of_path_and_key(example: Running, path: str, prefix: str) -> None:
    answer = example.ask("GET", path, f"Bearer {prefix}{example.key.removeprefix('sk-')}")
    assert (answer.status, answer.body) == (200, example.program.usage)


@pytest.mark.parametrize("path", [PATH, PATH + "/"])
def test_head_has_the_length_and_no_body(example: Running, path: str) -> None:
    # Use a socket: http.client would not read a body that is sent by mistake.
    request = (
        f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {example.key}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", example.port), timeout=10) as connection:
        connection.sendall(request.encode())
        with connection.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-length: %d\r\n" % len(example.program.usage) in head.lower() + b"\r\n"
    assert body == b""


@pytest.mark.parametrize(
    ("method", "authorization", "status", "message", "header"),
    [
        pytest.param("GET", None, 401, "No Authorization header", ("WWW-Authenticate", "Bearer"), id="no-header"),
        pytest.param(
            "GET",
            "Bearer sk-unknown",
            401,
            "token not found",
            ("WWW-Authenticate", 'Bearer error="invalid_token"'),
            id="unknown-key",
        ),
        pytest.param("POST", None, 405, "Method Not Allowed", ("Allow", "GET, HEAD, OPTIONS"), id="another-method"),
    ],
)
def test_a_refusal_is_that_of_the_endpoint(
    example: Running, method: str, authorization: str | None, status: int, message: str, header: tuple[str, str]
) -> None:
    answer = example.ask(method, PATH, authorization)

    assert answer.status == status
    assert answer.body == b'{"success":false,"message":"%s"}' % message.encode()
    assert answer.headers.get_all(header[0]) == [header[1]]
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_a_preflight_is_answered(example: Running) -> None:
    answer = example.ask("OPTIONS", PATH)

    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert answer.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type"


def test_another_path_is_the_wrapped_application(example: Running) -> None:
    status, text = example.program.page
    answer = example.ask("GET", "/")

    assert answer.status == status
    assert text in answer.body
    # The meter's refusals can be read by the pages that may ask the endpoint.
    assert ("Access-Control-Allow-Origin" in answer.headers) == (status == 401)


def test_the_printed_command_prints_the_usage(example: Running) -> None:
    find_program("curl", "curl")
    # If the machine uses a proxy, the proxy cannot reach this loopback interface.
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    done = subprocess.run(shlex.split(example.command), env=environment, stdout=subprocess.PIPE, timeout=10, check=True)
    assert done.stdout == example.program.usage


def test_the_old_application_does_not_import_the_package() -> None:
    assert "usage_middleware" not in (EXAMPLES / "old_application.py").read_text()


only_legacy_proxy = pytest.mark.parametrize(
    "running", [pytest.param(LEGACY_PROXY, id="legacy_proxy")], indirect=True, scope="module"
)


@only_legacy_proxy
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        pytest.param("GET", "/api/usage", b"", id="above-the-endpoint"),
        pytest.param("GET", "/api/usage/token/1", b"", id="below-the-endpoint"),
        pytest.param("GET", "/prices?fruit=Apples&sort=", b"", id="query"),
        pytest.param("GET", "/caf%C3%A9", b"", id="not-ascii"),
        pytest.param("GET", "/100%25", b"", id="percent-sign"),
        pytest.param("GET", "/a%20b/$1;v=2@(x)", b"", id="punctuation"),
        pytest.param("POST", "/orders", b"quinces=3\0", id="body"),
    ],
)
def test_the_legacy_service_gets_the_request_unchanged(example: Running, method: str, path: str, body: bytes) -> None:
    answer = example.ask(method, path, "Bearer sk-mine", body)

    assert answer.status == 200
    request_line, _, rest = answer.body.partition(b"\n")
    headers, _, received = rest.partition(b"\n\n")
    assert request_line == f"legacy service: {method} {path} HTTP/1.1".encode()
    assert f"X-Forwarded-Host: 127.0.0.1:{example.port}".encode() in headers.splitlines()
    assert b"Authorization: Bearer sk-mine" in headers.splitlines()
    assert received == body


LEGACY_KEY = "Ab3dEf"


@pytest.fixture(scope="module")
def legacy_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("legacy_table", EXAMPLES / "legacy_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def legacy_database(legacy_table: ModuleType, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "legacy.db", isolation_level=None)) as db:
        db.execute(legacy_table.LEGACY_TABLE)
        yield db


@pytest.mark.parametrize(
    ("columns", "token", "status"),
    [
        pytest.param(
            ("Acme", 70, 30, "2030-12-31", 0),
            Token(name="Acme", total_available=70, total_used=30, expires_at=1924992000),
            200,
            id="all-columns",
        ),
        pytest.param((None, None, None, None, None), Token(), 200, id="null"),
        pytest.param(("", 0, 0, "", 0), Token(), 200, id="empty"),
        pytest.param(
            ("Zoë", -5, 105, None, 0), Token(name="Zoë", total_available=-5, total_used=105), 200, id="overdrawn"
        ),
        pytest.param(("", 1, 0, "2001-01-01", 0), Token(total_available=1, expires_at=978393600), 200, id="expired"),
        pytest.param(("", 1, 0, None, 1), Token(total_available=1, enabled=False), 401, id="blocked"),
    ],
)
def test_a_row_of_the_legacy_table_becomes_a_token(
    legacy_table: ModuleType,
    legacy_database: sqlite3.Connection,
    tmp_path: Path,
    columns: tuple[object, ...],
    token: Token,
    status: int,
) -> None:
    legacy_database.execute("INSERT INTO api_clients VALUES (?, ?, ?, ?, ?, ?)", (LEGACY_KEY, *columns))
    store = legacy_table.LegacyTokenStore(str(tmp_path / "legacy.db"))
    client = Client(UsageMiddleware(NotFound(), store))

    assert store.get(LEGACY_KEY) == token
    assert client.get(PATH, headers={"Authorization": f"Bearer sk-{LEGACY_KEY}"}).status_code == status


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("ab3def", id="wrong-case"),
        pytest.param("Ab3dE", id="beginning"),
        pytest.param("Ab3dEf ", id="space-at-the-end"),
        pytest.param("Ab3%", id="pattern"),
        pytest.param("' OR '1'='1", id="quotes"),
        pytest.param("", id="empty"),
    ],
)
def test_only_the_exact_key_finds_a_legacy_client(
    legacy_table: ModuleType, legacy_database: sqlite3.Connection, tmp_path: Path, key: str
) -> None:
    legacy_database.execute("INSERT INTO api_clients (apikey) VALUES (?)", (LEGACY_KEY,))
    store = legacy_table.LegacyTokenStore(str(tmp_path / "legacy.db"))

    assert store.get(LEGACY_KEY) is not None
    assert store.get(key) is None


def test_a_legacy_client_is_found_by_the_index(legacy_table: ModuleType, legacy_database: sqlite3.Connection) -> None:
    (step,) = legacy_database.execute("EXPLAIN QUERY PLAN " + legacy_table.QUERY, {"key": LEGACY_KEY}).fetchall()
    assert re.fullmatch(r"SEARCH .*USING INDEX .*\(apikey=\?\)", step[3])


def test_an_unreadable_date_does_not_mean_never(
    legacy_table: ModuleType, legacy_database: sqlite3.Connection, tmp_path: Path
) -> None:
    legacy_database.execute("INSERT INTO api_clients (apikey, valid_until) VALUES (?, '31.12.2030')", (LEGACY_KEY,))
    with pytest.raises(ValueError, match="isoformat"):
        legacy_table.LegacyTokenStore(str(tmp_path / "legacy.db")).get(LEGACY_KEY)


def test_a_legacy_database_that_does_not_exist_is_not_created(legacy_table: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        legacy_table.LegacyTokenStore(str(tmp_path / "missing.db")).get(LEGACY_KEY)
    assert list(tmp_path.iterdir()) == []
