"""A hostile service or client: no error is unhandled, each request is settled once, and memory is bounded."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_answers import ANTHROPIC_STREAM, CHAT_BODY, CHAT_STREAM, DONE, compact, event
from metering import KEY, Metered, Served

from usage_middleware import FromHeader, LLMUsage, MemoryTokenStore, llm_key, requested_model

MOST = 500
COSTS = {
    "fixed": 3,
    "header": FromHeader("X-Usage-Cost", most=MOST),
    "llm": LLMUsage(most=MOST),
    "ask": LLMUsage(most=MOST, ask=True),
}

latin1 = st.text(st.characters(max_codepoint=255), max_size=20)
headers = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "Content-Type",
                "content-type",
                "Content-Length",
                "Content-Encoding",
                "X-Usage-Cost",
                "x_usage_cost",
                "X-A",
            ]
        ),
        st.sampled_from(
            [
                *(
                    "text/event-stream",
                    "application/json",
                    "text/event-stream;charset=x",
                    ";",
                    "",
                    "gzip",
                    "identity",
                    "br",
                ),
                *("5", "0", "-1", "99999999999999999999", "1e3", "\xb2", "3, 4", "12", "500"),
            ]
        )
        | latin1,
    ),
    max_size=5,
)
PIECES = [
    *CHAT_STREAM,
    *ANTHROPIC_STREAM,
    DONE,
    compact(CHAT_BODY),
    gzip.compress(b"".join(CHAT_STREAM)),
    gzip.compress(compact(CHAT_BODY))[:30],
    zlib.compress(b"x"),
    event({"usage": {"prompt_tokens": 10**30}}),
    event({"usage": {"prompt_tokens": {}}}),
    event({"type": ["message_start"], "message": 5}),
    event({"type": "message_delta", "usage": {"output_tokens": -1}}),
    event({"type": "response.completed", "response": None}),
    b'data: {"usage": ' + b"[" * 5000,
    b"data: " + b"9" * 5000 + b"\n\n",
    b'data: {"usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}\n\n",
    b'data: {"usage": NaN}\r\r',
    b"\r",
    b"\n",
    b"\0",
    b"",
]
chunks = st.lists(st.sampled_from(PIECES) | st.binary(max_size=50), max_size=8)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    cost=st.sampled_from(list(COSTS)),
    status=st.sampled_from(
        ["200 OK", "204 No Content", "304 Not", "404 Not Found", "500 Oh", "299", "xyz", "999 ?", ""]
    ),
    head=headers,
    chunks=chunks,
    how=st.sampled_from(["list", "iterator", "write", "late"]),
    end=st.sampled_from(["whole", "raise", "leave"]),
    method=st.sampled_from(["GET", "HEAD", "POST"]),
    abandoned=st.sampled_from(["reserved", "measured", "free"]),
)
def test_any_answer_is_settled_once(cost, status, head, chunks, how, end, method, abandoned):
    def body():
        yield from chunks
        if end == "raise":
            raise RuntimeError("of the service")

    def late(start_response):
        start_response(status, head)
        yield from body()

    def app(environ, start_response):
        if how == "late":
            return late(start_response)
        write = start_response(status, head)
        if how == "write":
            for chunk in chunks:
                write(chunk)
            return []
        return list(chunks) if how == "list" else body()

    with MemoryTokenStore() as store:
        metered = Metered(store, app, cost=COSTS[cost], abandoned=abandoned)
        request = compact({"stream": True}) if cost == "ask" else b""
        served = metered.serve(method, body=request, CONTENT_TYPE="application/json")
        received = []
        with suppress(RuntimeError):
            for number, chunk in enumerate(served.result):
                received.append(chunk)
                if end == "leave" and number == 2:
                    break
        served.close()
        if how == "list":
            assert served.result == chunks or cost == "ask"
        elif how != "write" and cost != "ask":
            assert received == chunks[: len(received)]
            assert len(received) == len(chunks) or end == "leave"
        settlement = metered.settlement
        assert metered.used == settlement.units
        assert settlement.settled
        assert all("usage" not in name.lower() for name, _ in served.headers) or cost != "header"


json_text = st.recursive(
    st.sampled_from(["null", "true", "1", "1e400", "NaN", '"a"', '"\\ud800"', '"\\u0000"', "[]", "{}", '"model"']),
    lambda values: (
        st.lists(values, max_size=3).map(lambda items: "[" + ",".join(items) + "]")
        | st.lists(
            st.tuples(
                st.sampled_from(['"model"', '"stream"', '"stream_options"', '"Model"', '"include_usage"', '""']), values
            ),
            max_size=4,
        ).map(lambda items: "{" + ",".join(f"{name}:{value}" for name, value in items) + "}")
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    body=json_text.map(str.encode) | st.binary(max_size=60) | json_text.map(lambda text: text[:-1].encode("utf-16")),
    length=st.sampled_from(["right", "none", "wrong", "text"]),
    kind=st.sampled_from(["application/json", "text/plain", "", "multipart/form-data; boundary=x"]),
    variables=st.dictionaries(
        st.sampled_from(
            [
                *("HTTP_AUTHORIZATION", "HTTP_X_API_KEY", "HTTP_X_GOOG_API_KEY", "HTTP_ACCEPT_ENCODING"),
                *("HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_ENCODING", "HTTP_ORIGIN", "HTTP_X_USAGE_COST", "REMOTE_ADDR"),
            ]
        ),
        st.sampled_from([f"Bearer {KEY}", KEY, "gzip;q=x", "chunked", "https://a.example", "*;q=0"]) | latin1,
    ),
    path=latin1,
)
def test_any_request_is_settled_once_or_refused(body, length, kind, variables, path):
    def app(environ, start_response):
        environ["wsgi.input"].read()
        start_response("200 OK", [])
        return [b"done"]

    if length == "right":
        variables["CONTENT_LENGTH"] = str(len(body))
    elif length == "wrong":
        variables["CONTENT_LENGTH"] = str(len(body) + 5)
    elif length == "text":
        variables["CONTENT_LENGTH"] = "many"
    with MemoryTokenStore() as store:
        metered = Metered(
            store,
            app,
            cost=COSTS["ask"],
            model=requested_model,
            find_key=llm_key,
            forward_key=False,
            exempt=("/free/",),
        )
        served = Served(
            metered.meter, "POST", path, key=None, body=body, CONTENT_TYPE=kind, **{"HTTP_X_API_KEY": KEY, **variables}
        )
        served.finish()
        assert served.status in (200, 400, 401, 402, 411, 413, 415)
        assert len(metered.settlements) == (served.status == 200 and not path.startswith("/free/"))
        assert metered.used >= 0


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["llm", "ask"])
@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        pytest.param("text/event-stream", CHAT_STREAM[0] * 100, id="events"),
        pytest.param("text/event-stream", b"x" * 16_000, id="one line"),
        pytest.param("text/event-stream", (b"data: " + b"x" * 200 + b"\n") * 80, id="one event"),
        pytest.param("text/event-stream", (b": usage" + b"x" * 200 + b"\n") * 80, id="comments"),
        pytest.param("application/json", b"[" * 16_000, id="JSON"),
        pytest.param("video/mp4", b"x" * 16_000, id="another type"),
    ],
)
def test_a_long_answer_takes_little_memory(full, cost, kind, piece):
    size = (1024 if full else 24) * 2**20

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", kind)])
        for _ in range(size // len(piece)):
            yield piece

    with MemoryTokenStore() as store:
        metered = Metered(store, app, cost=COSTS[cost])
        body = compact({"stream": True})
        served = metered.serve("POST", body=body, CONTENT_TYPE="application/json")
        received = 0
        tracemalloc.start()
        try:
            for chunk in served.result:
                received += len(chunk)
            assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
        finally:
            tracemalloc.stop()
        assert received == size // len(piece) * len(piece)
        assert metered.settled() == (MOST, "reserved", "completed")
