"""The examples that charge: how they answer, and how much quota is left then."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import EXAMPLES

PATH = "/api/usage/token"


@pytest.fixture(params=["metered_flask", "idempotent_flask"])
def example(request, tmp_path, monkeypatch):
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(tmp_path / "tokens.db"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module(request.param)
    yield module
    module.store.close()
    del sys.modules[request.param]


@pytest.fixture
def keeps_answers(example):
    """Return whether the example answers a repeated request with the first answer."""
    return example.__name__ == "idempotent_flask"


@pytest.fixture
def client(example):
    """Return a function that sends a request with a key, by Flask's test client."""

    def send(key, text="hello", name="mine"):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": name}
        return example.app.test_client().post("/shout", data=text, headers=headers)

    return send


def usage(example, key):
    answer = example.app.test_client().get(PATH, headers={"Authorization": f"Bearer {key}"})
    return answer.json["data"]["total_used"], answer.json["data"]["total_available"]


def test_a_request_costs_a_unit_per_character(example, client):
    key, _ = example.store.create(total_available=2000)
    assert client(key).text == "HELLO"
    assert usage(example, key) == (5, 1995)


def test_a_repeated_request_is_charged_once(example, client, keeps_answers):
    key, _ = example.store.create(total_available=2000)
    client(key)
    for _ in range(3):
        again = client(key)
        assert (again.status_code, again.text) == (200, "HELLO") if keeps_answers else again.status_code == 409
    assert usage(example, key) == (5, 1995)


def test_another_request_with_a_used_idempotency_key_is_refused(example, client):
    key, _ = example.store.create(total_available=2000)
    client(key)
    for text in ("another request", "hello!", ""):
        assert client(key, text).status_code == 409
    assert usage(example, key) == (5, 1995)


def test_a_disabled_key_gets_no_answer_with_a_used_idempotency_key(example, client, keeps_answers):
    key, token = example.store.create(total_available=2000)
    client(key)
    example.store.update(token.id, enabled=False)
    assert client(key).status_code == (401 if keeps_answers else 409)
    assert client(key, name="another").status_code == 401


def test_two_holders_may_choose_the_same_name(example, client):
    for _ in range(2):
        key, _ = example.store.create(total_available=2000)
        assert client(key, name="1").text == "HELLO"
        assert usage(example, key) == (5, 1995)


@pytest.mark.parametrize(
    ("fields", "changes", "status"),
    [
        pytest.param({"total_available": 999}, {}, 402, id="less left than a request may cost"),
        pytest.param({"total_available": 2000}, {"enabled": False}, 401, id="disabled"),
        pytest.param({"total_available": 2000}, {"expires_at": 1}, 401, id="expired"),
    ],
)
def test_a_request_that_may_not_be_made_is_not_charged(example, client, fields, changes, status):
    key, token = example.store.create(**fields)
    example.store.update(token.id, **changes)
    assert client(key).status_code == status
    assert example.store.get_by_id(token.id).total_used == 0


@pytest.mark.parametrize(
    ("limits", "status"),
    [pytest.param({"shout-1": 999}, 402, id="the model's limit"), pytest.param({"other": True}, 403, id="not listed")],
)
def test_model_limits_are_enforced(example, client, keeps_answers, limits, status):
    if keeps_answers:
        pytest.skip("it charges without a model")
    key, token = example.store.create(total_available=2000, model_limits=limits)
    assert client(key).status_code == status
    assert example.store.get_by_id(token.id).total_used == 0


@pytest.mark.parametrize("key", ["", "sk-unknown", "two keys"])
def test_without_a_valid_key_the_answer_is_401(client, key):
    answer = client(key)
    assert answer.status_code == 401
    assert "Bearer" in answer.headers["WWW-Authenticate"]


def test_an_idempotency_key_that_is_too_long_is_refused(example, client):
    key, _ = example.store.create(total_available=2000)
    assert client(key, name="x" * 256).status_code == 400
    assert usage(example, key) == (0, 2000)


def test_only_the_example_that_keeps_answers_needs_an_idempotency_key(example, client, keeps_answers):
    key, _ = example.store.create(total_available=2000)
    assert client(key, name="").status_code == (400 if keeps_answers else 200)


def test_a_failure_of_the_work_is_not_charged(example, client, monkeypatch, keeps_answers):
    if not keeps_answers:
        pytest.skip("nothing in it can fail")
    key, _ = example.store.create(total_available=2000)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(example, "keep", full)
    assert client(key).status_code == 500
    assert usage(example, key) == (0, 2000)
    assert client(key).status_code == 409


def test_an_answer_that_was_kept_and_not_settled_is_settled_by_the_next_request(example, client, keeps_answers):
    if not keeps_answers:
        pytest.skip("it keeps no answers")
    key, _ = example.store.create(total_available=2000)
    operation = example.store.reserve(key, 1000, idempotency_key="mine")
    example.keep(operation, b"hello", "HELLO")
    assert client(key).text == "HELLO"
    assert usage(example, key) == (5, 1995)


def test_requests_at_once_spend_no_more_than_there_is(example, client):
    key, _ = example.store.create(total_available=5000)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: client(key, "x" * 1000, name=str(number)), range(8))
        statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [200] * 5 + [402] * 3
    assert usage(example, key) == (5000, 0)


def test_if_the_store_fails_the_answer_is_503(example, client):
    key, _ = example.store.create(total_available=5000)
    example.store.close()
    answer = client(key)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
