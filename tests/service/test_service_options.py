"""The options of a service and their effects, called in this process."""

from __future__ import annotations

import io
import json
from datetime import datetime, timedelta, timezone

import pytest
from client import call, environ
from raw_service import answering, serving

from usage_middleware import SQLiteTokenStore
from usage_middleware.wsgi import application

USAGE = "/api/usage/token"
CHAT = (
    b'{"id":"1","object":"chat.completion","model":"mini-1","choices":[],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}}'
)


def response(body=b"ok", *headers):
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", b""]
    return b"\r\n".join(head) + body


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", "tokens.db")
    with SQLiteTokenStore("tokens.db") as store:
        store.create(key="k" * 48, total_available=1000)
        yield store


def ask(app, path="/work", key="k" * 48, method="GET", **variables):
    if key is not None:
        variables["HTTP_AUTHORIZATION"] = f"Bearer sk-{key}"
    return call(app, environ(method, path, **variables))


def used(store):
    return store.get_by_id(1).total_used


@pytest.mark.parametrize(
    ("options", "sent", "charged"),
    [
        pytest.param("", response(), 1, id="one unit"),
        pytest.param("--cost 25", response(), 25, id="a fixed cost"),
        pytest.param("--cost 0", response(), 0, id="nothing"),
        pytest.param("--cost-header X-Cost --reserve 500", response(b"ok", b"X-Cost: 42"), 42, id="a header"),
        pytest.param("--cost-header X-Cost --reserve 500", response(), 500, id="a header that is not there"),
        pytest.param("--llm --reserve 500", response(CHAT, b"Content-Type: application/json"), 12, id="tokens"),
        pytest.param(
            "--llm --reserve 500 --input-price 2 --output-price 10",
            response(CHAT, b"Content-Type: application/json"),
            64,
            id="tokens at a price",
        ),
        pytest.param(
            "--llm --reserve 500 --input-price 150000/M --output-price 0",
            response(CHAT, b"Content-Type: application/json"),
            2,
            id="tokens at a price for a million",
        ),
    ],
)
def test_what_a_request_costs(store, options, sent, charged):
    with serving(answering(sent)) as service:
        app = application(f"--upstream {service.url} {options}")
        answer = ask(app)
        start, headers, _ = service.result()

    assert answer.status == 200
    assert answer.header("X-Cost") is None
    assert start == "GET /work HTTP/1.1"
    assert "Authorization" not in dict(headers)
    assert used(store) == charged
    assert ask(app, USAGE).json["data"]["total_used"] == charged


def test_without_a_key_the_service_is_not_asked(store):
    with serving(answering(response())) as service:
        app = application(f"--upstream {service.url} --throttle '1 per 30 days'")
        assert ask(app, key=None).status == 401
        assert [ask(app, key="x" * 48).status for _ in range(3)] == [401, 429, 429]
        assert service.returned.empty()


def test_exempt_paths_are_free_and_the_key_stays_here(store):
    with serving(answering(response())) as service:
        app = application(f"--upstream {service.url} --exempt /static/ --exempt /health")
        assert ask(app, "/static/app.css", key=None).status == 200
        assert ask(app, "/health").status == 200
        for _ in range(2):
            assert "Authorization" not in dict(service.result()[1])
        assert ask(app, "/static/../work", key=None).status == 401
    assert used(store) == 0


def test_headers_of_the_service(store, monkeypatch):
    monkeypatch.setenv("UPSTREAM_KEY", "secret: with ${HOME} in it")
    with serving(answering(response())) as service:
        app = application(
            f"--upstream {service.url}/base --upstream-header 'Authorization: Bearer ${{UPSTREAM_KEY}}'"
            " --upstream-header X-Plain:1"
        )
        assert ask(app).status == 200
        start, headers, _ = service.result()
    assert start == "GET /base/work HTTP/1.1"
    fields = dict(headers)
    assert fields["Authorization"] == "Bearer secret: with ${HOME} in it"
    assert fields["X-Plain"] == "1"


def test_the_key_may_be_kept(store):
    with serving(answering(response())) as service:
        assert ask(application(f"--upstream {service.url} --keep-key")).status == 200
        assert dict(service.result()[1])["Authorization"] == "Bearer sk-" + "k" * 48


def test_an_llm_client_may_send_its_key_as_it_does(store):
    with serving(answering(response(CHAT, b"Content-Type: application/json"))) as service:
        app = application(f"--upstream {service.url} --llm --reserve 500")
        assert ask(app, key=None, HTTP_X_API_KEY="sk-" + "k" * 48).status == 200
        assert "X-Api-Key" not in dict(service.result()[1])


def test_a_stream_is_asked_for_its_usage_and_charged_to_its_model(store):
    today = datetime.now(timezone.utc).date()
    event = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\ndata: [DONE]\n\n'
    body = b'{"model":"mini-1","stream":true,"messages":[]}'
    with serving(answering(response(event, b"Content-Type: text/event-stream"))) as service:
        app = application(f"--upstream {service.url} --llm --reserve 500")
        sent = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
        assert ask(app, method="POST", **sent).body == b"data: [DONE]\n\n"
        assert json.loads(service.result()[2])["stream_options"] == {"include_usage": True}
    (usage,) = store.usage_by_day(1, today - timedelta(days=1), today)
    assert (usage.model, usage.used) == ("mini-1", 12)


