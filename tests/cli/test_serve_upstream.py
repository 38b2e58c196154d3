"""``serve --upstream``, run by the installed script in front of an HTTP service."""

import json
import signal
import socket
import sys

import pytest
from command import URL, get, run
from gateway import Gateway
from raw_service import answering, serving


@pytest.mark.servers
def test_a_service_is_charged_without_being_changed(start, db, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    key = run("create", "--name", "Alice", "--quota", "10")[0].strip()
    with serving(answering(b"HTTP/1.1 200 OK\r\nX-Cost: 4\r\nContent-Length: 5\r\n\r\nhello")) as service:
        process, match, log = start(
            *("serve", "--port", "0", "--upstream", service.url, "--cost-header", "X-Cost", "--reserve", "5"),
            *("--upstream-header", "Authorization: Bearer ${SECRET}"),
            ready=URL + "/api/usage/token",
        )
        url, headers = match[1], {"Authorization": f"Bearer {key}"}
        assert get(url, "/work")[0] == 401
        for used in (4, 8):
            status, answered, body = get(url, "/work", **headers)
            assert (status, body) == (200, b"hello")
            assert "X-Cost" not in answered
            assert dict(service.result()[1])["Authorization"] == "Bearer canary"
            assert json.loads(get(url, **headers)[2])["data"]["total_used"] == used
        status, _, body = get(url, "/work", **headers)
        assert (status, json.loads(body)["error"]["code"]) == (402, "insufficient_quota")
        assert service.returned.empty()
    status, _, body = get(url, "/other", Authorization=f"Bearer {run('create', '--quota', '9')[0].strip()}")
    assert (status, json.loads(body)["error"]["code"]) == (502, "bad_gateway")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    text = log.read_text()
    assert "canary" not in text
    assert key not in text
    assert "Traceback" not in text


@pytest.mark.servers
def test_metrics_have_a_port_of_their_own(start, db):
    key = run("create", "--quota", "10")[0].strip()
    with serving(answering(b"HTTP/1.1 200 OK\r\n\r\nhello")) as service:
        process, match, log = start(
            *("serve", "--port", "0", "--upstream", service.url, "--metrics-port", "0"),
            ready=rf"Metrics at {URL}/metrics\nServing {URL}",
        )
        metrics, url = match.groups()
        assert get(url, "/work", Authorization=f"Bearer {key}")[0] == 200
        assert get(url, "/work")[0] == 401
        assert get(url, "/metrics")[0] == 401  # that path belongs to the service and is metered
        text = get(metrics, "/metrics")[2].decode()
    assert 'usage_requests_total{outcome="completed"} 1.0' in text
    assert 'usage_refusals_total{reason="no_key"} 2.0' in text
    assert 'usage_tokens{state="active"} 1.0' in text
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()
    assert "ResourceWarning" not in log.read_text()


def test_a_metrics_port_in_use_is_one_line(db):
    run("create")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, err = run("serve", "--port", 0, "--metrics-port", taken.getsockname()[1], status=2)
    assert err.startswith("Error: cannot listen on 127.0.0.1 port")
    assert "--metrics-port" in err
    assert err.count("\n") == 1


def test_serve_names_the_package_that_metrics_need(db, monkeypatch):
    run("create")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "usage_middleware.wsgi.metrics", raising=False)
    _, err = run("serve", "--metrics-port", 0, status=2)
    assert err == "Error: metrics need the package prometheus_client: pip install prometheus_client\n"


def test_an_option_that_is_missing_is_one_line(db):
    run("create")
    _, err = run("serve", "--upstream", "http://127.0.0.1:1", "--llm", status=2)
    assert err == "Error: --llm needs --reserve, the most that a request can cost\n"


def test_a_database_of_new_api_cannot_be_charged(tmp_path):
    Gateway("sqlite", f"sqlite:///{tmp_path / 'one-api.db'}").add_users()
    for option in (("--upstream", "http://127.0.0.1:1"), ("--metrics-port", "0")):
        _, err = run("serve", "--db", tmp_path / "one-api.db", *option, status=2)
        assert "this is a database of new-api" in err
