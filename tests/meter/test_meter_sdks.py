"""The packages ``openai`` and ``anthropic`` through the meter, over a real server: answers, streams and refusals."""

from __future__ import annotations

import json
import threading
from importlib import import_module
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from llm_answers import (
    ANTHROPIC_BODY,
    ANTHROPIC_STREAM,
    CHAT_BODY,
    CHAT_STREAM,
    RESPONSES_BODY,
    USAGE_CHUNK,
    event,
    responses_stream,
)
from metering import KEY, Metered

from usage_middleware import LLMUsage, MemoryTokenStore, llm_key, requested_model

pytestmark = [pytest.mark.servers]

MOST = 500
MESSAGES = [{"role": "user", "content": "Hello"}]


def service(environ, start_response):
    """Answer as OpenAI and Anthropic do."""
    body = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    path = environ["PATH_INFO"]
    if path == "/v1/chat/completions":
        answer, stream = CHAT_BODY, list(CHAT_STREAM)
        if not (body.get("stream_options") or {}).get("include_usage"):
            stream.remove(event(USAGE_CHUNK))
    elif path == "/v1/responses":
        answer = {**RESPONSES_BODY, "id": "resp_1", "created_at": 1, "output": [], "tools": [], "tool_choice": "auto"}
        stream = responses_stream()
    elif path == "/v1/embeddings":
        answer = {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": "AACAPw=="}],
            "model": body["model"],
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        }
        stream = []
    else:
        assert path == "/v1/messages"
        assert "stream_options" not in body
        answer = {**ANTHROPIC_BODY, "role": "assistant", "stop_sequence": None}
        start = json.loads(ANTHROPIC_STREAM[0].partition(b"data: ")[2])
        start["message"].update(role="assistant", content=[], stop_reason=None, stop_sequence=None)
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        stop = {"type": "content_block_stop", "index": 0}
        stream = [
            event(start, "message_start"),
            event(block, "content_block_start"),
            *ANTHROPIC_STREAM[1:3],
            event(stop, "content_block_stop"),
            *ANTHROPIC_STREAM[3:],
        ]
    if body.get("stream"):
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return iter(stream)
    data = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]


class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments):
        pass


class Counted(Metered):
    """A metered service that counts the requests that reach it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.requests = 0

    def __call__(self, environ, start_response):
        self.requests += 1
        return self.meter(environ, start_response)


@pytest.fixture
def metered():
    with MemoryTokenStore() as store:
        cost = LLMUsage(most=MOST, ask=True)
        metered = Counted(store, service, total_available=10_000, cost=cost, model=requested_model, find_key=llm_key)
        server = make_server("127.0.0.1", 0, metered, WSGIServer, Quiet)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        metered.url = f"http://127.0.0.1:{server.server_port}"
        yield metered
        server.shutdown()
        thread.join()
        server.server_close()


# Both packages take seconds to import, which a run without these tests need not wait for.


@pytest.fixture
def openai_client(metered):
    import openai

    with openai.OpenAI(base_url=f"{metered.url}/v1", api_key=f"sk-{KEY}") as client:
        yield client


@pytest.fixture
def anthropic_client(metered):
    import anthropic

    with anthropic.Anthropic(base_url=metered.url, api_key=KEY) as client:
        yield client


def test_a_chat_completion_is_charged(metered, openai_client):
    answer = openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage.total_tokens == metered.used == 29
    assert metered.settlement.model == "gpt-4o"


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_a_client_that_does_not_ask_for_usage_gets_none(metered, openai_client, options):
    text = ""
    for chunk in openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True, **options):
        text += chunk.choices[0].delta.content or ""  # as many programs do
        assert chunk.usage is None
    assert text == "Hello"
    assert metered.used == 29


def test_a_client_that_asks_for_usage_gets_it(metered, openai_client):
    stream = openai_client.chat.completions.create(
        model="gpt-4o", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    assert [chunk.usage.total_tokens for chunk in stream if chunk.usage] == [29]
    assert metered.used == 29


def test_a_stream_is_charged_before_the_client_sees_its_end(metered, openai_client):
    """When the client has seen the end, the endpoint already has the final total."""
    stream = openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
    for _ in stream:
        pass
    assert metered.token.total_used == 29


def test_a_client_that_stops_reading_is_charged(metered, openai_client):
    with openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert metered.used in (29 + 29, MOST + 29)


def test_responses_are_charged(metered, openai_client):
    assert openai_client.responses.create(model="gpt-4o", input="Hello").usage.total_tokens == 123
    events = list(openai_client.responses.create(model="gpt-4o", input="Hello", stream=True))
    assert events[-1].response.usage.total_tokens == 123
    assert metered.used == 246


def test_embeddings_are_charged(metered, openai_client):
    assert openai_client.embeddings.create(model="e", input="Hello").data[0].embedding == [1.0]
    assert metered.used == 8


def test_messages_are_charged(metered, anthropic_client):
    answer = anthropic_client.messages.create(model="large-4", max_tokens=9, messages=MESSAGES)
    assert answer.content[0].text == "Hello"
    assert metered.used == 77
    with anthropic_client.messages.stream(model="large-4", max_tokens=9, messages=MESSAGES) as stream:
        assert stream.get_final_text() == "Hello"
        assert stream.get_final_message().usage.output_tokens == 15
    assert metered.used == 154


def chat(client):
    return client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


def message(client):
    return client.messages.create(model="large-4", max_tokens=9, messages=MESSAGES)


@pytest.mark.parametrize(
    ("name", "module", "send"), [("openai_client", "openai", chat), ("anthropic_client", "anthropic", message)]
)
class TestRefusals:
    @pytest.fixture
    def package(self, module):
        return import_module(module)

    def refused(self, request, name, send, error):
        with pytest.raises(error) as caught:
            send(request.getfixturevalue(name))
        return caught.value

    def test_a_used_up_key_is_not_retried(self, request, metered, name, package, send):
        metered.store.charge(KEY, 9900)
        error = self.refused(request, name, send, package.APIStatusError)
        assert error.status_code == 402
        assert error.body["error" if package.__name__ == "anthropic" else "code"]
        assert "used up" in str(error)
        assert metered.requests == 1  # not sent again

    def test_a_used_up_key_is_not_retried_even_as_429(self, request, metered, name, package, send):
        metered.change(exhausted_status=429)
        metered.store.charge(KEY, 9900)
        self.refused(request, name, send, package.RateLimitError)
        assert metered.requests == 1

    def test_held_quota_is_retried(self, request, metered, name, package, send):
        """The package waits a second, as Retry-After says, and succeeds."""
        metered.store.charge(KEY, 9000)
        operation = metered.store.reserve(KEY, 900)
        metered.change(on_refused=lambda reason: metered.store.settle(operation, 0))
        answer = send(request.getfixturevalue(name))
        assert answer.usage
        assert metered.requests == 2

    def test_a_wrong_key_is_an_authentication_error(self, request, metered, name, package, send):
        metered.store.rotate(metered.token_id)
        error = self.refused(request, name, send, package.AuthenticationError)
        assert "not valid" in str(error)
        assert metered.requests == 1

    def test_a_model_that_is_not_allowed_is_a_permission_error(self, request, metered, name, package, send):
        metered.store.update(metered.token_id, model_limits={"other": True}, model_limits_enabled=True)
        self.refused(request, name, send, package.PermissionDeniedError)
        assert metered.requests == 1
        assert metered.used == 0
