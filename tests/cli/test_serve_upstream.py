"""``serve --upstream``: the installed script, as a process in front of an HTTP service."""

import json
import signal

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


def test_what_is_wrong_with_the_options_is_one_line(db):
    run("create")
    _, err = run("serve", "--upstream", "http://127.0.0.1:1", "--llm", status=2)
    assert err == "Error: --llm needs --reserve, the most that a request can cost\n"


def test_a_database_of_new_api_cannot_be_charged(tmp_path):
    Gateway("sqlite", f"sqlite:///{tmp_path / 'one-api.db'}").add_users()
    _, err = run("serve", "--db", tmp_path / "one-api.db", "--upstream", "http://127.0.0.1:1", status=2)
    assert "only read" in err
