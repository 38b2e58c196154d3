"""Event streams and JSON are read while they pass, wherever they are cut into chunks."""

import contextlib
import gzip
import itertools
import json
import random
import tracemalloc
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from llm_answers import ANTHROPIC_STREAM, CHAT_STREAM, GEMINI_STREAM, OPENAI_USAGE, compact, responses_stream

from usage_middleware.wsgi.meter.figures import Figures, TokenCounts
from usage_middleware.wsgi.meter.streams import MOST_EVENT, MOST_JSON, EventStream, Gunzipped, JSONBody

USAGE = compact({"usage": OPENAI_USAGE})
COUNTED = TokenCounts(input=19, output=10, cached=4)
OTHER = compact({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})


def read(chunks, body=EventStream, *, end=True):
    """Return the figures of a body that arrives in these chunks."""
    figures = Figures()
    reader = body(figures)
    for chunk in chunks:
        reader.feed(chunk)
    if end:
        reader.end()
    return figures


def state(figures):
    return figures.counts, figures.model, figures.complete, figures.final, figures.failed, figures.extra_events


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


STREAMS = {
    "chat": (CHAT_STREAM, COUNTED, True),
    "anthropic": (ANTHROPIC_STREAM, TokenCounts(25 + 7 + 30, 15, 30), True),
    "responses": (responses_stream(), TokenCounts(36, 87, 16), True),
    "gemini": (GEMINI_STREAM, TokenCounts(10, 23, 5), False),
}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", STREAMS)
def test_chunks_of_every_size_give_the_same_usage(name, newline):
    events, counts, complete = STREAMS[name]
    data = b"".join(events).replace(b"\n", newline)
    for size in range(1, len(data) + 1):
        figures = read(cut(data, size), end=False)
        assert (figures.counts, figures.complete) == (counts, complete), size


FIELDS = st.sampled_from(
    [
        b"data: " + USAGE,
        b"data:" + OTHER,
        b'data: {"usage":',
        b"data: " + compact(OPENAI_USAGE) + b"}",
        b'data: {"choices":[],',
        b'data: "usage":' + compact(OPENAI_USAGE) + b"}",
        b'data: {"choices":[],"usage":null}',
        b'data: {"choices":[{"delta":{"content":"usage \\u0075 error [DONE"}}]}',
        b"data: " + compact({"choices": [], "usage": OPENAI_USAGE}),
        b"data",
        b"data:",
        b"data: [DONE]",
        b"event: ping",
        b"event:error",
        b": comment of usage",
        b"id: 7",
        b"retry: 10",
        b"\xff\xfe",
        b"\xef\xbb\xbfdata: " + USAGE,
        b"",
        b"",
    ]
)
LINES = st.lists(st.tuples(FIELDS, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=12)


@given(lines=LINES, last=FIELDS, cuts=st.lists(st.integers(0, 600), max_size=8))
@example(lines=[(b"data: " + USAGE, b"\r")], last=b"", cuts=[])
def test_where_a_stream_is_cut_does_not_matter(lines, last, cuts):
    data = b"".join(line + newline for line, newline in lines) + last
    at = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    chunks = [data[begin:end] for begin, end in itertools.pairwise(at)]
    whole = state(read([data]))
    assert state(read(chunks)) == whole
    assert state(read(cut(data, 1))) == whole
    # A parser that follows the standard to the letter, except at the end, finds the same.
    assert whole == state(parsed(data))


def parsed(data):
    """Return the figures of a whole stream, by the steps of the standard."""
    figures = Figures()
    kind, values = b"", []
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for line in [*text.split(b"\n"), b""]:
        if not line:
            whole = b"\n".join(values)
            if kind == b"error":
                figures.failed = figures.complete = True
            else:
                with contextlib.suppress(ValueError):
                    figures.take_event(json.loads(whole))
            kind, values = b"", []
            continue
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            values.append(value)
            if values == [b"[DONE]"]:
                figures.complete = True
        elif name == b"event":
            kind = value
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "counts"),
    [
        pytest.param(b"data: " + USAGE + b"\n\n", COUNTED, id="an event"),
        pytest.param(b"data: " + USAGE, COUNTED, id="no line ending after it"),
        pytest.param(b"data: " + USAGE + b"\n", COUNTED, id="no blank line after it"),
        pytest.param(b"data:" + USAGE + b"\n\n", COUNTED, id="no space"),
        pytest.param(b"data:  " + USAGE + b"\n\n", COUNTED, id="two spaces"),
        pytest.param(b'data: {"usage":\ndata: ' + compact(OPENAI_USAGE) + b"}\n\n", COUNTED, id="data lines join"),
        pytest.param(b": " + USAGE + b"\n\n", None, id="a comment"),
        pytest.param(b"datum: " + USAGE + b"\n\n", None, id="another field"),
        pytest.param(b" data: " + USAGE + b"\n\n", None, id="a space before the field"),
        pytest.param(b"data: " + OTHER + b"\n\ndata: " + USAGE + b"\n\n", COUNTED, id="the last one"),
        pytest.param(b'data: {"usage":null}\n\ndata: ' + USAGE + b'\n\ndata: {"usage":null}\n\n', COUNTED, id="null"),
        pytest.param(b"\xef\xbb\xbfdata: " + USAGE + b"\n\n", COUNTED, id="a byte order mark"),
        pytest.param(b'data: {"\\u0075sage":' + compact(OPENAI_USAGE) + b"}\n\n", COUNTED, id="an escaped name"),
        pytest.param(b"data: {" + USAGE + b"\n\ndata: usage\n\n", None, id="not JSON"),
        pytest.param(b"data: " + b"[" * 100_000 + b'"usage"' + b"\n\n", None, id="nested deeply"),
        pytest.param(b"data: " + b"[" + b"[]," * 300_000 + b'"usage"]' + b"\n\n", None, id="many values"),
        pytest.param(b"data: [" + USAGE + b"]\n\n", None, id="not an object"),
        pytest.param(b'data: {"a":' + USAGE + b"}\n\n", None, id="not at the top"),
    ],
)
def test_usage_is_found_in_valid_events_only(stream, counts):
    assert read([stream]).counts == counts
    assert read(cut(stream, 7)).counts == counts


