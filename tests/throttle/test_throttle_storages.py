"""Threads and processes that count together, and storages that are down."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from client import PATH
from ports import free_port
from processes import python
from storage_servers import storage_server
from throttling import BEARER, LONG_LIMIT, WRONG, guess, make_app, statuses
from waiting import until_listening

# --- Threads and processes


def test_threads_that_guess_at_once_get_exactly_the_limit(storage):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    barrier = threading.Barrier(64)
    try:
        for round_ in range(5):
            app = make_app(LONG_LIMIT, storage)

            def guess_at_once(_, app=app, address=f"192.0.2.{round_}"):
                barrier.wait(20)
                return statuses(app, 5, address=address)

            with ThreadPoolExecutor(64) as threads:
                answers = [status for answer in threads.map(guess_at_once, range(64)) for status in answer]
            assert (answers.count(401), answers.count(429)) == (20, 64 * 5 - 20)
    finally:
        sys.setswitchinterval(interval)


GUESSING_PROCESS = """
import sys
from client import ask
from usage_middleware import UsageMiddleware
app = UsageMiddleware(None.__class__, {}, throttle=sys.argv[1], throttle_storage=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(sum(ask(app, authorization="Bearer wrong", REMOTE_ADDR="192.0.2.1").status == 401 for _ in range(20)))
"""


def test_processes_count_together(server):
    command = ("-c", GUESSING_PROCESS, LONG_LIMIT, server.uri)
    processes = [python(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        assert sum(int(process.communicate(timeout=20)[0]) for process in processes) == 20
    finally:
        for process in processes:
            process.kill()
            process.communicate()


FORKING_PROCESS = """
import os, signal, sys, threading, warnings
from client import ask
from usage_middleware import UsageMiddleware
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads, which are the point here
app = UsageMiddleware(None.__class__, {}, throttle=sys.argv[1], throttle_storage=sys.argv[2])
def guess(address): return ask(app, authorization="Bearer wrong", REMOTE_ADDR=address).status
def go_on():
    while not stopped.is_set(): guess("192.0.2.1")
guess("192.0.2.1")  # a fork while another thread imports something hangs, whoever imports
stopped = threading.Event()
threads = [threading.Thread(target=go_on) for _ in range(4)]
for thread in threads: thread.start()
sys.setswitchinterval(1e-6)
statuses = []
try:
    for _ in range(30):
        child = os.fork()
        if not child:
            signal.alarm(60)
            os._exit(guess(f"192.0.2.{os.getpid() % 200 + 10}") % 256)
        statuses.append(os.waitpid(child, 0)[1])
finally:
    stopped.set()
assert guess("192.0.2.1") == 429
print({status: statuses.count(status) for status in statuses})
"""


def test_nothing_is_carried_over_a_fork(storage):
    # The parent's threads hold locks, and have requests under way on connections, at the moment of many of the forks.
    process = python("-c", FORKING_PROCESS, LONG_LIMIT, storage, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out == str({401 % 256 << 8: 30}) + "\n"


SERVED = """
import os
from usage_middleware import Token, UsageMiddleware
wrapped = UsageMiddleware(
    None.__class__, {"k3y": Token()}, throttle=os.environ["LIMIT"], throttle_storage=os.environ["STORAGE"]
)
def app(environ, start_response):
    return wrapped(environ, lambda s, h, *e: start_response(s, [*h, ("Served-By", str(os.getpid()))], *e))
"""


def test_the_workers_of_a_preloading_server_count_together(tmp_path, monkeypatch):
    (tmp_path / "served_throttled.py").write_text(SERVED)
    port = free_port()
    with storage_server("redis", tmp_path) as redis, (tmp_path / "log").open("w") as log:
        monkeypatch.setenv("LIMIT", LONG_LIMIT)
        monkeypatch.setenv("STORAGE", redis.uri)
        gunicorn = python(
            *("-m", "gunicorn", "--preload", "--workers=3", f"--bind=127.0.0.1:{port}", "--no-control-socket"),
            *("--graceful-timeout=3", "served_throttled:app"),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        try:
            until_listening(port, gunicorn)
            answers = []
            deadline = time.monotonic() + 20
            while len(answers) < 60 or len({process for _, _, process in answers}) < 3:
                with ThreadPoolExecutor(6) as threads:
                    answers += threads.map(lambda _: fetch(port, WRONG), range(12))
                assert time.monotonic() < deadline
            assert [status for status, _, _ in answers].count("401") == 20
            assert {status for status, _, _ in answers} == {"401", "429"}
            assert all(int(wait) > 0 for status, wait, _ in answers if status == "429")
            assert fetch(port, BEARER)[0] == "200"
        finally:
            gunicorn.terminate()
            gunicorn.wait(10)
    assert "Traceback" not in (tmp_path / "log").read_text()


def fetch(port, authorization):
    """Return the status of an answer over HTTP, its Retry-After and the process that it is from."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        request = (
            f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(request.encode())
        with connection.makefile(encoding="latin-1") as file:
            lines = file.read().splitlines()
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    return lines[0].split()[1], headers.get("Retry-After"), headers["Served-By"]


# --- When the storage is down


def test_requests_pass_while_the_storage_is_down_and_are_throttled_when_it_is_back(clock, server, caplog):
    app = make_app(storage=server.uri)
    assert statuses(app, 4) == [401, 401, 401, 429]
    assert caplog.text == ""

    server.kill()
    assert statuses(app, 100) == [401] * 100
    assert guess(app, BEARER).status == 200
    # One line for the flood, and one more when the storage was asked again.
    clock.now += 5
    assert statuses(app, 100) == [401] * 100
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert (record.name, record.levelno) == ("usage_middleware", logging.ERROR)
        assert f"throttle_storage ({server.uri.partition(':')[0]}) failed: " in record.getMessage()
        assert record.exc_info is None
    assert "canary" not in caplog.text
    assert str(server.port) not in caplog.text

    server.start()
    assert statuses(app, 10) == [401] * 10
    clock.now += 5
    assert statuses(app, 5) == [401, 401, 401, 429, 429]
    assert len(caplog.records) == 2


def test_a_storage_that_hangs_holds_up_one_request_and_no_flood(clock, server, caplog):
    app = make_app(storage=server.uri)
    assert statuses(app, 4) == [401, 401, 401, 429]
    server.process.send_signal(signal.SIGSTOP)
    os.waitpid(server.process.pid, os.WUNTRACED)
    started = time.monotonic()
    try:
        assert statuses(app, 1000) == [401] * 1000
    finally:
        server.process.send_signal(signal.SIGCONT)
    # Each would wait for more than a second.
    assert time.monotonic() - started < 100
    assert len(caplog.records) == 1


def test_a_storage_that_is_down_at_the_start_does_no_harm(clock, tmp_path, caplog):
    app = make_app(storage=f"redis://:canary@127.0.0.1:{free_port()}")
    assert statuses(app, 10) == [401] * 10
    assert len(caplog.records) == 1
    assert "canary" not in caplog.text
