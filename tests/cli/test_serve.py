"""``demo`` and ``serve``, run by the installed script in a process of their own."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from command import SCRIPT, URL, get, run


def test_demo_prints_a_curl_line_that_works_and_cleans_up(start, tmp_path):
    process, match, log = start(
        "demo", "--port", "0", ready=rf"curl -H '(Authorization): (Bearer sk-\w+)' {URL}/api/usage/token\n"
    )
    header, value, url = match.groups()
    status, headers, body = get(url, **{header: value})
    assert status == 200
    assert json.loads(body)["data"]["name"] == "Demo Token"
    assert headers["Content-Length"] == str(len(body))
    # The charge that it prints changes the totals while it is serving.
    charge = re.search(r"usage-middleware (charge --db \S+ 1 1000)", log.read_text())[1].split()
    subprocess.run([SCRIPT, *charge], check=True, capture_output=True)
    after = json.loads(get(url, **{header: value})[2])["data"]
    assert after["total_used"] == json.loads(body)["data"]["total_used"] + 1000
    assert after["total_granted"] == json.loads(body)["data"]["total_granted"]
    assert get(url, **{header: value + "x"})[0] == 401
    assert get(url, path="/")[2].startswith(b"<!doctype html>")
    assert get(url, path="/other")[0] == 404
    listing = re.search(r"usage-middleware (list --db \S+)", log.read_text())[1].split()
    assert "Demo Token" in subprocess.run([SCRIPT, *listing], check=True, capture_output=True, text=True).stdout
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not list(tmp_path.glob("usage-middleware-*"))
    assert "Traceback" not in log.read_text()
    assert "ResourceWarning" not in log.read_text()


def test_serve_answers_in_front_of_an_application(start, db, tmp_path):
    (tmp_path / "legacy.py").write_text(
        "def application(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [b'legacy ' + environ['PATH_INFO'].encode('latin-1')]\n"
    )
    key = run("create", "--name", "Alice")[0].strip()
    process, match, log = start(
        *("serve", "--app", "legacy:application", "--port", "0", "--path", "/quota"),
        *("--allow-origin", "https://app.example"),
        ready=URL + "/quota",
    )
    url = match[1]
    assert get(url, "/other")[2] == b"legacy /other"
    assert get(url)[2] == b"legacy /api/usage/token"
    status, headers, body = get(url, "/quota", Authorization=f"Bearer {key}", Origin="https://app.example")
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert json.loads(body)["data"]["name"] == "Alice"
    # An operator disables the token while the service is running.
    run("update", 1, "--disable")
    assert get(url, "/quota", Authorization=f"Bearer {key}")[0] == 401
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


def test_serve_alone_serves_only_the_endpoint_and_logs_no_key(start, db):
    run("create")
    process, match, log = start("serve", "--port", "0", "--no-cors", ready=URL)
    status, headers, _ = get(match[1], "/api/usage/token?key=sk-canary", Authorization="Bearer sk-canary")
    assert status == 401
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert get(match[1], "/other?key=sk-canary")[0] == 404
    with socket.create_connection(match[1].removeprefix("http://").split(":")) as connection:
        connection.sendall(b"Authorization: Bearer sk-canary\r\n\r\n")
        while connection.recv(1000):
            pass
    process.terminate()
    assert process.wait(10) == 0
    assert '127.0.0.1 "GET /api/usage/token" 401' in log.read_text()
    assert '127.0.0.1 "GET /other" 404' in log.read_text()
    assert "canary" not in log.read_text()


def test_serve_throttles_a_client_that_guesses_keys(start, db):
    key = run("create")[0].strip()
    _, match, log = start("serve", "--port", "0", "--throttle", "3 per 30 days", ready=URL)
    guesses = [get(match[1], Authorization="Bearer sk-canary") for _ in range(5)]
    assert [status for status, _, _ in guesses] == [401, 401, 401, 429, 429]
    assert 0 < int(guesses[-1][1]["Retry-After"]) <= 30 * 24 * 3600
    assert get(match[1], Authorization=f"Bearer {key}")[0] == 200
    assert "canary" not in log.read_text()


def test_serve_names_the_extra_that_a_limit_needs(db, monkeypatch):
    run("create")
    monkeypatch.setitem(sys.modules, "limits", None)
    _, err = run("serve", "--throttle", "3 per minute", status=2)
    assert err == "Error: throttle needs the package limits: pip install limits\n"


def test_a_port_in_use_is_one_line(db):
    run("create")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, err = run("serve", "--port", taken.getsockname()[1], status=2)
    assert err.startswith("Error: cannot listen on 127.0.0.1 port")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "page"),
    [
        pytest.param([], "/", id="alone"),
        pytest.param(["--page", "/usage"], "/usage", id="with --page"),
        pytest.param(["--app", "legacy:application", "--page", "/usage"], "/usage", id="with --app and --page"),
        pytest.param(["--app", "legacy:application"], None, id="not with --app alone"),
        pytest.param(["--path", "/"], None, id="not on the path of the endpoint"),
    ],
)
def test_the_page_is_served_where_the_options_say(start, db, tmp_path, arguments, page):
    (tmp_path / "legacy.py").write_text(
        "def application(environ, start_response):\n    start_response('200 OK', [])\n    return [b'']\n"
    )
    run("create")
    _, match, log = start("serve", "--port", "0", *arguments, ready=rf"Serving {URL}")
    assert get(match[1], path=page or "/")[2].startswith(b"<!doctype html>") is (page is not None)
    assert (f"The page for the holders of keys is {match[1]}{page}\n" in log.read_text()) is (page is not None)
