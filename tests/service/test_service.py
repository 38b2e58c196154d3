"""One service over each store: started three times with only the store's name changed, and asked only over HTTP."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import ROOT

SERVICE = """
import os, sys
from flask import Flask, request
from werkzeug.serving import make_server
from usage_middleware import QuotaError, StoreError, UsageMiddleware, bearer_key, open_store

store = open_store(os.environ["TOKENS"])
app = Flask("service")
app.wsgi_app = UsageMiddleware(app.wsgi_app, store)

@app.post("/charge/<int:amount>")
def charge(amount):
    token = store.charge(bearer_key(request.environ), amount, idempotency_key=request.headers.get("X-Request-Id"))
    return {"left": token.total_available}

@app.post("/reserve/<int:amount>")
def reserve(amount):
    return {"id": store.reserve(bearer_key(request.environ), amount, model="gpt-4o").id}

@app.post("/settle/<operation_id>/<int:amount>")
def settle(operation_id, amount):
    return {"left": store.settle(operation_id, amount).total_available}

@app.post("/refund")
def refund():
    operation = store.find_operation(bearer_key(request.environ), request.headers["X-Request-Id"])
    return {"left": store.refund(operation).total_available}

@app.errorhandler(QuotaError)
def refused(error):
    return {"refused": type(error).__name__}, 402

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


class Service:
    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}"

    def send(self, method, path, key=None, **headers):
        """Return the status and the JSON of an answer."""
        request = urllib.request.Request(self._url + path, method=method)
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def usage(self, key):
        status, answer = self.send("GET", "/api/usage/token", key)
        return status, answer.get("data")

    def days(self, key):
        """What was used in the last days, in how many requests, and what is held."""
        _, answer = self.send("GET", "/api/usage/token/days", key)
        return answer["data"]["used"], answer["data"]["requests"], answer["data"]["held"]


@pytest.fixture
def service(store_text):
    environment = {**os.environ, "TOKENS": store_text}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield Service(int(process.stdout.readline()))
    finally:
        process.terminate()
        _, log = process.communicate(timeout=10)
        assert "Traceback" not in log, log


@pytest.fixture
def command(store_text):
    """Run the command for an operator. Return what it printed."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", "from usage_middleware.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "USAGE_MIDDLEWARE_DB": store_text},
            cwd=ROOT,
        ).stdout

    return run


def test_a_service_over_any_store(service, command):
    made = command("create", "--name", "Grüne Bohne", "--quota", "1000", "--model-limit", "gpt-4o=600")
    key = re.search(r"sk-\w+", made)[0]
    expected = {
        "object": "token_usage",
        "name": "Grüne Bohne",
        "total_granted": 1000,
        "total_used": 0,
        "total_available": 1000,
        "unlimited_quota": False,
        "model_limits": {"gpt-4o": 600},
        "model_limits_enabled": True,
        "expires_at": 0,
    }
    assert service.usage(key) == (200, expected)
    assert service.usage(key.swapcase())[0] == service.usage("sk-" + "x" * 48)[0] == service.usage(None)[0] == 401

    for _ in range(3):
        assert service.send("POST", "/charge/100", key, X_Request_Id="Mine") == (200, {"left": 900})
    assert service.send("POST", "/charge/101", key, X_Request_Id="Mine") == (402, {"refused": "OperationConflict"})
    assert service.send("POST", "/charge/50", key, X_Request_Id="mine") == (200, {"left": 850})
    assert service.send("POST", "/charge/851", key) == (402, {"refused": "QuotaExceeded"})
    assert service.send("POST", "/refund", key, X_Request_Id="mine") == (200, {"left": 900})

    status, reserved = service.send("POST", "/reserve/500", key)
    assert status == 200
    assert service.usage(key)[1]["total_used"] == 600
    assert service.days(key) == (600, 3, 500)
    assert service.send("POST", "/reserve/101", key) == (402, {"refused": "QuotaExceeded"})
    for _ in range(2):
        assert service.send("POST", f"/settle/{reserved['id']}/200", key) == (200, {"left": 700})

    with ThreadPoolExecutor(8) as threads:
        statuses = [status for status, _ in threads.map(lambda _: service.send("POST", "/charge/100", key), range(9))]
    assert sorted(statuses) == [200] * 7 + [402] * 2
    assert service.usage(key) == (200, {**expected, "total_used": 1000, "total_available": 0})
    assert service.days(key) == (1000, 10, 0)

    command("grant", "1", "5")
    assert service.usage(key)[1]["total_available"] == 5
    rotated = re.search(r"sk-\w+", command("rotate", "1"))[0]
    assert (service.usage(key)[0], service.usage(rotated)[0]) == (401, 200)
