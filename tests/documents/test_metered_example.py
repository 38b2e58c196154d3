"""The example that charges: what its caller is answered, and what that leaves of the quota."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import EXAMPLES

PATH = "/api/usage/token"


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(tmp_path / "tokens.db"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("metered_flask")
    yield module
    module.store.close()
    del sys.modules["metered_flask"]


@pytest.fixture
def client(example):
    """Sends a request with a key; the client of Flask itself."""

    def send(key, text="hello", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return example.app.test_client().post(
            "/shout", data=text, headers={"Authorization": f"Bearer {key}", **headers}
        )

    return send


def usage(example, key):
    answer = example.app.test_client().get(PATH, headers={"Authorization": f"Bearer {key}"})
    return answer.json["data"]["total_used"], answer.json["data"]["total_available"]


def test_a_request_is_charged_for_what_it_came_to(example, client):
    key, _ = example.store.create(total_available=2000)
    assert client(key).text == "HELLO"
    assert usage(example, key) == (5, 1995)


def test_a_request_that_is_sent_again_is_charged_once(example, client):
    key, _ = example.store.create(total_available=2000)
    for _ in range(3):
        assert client(key, X_Request_Id="mine").text == "HELLO"
    assert usage(example, key) == (5, 1995)
    assert client(key, "another request", X_Request_Id="mine").status_code == 409
    assert usage(example, key) == (5, 1995)


def test_two_callers_may_choose_the_same_id(example, client):
    for _ in range(2):
        key, _ = example.store.create(total_available=2000)
        assert client(key, X_Request_Id="1").text == "HELLO"
        assert usage(example, key) == (5, 1995)


@pytest.mark.parametrize(
    ("fields", "changes", "status"),
    [
        pytest.param({"total_available": 999}, {}, 402, id="less left than a request may cost"),
        pytest.param({"total_available": 2000, "model_limits": {"shout-1": 999}}, {}, 402, id="the model's limit"),
        pytest.param({"total_available": 2000, "model_limits": {"other": True}}, {}, 403, id="another model's key"),
        pytest.param({"total_available": 2000}, {"enabled": False}, 403, id="disabled"),
        pytest.param({"total_available": 2000}, {"expires_at": 1}, 403, id="expired"),
    ],
)
def test_a_request_that_may_not_be_made_is_not_charged(example, client, fields, changes, status):
    key, token = example.store.create(**fields)
    example.store.update(token.id, **changes)
    assert client(key).status_code == status
    assert example.store.get_by_id(token.id).total_used == 0


@pytest.mark.parametrize("key", ["", "sk-unknown", "two keys"])
def test_without_a_key_there_is_no_answer(client, key):
    assert client(key).status_code == 401


def test_an_id_that_is_too_long(example, client):
    key, _ = example.store.create(total_available=2000)
    assert client(key, X_Request_Id="x" * 201).status_code == 400
    assert usage(example, key) == (0, 2000)


def test_requests_at_once_spend_no_more_than_there_is(example, client):
    key, _ = example.store.create(total_available=5000)
    with ThreadPoolExecutor(8) as pool:
        statuses = [answer.status_code for answer in pool.map(lambda _: client(key, "x" * 1000), range(8))]
    assert sorted(statuses) == [200] * 5 + [402] * 3
    assert usage(example, key) == (5000, 0)
