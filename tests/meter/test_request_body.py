"""The meter reads a request's body before the application does, and asks a service for the usage of its stream."""

import io
import json
import tracemalloc

import pytest
from client import environ
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException

from usage_middleware import requested_model
from usage_middleware.wsgi.meter.asking import ask_for_usage
from usage_middleware.wsgi.meter.request_body import MOST_BODY, MOST_IN_MEMORY, close_request_body

MODEL = "gpt-4o"
BODY = b'{"model": "gpt-4o", "messages": []}'


class Endless(io.RawIOBase):
    """An input like a connection. A read beyond the length would block, so it fails the test."""

    def __init__(self, data, *, ends=False):
        self._data = io.BytesIO(data)
        self._ends = ends

    def readable(self):
        return True

    def readinto(self, buffer):
        size = self._data.readinto(buffer)
        assert size or self._ends or not len(buffer), "read beyond the end"
        return size


def request(body=BODY, *, length=True, kind="application/json", ends=False, **variables):
    if length:
        variables.setdefault("CONTENT_LENGTH", str(len(body)))
    return environ("POST", CONTENT_TYPE=kind, **{"wsgi.input": Endless(body, ends=ends), **variables})


def status(given, ask=requested_model):
    with pytest.raises(HTTPException) as caught:
        ask(given)
    close_request_body(given)
    return caught.value.code


@pytest.mark.parametrize(
    ("body", "model"),
    [
        pytest.param(BODY, MODEL, id="a string"),
        pytest.param(b' \n{ "messages":[{"model":"other"}] ,\t"model" : "gpt-4o" } ', MODEL, id="white space"),
        pytest.param(b"\xef\xbb\xbf" + BODY, MODEL, id="a byte order mark"),
        pytest.param(BODY.decode().encode("utf-16"), MODEL, id="UTF-16"),
        pytest.param(b'{"\\u006dodel":"gpt-4o"}', MODEL, id="an escaped name"),
        pytest.param(b'{"Model":"gpt-4o"}', MODEL, id="a name that servers in Go accept"),
        pytest.param('{"model":"模型"}'.encode(), "模型", id="another script"),
        pytest.param(b'{"model":null}', None, id="null"),
        pytest.param(b'{"model":""}', None, id="empty"),
        pytest.param(b"{}", None, id="absent"),
        pytest.param(b'{"a":{"model":"gpt-4o"}}', None, id="deeper"),
        pytest.param(b'[{"model":"gpt-4o"}]', None, id="an array"),
        pytest.param(b"", None, id="no body"),
        pytest.param(b" ", None, id="white space alone"),
    ],
)
def test_the_model_is_read_from_the_body(body, model):
    given = request(body)
    assert requested_model(given) == model
    # The application can still read all of it.
    assert given["wsgi.input"].read(int(given["CONTENT_LENGTH"])) == body
    assert requested_model(given) == model
    close_request_body(given)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model":"a","model":"b"}', id="twice"),
        pytest.param(b'{"model":"a","model":"a"}', id="twice the same"),
        pytest.param(b'{"model":"a","MODEL":"b"}', id="in another case"),
        pytest.param(b'{"model":"a","\\u006dodel":"b"}', id="escaped"),
        pytest.param(b'{"model":7}', id="a number"),
        pytest.param(b'{"model":["a"]}', id="a list"),
        pytest.param(b'{"model":"a"', id="cut"),
        pytest.param(b'{"model":"a",}', id="a comma at the end"),
        pytest.param(b'{"model":"a"}{}', id="two objects"),
        pytest.param(b'{model:"a"}', id="a name without quotes"),
        pytest.param(b'{"model" "a"}', id="no colon"),
        pytest.param(b'{"model":}', id="no value"),
        pytest.param(b'{"model":"\xff"}', id="not UTF-8"),
        pytest.param(b'{7:"a"}', id="a number for a name"),
        pytest.param(b'/**/{"model":"a"}', id="after a comment"),
        pytest.param(b"model=a", id="a form"),
        pytest.param(b'[{"model":"a"}]]', id="an array, and more"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="arrays nested deeply"),
        pytest.param('{"model":"a"}'.encode("cp037"), id="EBCDIC"),
        pytest.param(b'{"stream":true,"stream":false}', id="stream twice"),
        pytest.param(b'{"stream":true,"Stream":false}', id="stream in another case"),
        pytest.param('{"stream":false,"\u017ftream":true}'.encode(), id="stream with a long s"),
        pytest.param(b'{"stream_options":{},"Stream_Options":{"include_usage":true}}', id="options in another case"),
        pytest.param(b'{"a":' * 100_000, id="nested deeply"),
        pytest.param(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="lists nested deeply"),
        pytest.param(b'{"a":[' + b"[]," * 700_000 + b'1],"model":"a"}', id="many values"),
    ],
)
def test_a_body_from_which_services_may_read_another_model_is_refused(body):
    assert status(request(body)) == 400