APP = """
def application(environ, start_response):
    start_response("200 OK", [("Content-Length", "2"), ("X-Cost", "30")])
    return [b"ok"]
"""


@pytest.mark.parametrize(
    ("options", "charged"),
    [("", 0), ("--cost 3", 3), ("--cost-header X-Cost --reserve 50", 30), ("--cost 3 --exempt /work", 0)],
)
def test_an_application_is_metered_if_a_cost_is_given(store, tmp_path, monkeypatch, options, charged):
    (tmp_path / "old_app.py").write_text(APP)
    monkeypatch.syspath_prepend(tmp_path)
    app = application(f"--app old_app:application {options}")
    assert ask(app, key=None).status == (200 if charged == 0 else 401)
    assert ask(app).body == b"ok"
    assert used(store) == charged


def test_new_api_and_the_page(store):
    with serving(answering(response())) as service:
        upstream = f"--upstream {service.url}"
        assert ask(application(""), "/api/status", key=None).json["success"] is True
        assert ask(application(upstream), "/api/status", key=None).status == 401  # it is the service's path
        assert (
            ask(application(f"{upstream} --new-api --system-name X"), "/api/status").json["data"]["system_name"] == "X"
        )
        assert b"<html" in ask(application(f"{upstream} --page /usage"), "/usage", key=None).body


def test_metrics_at_a_path(store):
    with serving(answering(response())) as service:
        app = application(f"--upstream {service.url} --cost 3 --metrics-path /internal/metrics")
        assert ask(app).status == 200
        assert ask(app, key=None).status == 401
        text = ask(app, "/internal/metrics", key=None).body.decode()
    assert 'usage_units_total{model=""} 3.0' in text
    assert 'usage_refusals_total{reason="no_key"} 1.0' in text
    assert 'usage_tokens{state="active"} 1.0' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--metrics-path metrics", "--metrics-path must begin"),
        ("--upstream ftp://x", "--upstream cannot be used: url must"),
        ("--upstream http://x --app a:b", "--app and --upstream exclude each other"),
        ("--upstream http://x --cost 1 --llm", "--cost and --llm exclude each other"),
        ("--upstream http://x --cost 0 --cost-header X", "--cost and --cost-header exclude each other"),
        ("--upstream http://x --llm", "--llm needs --reserve"),
        ("--upstream http://x --cost-header X", "--cost-header needs --reserve"),
        ("--upstream http://x --cost-header 'a b' --reserve 1", "name must be a header name"),
        ("--upstream http://x --reserve 5", "--reserve needs --cost-header or --llm"),
        ("--upstream http://x --input-price 0", "--input-price needs --llm"),
        ("--upstream http://x --llm --reserve 1 --input-price 1.5", "is not a price"),
        ("--upstream http://x --llm --reserve 1 --input-price 1/K", "is not a price"),
        ("--upstream http://x --upstream-header hidden", "must have the form"),
        ("--upstream http://x --upstream-header 'A: ${NO_SUCH_VARIABLE}'", "NO_SUCH_VARIABLE, which is not set"),
        ("--upstream http://x --upstream-header 'Content-Length: 1'", "headers cannot set Content-Length"),
        ("--upstream http://x --upstream-timeout 0", "upstream-timeout"),
        ("--upstream http://x --exempt static", "exempt must hold path prefixes"),
        ("--upstream http://x --path x", "path must begin"),
        ("--upstream http://x --quota-per-unit 5", "--quota-per-unit needs --new-api"),
        ("--upstream http://x --throttle-storage redis://h", "--throttle-storage needs a --throttle"),
        ("--cost 1", "--cost needs --upstream or --app"),
        ("--keep-key", "--keep-key needs --upstream"),
        ("--app a:b --exempt /x", "--exempt needs --upstream or a cost"),
        ("--app a:b", "cannot import a:b"),
        ("--allow-origin https://a.example --no-cors", "--allow-origin and --no-cors exclude each other"),
        ("--db no.db", "there is no database no.db"),
        ("--db memory:", "a store in memory"),
        ("--no-such-option", "--no-such-option"),
        ("surplus", "surplus"),
    ],
)
def test_options_that_cannot_be_used(store, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        application(options)
    assert "hidden" not in str(raised.value)


def test_a_database_must_be_named(monkeypatch):
    monkeypatch.delenv("USAGE_MIDDLEWARE_DB", raising=False)
    with pytest.raises(ValueError, match="which database"):
        application("")


def test_the_environment_may_have_the_options(store, monkeypatch):
    monkeypatch.setenv("USAGE_MIDDLEWARE_SERVE", "--path '/my quota'")
    assert ask(application(), "/my quota").json["data"]["total_granted"] == 1000
