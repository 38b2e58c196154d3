"""The usage that LLM services state, and its price."""

import gzip
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_answers import (
    ANTHROPIC_BODY,
    ANTHROPIC_STREAM,
    CHAT_BODY,
    CHAT_STREAM,
    DONE,
    GEMINI_PARTS,
    GEMINI_STREAM,
    RESPONSES_BODY,
    USAGE_CHUNK,
    chat_chunk,
    compact,
    event,
    responses_stream,
)

from usage_middleware import LLMUsage, Prices, Usage, per_million
from usage_middleware.wsgi.meter.figures import Figures, TokenCounts

JSON = [("Content-Type", "application/json")]
EVENTS = [("Content-Type", "text/event-stream; charset=utf-8")]
CHAT_JSON = compact(CHAT_BODY)
GZIP = gzip.compress(CHAT_JSON)
GZIP_EVENTS = gzip.compress(b"".join(CHAT_STREAM))
MOST = 9000
# All prices differ, so a token that is counted as another kind changes the sum.
PRICES = {"input": 1000, "output": 100_000, "cached": 10}


def usage(body, headers=JSON, *, ended=True, **arguments):
    """Return the usage of an answer. ``body`` is bytes or a list of chunks."""
    reader = LLMUsage(most=MOST, **(arguments or PRICES)).reader(200, headers)
    for chunk in [body] if isinstance(body, bytes) else body:
        reader.feed(chunk)
    return reader.result(ended=ended)


def priced(input_tokens, output_tokens, cached=0):
    units = (input_tokens - cached) * 1000 + cached * 10 + output_tokens * 100_000
    return Usage(units, input_tokens, output_tokens)


CHAT, ANTHROPIC, RESPONSES, GEMINI = priced(19, 10, 4), priced(62, 15, 30), priced(36, 87, 16), priced(10, 23, 5)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(CHAT_BODY, CHAT, id="OpenAI chat"),
        pytest.param({"usage": {"prompt_tokens": 5, "completion_tokens": 7}}, priced(5, 7), id="completions"),
        pytest.param({"usage": {"prompt_tokens": 8, "total_tokens": 8}}, priced(8, 0), id="embeddings"),
        pytest.param(RESPONSES_BODY, RESPONSES, id="OpenAI responses"),
        pytest.param(ANTHROPIC_BODY, ANTHROPIC, id="Anthropic"),
        pytest.param(
            {"usage": {"input_tokens": 2, "output_tokens": 3, "cache_read_input_tokens": None}},
            priced(2, 3),
            id="Anthropic, null",
        ),
        pytest.param(GEMINI_PARTS[1], GEMINI, id="Gemini"),
        pytest.param(GEMINI_PARTS, GEMINI, id="Gemini, an array"),
        pytest.param({"usageMetadata": {"promptTokenCount": 4}}, priced(4, 0), id="Gemini, blocked"),
        pytest.param({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, priced(0, 0), id="nothing used"),
        pytest.param({"usage": None}, None, id="null"),
        pytest.param({"usage": {}}, None, id="no figures"),
        pytest.param({"usage": {"total_tokens": 5}}, None, id="a total alone"),
        pytest.param({"usage": [1]}, None, id="a list"),
        pytest.param({"usage": 5}, None, id="a number"),
        pytest.param({}, None, id="none"),
        pytest.param({"error": {"message": "overloaded"}}, Usage(0), id="an error"),
        pytest.param({"error": {"message": "cut short"}, **CHAT_BODY}, CHAT, id="an error, and usage"),
        pytest.param({"message": {"usage": {"prompt_tokens": 1}}}, None, id="deeper"),
        pytest.param(
            {"choices": [{"message": {"tool_calls": [{"function": {"arguments": '{"usage":{"prompt_tokens":1}}'}}]}}]},
            None,
            id="in the arguments of a tool",
        ),
    ],
)
def test_usage_of_a_json_answer(body, expected):
    assert usage(compact(body)) == expected


