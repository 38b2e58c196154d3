"""How answers pass through the meter, as a server and an application see it."""

import io
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from client import ask, environ
from llm_answers import CHAT_BODY, CHAT_STREAM, DONE, USAGE_CHUNK, chat_chunk, compact, event
from metering import KEY, Host

from usage_middleware import FromHeader, LLMUsage, Usage

JSON = ("Content-Type", "application/json")
EVENTS = ("Content-Type", "text/event-stream")
HEADER = FromHeader("X-Usage-Cost", most=500)
STATED = ("X-Usage-Cost", "7")
LLM = LLMUsage(most=500)


class Costly:
    """A cost of the host's own, which counts bytes."""

    complete = False

    def most(self, environ):
        return 500

    least = most

    def reader(self, status, headers):
        self.read = []
        return self

    def feed(self, data):
        self.read.append(data)

    def result(self, *, ended):
        return Usage(sum(map(len, self.read)))


def balance_at_each_chunk(metered, served):
    """Return what is used after each chunk and at the end, as a client would read it."""
    used = []
    while True:
        try:
            served.next()
        except StopIteration:
            return [*used, metered.token.total_used]
        used.append(metered.token.total_used)


@pytest.mark.parametrize(
    ("cost", "chunks", "headers", "used"),
    [
        pytest.param(3, [b"a", b"b", b"c"], [], [3, 3, 3, 3], id="fixed: reserved as it is charged"),
        pytest.param(HEADER, [b"a", b"b"], [STATED], [7, 7, 7], id="stated: before the first chunk"),
        pytest.param(HEADER, [b"", b"a"], [STATED], [500, 7, 7], id="not before an empty chunk"),
        pytest.param(
            LLM,
            [compact(CHAT_BODY)],
            [JSON, ("Content-Length", str(len(compact(CHAT_BODY))))],
            [29, 29],
            id="JSON: before the last byte of its length",
        ),
        pytest.param(LLM, [compact(CHAT_BODY)], [JSON], [500, 29], id="JSON: at the end"),
        pytest.param(LLM, [*CHAT_STREAM], [EVENTS], [500, 500, 500, 500, 29, 29], id="events: before [DONE]"),
        pytest.param(LLM, [b"".join(CHAT_STREAM)], [EVENTS], [29, 29], id="events: in one chunk"),
        pytest.param(
            LLM, [b"".join(CHAT_STREAM)[:-1], b"\n"], [EVENTS], [29, 29, 29], id="events: at the line of [DONE]"
        ),
        pytest.param(LLM, [*CHAT_STREAM[:4]], [EVENTS], [500, 500, 500, 500, 29], id="events: at the end"),
        pytest.param(
            LLM, [CHAT_STREAM[0], event({"error": {"code": 1}})], [EVENTS], [500, 0, 0], id="events: before an error"
        ),
    ],
)
def test_a_request_is_settled_before_its_last_byte(metered, cost, chunks, headers, used):
    app = Host(chunks)
    app.headers = headers
    metered = metered(app, cost=cost)
    served = metered.serve()
    assert metered.token.total_used == (3 if cost == 3 else 500)
    assert balance_at_each_chunk(metered, served) == used
    served.close()
    assert metered.used == used[-1]
    assert len(metered.settlements) == 1


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize(
    ("cost", "chunks", "headers", "used"),
    [
        (3, [b"a", b"b"], [], 3),
        (HEADER, [b"a"], [STATED], 7),
        (LLM, [compact(CHAT_BODY)], [JSON], 29),
        (LLM, CHAT_STREAM, [EVENTS], 29),
        (LLM, [], [JSON], 500),
    ],
)
def test_a_list_is_settled_and_returned_as_it_is(metered, kind, cost, chunks, headers, used):
    chunks = kind(chunks)

    def app(environ, start_response):
        start_response("200 OK", headers)
        return chunks

    metered = metered(app, cost=cost)
    served = metered.serve()
    assert served.result is chunks
    assert metered.used == used


