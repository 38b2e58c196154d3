"""What each outcome of a request is charged: the table of the meter, row by row."""

import gzip
import itertools
from threading import Event

import pytest
from client import environ
from llm_answers import ANTHROPIC_STREAM, CHAT_BODY, CHAT_STREAM, GEMINI_STREAM, compact, event, responses_stream
from metering import KEY, Host, interrupted
from raw_service import WAIT, serving
from werkzeug.exceptions import ClientDisconnected

from usage_middleware import FromHeader, LLMUsage, Proxy

MOST = 500
HEADER = FromHeader("X-Usage-Cost", most=MOST)
LLM = LLMUsage(most=MOST)
STATED = [("X-Usage-Cost", "7")]
JSON = [("Content-Type", "application/json")]
EVENTS = [("Content-Type", "text/event-stream")]
CHAT = 29  # tokens of CHAT_BODY and CHAT_STREAM


class Greenlet(BaseException):
    """A stand-in for gevent's GreenletExit."""


def host(chunks=(b"a", b"b"), status="200 OK", headers=()):
    answer = Host(chunks, status)
    answer.headers = list(headers)
    return answer


def length(chunks, headers=JSON):
    return [*headers, ("Content-Length", str(sum(map(len, chunks))))]


CHAT_CHUNKS = [compact(CHAT_BODY)[:20], compact(CHAT_BODY)[20:]]