@pytest.mark.parametrize("value", [1.0, 1e3, float("nan"), float("inf"), "5", True, -1, 2**63, [1], {}, 10**400])
@pytest.mark.parametrize(
    "place",
    [
        ("prompt_tokens",),
        ("completion_tokens",),
        ("prompt_tokens_details", "cached_tokens"),
    ],
    ids=".".join,
)
def test_figures_that_are_not_integers_make_the_usage_unknown(place, value):
    body = json.loads(json.dumps(CHAT_BODY))
    target = body["usage"]
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    assert usage(compact(body)) is None
    # In a stream the last figures count, even if they are not valid.
    assert usage([*CHAT_STREAM[:-1], event({"usage": body["usage"]}), DONE], EVENTS) is None


def test_more_cached_tokens_than_tokens_make_the_usage_unknown():
    body = {"usage": {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6}}}
    assert usage(compact(body)) is None


def test_a_cost_that_does_not_fit_a_database_is_unknown():
    most = 2**63 - 1
    body = compact({"usage": {"prompt_tokens": most, "completion_tokens": 0}})
    assert usage(body, input=1) == Usage(most, most, 0)
    assert usage(body, input=2) is None
    assert usage(compact({"usage": {"input_tokens": most, "cache_read_input_tokens": 1}}), input=0) is None


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(CHAT_STREAM, CHAT, id="OpenAI chat"),
        pytest.param(
            [event(chat_chunk("a", usage={"prompt_tokens": 1, "completion_tokens": 1})), *CHAT_STREAM],
            CHAT,
            id="usage in each event",
        ),
        pytest.param([event(chat_chunk("a")), DONE], None, id="a service that was not asked"),
        pytest.param(ANTHROPIC_STREAM, ANTHROPIC, id="Anthropic"),
        pytest.param(ANTHROPIC_STREAM[:1], priced(62, 1, 30), id="Anthropic, begun"),
        pytest.param(
            [
                *ANTHROPIC_STREAM[:-1],
                event({"type": "message_delta", "delta": {}, "usage": {"input_tokens": 5, "output_tokens": 20}}),
            ],
            priced(5 + 7 + 30, 20, 30),
            id="Anthropic, field by field",
        ),
        pytest.param(responses_stream(), RESPONSES, id="OpenAI responses"),
        pytest.param(responses_stream("response.incomplete"), RESPONSES, id="OpenAI responses, incomplete"),
        pytest.param(responses_stream("response.failed"), RESPONSES, id="OpenAI responses, failed"),
        pytest.param(responses_stream("response.failed", None), Usage(0), id="OpenAI responses, failed at once"),
        pytest.param(responses_stream("response.cancelled"), None, id="OpenAI responses, another end"),
        pytest.param(GEMINI_STREAM, GEMINI, id="Gemini"),
        pytest.param([event(chat_chunk("a")), event({"error": {"message": "no"}})], Usage(0), id="an error"),
        pytest.param(
            [*ANTHROPIC_STREAM[:3], event({"type": "error", "error": {}}, "error")],
            priced(62, 1, 30),
            id="an error after usage",
        ),
        pytest.param(
            [event({"type": "transcript.text.done", "usage": {"input_tokens": 14, "output_tokens": 45}})],
            priced(14, 45),
            id="OpenAI audio",
        ),
    ],
)
def test_usage_of_a_stream(stream, expected):
    assert usage(stream, EVENTS) == expected