def test_a_request_is_settled_once_whatever_the_server_calls(metered):
    app = Host(CHAT_STREAM)
    app.headers = [EVENTS]
    metered = metered(app, cost=LLM)
    served = metered.serve()
    served.rest()
    for _ in range(2):
        with pytest.raises(StopIteration):
            served.next()
    served.close()
    served.close()
    assert len(metered.settlements) == 1
    assert app.closed == 1


def test_the_iterable_is_closed_before_the_request_is_settled(metered):
    order = []

    class Answer:
        def __iter__(self):
            return iter([b"a"])  # an iterator without close()

        def close(self):
            order.append(("close", metered.token.total_used))

    def app(environ, start_response):
        start_response("200 OK", [])
        return Answer()

    metered = metered(app, cost=HEADER, abandoned="free")
    metered.serve().close()
    assert order == [("close", 500)]
    assert metered.used == 0


def test_an_error_in_close_is_raised_after_settling(metered):
    class Answer:
        def __iter__(self):
            return iter([b"a"])

        def close(self):
            raise ValueError("in close")

    def app(environ, start_response):
        start_response("200 OK", [])
        return Answer()

    metered = metered(app)
    with pytest.raises(ValueError, match="in close"):
        metered.serve().close()
    assert metered.settled() == (1, "reserved", "abandoned")


def test_an_answer_that_is_closed_unread_is_settled(metered):
    """Closing a generator that was not started runs none of its code, so the iterable must not be one."""
    app = Host()
    metered = metered(app)
    metered.serve().close()
    assert app.closed == 1
    assert metered.settled() == (1, "reserved", "abandoned")


def test_an_answer_that_is_closed_before_its_head_is_settled(metered):
    app = Host(late=True)
    metered = metered(app, abandoned="free")
    metered.serve().close()
    assert metered.settled() == (0, "free", "abandoned")
    assert metered.settlement.status is None


def test_an_answer_without_any_head_is_a_failure(metered):
    metered = metered(lambda environ, start_response: [b"a"])
    served = metered.serve()
    assert served.result == [b"a"]
    assert metered.settled() == (0, "free", "failed")


def test_an_iterable_that_cannot_be_iterated_over_is_a_failure(metered):
    class Broken:
        def __iter__(self):
            raise ValueError("no iterator")

    def app(environ, start_response):
        start_response("200 OK", [])
        return Broken()

    metered = metered(app)
    with pytest.raises(ValueError, match="no iterator"):
        metered.serve().finish()
    assert metered.settled() == (0, "free", "failed")


# --- start_response


def test_the_head_passes_as_it_is(metered):
    headers = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Usage-Cost-Unit", "\xfc")]
    given = []

    def app(environ, start_response):
        start_response("299 Whatever It Was", headers)
        return [b"a"]

    def start_response(*arguments):
        given.append(arguments)

    metered = metered(app, cost=HEADER)
    metered.meter(environ("GET", "/", HTTP_AUTHORIZATION=f"Bearer {KEY}"), start_response)
    # There is no third argument, which not every server accepts, and the list is the same object.
    assert given == [("299 Whatever It Was", headers)]
    assert given[0][1] is headers


@pytest.mark.parametrize("name", ["X-Usage-Cost", "x-usage-cost", "X_Usage_Cost"])
def test_the_cost_header_is_removed_from_request_and_answer(metered, name):
    app = Host(headers=[(name, "7"), ("X-Other", "1")])
    metered = metered(app, cost=HEADER)
    served = metered.serve(HTTP_X_USAGE_COST="0")
    served.finish()
    assert served.headers == [("Content-Type", "text/plain"), ("X-Other", "1")]
    assert "HTTP_X_USAGE_COST" not in app.environ
    assert metered.used == 7


def test_the_head_may_be_replaced_before_the_first_chunk(metered):
    """Until the first chunk of the body, an application may begin another answer (PEP 3333)."""

    def app(environ, start_response):
        start_response("200 OK", [STATED])
        yield b""
        try:
            raise ValueError("an error")
        except ValueError:
            import sys

            start_response("500 Oh", [("X-Usage-Cost", "2")], sys.exc_info())
        yield b"sorry"

    metered = metered(app, cost=HEADER)
    served = metered.serve()
    assert served.finish() == b"sorry"
    assert [head[0] for head in served.heads] == ["200 OK", "500 Oh"]
    assert metered.settled() == (2, "stated", "failed")