def test_text_may_begin_like_json_if_its_type_is_another():
    assert requested_model(request(b"{{template}}", kind="text/plain")) is None
    assert status(request(b"{{template}}", kind="")) == 400
    assert requested_model(request(b"model=gpt-4o", kind="application/x-www-form-urlencoded")) is None


@pytest.mark.parametrize("more", [b" and more", b',"a":"\xff"}'], ids=["more", "not UTF-8"])
def test_what_a_service_that_ignores_types_reads_as_an_object_must_be_one(more):
    """Services in Go read the first value of a body, whatever its type, and accept any bytes in its strings."""
    assert requested_model(request(BODY, kind="text/plain")) == MODEL
    body = BODY.removesuffix(b"}") + more if more.startswith(b",") else BODY + more
    for bom in (b"", b"\xef\xbb\xbf"):
        assert status(request(bom + b" " + body, kind="text/plain")) == 400


def test_a_charset_in_which_services_may_read_another_model_is_refused():
    hidden = b'{"model":"small","+AG0AbwBkAGUAbA-":"large"}'
    assert json.loads(hidden.decode("utf-7")) == {"model": "large"}
    for kind in (
        "application/json; charset=utf-7",
        'text/plain;a=b;charset="UTF-7"',
        "application/json;charset = utf-7",
    ):
        assert status(request(hidden, kind=kind)) == 415
    for kind in (
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json;charset=utf8",
    ):
        assert requested_model(request(hidden, kind=kind)) == "small"
    assert requested_model(request(BODY.decode().encode("utf-16"), kind="application/json; charset=utf-16")) == MODEL
    assert requested_model(request(b"{{template}}", kind="text/plain; charset=shift_jis")) is None


def test_a_compressed_request_is_refused():
    assert status(request(HTTP_CONTENT_ENCODING="gzip")) == 415
    assert requested_model(request(HTTP_CONTENT_ENCODING="identity")) == MODEL


def test_a_length_must_be_known():
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked"}
    assert status(request(length=False, **chunked)) == 411
    given = request(length=False, ends=True, **chunked, **{"wsgi.input_terminated": True})
    assert requested_model(given) == MODEL
    # The application gets a body whose length is known.
    assert "HTTP_TRANSFER_ENCODING" not in given
    assert given["wsgi.input"].read() == BODY
    assert given["CONTENT_LENGTH"] == str(len(BODY))
    # A request by HTTP/2 may have neither.
    assert requested_model(request(length=False, ends=True, **{"wsgi.input_terminated": True})) == MODEL
    # A request without a body is left as it is.
    given = request(b"", length=False)
    before = dict(given)
    assert requested_model(given) is None
    given.pop("usage_middleware.request_body")
    assert given == before


def test_a_body_that_ends_early_is_refused():
    assert status(request(CONTENT_LENGTH=str(len(BODY) + 1), ends=True)) == 400
    assert status(request(CONTENT_LENGTH=str(len(BODY) + 1), ends=True, **{"wsgi.input_terminated": True})) == 400


def padded(size):
    head, tail = b'{"model":"gpt-4o","a":"', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


@pytest.mark.parametrize("terminated", [False, True])
def test_the_largest_body_is_read_and_a_larger_one_refused(terminated):
    variables = {"wsgi.input_terminated": True} if terminated else {}
    given = request(padded(MOST_BODY), **variables)
    assert requested_model(given) == MODEL
    assert len(given["wsgi.input"].read()) == MOST_BODY
    close_request_body(given)
    assert status(request(padded(MOST_BODY + 1), **variables)) == 413


def test_a_body_without_a_length_is_bounded():
    given = request(padded(MOST_BODY + 1), length=False, ends=True, **{"wsgi.input_terminated": True})
    assert status(given) == 413


