"""The examples of the meter, started as a reader starts them: the commands that they print are run, and charged."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager

import pytest
from places import EXAMPLES
from ports import free_port
from programs import find_program
from waiting import until_listening, until_logged

pytestmark = pytest.mark.servers

GRANTED = 1_000_000


@contextmanager
def running(name, tmp_path):
    """Run a program, and yield the commands that it prints."""
    find_program("curl", "curl")
    port = free_port()
    environment = {**os.environ, "PYTHONWARNINGS": "default::ResourceWarning"}
    for variable in ("USAGE_MIDDLEWARE_DB", "UPSTREAM_URL", "UPSTREAM_KEY"):
        environment.pop(variable, None)
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / name, str(port)], cwd=tmp_path, env=environment, stdout=out, stderr=err
        )
    try:
        until_logged(r"curl", stdout, process)
        until_listening(port, process, stderr)
        yield [line for line in stdout.read_text().splitlines() if line.startswith("curl")]
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in stderr.read_text()


def run(command, *options):
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [*shlex.split(command), "-sS", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout


def used(command):
    data = json.loads(run(command))["data"]
    assert data["total_used"] + data["total_available"] == GRANTED
    return data["total_used"]


@pytest.mark.parametrize(
    ("name", "answer", "cost"),
    [
        ("meter_flask.py", "Hello from Flask.", 1),
        ("meter_legacy_service.py", "3 words\n", 9),
        ("meter_stated_cost.py", "HELLO, YOU.", 8),
        ("meter_opentelemetry.py", "the application itself", 1),
    ],
)
def test_the_printed_request_is_charged(name, answer, cost, tmp_path):
    with running(name, tmp_path) as (balance, request):
        assert used(balance) == 0
        assert run(request) == answer
        assert used(balance) == cost
        headers = run(request, "-D", "-", "-o", os.devnull)
        assert headers.startswith("HTTP/1.1 200 ")
        assert "x-usage-cost" not in headers.lower()
        assert used(balance) == 2 * cost


def test_a_path_that_is_exempt_is_free(tmp_path):
    with running("meter_flask.py", tmp_path) as (balance, request):
        assert run(request.split(" -H ")[0] + " " + request.rpartition(" ")[2] + "health") == "well"
        assert used(balance) == 0


def test_tokens_are_charged_in_json_and_in_event_streams(tmp_path):
    with running("meter_llm.py", tmp_path) as (balance, request, stream):
        answer = json.loads(run(request))
        assert answer["choices"][0]["message"]["content"] == "Quinces are ripe."
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
        assert used(balance) == 4 + 3 * 4

        lines = [line for line in run(stream).split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "Quinces are ripe."
        assert used(balance) == 2 * (4 + 3 * 4)


def test_opentelemetry_sees_what_is_charged(tmp_path):
    # It runs in a process of its own, because a provider of metrics can be set only once.
    program = """
import json
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from werkzeug.test import Client

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
import meter_opentelemetry

key, _ = meter_opentelemetry.store.create(total_available=10)
client = Client(meter_opentelemetry.application)
for _ in range(3):
    assert client.get("/", headers={"Authorization": f"Bearer {key}"}).status_code == 200
seen = json.loads(reader.get_metrics_data().to_json())
print(json.dumps({
    metric["name"]: metric["data"]["data_points"][0]
    for metric in seen["resource_metrics"][0]["scope_metrics"][0]["metrics"]
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), "USAGE_MIDDLEWARE_DB": str(tmp_path / "tokens.db")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["usage.requests"]["value"], seen["usage.requests"]["attributes"]) == (3, {"outcome": "completed"})
    assert (seen["usage.units"]["value"], seen["usage.units"]["attributes"]) == (3, {"model": ""})
    assert seen["usage.added"]["count"] == 3