@pytest.mark.parametrize(
    ("stream", "complete", "failed"),
    [
        pytest.param(b"data: [DONE]\n", True, False, id="[DONE], before its blank line"),
        pytest.param(b"data:[DONE]\n\n", True, False, id="[DONE] without a space"),
        pytest.param(b": [DONE]\n\n", False, False, id="[DONE] in a comment"),
        pytest.param(b'data: "[DONE]"\n\n', False, False, id="[DONE] in JSON"),
        pytest.param(b"event: error\ndata: overloaded\n\n", True, True, id="an event of type error"),
        pytest.param(b'data: {"type":"error","error":{"type":"overloaded_error"}}\n\n', True, True, id="Anthropic's"),
        pytest.param(b'data: {"error":{"message":"no","code":500}}\n\n', True, True, id="OpenAI's and Gemini's"),
        pytest.param(b'data: {"error":null}\n\n', False, False, id="an error that is null"),
        pytest.param(b'data: {"choices":[{"delta":{"content":"error"}}]}\n\n', False, False, id="a word"),
        pytest.param(b"event: message\ndata: an error\n\n", False, False, id="a word in an event of another type"),
        pytest.param(b'data: {"type":"message_stop"}\n\n', True, False, id="Anthropic's end"),
    ],
)
def test_the_end_of_a_stream_is_recognised(stream, complete, failed):
    for chunks in ([stream], cut(stream, 1)):
        figures = read(chunks, end=False)
        assert (figures.complete, figures.failed) == (complete, failed)


@pytest.mark.parametrize(
    ("last", "usage", "counts", "failed"),
    [
        ("response.completed", {"input_tokens": 3, "output_tokens": 4}, TokenCounts(3, 4, 0), False),
        ("response.incomplete", {"input_tokens": 3, "output_tokens": 4}, TokenCounts(3, 4, 0), False),
        ("response.failed", None, None, True),
        ("response.failed", {"input_tokens": 3, "output_tokens": 4}, TokenCounts(3, 4, 0), True),
    ],
)
def test_the_end_of_a_response_is_recognised(last, usage, counts, failed):
    figures = read(responses_stream(last, usage), end=False)
    assert (figures.counts, figures.complete, figures.failed) == (counts, True, failed)


@pytest.mark.parametrize("size", [2**16, 2**20, 10**7])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_line_that_is_too_long_is_not_read(size, newline):
    too_long = b'data: {"usage":' + compact(OPENAI_USAGE) + b',"pad":"' + b"x" * MOST_EVENT + b'"}'
    stream = (too_long + b"\n\ndata: " + OTHER + b"\n\n").replace(b"\n", newline)
    assert read(cut(stream, size)).counts == TokenCounts(1, 1, 0)
    # A shorter line of the same event is not read either.
    stream = (too_long + b"\ndata: " + USAGE + b"\n\ndata: " + OTHER + b"\n\n").replace(b"\n", newline)
    assert read(cut(stream, size)).counts == TokenCounts(1, 1, 0)


def test_the_longest_line_is_read():
    for length, counts in ((MOST_EVENT, COUNTED), (MOST_EVENT + 1, None)):
        head = b'data:{"usage":' + compact(OPENAI_USAGE) + b',"pad":"'
        line = head + b"x" * (length - len(head) - 2) + b'"}'
        assert len(line) == length
        for chunks in ([line + b"\n\n"], cut(line + b"\n\n", 10_000)):
            assert read(chunks).counts == counts