@pytest.mark.parametrize(
    ("chunks", "final", "complete"),
    [
        pytest.param(CHAT_STREAM[:3], False, False, id="OpenAI, before its usage"),
        pytest.param(CHAT_STREAM[:4], True, False, id="OpenAI, before [DONE]"),
        pytest.param(CHAT_STREAM, True, True, id="OpenAI, all"),
        pytest.param([event(chat_chunk("a", usage={"prompt_tokens": 1}))], False, False, id="usage so far"),
        pytest.param(
            [event(chat_chunk(finish="stop", usage={"prompt_tokens": 1}))], True, False, id="with the reason to finish"
        ),
        pytest.param(ANTHROPIC_STREAM[:1], False, False, id="Anthropic, begun"),
        pytest.param(ANTHROPIC_STREAM[:4], True, False, id="Anthropic, before message_stop"),
        pytest.param(ANTHROPIC_STREAM, True, True, id="Anthropic, all"),
        pytest.param(GEMINI_STREAM[:1], False, False, id="Gemini, begun"),
        pytest.param(GEMINI_STREAM, True, False, id="Gemini, all"),
    ],
)
def test_when_the_usage_of_a_stream_is_final(chunks, final, complete):
    reader = LLMUsage(most=MOST).reader(200, EVENTS)
    for chunk in chunks:
        reader.feed(chunk)
    assert (reader.final, reader.complete) == (final, complete)


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        pytest.param([], CHAT_JSON, CHAT, id="no type"),
        pytest.param([("content-type", "APPLICATION/JSON; charset=utf-8")], CHAT_JSON, CHAT, id="in another case"),
        pytest.param([("Content-Type", "application/vnd.service+json")], CHAT_JSON, CHAT, id="a suffix"),
        pytest.param([("Content-Type", "text/html")], CHAT_JSON, None, id="HTML"),
        pytest.param([("Content-Type", "audio/mpeg")], b"\xff\xfb", None, id="audio"),
        pytest.param([*JSON, ("Content-Encoding", "gzip")], GZIP, CHAT, id="gzip"),
        pytest.param([*JSON, ("content-encoding", " GZIP ")], GZIP, CHAT, id="gzip in another case"),
        pytest.param([*JSON, ("Content-Encoding", "identity")], CHAT_JSON, CHAT, id="identity"),
        pytest.param([*JSON, ("Content-Encoding", "br")], CHAT_JSON, None, id="Brotli"),
        pytest.param(
            [*JSON, ("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")],
            gzip.compress(GZIP),
            None,
            id="gzip twice",
        ),
        pytest.param([*JSON, ("Content-Encoding", "gzip")], CHAT_JSON, None, id="not gzip"),
        pytest.param([*JSON, ("Content-Encoding", "gzip")], GZIP[:-20], None, id="gzip that is cut"),
        pytest.param([*EVENTS, ("Content-Encoding", "gzip")], GZIP_EVENTS, CHAT, id="events in gzip"),
        pytest.param([*EVENTS, ("Content-Encoding", "zstd")], b"".join(CHAT_STREAM), None, id="events in zstd"),
    ],
)
def test_content_type_and_coding_decide_what_is_read(headers, body, expected):
    assert usage(body, headers) == expected


COUNTS = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}


@pytest.mark.parametrize(
    ("prices", "units"),
    [
        pytest.param({}, 5, id="a unit for each token"),
        pytest.param({"input": 2, "output": 5}, 16, id="integers"),
        pytest.param({"input": 10, "output": 0, "cached": 1}, 21, id="cached tokens"),
        pytest.param({"input": 10, "output": 0, "cached": 0}, 20, id="cached tokens are free"),
        pytest.param({"input": 0, "output": 0}, 0, id="free"),
        pytest.param({"input": per_million(1), "output": per_million(1)}, 1, id="rounded up"),
        pytest.param({"input": Fraction(2, 5), "output": Fraction(2, 5)}, 2, id="rounded up once"),
        pytest.param({"input": Fraction(1, 3), "output": Fraction(1, 2)}, 2, id="fractions that come to a whole unit"),
        pytest.param({"input": Fraction(1, 3), "output": Fraction(1, 2), "cached": Fraction(1, 7)}, 2, id="fractions"),
    ],
)
def test_prices_are_added_and_rounded_up_once(prices, units):
    reader = LLMUsage(most=MOST, **prices).reader(200, JSON)
    reader.feed(compact(COUNTS))
    assert reader.result(ended=True) == Usage(units, 3, 2)


PRICE = st.one_of(st.integers(0, 10**9), st.integers(0, 10**9).map(per_million), st.fractions(0, 1000))
COUNT = st.integers(0, 10**6)


