"""``serve`` and new-api's other endpoints: on without an application, off in front of one, and what can be said."""

import json

import pytest
from command import URL, get, run

from usage_middleware.cli.serve import serve

ORIGIN = "https://app.example"


@pytest.fixture
def key(db):
    return run("create", "--name", "Alice", "--quota", 1000)[0].strip()


def data(url, path, key):
    status, _, body = get(url, path, Authorization=f"Bearer {key}")
    assert status == 200, body
    return json.loads(body)


def test_alone_it_answers_what_clients_of_new_api_ask(start, key):
    run("charge", key, 300, "--model", "gpt-4o")
    _, match, log = start("serve", "--port", "0", ready=URL)
    status = data(match[1], "/api/status", key)["data"]
    assert (status["quota_per_unit"], status["quota_display_type"]) == (500_000, "USD")
    assert status["system_name"] == "usage-middleware"
    assert [row["quota"] for row in data(match[1], "/api/log/token", key)["data"]] == [300]
    assert data(match[1], "/api/user/self", key)["data"]["quota"] == 700
    assert data(match[1], "/v1/dashboard/billing/subscription", key)["hard_limit_usd"] == 0.002
    assert data(match[1], "/dashboard/billing/usage", key)["total_usage"] == 0.06
    assert data(match[1], "/api/usage/token/days", key)["data"]["used"] == 300
    assert "Traceback" not in log.read_text()


def test_the_unit_can_be_set(start, key):
    _, match, _ = start(
        *("serve", "--port", "0", "--quota-per-unit", "1000", "--display", "TOKENS", "--system-name", "Caf\u00e9"),
        ready=URL,
    )
    status = data(match[1], "/api/status", key)["data"]
    assert (status["quota_per_unit"], status["quota_display_type"]) == (1000, "TOKENS")
    assert status["system_name"] == "Caf\u00e9"
    assert data(match[1], "/dashboard/billing/subscription", key)["hard_limit_usd"] == 1000


@pytest.mark.parametrize("arguments", [["--no-new-api"], ["--no-new-api", "--path", "/api/status"]])
def test_they_can_be_turned_off(start, key, arguments):
    _, match, _ = start("serve", "--port", "0", *arguments, ready=URL)
    assert get(match[1], "/api/log/token", Authorization=f"Bearer {key}")[0] == 404


def test_in_front_of_an_application_they_are_its_own(start, key, tmp_path):
    (tmp_path / "legacy.py").write_text(
        "def application(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [b'legacy']\n"
    )
    _, match, _ = start("serve", "--app", "legacy:application", "--port", "0", ready=URL)
    assert get(match[1], "/api/status")[2] == b"legacy"
    _, match, _ = start("serve", "--app", "legacy:application", "--port", "0", "--new-api", ready=URL)
    assert data(match[1], "/api/status", key)["success"] is True
    assert get(match[1], "/other")[2] == b"legacy"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(["--no-new-api", "--display", "TOKENS"], "Error: --display needs --new-api\n", id="off"),
        pytest.param(
            ["--app", "legacy:application", "--quota-per-unit", "1000"],
            "Error: --quota-per-unit needs --new-api\n",
            id="in front of an application",
        ),
    ],
)
def test_an_option_without_effect_is_refused(key, arguments, error):
    assert run("serve", "--port", "0", *arguments, status=2)[1] == error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--quota-per-unit", "0"], "--quota-per-unit"),
        (["--display", "EUR"], "--display"),
        (["--path", "/api/status"], "path"),
    ],
)
def test_an_impossible_value_is_refused(key, arguments, named):
    assert named in run("serve", "--port", "0", *arguments, status=2)[1]


def test_an_unknown_path_is_a_404_that_a_browser_can_read(start, key):
    _, match, _ = start("serve", "--port", "0", "--allow-origin", ORIGIN, ready=URL)
    for path in (
        "/other",
        "/v1/models",
        "/v1/usage",
        "/api",
        "/\u00e9".encode().decode("latin-1").replace("\u00c3\u00a9", "%C3%A9"),
    ):
        status, headers, body = get(match[1], path, Origin=ORIGIN)
        assert (status, body) == (404, b'{"success":false,"message":"Not Found"}')
        assert headers["Content-Type"] == "application/json; charset=utf-8"
        assert headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Access-Control-Allow-Origin" not in get(match[1], "/other", Origin="https://other.example")[1]


def test_every_option_says_what_it_is_for():
    assert all(getattr(parameter, "help", "") for parameter in serve.params)