def test_the_head_cannot_be_replaced_after_the_first_chunk(metered):
    def app(environ, start_response):
        start_response("200 OK", [STATED])
        yield b"begun"
        try:
            raise ValueError("an error")
        except ValueError as error:
            start_response("500 Oh", [], (type(error), error, error.__traceback__))
        yield b"never sent"

    metered = metered(app, cost=HEADER)
    served = metered.serve()
    with pytest.raises(ValueError, match="an error"):
        served.finish()
    assert served.written == [b"begun"]
    # It was settled before the first chunk was passed on.
    assert metered.settled() == (7, "stated", "completed")


def test_what_write_sends_is_measured_too(metered):
    cost = Costly()

    def app(environ, start_response):
        write = start_response("200 OK", [])
        write(b"one")
        write(b"two")
        return [b"three"]

    metered = metered(app, cost=cost)
    served = metered.serve()
    assert served.written == [b"one", b"two"]
    assert cost.read == [b"one", b"two", b"three"]
    assert metered.settled() == (11, "measured", "completed")


def test_a_request_is_settled_before_its_last_byte_is_written(metered):
    used = []

    def app(environ, start_response):
        write = start_response("200 OK", [("Content-Length", "6")])
        for data in (b"one", b"two"):
            write(data)
            used.append(metered.token.total_used)
        return []

    metered = metered(app, cost=Costly())
    metered.serve()
    assert used == [500, 6]


def test_a_server_needs_no_write(metered):
    def app(environ, start_response):
        assert start_response("200 OK", []) is None
        return [b"a"]

    metered = metered(app)
    request = environ("GET", "/", HTTP_AUTHORIZATION=f"Bearer {KEY}")
    assert metered.meter(request, lambda status, headers: None) == [b"a"]


# --- wsgi.file_wrapper


@pytest.mark.parametrize(
    ("cost", "headers", "units", "is_same"),
    [
        pytest.param(3, [], 3, True, id="fixed"),
        pytest.param(HEADER, [STATED], 7, True, id="stated"),
        pytest.param(HEADER, [], 500, True, id="not stated"),
        pytest.param(LLM, [JSON], 29, False, id="measured"),
        pytest.param(LLM, [("Content-Type", "video/mp4")], 500, True, id="cannot be measured"),
        pytest.param(Costly(), [JSON], len(compact(CHAT_BODY)), False, id="a cost of the host"),
    ],
)
def test_a_file_is_left_to_the_server_unless_it_is_measured(metered, cost, headers, units, is_same):
    def app(environ, start_response):
        start_response("200 OK", headers)
        return environ["wsgi.file_wrapper"](io.BytesIO(compact(CHAT_BODY)))

    metered = metered(app, cost=cost)
    served = metered.serve(**{"wsgi.file_wrapper": FileWrapper})
    assert isinstance(served.result, FileWrapper) is is_same
    if is_same:
        # The server sends the file without another call of the meter.
        assert metered.used == units
    assert served.finish() == compact(CHAT_BODY)
    assert metered.used == units


def test_a_file_that_is_not_found_is_free(metered):
    def app(environ, start_response):
        start_response("404 Not Found", [])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"no"))

    metered = metered(app)
    served = metered.serve(**{"wsgi.file_wrapper": FileWrapper})
    assert isinstance(served.result, FileWrapper)
    assert metered.settled() == (0, "free", "rejected")


# --- Asking for the usage

ASKING = LLMUsage(most=500, ask=True)
STREAM = compact({"model": "gpt-4o", "stream": True, "messages": []})


def asked(metered, app, body=STREAM, cost=ASKING, **variables):
    metered = metered(app, cost=cost)
    served = metered.serve("POST", "/v1/chat/completions", body=body, CONTENT_TYPE="application/json", **variables)
    return metered, served