@given(fresh=COUNT, cached=COUNT, output=COUNT, prices=st.tuples(PRICE, PRICE, PRICE))
def test_prices_are_exact(fresh, cached, output, prices):
    body = {
        "prompt_tokens": fresh + cached,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    exact = fresh * Fraction(prices[0]) + output * Fraction(prices[1]) + cached * Fraction(prices[2])
    reader = LLMUsage(most=1, input=prices[0], output=prices[1], cached=prices[2]).reader(200, JSON)
    reader.feed(compact({"usage": body}))
    assert reader.result(ended=True) == Usage(math.ceil(exact), fresh + cached, output)


@pytest.mark.parametrize(
    ("model", "units"),
    [
        ("gpt-4o", 20),
        ("gpt-4o-2024-08-06", 20),
        ("gpt-4o-latest", 20),
        ("gpt-4o-mini", 7),
        ("gpt-4o-mini-2024-07-18", 7),
        ("large-4-20250514", 30),
        ("large-4@20250514", 30),
        ("gemini-pro-001", 40),
        ("gpt-4o-audio", 2),
        ("gpt-4", 2),
        ("", 2),
        (None, 2),
        (7, 2),
    ],
)
def test_a_model_has_the_price_of_its_name_without_a_version(model, units):
    models = {
        "gpt-4o": Prices(input=10, output=10),
        "gpt-4o-mini": Prices(input=3, output=4),
        "large-4": Prices(input=15, output=15),
        "gemini-pro": Prices(input=20, output=20),
    }
    cost = LLMUsage(most=MOST, models=models)
    stream = [event({**chat_chunk("a"), "model": model, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}), DONE]
    for headers, chunks in (
        (EVENTS, stream),
        (JSON, [compact({"model": model, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})]),
    ):
        reader = cost.reader(200, headers)
        for chunk in chunks:
            reader.feed(chunk)
        assert reader.result(ended=True).units == units


@pytest.mark.parametrize(
    "arguments",
    [
        {"input": 1.0},
        {"output": "1"},
        {"cached": True},
        {"input": None},
        {"models": {"gpt-4o": {"input": 1}}},
        {"models": {1: Prices()}},
        {"most": "8000"},
        {"least": 1.5},
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type_are_refused(arguments):
    with pytest.raises(TypeError):
        LLMUsage(**{"most": MOST, **arguments})


@pytest.mark.parametrize(
    "arguments", [{"input": -1}, {"output": Fraction(-1, 2)}, {"most": -1}, {"least": MOST + 1}], ids=str
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        LLMUsage(**{"most": MOST, **arguments})


def test_most_is_reserved_and_at_least_least():
    assert (LLMUsage(most=MOST).most({}), LLMUsage(most=MOST).least({})) == (MOST, MOST)
    assert LLMUsage(most=MOST, least=5).least({}) == 5


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("usage", "usageMetadata", "type", "message", "response", "error", "choices", "delta", "model"),
                    *CHAT_BODY["usage"],
                    *ANTHROPIC_BODY["usage"],
                    *("input_tokens_details", "cached_tokens"),
                ]
            ),
            values | st.sampled_from(["message_start", "message_delta", "message_stop", "response.completed", "error"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(messages=st.lists(JSON_VALUES, max_size=5))
def test_no_answer_of_a_service_raises(messages):
    figures = Figures()
    for message in messages:
        figures.take_event(message)
        figures.take_body(message)
        assert figures.counts is None or isinstance(figures.counts, TokenCounts)
    for headers in (JSON, EVENTS):
        result = usage([event(message) for message in messages], headers)
        assert result is None or isinstance(result, Usage)


def test_a_stream_is_measured_although_its_usage_is_removed():
    cost = LLMUsage(most=MOST)
    reader = cost.reader_of_request([*EVENTS, ("Content-Length", "999")], None, asked=True)
    assert reader.answer_headers == EVENTS
    out = b"".join(reader.pass_on(chunk) for chunk in CHAT_STREAM) + reader.rest()
    assert out == b"".join(chunk for chunk in CHAT_STREAM if chunk != event(USAGE_CHUNK))
    assert reader.complete
    assert reader.result(ended=True) == Usage(29, 19, 10)