@pytest.mark.parametrize(
    ("cost", "app", "settled"),
    [
        pytest.param(3, host(), (3, "fixed", "completed"), id="fixed"),
        pytest.param(3, host([]), (3, "fixed", "completed"), id="fixed, no body"),
        pytest.param(3, host(status="302 Found"), (3, "fixed", "completed"), id="fixed, 302"),
        pytest.param(0, host(), (0, "fixed", "completed"), id="fixed, nothing"),
        pytest.param(HEADER, host(headers=STATED), (7, "stated", "completed"), id="stated"),
        pytest.param(HEADER, host([], headers=STATED), (7, "stated", "completed"), id="stated, no body"),
        pytest.param(HEADER, host(), (MOST, "reserved", "completed"), id="not stated"),
        pytest.param(HEADER, host(headers=STATED * 2), (MOST, "reserved", "completed"), id="stated twice"),
        pytest.param(
            HEADER,
            host(headers=[("X-Usage-Cost", "900")]),
            (900, "stated", "completed"),
            id="stated, more than reserved",
        ),
        pytest.param(LLM, host(CHAT_CHUNKS, headers=JSON), (CHAT, "measured", "completed"), id="JSON"),
        pytest.param(
            LLM,
            host(CHAT_CHUNKS, headers=length(CHAT_CHUNKS)),
            (CHAT, "measured", "completed"),
            id="JSON with its length",
        ),
        pytest.param(
            LLM,
            host([gzip.compress(compact(CHAT_BODY))], headers=[*JSON, ("Content-Encoding", "gzip")]),
            (CHAT, "measured", "completed"),
            id="JSON in gzip",
        ),
        pytest.param(LLM, host(CHAT_STREAM, headers=EVENTS), (CHAT, "measured", "completed"), id="events"),
        pytest.param(
            LLM, host(ANTHROPIC_STREAM, headers=EVENTS), (77, "measured", "completed"), id="Anthropic's events"
        ),
        pytest.param(
            LLM, host(responses_stream(), headers=EVENTS), (123, "measured", "completed"), id="events of a response"
        ),
        pytest.param(LLM, host(GEMINI_STREAM, headers=EVENTS), (33, "measured", "completed"), id="Gemini's events"),
        pytest.param(
            LLM, host(CHAT_STREAM[:2], headers=EVENTS), (MOST, "reserved", "completed"), id="events without usage"
        ),
        pytest.param(LLM, host([b"{}"], headers=JSON), (MOST, "reserved", "completed"), id="JSON without usage"),
        pytest.param(
            LLM,
            host([b"\xff\xfb"], headers=[("Content-Type", "audio/mpeg")]),
            (MOST, "reserved", "completed"),
            id="audio",
        ),
        # 4xx and 5xx: what was stated, otherwise nothing.
        pytest.param(3, host(status="404 Not Found"), (0, "free", "rejected"), id="fixed, 404"),
        pytest.param(3, host(status="500 Oh"), (0, "free", "failed"), id="fixed, 500"),
        pytest.param(HEADER, host(status="404 Not Found", headers=STATED), (7, "stated", "rejected"), id="stated, 404"),
        pytest.param(HEADER, host(status="503 Oh", headers=STATED), (7, "stated", "failed"), id="stated, 503"),
        pytest.param(HEADER, host(status="503 Oh"), (0, "free", "failed"), id="not stated, 503"),
        pytest.param(HEADER, host(status="503 Oh", headers=STATED * 2), (0, "free", "failed"), id="stated twice, 503"),
        pytest.param(LLM, host(CHAT_CHUNKS, "429 Too Many Requests", JSON), (0, "free", "rejected"), id="JSON, 429"),
        pytest.param(LLM, host(CHAT_STREAM, "500 Oh", EVENTS), (0, "free", "failed"), id="events, 500"),
        # An error in the answer itself.
        pytest.param(
            LLM,
            host([CHAT_STREAM[0], event({"error": {"message": "no"}})], headers=EVENTS),
            (0, "measured", "failed"),
            id="an error event",
        ),
        pytest.param(
            LLM,
            host([*ANTHROPIC_STREAM[:3], event({"type": "error"}, "error")], headers=EVENTS),
            (63, "measured", "failed"),
            id="an error event after usage",
        ),
        pytest.param(
            LLM,
            host(responses_stream("response.failed", None), headers=EVENTS),
            (0, "measured", "failed"),
            id="a response that failed",
        ),
        # The service sent less than the length that it has announced.
        pytest.param(3, host(headers=[("Content-Length", "3")]), (0, "free", "failed"), id="fixed, cut"),
        pytest.param(
            HEADER, host(headers=[*STATED, ("Content-Length", "3")]), (7, "stated", "completed"), id="stated, cut"
        ),
        pytest.param(LLM, host(CHAT_CHUNKS[:1], headers=length(CHAT_CHUNKS)), (0, "free", "failed"), id="JSON, cut"),
    ],
)
def test_an_answer_that_ends_is_charged_by_the_table(metered, cost, app, settled):
    app.closed = 0
    metered = metered(app, cost=cost)
    body = metered.serve().finish()
    assert body == b"".join(app.chunks)
    assert metered.settled() == settled
    assert app.closed == 1
    settlement = metered.settlement
    assert settlement.status == int(app.status[:3])
    assert settlement.settled
    assert settlement.reserved == (cost if isinstance(cost, int) else MOST)
    assert settlement.seconds > 0
    assert settlement.token_id == metered.token_id
    assert metered.store.operation(settlement.operation_id).final_amount == settlement.units


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "304 Not Modified"])
@pytest.mark.parametrize(
    ("cost", "headers", "units"),
    [
        pytest.param(3, [], 3, id="fixed"),
        pytest.param(HEADER, STATED, 7, id="stated"),
        pytest.param(HEADER, [], 0, id="not stated"),
        pytest.param(LLM, JSON, 0, id="measured"),
        pytest.param(LLM, [*EVENTS, ("Content-Length", "99")], 0, id="measured, with a length"),
    ],
)
@pytest.mark.parametrize("is_iterated", [True, False])
def test_an_answer_without_a_body_is_charged_what_is_fixed_or_stated(
    metered, status, cost, headers, units, is_iterated
):
    metered = metered(host([], status, headers), cost=cost)
    served = metered.serve("HEAD" if status.startswith("200") else "DELETE")
    if is_iterated:
        served.finish()
    else:
        served.close()
    assert metered.used == units
    assert metered.settlement.basis == {3: "fixed", 7: "stated", 0: "free"}[units]


@pytest.mark.parametrize("cost", [3, HEADER, LLM], ids=["fixed", "header", "LLM"])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, Greenlet, GeneratorExit])
def test_an_exception_before_the_head_is_free(metered, cost, error):
    def app(environ, start_response):
        environ["usage_middleware.charge"](9)
        raise error

    metered = metered(app, cost=cost)
    with pytest.raises(error):
        metered.serve()
    assert metered.settled() == (0, "free", "failed")
    assert metered.settlement.status is None


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, Greenlet])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("cost", "chunks", "headers", "settled"),
    [
        pytest.param(3, [b"a"], [], (0, "free", "failed"), id="fixed"),
        pytest.param(3, [], [], (0, "free", "failed"), id="fixed, at once"),
        pytest.param(HEADER, [b"a"], STATED, (7, "stated", "completed"), id="stated"),
        pytest.param(HEADER, [], STATED, (7, "stated", "failed"), id="stated, at once"),
        pytest.param(HEADER, [b"a"], [], (0, "free", "failed"), id="not stated"),
        pytest.param(LLM, CHAT_CHUNKS[:1], JSON, (0, "free", "failed"), id="JSON"),
        pytest.param(LLM, CHAT_STREAM[:2], EVENTS, (0, "free", "failed"), id="events"),
        pytest.param(LLM, CHAT_STREAM[:4], EVENTS, (CHAT, "measured", "failed"), id="events, usage seen"),
        pytest.param(LLM, CHAT_STREAM, EVENTS, (CHAT, "measured", "completed"), id="events, all seen"),
        pytest.param(LLM, ANTHROPIC_STREAM[:3], EVENTS, (63, "measured", "failed"), id="Anthropic's events"),
    ],
)
def test_an_exception_after_the_head_is_charged_what_is_known(metered, error, late, cost, chunks, headers, settled):
    app = host([*chunks, error("cut")], headers=headers)
    app.late = late
    metered = metered(app, cost=cost)
    with pytest.raises(error, match="cut"):
        metered.serve().finish()
    assert metered.settled() == settled
    assert app.closed == 1