@pytest.mark.parametrize("size", [MOST_IN_MEMORY, MOST_IN_MEMORY + 1])
def test_a_large_body_is_kept_on_disk(size):
    body = padded(size)
    given = request(body)
    tracemalloc.start()
    try:
        assert requested_model(given) == MODEL
        assert (tracemalloc.get_traced_memory()[0] < MOST_IN_MEMORY // 2) is (size > MOST_IN_MEMORY)
    finally:
        tracemalloc.stop()
    file = given["wsgi.input"]
    assert file.readline() == body
    close_request_body(given)
    assert file.closed
    close_request_body(given)


STREAM = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Grüße\u2028"}]}
ASKED = {**STREAM, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("body", "after"),
    [
        pytest.param(STREAM, ASKED, id="no options"),
        pytest.param({**STREAM, "stream_options": None}, ASKED, id="null"),
        pytest.param({**STREAM, "stream_options": {}}, ASKED, id="empty options"),
        pytest.param({**STREAM, "stream_options": {"include_usage": False}}, ASKED, id="an explicit false"),
        pytest.param({"stream_options": {"include_usage": None}, **STREAM}, ASKED, id="an explicit null"),
        pytest.param(
            {**STREAM, "stream_options": {"a": [1], "include_usage": 1}},
            {**STREAM, "stream_options": {"a": [1], "include_usage": True}},
            id="other options",
        ),
        pytest.param(
            {**STREAM, "stream_options": {"include_usage": False}, "input": None},
            {**ASKED, "input": None},
            id="a member of OpenAI's responses",
        ),
        pytest.param({**STREAM, "Stream_Options": {"include_usage": False}}, ASKED, id="options in another case"),
        pytest.param(
            {"model": MODEL, "messages": STREAM["messages"], "\u017ftream": True},
            {
                "model": MODEL,
                "messages": STREAM["messages"],
                "\u017ftream": True,
                "stream_options": {"include_usage": True},
            },
            id="a long s",
        ),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_the_usage_of_a_stream_is_asked_for(body, after, indent):
    text = json.dumps(body, indent=indent, ensure_ascii=indent is None).encode()
    given = request(text, HTTP_ACCEPT_ENCODING="gzip", HTTP_ANTHROPIC_VERSION="2023-06-01")
    assert ask_for_usage(given)
    sent = given["wsgi.input"].read(int(given["CONTENT_LENGTH"]))
    assert given["wsgi.input"].read() == b""
    assert json.loads(sent) == after
    # The usage could not be removed from a compressed stream.
    assert given["HTTP_ACCEPT_ENCODING"] == "identity"


@pytest.mark.parametrize(
    ("body", "variables"),
    [
        pytest.param(ASKED, {}, id="the client asks"),
        pytest.param({**STREAM, "stream": False}, {}, id="not a stream"),
        pytest.param({"model": MODEL}, {}, id="no stream"),
        pytest.param({**STREAM, "stream": None}, {}, id="null"),
        pytest.param(STREAM, {"path": "/v1/responses"}, id="OpenAI responses"),
        pytest.param(STREAM, {"path": "/v1/messages"}, id="Anthropic"),
        pytest.param(STREAM, {"path": "/v1/messages/"}, id="Anthropic with a slash"),
        pytest.param([STREAM], {}, id="an array"),
    ],
)
def test_the_usage_is_not_asked_for(body, variables):
    text = json.dumps(body).encode()
    given = request(text, HTTP_ACCEPT_ENCODING="gzip")
    given["PATH_INFO"] = variables.pop("path", "/v1/chat/completions")
    given.update(variables)
    assert not ask_for_usage(given)
    assert json.loads(given["wsgi.input"].read()) == body
    assert given["HTTP_ACCEPT_ENCODING"] == "gzip"


def test_options_in_another_case_do_not_overrule_what_is_asked_for():
    given = request(b'{"stream":true,"stream_options":{"include_usage":true,"Include_Usage":false}}')
    assert not ask_for_usage(given)
    # Servers in Go take the last.
    assert given["wsgi.input"].read().endswith(b'{"Include_Usage": false, "include_usage": true}}')


@pytest.mark.parametrize(
    "members",
    [
        pytest.param({"stream": "true"}, id="a string"),
        pytest.param({"stream": 1}, id="a number"),
        pytest.param({"stream": True, "stream_options": "include_usage"}, id="options that are a string"),
        pytest.param({"stream": True, "stream_options": []}, id="options that are an array"),
    ],
)
def test_what_services_may_take_for_a_stream_without_its_usage_is_refused(members):
    assert status(request(json.dumps(members).encode()), ask_for_usage) == 400


def test_the_rest_of_a_request_stays_as_the_client_wrote_it():
    text = b'{ "temperature":1.0e0,"seed":12345678901234567890123,"n":1E400, "stream" :true,"x":"\\u00e9\xc3\xa9" }'
    given = request(text)
    assert ask_for_usage(given)
    sent = given["wsgi.input"].read()
    assert sent.replace(b'"stream_options":{"include_usage": true},', b"") == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)


@given(
    members=st.dictionaries(st.sampled_from(["stream", "stream_options", "model", "a", "\u1e9e", '"']), VALUES),
    indent=st.sampled_from([None, 0, 3]),
    ascii=st.booleans(),
    asked=st.booleans(),
)
def test_any_object_keeps_its_other_members(members, indent, ascii, asked):  # noqa: A002 - json.dumps has it
    if asked:
        members["stream"] = True
    body = json.dumps(members, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    given = request(body)
    stream, options = members.get("stream"), members.get("stream_options")
    is_stream = stream is not None and stream is not False
    if is_stream and not (stream is True and isinstance(options, dict | None)):
        assert status(given, ask_for_usage) == 400
        return
    was_asked = ask_for_usage(given)
    after = json.loads(given["wsgi.input"].read().decode("utf-8", "surrogatepass"))
    assert ("include_usage" in str(after.get("stream_options"))) >= was_asked
    if was_asked:
        assert after.pop("stream_options")["include_usage"] is True
        members.pop("stream_options", None)
    assert after == members
    model = members.get("model")
    if model is None or isinstance(model, str):
        assert requested_model(given) == (model or None)
    else:
        assert status(given) == 400
