"""The meter under real WSGI servers, directly and in front of :class:`Proxy`: what is charged, and when.

If a server cannot do something, the test is an expected failure whose reason says what.
"""

from __future__ import annotations

import re
import socket
import time
from contextlib import closing, suppress

import pytest
from llm_answers import CHAT_STREAM, USAGE_CHUNK, event
from metered_front import COMMANDS, Front, body_so_far, leave, request
from metered_rows import CHAT, FIXED, MOST, ROWS, STATED
from places import TESTS
from raw_service import WAIT

pytestmark = [pytest.mark.servers, pytest.mark.slow]


@pytest.fixture(scope="module", params=list(COMMANDS))
def front(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with Front(request.param, directory).running() as front:
        yield front
    # The exceptions of the host and of the service reach the server. Nothing else is raised.
    for frames, error in re.findall(r"^.*Traceback .*\n((?: .*\n)+)(\S.*)", front.log, re.MULTILINE):
        expected = ("RuntimeError: before the head", "RuntimeError: after the head", "UpstreamError")
        if front.name == "granian":
            expected += ("TypeError: 'NoneType' object is not callable",)  # its write()
        assert any(text in error for text in expected) or "/wsgi/meter/" not in frames, front.log


def cannot(request, front, reasons):
    """Expect the test to fail on a server that cannot do something."""
    if front.name in reasons:
        request.applymarker(pytest.mark.xfail(reason=f"{front.name} {reasons[front.name]}", strict=True))


@pytest.mark.parametrize("place", ["direct", "proxied"])
@pytest.mark.parametrize("name", list(ROWS))
def test_each_row_of_the_table_is_charged(front, place, name):
    row = ROWS[name]
    key, token_id = front.token(MOST)
    path = f"/{place}/{row.cost}/{name}"
    client = socket.create_connection(("127.0.0.1", front.port), timeout=WAIT)
    received = b""
    with closing(client), suppress(ConnectionResetError):
        client.sendall(request(path, key, row.method.encode(), b"Connection: close"))
        while row.leaves_after is None or len(body_so_far(received)) < row.leaves_after:
            piece = client.recv(65_536)
            if not piece:
                break
            received += piece
        if row.leaves_after is not None:
            leave(client)
    (operation,) = front.settled(token_id)
    assert operation.final_amount == row.units
    assert b"x-usage-cost" not in received.lower()
    if row.end == "whole" and row.leaves_after is None and row.method != "HEAD":
        assert body_so_far(received) == row.body
    if name == "much":
        answer = front.ask(path, key)
        assert answer.status == 402
        assert front.store.get_by_id(token_id).total_available == MOST - 900


@pytest.mark.parametrize("place", ["direct", "proxied"])
@pytest.mark.parametrize(
    "name", ["list", "chunks", "stated", "json", "json-length", "json-list", "events", "anthropic"]
)
def test_the_balance_is_final_after_the_last_byte(front, full, place, name):
    row = ROWS[name]
    key, token_id = front.token(10**6)
    path = f"/{place}/{row.cost}/{name}"
    stale = 0
    count = 25 if full else 3  # 400 on each server
    for number in range(1, count + 1):
        with front.connect() as connection:
            connection.send(request(path, key, b"GET", b"Connection: close"))
            answer = connection.read(b"GET")
            stale += front.store.get_by_id(token_id).total_used != number * row.units
        assert answer.body == row.body
        front.settled(token_id, number)
    assert stale == 0, f"{stale} of {count}"


def test_a_connection_goes_on_after_a_refusal(front):
    """Nothing has read the body of a request that is refused."""
    key, token_id = front.token(10)
    with front.connect() as connection:
        for wanted, target, sent in (
            (200, "/direct/one/list", key),
            (401, "/direct/one/echo", "unknown-key"),
            (402, "/direct/llm/echo", key),
            (200, "/direct/one/list", key),
        ):
            body = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n" * 100 if wanted != 200 else b""
            method = b"POST" if body else b"GET"
            headers = [b"Content-Length: %d" % len(body)] if body else []
            connection.send(request(target, sent, method, *headers, body=body))
            answer = connection.read(method)
            if answer is None:  # HTTP lets a server close a connection unannounced
                break
            assert answer.status == wanted
            if answer.is_last:
                break
    assert all(o.final_amount == 1 for o in front.settled(token_id, len(list(front.store.history(token_id)))))


def test_the_body_of_a_request_reaches_the_host(front):
    key, _ = front.token()
    for size in (0, 1000, 3 * 2**20):
        body = b'{"model":"gpt-4o","stream":false,"a":"' + b"x" * size + b'"}'
        for cost in ("fixed", "ask"):
            answer = front.ask(
                f"/direct/{cost}/echo",
                key,
                b"POST",
                b"Content-Type: application/json",
                b"Content-Length: %d" % len(body),
                body=body,
            )
            assert (answer.status, answer.body) == (200, body)


def test_the_usage_is_asked_for_and_removed(front):
    key, token_id = front.token()
    body = b'{"stream":true,"messages":[]}'
    answer = front.ask("/direct/ask/events", key, b"POST", b"Content-Length: %d" % len(body), body=body)
    assert answer.body == b"".join(CHAT_STREAM).replace(event(USAGE_CHUNK), b"")
    assert [o.final_amount for o in front.settled(token_id)] == [CHAT]


def test_a_file_is_sent_and_charged(front):
    key, token_id = front.token()
    expected = (TESTS / "support" / "meter" / "metered_app.py").read_bytes()
    for cost, units in (("fixed", FIXED), ("llm", MOST)):
        assert front.ask(f"/direct/{cost}/file", key).body == expected
        assert front.settled(token_id, 1 if cost == "fixed" else 2)[-1].final_amount == units


def test_what_write_sends_is_charged(front, request):
    cannot(request, front, {"granian": "has no write()"})
    key, token_id = front.token()
    assert front.ask("/direct/fixed/write", key).body == b"one two"
    assert front.settled(token_id)[0].final_amount == FIXED


def test_a_failed_settle_is_logged_and_retried(front):
    key, token_id = front.token()
    broken = front.directory / "tokens.db-broken"
    broken.touch()
    try:
        answer = front.ask("/direct/header/stated", key)
        assert (answer.status, answer.body) == (200, b"one two")
    finally:
        broken.unlink()
    (operation,) = front.store.history(token_id)
    assert operation.is_open
    assert f"usage-middleware settle {operation.id} {STATED}" in front.log
    assert key not in front.log
    assert front.ask("/direct/header/stated", key).status == 200
    assert [o.final_amount for o in front.settled(token_id, 2)] == [STATED, STATED]


STREAM = b"".join(CHAT_STREAM)
BEFORE_USAGE = len(b"".join(CHAT_STREAM[:3]))


def test_a_client_that_leaves_at_any_byte_is_charged_once(front, full):
    """It is charged what was reserved, or the usage once that was sent."""
    key, token_id = front.token(10**7)
    # From the first byte on: who leaves before it may leave before a busy server has read the request.
    steps = range(1, len(STREAM) + 1, 1 if full else 97)
    for at in (*steps, len(STREAM)):
        client = socket.create_connection(("127.0.0.1", front.port), timeout=WAIT)
        received = b""
        client.sendall(request("/direct/llm/done-left", key))
        while len(body_so_far(received)) < at:
            received += client.recv(min(65_536, at - len(body_so_far(received)) + 20))
        leave(client)
    operations = front.settled(token_id, len(steps) + 1)
    for at, operation in zip((*steps, len(STREAM)), operations, strict=True):
        assert operation.final_amount in ((CHAT,) if at >= len(STREAM) else (CHAT, MOST)), at


def test_a_slow_service_is_charged(front):
    key, token_id = front.token()
    with front.connect() as connection:
        connection.send(request("/direct/llm/slow", key, b"GET", b"Connection: close"))
        answer = connection.read(b"GET")
    assert answer.body == STREAM
    assert front.settled(token_id)[0].final_amount == CHAT


def test_a_large_answer_for_a_slow_client_takes_little_memory(front, full):
    mebibytes = 1024 if full else 32
    key, token_id = front.token()
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT) as client:
        client.sendall(request(f"/direct/llm/big?{mebibytes}", key, b"GET", b"Connection: close"))
        client.recv(100)
        before, most, received = front.memory(), 0, 0
        for _ in range(20):  # slow at first
            received += len(client.recv(1000))
            time.sleep(0.01)
        while piece := client.recv(2**20):
            received += len(piece)
            if received % (4 * 2**20) < len(piece):
                most = max(most, front.memory() - before)
    assert received > mebibytes * 2**20 * 0.95
    assert front.settled(token_id)[0].final_amount == CHAT
    assert most < 64 * 2**20