def left(served, chunks):
    """Read that many chunks, and close the answer as if the client had left."""
    for _ in range(chunks):
        served.next()
    served.close()


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize(
    ("abandoned", "cost", "units"),
    [
        ("reserved", 3, 3),
        ("measured", 3, 3),
        ("free", 3, 0),
        ("reserved", HEADER, MOST),
        ("measured", HEADER, MOST),
        ("free", HEADER, 0),
        ("reserved", LLM, MOST),
        ("free", LLM, 0),
    ],
)
def test_a_client_that_leaves_is_charged_as_abandoned_says(metered, chunks, abandoned, cost, units):
    app = host(CHAT_STREAM, headers=EVENTS)
    metered = metered(app, cost=cost, abandoned=abandoned)
    left(metered.serve(), chunks)
    assert metered.settled() == (units, "reserved" if units else "free", "abandoned")
    assert app.closed == 1


@pytest.mark.parametrize("abandoned", ["reserved", "measured", "free"])
@pytest.mark.parametrize(
    ("chunks", "headers", "seen", "settled"),
    [
        pytest.param(CHAT_STREAM, EVENTS, 4, (CHAT, "measured", "abandoned"), id="OpenAI, usage seen"),
        pytest.param(CHAT_STREAM, EVENTS, 5, (CHAT, "measured", "completed"), id="OpenAI, [DONE] seen"),
        pytest.param(ANTHROPIC_STREAM, EVENTS, 4, (77, "measured", "abandoned"), id="Anthropic, usage seen"),
        pytest.param(ANTHROPIC_STREAM, EVENTS, 5, (77, "measured", "completed"), id="Anthropic, message_stop seen"),
        pytest.param(responses_stream(), EVENTS, 3, (123, "measured", "completed"), id="response.completed seen"),
        pytest.param(GEMINI_STREAM, EVENTS, 2, (33, "measured", "abandoned"), id="Gemini, usage seen"),
        pytest.param([b"a", b"b"], STATED, 1, (7, "stated", "completed"), id="stated"),
        pytest.param([b"a", b"b"], STATED, 0, (7, "stated", "abandoned"), id="stated, nothing seen"),
        pytest.param(CHAT_CHUNKS, JSON, 0, (CHAT, "measured", "abandoned"), id="JSON, nothing seen"),
        pytest.param(CHAT_CHUNKS, JSON, 1, (CHAT, "measured", "abandoned"), id="JSON, half seen"),
        pytest.param(CHAT_CHUNKS, JSON, 2, (CHAT, "measured", "abandoned"), id="JSON, all but the end seen"),
        pytest.param(
            CHAT_CHUNKS, length(CHAT_CHUNKS), 1, (CHAT, "measured", "abandoned"), id="JSON with its length, half seen"
        ),
        pytest.param(
            CHAT_CHUNKS, length(CHAT_CHUNKS), 2, (CHAT, "measured", "completed"), id="JSON with its length, all seen"
        ),
    ],
)
def test_a_client_that_leaves_is_charged_the_cost_if_it_is_known(metered, abandoned, chunks, headers, seen, settled):
    app = host(chunks, headers=headers)
    metered = metered(app, cost=HEADER if headers is STATED else LLM, abandoned=abandoned)
    left(metered.serve(), seen)
    assert metered.settled() == settled
    assert app.closed == 1


def test_abandoned_measured_charges_the_usage_so_far(metered):
    metered = metered(host(ANTHROPIC_STREAM, headers=EVENTS), cost=LLM, abandoned="measured")
    left(metered.serve(), 2)
    assert metered.settled() == (63, "measured", "abandoned")