@pytest.mark.slow
def test_an_event_of_many_lines_is_bounded():
    tracemalloc.start()
    try:
        figures = Figures()
        stream = EventStream(figures)
        for _ in range(60):
            stream.feed(b"data:\n" * 20_000)
        assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    finally:
        tracemalloc.stop()
    stream.feed(b"\n\ndata: " + USAGE + b"\n\n")
    assert figures.counts == COUNTED


def test_a_long_line_in_single_bytes_takes_linear_time():
    # It is a mebibyte. If it were copied for each byte, this would take hours.
    stream = EventStream(figures := Figures())
    for _ in range(MOST_EVENT + 10):
        stream.feed(b"x")
    stream.feed(b"\n\ndata: " + USAGE + b"\n\n")
    assert figures.counts == COUNTED


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        pytest.param(USAGE, COUNTED, id="an object"),
        pytest.param(b"\xef\xbb\xbf" + USAGE, COUNTED, id="a byte order mark"),
        pytest.param(b" \n" + USAGE + b"\n", COUNTED, id="white space"),
        pytest.param(USAGE[:-1], None, id="cut"),
        pytest.param(USAGE + USAGE, None, id="two objects"),
        pytest.param(b"", None, id="empty"),
        pytest.param(b"null", None, id="null"),
        pytest.param(b'"usage"', None, id="a string"),
        pytest.param(b"[" + USAGE + b"]", COUNTED, id="an array, as Gemini streams without alt=sse"),
        pytest.param(b"[1,[],null," + OTHER + b"," + USAGE + b"]", COUNTED, id="the last of an array"),
        pytest.param(b"[[" + USAGE + b"]]", None, id="deeper in an array"),
        pytest.param(b'{"choices":[' + USAGE + b"]}", None, id="deeper"),
        pytest.param(b"[" * 10**6, None, id="nested deeply"),
        pytest.param(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, None, id="objects nested deeply"),
        pytest.param(b"[" + b"[]," * 4_000_000 + b"1]", None, id="many values"),
        pytest.param(b"\xff" * 100, None, id="not text"),
    ],
)
def test_usage_is_found_at_the_top_of_a_body_only(body, counts):
    assert read([body], JSONBody).counts == counts
    assert read(cut(body, 1 + len(body) // 7), JSONBody).counts == counts


def test_the_largest_body_is_read():
    for size, counts in ((MOST_JSON, COUNTED), (MOST_JSON + 1, None)):
        body = USAGE[:-1] + b',"pad":"' + b"x" * (size - len(USAGE) - len(b',"pad":""')) + b'"}'
        assert len(body) == size
        assert read(cut(body, 2**16), JSONBody).counts == counts


@pytest.mark.slow
def test_the_memory_for_a_body_is_bounded():
    tracemalloc.start()
    try:
        reader = JSONBody(Figures())
        for number in range(2**20):
            reader.feed(b"%16d" % number)
        reader.end()
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST_JSON
    finally:
        tracemalloc.stop()


def gunzip(chunks):
    out = []
    reader = Gunzipped(out.append)
    for chunk in chunks:
        reader.feed(chunk)
    return b"".join(out)


@pytest.mark.parametrize("size", [1, 7, 1000, 10**7])
@pytest.mark.parametrize("times", [1, 3000])
def test_gzip_is_decompressed_as_it_comes(size, times):
    noise = random.Random(1).randbytes(50)
    data = (noise + b"".join(CHAT_STREAM)) * times
    assert gunzip(cut(gzip.compress(data), size)) == data
    # RFC 1952 section 2.2: members follow each other.
    assert gunzip(cut(gzip.compress(data) + gzip.compress(b"more"), size)) == data + b"more"


def test_flushed_gzip_is_read_before_its_end():
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for part in CHAT_STREAM:
        data = compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH)
        assert data
    figures = Figures()
    reader = Gunzipped(EventStream(figures).feed)
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for part in CHAT_STREAM:
        assert not figures.complete
        reader.feed(compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH))
    assert figures.complete
    assert figures.counts == COUNTED


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"not gzip at all", id="not gzip"),
        pytest.param(zlib.compress(USAGE), id="zlib"),
        pytest.param(gzip.compress(b"x" * 1000)[:20] + b"\0" * 100, id="damaged"),
    ],
)
def test_what_is_not_gzip_is_ignored(data):
    gunzip([data, data])


def test_a_decompression_bomb_is_not_read_to_its_end():
    bomb = gzip.compress(bytes(2**28), compresslevel=1)
    sizes = []
    reader = Gunzipped(lambda data: sizes.append(len(data)))
    for chunk in cut(bomb, 2**16):
        reader.feed(chunk)
    assert max(sizes) <= 2**16
    assert sum(sizes) < 2**28 // 4