@pytest.mark.parametrize("cut", [None, 1, 7, 50, 333])
def test_the_usage_is_asked_for_and_removed(metered, cut):
    data = b"".join(CHAT_STREAM)
    chunks = CHAT_STREAM if cut is None else [data[at : at + cut] for at in range(0, len(data), cut)]
    app = Host(chunks, headers=[("Content-Length", str(len(data)))])
    app.headers[0] = EVENTS
    metered, served = asked(metered, app)
    assert b'"include_usage": true' in app.environ["wsgi.input"].read()
    received = []
    used = []
    for chunk in served.result:
        assert chunk
        received.append(chunk)
        used.append(metered.token.total_used)
    served.close()
    assert b"".join(received) == data.replace(event(USAGE_CHUNK), b"")
    # Without the usage, the announced length would be wrong, so the header is removed.
    assert served.headers == [EVENTS]
    assert metered.settled() == (29, "measured", "completed")
    assert used[-1] == 29
    assert app.environ["wsgi.input"].closed


def test_a_client_that_asks_gets_the_usage(metered):
    app = Host(CHAT_STREAM)
    app.headers = [EVENTS]
    metered, served = asked(metered, app, compact({"stream": True, "stream_options": {"include_usage": True}}))
    assert served.finish() == b"".join(CHAT_STREAM)
    assert metered.used == 29


def test_the_rest_comes_at_the_end_and_after_the_settle(metered):
    chunks = [event(chat_chunk("a")), event(USAGE_CHUNK), b"data: unfinished"]
    app = Host(chunks)
    app.headers = [EVENTS]
    metered, served = asked(metered, app)
    assert served.next() == chunks[0]
    assert served.next() == b"data: unfinished"
    assert metered.used == 29
    with pytest.raises(StopIteration):
        served.next()


def test_the_usage_is_removed_from_a_list_of_events(metered):
    def app(environ, start_response):
        start_response("200 OK", [EVENTS])
        return list(CHAT_STREAM)

    metered, served = asked(metered, app)
    assert served.finish() == b"".join(CHAT_STREAM).replace(event(USAGE_CHUNK), b"")
    assert metered.used == 29


@pytest.mark.parametrize("headers", [[JSON], [EVENTS, ("Content-Encoding", "gzip")]])
def test_what_is_not_a_stream_of_events_is_not_changed(metered, headers):
    app = Host([compact(CHAT_BODY)])
    app.headers = [*headers, ("Content-Length", str(len(compact(CHAT_BODY))))]
    _, served = asked(metered, app)
    assert served.finish() == compact(CHAT_BODY)
    assert served.headers == app.headers


def test_an_error_does_not_lose_its_body(metered):
    app = Host([b'{"error":{}}'], "400 Bad Request")
    app.headers = [JSON]
    metered, served = asked(metered, app)
    assert served.finish() == b'{"error":{}}'
    assert metered.settled() == (0, "free", "rejected")


# --- Hosts that fail


def test_a_request_whose_reader_fails_is_charged_what_was_reserved(metered, caplog):
    for method, phase in (("reader", 0), ("feed", 1), ("result", 2)):

        class Broken(Costly):
            pass

        def fail(self, *arguments, **options):
            raise ValueError("a bug")

        setattr(Broken, method, fail)
        made = metered(Host([b"a", b"b"]), cost=Broken(), key=f"{phase}" * 20)
        assert made.serve(key=f"{phase}" * 20).finish() == b"ab"
        assert made.settled() == (500, "reserved", "completed")
        assert "the cost is unknown" in caplog.text
        caplog.clear()


def test_the_meter_conforms_to_pep_3333(metered):
    """wsgiref.validate on both sides of the meter."""
    app = Host([b"a", b"b"])
    metered = metered(app, cost=HEADER, model="m")
    metered.meter.app = validator(app)
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        app.chunks = [] if method == "HEAD" else [b"a", b"b"]
        answer = ask(metered.meter, method, "/x", authorization=f"Bearer {KEY}")
        assert answer.status == 200
    for authorization in (None, "Bearer wrong"):
        assert ask(metered.meter, "GET", "/x", authorization=authorization).status == 401
        assert ask(metered.meter, "HEAD", "/x", authorization=authorization).body == b""


def test_chunks_are_the_same_objects(metered):
    chunks = [b"some bytes", bytearray(b"more"), DONE]
    app = Host(chunks)
    app.headers = [EVENTS]
    metered = metered(app, cost=LLM)
    served = metered.serve()
    assert all(served.next() is chunk for chunk in chunks)