class Counter:
    """Chunks that count how many of them were read."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.read = 0

    def __iter__(self):
        for chunk in self.chunks:
            self.read += 1
            yield chunk


@pytest.mark.parametrize(
    ("padding", "announced", "read", "units"),
    [
        pytest.param(15, False, 17, CHAT, id="little"),
        pytest.param(17, False, 18, MOST, id="much"),
        pytest.param(10**9, False, 18, MOST, id="without end"),
        pytest.param(15, True, 17, CHAT, id="little, announced"),
        pytest.param(17, True, 1, MOST, id="much, announced"),
    ],
)
def test_only_a_bounded_amount_of_json_is_drained(metered, padding, announced, read, units):
    chunks = Counter(itertools.chain([CHAT_CHUNKS[0]], itertools.repeat(b" " * 2**16, padding), CHAT_CHUNKS[1:]))
    size = len(b"".join(CHAT_CHUNKS)) + padding * 2**16
    app = host(chunks, headers=[*JSON, ("Content-Length", str(size))] if announced else JSON)
    metered = metered(app, cost=LLM)
    left(metered.serve(), 1)
    assert metered.settled() == (units, "reserved" if units == MOST else "measured", "abandoned")
    assert chunks.read == read


@pytest.mark.parametrize(
    ("status", "headers", "cost"),
    [
        ("200 OK", EVENTS, LLM),
        ("200 OK", JSON, 3),
        ("200 OK", [*JSON, *STATED], HEADER),
        ("400 Bad Request", JSON, LLM),
    ],
)
def test_an_answer_that_does_not_contain_the_cost_is_not_drained(metered, status, headers, cost):
    chunks = Counter([b"{", b"}"])
    metered = metered(host(chunks, status, headers), cost=cost)
    metered.serve().close()
    assert chunks.read == 0
    assert len(metered.settlements) == 1


def test_a_failure_during_draining_is_charged_what_was_reserved(metered):
    app = host([CHAT_CHUNKS[0], ValueError("cut")], headers=JSON)
    metered = metered(app, cost=LLM)
    left(metered.serve(), 1)
    assert metered.settled() == (MOST, "reserved", "abandoned")
    assert app.closed == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Greenlet])
@pytest.mark.parametrize(
    ("chunks", "headers", "units"),
    [(CHAT_STREAM, EVENTS, 0), (ANTHROPIC_STREAM, EVENTS, 62 + 1), (CHAT_CHUNKS, JSON, 0)],
)
def test_a_stopped_worker_charges_the_usage_so_far(metered, error, chunks, headers, units):
    """The signal arrives while the server sends. The server closes the answer while the exception passes."""
    app = host(chunks, headers=headers)
    metered = metered(app, cost=LLM)
    served = metered.serve()
    served.next()
    interrupted(error())(served.close)
    assert metered.settled() == (units, "measured" if units else "free", "failed")
    assert app.closed == 1


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError, TimeoutError, GeneratorExit])
def test_a_server_that_cannot_send_has_lost_its_client(metered, error):
    metered = metered(host(CHAT_STREAM, headers=EVENTS), cost=LLM)
    served = metered.serve()
    served.next()
    interrupted(error())(served.close)
    assert metered.settled() == (MOST, "reserved", "abandoned")


def test_an_application_that_cannot_write_has_lost_its_client(metered):
    def app(environ, start_response):
        write = start_response("200 OK", [])
        write(b"one")
        try:
            write(b"two")
        except BrokenPipeError:
            raise RuntimeError("what the application makes of it") from None

    def start_response(status, headers):
        return sent.append

    class Sent(list):
        def append(self, data):
            if self:
                raise BrokenPipeError
            super().append(data)

    sent = Sent()
    metered = metered(app, cost=3)
    with pytest.raises(RuntimeError):
        metered.meter(environ("GET", "/work", HTTP_AUTHORIZATION=f"Bearer {KEY}"), start_response)
    assert sent == [b"one"]
    assert metered.settled() == (3, "reserved", "abandoned")


@pytest.mark.parametrize(
    ("has_head", "settled"), [(True, (3, "reserved", "abandoned")), (False, (0, "free", "failed"))]
)
def test_a_client_that_breaks_off_its_request_has_left(metered, has_head, settled):
    """werkzeug raises this if an application reads a request that is not complete."""

    def app(environ, start_response):
        if has_head:
            start_response("200 OK", [])
        raise ClientDisconnected

    metered = metered(app, cost=3)
    with pytest.raises(ClientDisconnected):
        metered.serve().finish()
    assert metered.settled() == settled


def test_a_client_that_holds_back_its_request_and_breaks_it_off_pays(metered):
    """Some services answer before they have read all of the request, and the client gets most of the answer."""

    def handle(connection):
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nanswer\r\n")
        has_answer.set()
        return connection.is_closed_by_peer()

    class Body:
        blocks = iter([b"{}", b" "])

        def read(self, size):
            block = next(self.blocks, b"")
            assert block == b"{}" or has_answer.wait(WAIT)
            return block

    has_answer = Event()
    with serving(handle) as service:
        metered = metered(Proxy(service.url), cost=3)
        served = metered.serve("POST", CONTENT_LENGTH="9", **{"wsgi.input": Body()})
        assert served.next() == b"answer"
        with pytest.raises(ClientDisconnected):
            served.next()
        served.close()
        assert service.result()
    assert metered.settled() == (3, "reserved", "abandoned")


# --- What the application states through environ


def stating(*calls, chunks=(b"a", b"b"), status="200 OK", headers=(), error=None):
    """Return an application that states its cost. ``calls`` are pairs of the number of a chunk and units."""
    app = host(chunks, status, headers)

    def on_chunk(number):
        for at, units in calls:
            if at == number:
                app.environ["usage_middleware.charge"](units)
        if error is not None and number == 1:
            raise error

    app.on_chunk = on_chunk
    return app


@pytest.mark.parametrize(
    ("cost", "app", "settled"),
    [
        pytest.param(3, stating((0, 5)), (5, "stated", "completed"), id="instead of a fixed amount"),
        pytest.param(3, stating((0, 5), (1, 8)), (8, "stated", "completed"), id="twice"),
        pytest.param(
            LLM,
            stating((0, 5), chunks=CHAT_STREAM, headers=EVENTS),
            (5, "stated", "completed"),
            id="instead of what is measured",
        ),
        pytest.param(HEADER, stating((0, 5), headers=STATED), (5, "stated", "completed"), id="instead of a header"),
        pytest.param(3, stating((0, 5), status="500 Oh"), (5, "stated", "failed"), id="500"),
        pytest.param(3, stating((0, 0)), (0, "stated", "completed"), id="nothing"),
        pytest.param(3, stating((0, 5000)), (5000, "stated", "completed"), id="more than there is"),
    ],
)
def test_what_the_application_states_is_charged(metered, cost, app, settled):
    metered = metered(app, cost=cost)
    metered.serve().finish()
    assert metered.settled() == settled


def test_what_the_application_states_before_it_fails_is_charged(metered):
    metered = metered(stating((0, 5), error=ValueError("cut")))
    with pytest.raises(ValueError, match="cut"):
        metered.serve().finish()
    assert metered.settled() == (5, "stated", "failed")


def test_what_the_application_states_before_its_client_leaves_is_charged(metered):
    metered = metered(stating((0, 5)), abandoned="free")
    left(metered.serve(), 1)
    assert metered.settled() == (5, "stated", "abandoned")


def test_what_the_application_states_in_close_is_charged(metered):
    class Closing:
        def __init__(self, charge):
            self.charge = charge

        def __iter__(self):
            yield b"a"

        def close(self):
            self.charge(6, input_tokens=2, output_tokens=4)

    def app(environ, start_response):
        start_response("200 OK", [])
        return Closing(environ["usage_middleware.charge"])

    metered = metered(app)
    left(metered.serve(), 1)
    assert metered.settled() == (6, "stated", "abandoned")
    assert (metered.settlement.input_tokens, metered.settlement.output_tokens) == (2, 4)


def test_what_the_application_states_too_late_is_logged(metered, caplog):
    app = host([b"a"], headers=[("Content-Length", "1")])
    metered = metered(app)
    served = metered.serve()
    served.next()
    app.environ["usage_middleware.charge"](5)
    served.rest()
    assert metered.settled() == (1, "fixed", "completed")
    assert "after its request was settled" in caplog.text


@pytest.mark.parametrize("units", [-1, 1.5, "5", True])
def test_what_the_application_states_is_checked(metered, units):
    metered = metered(stating((0, units)))
    with pytest.raises((TypeError, ValueError), match="must be"):
        metered.serve().finish()
    assert metered.settled() == (0, "free", "failed")


@pytest.mark.parametrize("error", [ValueError, SystemExit, Greenlet])
def test_an_exception_is_settled_before_the_answer_is_closed(metered, error):
    """A server may close the answer much later, or never."""
    metered = metered(host([b"a", error()]))
    served = metered.serve()
    served.next()
    with pytest.raises(error):
        served.next()
    assert metered.settled() == (0, "free", "failed")
    served.close()
    assert len(metered.settlements) == 1
