"""The event with the usage is removed from a stream, wherever it is cut into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_answers import CHAT_STREAM, DONE, OPENAI_USAGE, USAGE_CHUNK, chat_chunk, compact, event

from usage_middleware.wsgi.meter.asking import UsageFilter
from usage_middleware.wsgi.meter.figures import Figures
from usage_middleware.wsgi.meter.streams import MOST_EVENT, EventStream

EXTRA = event(USAGE_CHUNK)


def passed(chunks, figures=None):
    """Return what the client gets for each chunk, and at the end."""
    figures = figures or Figures()
    usage_filter = UsageFilter(EventStream(figures), figures)
    out = [usage_filter.pass_on(chunk) for chunk in chunks]
    return [*out, usage_filter.rest()]


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("end", [DONE, b"", b": the end\n"])
def test_the_event_with_the_usage_is_removed(newline, end):
    data = (b"".join(CHAT_STREAM[:-1]) + end).replace(b"\n", newline)
    expected = data.replace(EXTRA.replace(b"\n", newline), b"")
    assert len(expected) < len(data)
    for size in range(1, len(data) + 1):
        figures = Figures()
        client = b"".join(passed(cut(data, size), figures))
        # If a chunk ends within CRLF, the LF may stay, which is an empty line.
        assert client == expected or (newline == b"\r\n" and client.replace(b"\n\n", b"\n") == expected), size
        assert figures.counts.input == 19
        assert figures.final


def test_a_complete_event_is_passed_on_at_once():
    out = passed(CHAT_STREAM)
    assert out == [*CHAT_STREAM[:3], b"", DONE, b""]
    half = len(CHAT_STREAM[0]) // 2
    out = passed([CHAT_STREAM[0][:half], CHAT_STREAM[0][half:]])
    assert out == [b"", CHAT_STREAM[0], b""]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(event({**chat_chunk("a"), "usage": OPENAI_USAGE}), id="usage beside a choice"),
        pytest.param(event({"choices": [], "usage": None}), id="no choices, and null"),
        pytest.param(event({"choices": [], "prompt_filter_results": []}), id="no choices, as Azure begins"),
        pytest.param(event({"usage": OPENAI_USAGE}), id="usage without choices"),
        pytest.param(event({"choices": [], "usage": {}}), id="usage without figures"),
        pytest.param(event({"a": USAGE_CHUNK}), id="deeper"),
        pytest.param(event([USAGE_CHUNK]), id="in an array"),
        pytest.param(b": " + compact(USAGE_CHUNK) + b"\n\n", id="a comment"),
        pytest.param(b"event: ping\n\n\n\n: comment\n\nid: 5\n\n", id="other fields"),
        pytest.param(b"data: \xff\xfe usage\n\n", id="bytes"),
        pytest.param(b'data: {"usage"', id="the end is missing"),
    ],
)
def test_all_other_events_pass(data):
    for size in range(1, len(data) + 1):
        assert b"".join(passed(cut(data, size))) == data


def test_usage_at_the_end_needs_no_blank_line():
    assert b"".join(passed([CHAT_STREAM[0], EXTRA[:-2]])) == CHAT_STREAM[0]
    assert b"".join(passed([CHAT_STREAM[0] + EXTRA[:-1]])) == CHAT_STREAM[0]


@pytest.mark.parametrize("size", [1000, 2**16, 2**22])
def test_an_event_that_is_too_large_is_not_held(size):
    data = b"data: " + b"x" * (3 * MOST_EVENT) + b"\n\n" + EXTRA + DONE
    out = passed(cut(data, size))
    assert b"".join(out) == data.replace(EXTRA, b"")
    assert max(map(len, out)) <= size + 2 * MOST_EVENT + 1000
    # Many lines without data are not held either.
    data = b"data: {\n" + b": comment\n" * 300_000 + b"data: }\n\n" + EXTRA + DONE
    out = passed(cut(data, 2**16))
    assert b"".join(out) == data.replace(EXTRA, b"")
    assert max(map(len, out)) <= 2 * MOST_EVENT + 2**17


PIECES = [EXTRA, *CHAT_STREAM, b": c\n", b"\n", b"\r", b"\r\n", b"data: x\r\r", b"id: 1\r\n", b"event: error\n\n", b"x"]


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), sizes=st.lists(st.integers(1, 400), min_size=1))
def test_what_the_client_reads_does_not_depend_on_the_chunks(pieces, sizes):
    data = b"".join(pieces)
    chunks, at = [], 0
    while at < len(data):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[at : at + size])
        at += size
    whole, in_chunks = b"".join(passed([data])), b"".join(passed(chunks))
    assert events_of(in_chunks) == events_of(whole) == [e for e in events_of(data) if b'"choices":[]' not in e]


def events_of(data):
    """Return the data of each event, as a client reads it."""
    events = []
    for block in data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        lines = [line for line in block.split(b"\n") if line.startswith(b"data:")]
        if lines:
            events.append(b"\n".join(lines))
    return events
