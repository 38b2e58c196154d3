"""Guessing of keys: what counts, against whom, what the guesser gets and for how long, and when nobody is throttled.

The clock is the test's own, where nothing else is said. Redis and Memcached are real servers on the loopback
interface; a case that needs one is skipped where it is not installed.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from client import PATH, ask, call, environ

from usage_middleware import StoreError, Token, UsageMiddleware
from usage_middleware.wsgi import throttle

KEY = "k3y"
BEARER = f"Bearer {KEY}"
WRONG = "Bearer wrong"
ADDRESS = "192.0.2.1"
PERIOD = 20 * 60
BEGIN = 1_800_000_000  # a multiple of the period: a window begins
LIMIT = "3 per 20 minutes"
# So that no window ends within a test whose clock is the real one.
LONG_LIMIT = "20 per 30 days"
TOO_MANY = b'{"success":false,"message":"Too Many Requests"}'


def not_found(environ, start_response):
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"the wrapped application"]


class Clock:
    """Stands for the module ``time``."""

    def __init__(self, now):
        self.now = now

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(BEGIN)
    monkeypatch.setattr(throttle, "time", clock)
    return clock


def make_app(limit=LIMIT, storage="memory://", store=None, **options):
    tokens = {KEY: Token(name="One"), "disabled": Token(enabled=False)}
    store = tokens if store is None else store
    return UsageMiddleware(not_found, store, throttle=limit, throttle_storage=storage, **options)


def guess(app, authorization=WRONG, address=ADDRESS, **variables):
    return ask(app, authorization=authorization, REMOTE_ADDR=address, **variables)


def statuses(app, times, authorization=WRONG, address=ADDRESS):
    return [guess(app, authorization, address).status for _ in range(times)]


# --- Storages


class StorageServer:
    """A Redis or Memcached server in a process of its own, on a port that stays the same when it starts again."""

    def __init__(self, name, directory):
        self._directory = directory
        self.port = free_port()
        self.password = "canary-password" if name == "redis" else ""
        self.uri = f"{name}://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}"
        port = str(self.port)
        self._command = {
            "redis": [
                *("redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
                *("--requirepass", self.password),
            ],
            # Only root needs a user's name, and may name itself.
            "memcached": ["memcached", "-l", "127.0.0.1", "-p", port, *(["-u", "root"] if os.getuid() == 0 else [])],
        }[name]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self._command, cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port, self.process)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process):
    deadline = time.monotonic() + 20
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


PROGRAMS = {"redis": "redis-server", "memcached": "memcached"}
CLIENTS = {"redis": "redis", "memcached": "pymemcache"}


@contextmanager
def storage_server(name, directory):
    program = PROGRAMS[name]
    pytest.importorskip(CLIENTS[name])
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    server = StorageServer(name, directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(params=["memory", "redis", "memcached"])
def storage(request, tmp_path):
    """The URI of each storage, empty."""
    if request.param == "memory":
        yield "memory://"
        return
    with storage_server(request.param, tmp_path) as server:
        yield server.uri


@pytest.fixture(params=["redis", "memcached"])
def server(request, tmp_path):
    with storage_server(request.param, tmp_path) as server:
        yield server


# --- What counts


class Broken:
    def get(self, key):
        raise StoreError("broken")


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        pytest.param(WRONG, 401, id="unknown"),
        pytest.param("Bearer disabled", 401, id="disabled"),
        pytest.param("Bearer", 401, id="no key"),
        pytest.param("Basic a2V5", 401, id="another scheme"),
        pytest.param(f"{BEARER}, {BEARER}", 401, id="two keys"),
        pytest.param("Bearer " + "k" * 513, 401, id="too long"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_failed_authentication_counts(clock, authorization, status, method):
    app = make_app()
    for expected in (status, status, status, 429, 429):
        assert ask(app, method, authorization=authorization, REMOTE_ADDR=ADDRESS).status == expected
    # All kinds are counted together.
    assert guess(app).status == 429


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param({"authorization": BEARER}, 200, id="a valid key"),
        pytest.param({"authorization": f"Bearer sk-{KEY}", "method": "HEAD"}, 200, id="a valid key by HEAD"),
        pytest.param({}, 401, id="no header"),
        pytest.param({"authorization": " "}, 401, id="an empty header"),
        pytest.param({"method": "OPTIONS", "authorization": WRONG}, 204, id="OPTIONS"),
        pytest.param({"method": "POST", "authorization": WRONG}, 405, id="another method"),
        pytest.param({"path": "/other", "authorization": WRONG}, 404, id="another path"),
    ],
)
def test_anything_else_neither_counts_nor_is_throttled(clock, request_, status):
    app = make_app()
    before = [ask(app, REMOTE_ADDR=ADDRESS, **request_) for _ in range(10)]
    assert statuses(app, 5) == [401, 401, 401, 429, 429]
    after = ask(app, REMOTE_ADDR=ADDRESS, **request_)
    assert after.status == status
    assert [after] * 10 == before


def test_a_store_that_fails_is_no_failure_of_the_client(clock):
    app = make_app(store=Broken())
    assert statuses(app, 10) == [503] * 10
    assert statuses(app, 4, "Bearer") == [401, 401, 401, 429]
    assert guess(app).status == 503


def test_a_valid_key_resets_nothing(clock):
    app = make_app()
    for _ in range(3):
        assert guess(app).status == 401
        assert guess(app, BEARER).status == 200
    assert guess(app).status == 429


def test_without_a_limit_nobody_is_throttled():
    app = UsageMiddleware(not_found, {})
    assert statuses(app, 1000) == [401] * 1000


def test_failures_are_counted_in_the_process_where_nothing_else_is_said():
    app = UsageMiddleware(not_found, {}, throttle="3 per hour")
    assert statuses(app, 5) == [401, 401, 401, 429, 429]


# --- Against whom


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param("192.0.2.1", "192.0.2.1", True, id="one IPv4 address"),
        pytest.param("192.0.2.1", "192.0.2.2", False, id="two IPv4 addresses"),
        pytest.param("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True, id="one network of 64 bits"),
        pytest.param("2001:db8:0:1::1", "2001:DB8:0000:1::2", True, id="one network, written in two ways"),
        pytest.param("2001:db8:0:1::1", "2001:db8:0:2::1", False, id="two networks"),
        pytest.param("::ffff:192.0.2.1", "::ffff:192.0.2.2", False, id="two IPv4 addresses at a socket for both"),
        pytest.param("::ffff:192.0.2.1", "192.0.2.1", True, id="one IPv4 address at two sockets"),
        pytest.param("fe80::1%eth0", "fe80::1", True, id="with a zone"),
        pytest.param(None, "", True, id="absent and empty"),
        pytest.param("unix:", "192.0.2.1:4711", True, id="no addresses"),
        pytest.param("x" * 100_000, "\r\n \x00\xe9", True, id="nonsense"),
        pytest.param(None, "192.0.2.1", False, id="absent and an address"),
    ],
)
def test_clients(clock, storage, one, other, same):
    app = make_app("1 per hour", storage)
    first, second = (
        environ(HTTP_AUTHORIZATION=WRONG, **({} if a is None else {"REMOTE_ADDR": a})) for a in (one, other)
    )
    assert call(app, first).status == 401
    assert call(app, first).status == 429
    assert call(app, second).status == (429 if same else 401)


def test_two_applications_with_one_limit_and_storage_count_together_and_with_another_limit_do_not(clock, server):
    assert statuses(make_app(storage=server.uri), 2) == [401, 401]
    assert statuses(make_app(storage=server.uri), 2) == [401, 429]
    assert statuses(make_app("1 per 20 minutes", storage=server.uri), 2) == [401, 429]


# --- What the guesser gets


def test_the_answer(clock):
    app = make_app()
    assert statuses(app, 3) == [401] * 3
    answer = guess(app)
    assert (answer.status, answer.reason, answer.body) == (429, "Too Many Requests", TOO_MANY)
    assert sorted(answer.headers) == [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Expose-Headers", "Retry-After"),
        ("Cache-Control", "no-store"),
        ("Content-Length", str(len(TOO_MANY))),
        ("Content-Type", "application/json; charset=utf-8"),
        ("Retry-After", str(PERIOD)),
        ("X-Content-Type-Options", "nosniff"),
    ]
    assert ask(app, "HEAD", authorization=WRONG, REMOTE_ADDR=ADDRESS) == answer._replace(body=b"")


@pytest.mark.parametrize(
    ("allow_origins", "origin", "expected"),
    [
        pytest.param((), "https://app.example", {}, id="CORS off"),
        pytest.param(["https://app.example"], "https://other.example", {"Vary": "Origin"}, id="another origin"),
        pytest.param(
            ["https://app.example"],
            "https://app.example",
            {
                "Vary": "Origin",
                "Access-Control-Allow-Origin": "https://app.example",
                "Access-Control-Expose-Headers": "Retry-After",
            },
            id="a listed origin",
        ),
    ],
)
def test_cors(clock, allow_origins, origin, expected):
    app = make_app(allow_origins=allow_origins)
    statuses(app, 3)
    answer = guess(app, HTTP_ORIGIN=origin)
    assert answer.status == 429
    names = ("Vary", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers")
    assert {name: answer.header(name) for name in names if answer.header(name)} == expected


def test_which_keys_there_are_cannot_be_told_from_the_answers(clock):
    keys = ("Bearer wrong", "Bearer disabled")
    unknown, disabled = (
        [guess(make, key) for _ in range(6)] for make, key in zip((make_app(), make_app()), keys, strict=True)
    )
    assert unknown == disabled
    assert [answer.status for answer in unknown] == [401, 401, 401, 429, 429, 429]


# --- For how long


@pytest.mark.parametrize(
    ("second", "retry_after"),
    [
        pytest.param(0, PERIOD, id="as the window begins"),
        pytest.param(0.25, PERIOD, id="a quarter of a second later"),
        pytest.param(17, PERIOD - 17, id="17 s later"),
        pytest.param(PERIOD - 1, 1, id="a second before its end"),
        pytest.param(PERIOD - 0.001, 1, id="a millisecond before its end"),
    ],
)
def test_retry_after_is_true(clock, storage, second, retry_after):
    app = make_app(storage=storage)
    clock.now = BEGIN + second
    assert statuses(app, 4) == [401, 401, 401, 429]
    assert guess(app).header("Retry-After") == str(retry_after)
    clock.now += retry_after - 1
    if retry_after > 1:
        assert guess(app).header("Retry-After") == "1"
    clock.now += 1
    assert statuses(app, 4) == [401, 401, 401, 429]


def test_to_fail_while_throttled_does_not_make_it_longer(clock):
    app = make_app()
    statuses(app, 1000)
    clock.now += PERIOD - 1
    assert statuses(app, 1000) == [429] * 1000
    clock.now += 1
    assert guess(app).status == 401


def test_a_clock_that_is_set_back_locks_nobody_out(clock):
    app = make_app()
    clock.now += 24 * 3600
    statuses(app, 10)
    clock.now -= 24 * 3600
    assert statuses(app, 4) == [401, 401, 401, 429]


# --- Memory


def test_memory_is_bounded_whatever_number_of_addresses_come(clock, monkeypatch, full):
    if not full:
        monkeypatch.setattr(throttle, "_MOST_CLIENTS", throttle._MOST_CLIENTS // 10)
    most = throttle._MOST_CLIENTS
    app = make_app()
    one = environ(HTTP_AUTHORIZATION="Bearer two,keys")  # counts, and is refused without asking the store

    def flood(start, stop):
        for number in range(start, stop):
            one["REMOTE_ADDR"] = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            assert call(app, one).status == 401
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        filled = flood(0, 2 * most)
        assert filled < 400 * most
        assert flood(2 * most, 1_000_000 if full else 6 * most) < filled * 1.1
        # Windows that have passed are forgotten.
        clock.now += PERIOD
        assert flood(0, 1) < filled / 2
    finally:
        tracemalloc.stop()


def test_who_is_forgotten_in_a_flood_of_addresses(clock, monkeypatch):
    monkeypatch.setattr(throttle, "_MOST_CLIENTS", 100)
    app = make_app()
    assert statuses(app, 3) == [401] * 3
    for number in range(1000):
        guess(app, address=f"10.0.{number // 250}.{number % 250}")
        # A guesser who goes on is not.
        if number % 50 == 0:
            assert guess(app).status == 429
    # One who begins now is counted, and the one who has not failed for longest is forgotten.
    assert statuses(app, 4, address="192.0.2.2") == [401, 401, 401, 429]
    statuses(app, 4, address="192.0.2.3")
    for number in range(100):
        guess(app, address=f"10.1.0.{number}")
    assert guess(app, address="192.0.2.3").status == 401


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


def python(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "default::ResourceWarning"},
        text=True,
        **options,
    )


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
            signal.alarm(10)
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
            wait_for_port(port, gunicorn)
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
    """The status of an answer over HTTP, its Retry-After and the process that it is from."""
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
    assert time.monotonic() - started < 5
    assert len(caplog.records) == 1


def test_a_storage_that_is_down_at_the_start_does_no_harm(clock, tmp_path, caplog):
    pytest.importorskip("redis")
    app = make_app(storage=f"redis://:canary@127.0.0.1:{free_port()}")
    assert statuses(app, 10) == [401] * 10
    assert len(caplog.records) == 1
    assert "canary" not in caplog.text


# --- What the constructor takes, and leaves alone


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"throttle": 20}, TypeError, id="limit int"),
        pytest.param({"throttle": b"20 per minute"}, TypeError, id="limit bytes"),
        pytest.param({"throttle": True}, TypeError, id="limit bool"),
        pytest.param({"throttle": ""}, ValueError, id="limit empty"),
        pytest.param({"throttle": "often"}, ValueError, id="limit no limit"),
        pytest.param({"throttle": "20"}, ValueError, id="limit without a time"),
        pytest.param({"throttle": "20 per fortnight"}, ValueError, id="limit with no such unit"),
        pytest.param({"throttle": "-1 per minute"}, ValueError, id="limit negative"),
        pytest.param({"throttle": "0 per minute"}, ValueError, id="limit 0"),
        pytest.param({"throttle": "1.5 per minute"}, ValueError, id="limit no integer"),
        pytest.param({"throttle": "5 per minute; 20 per hour"}, ValueError, id="two limits"),
        pytest.param({"throttle": "1 per 31 days"}, ValueError, id="limit longer than Memcached can"),
        pytest.param({"throttle": "9" * 10_000 + " per day"}, ValueError, id="limit too long to read"),
        pytest.param({"throttle_storage": None}, TypeError, id="storage None"),
        pytest.param({"throttle_storage": b"memory://"}, TypeError, id="storage bytes"),
        pytest.param({"throttle_storage": ""}, ValueError, id="storage empty"),
        pytest.param({"throttle_storage": "redis"}, ValueError, id="storage without a scheme"),
        pytest.param({"throttle_storage": "canary://canary:canary@host"}, ValueError, id="storage of no such scheme"),
        pytest.param({"throttle_storage": "async+memory://host"}, ValueError, id="storage for asyncio"),
        pytest.param({"throttle_storage": "memcached://"}, ValueError, id="storage without a host"),
        pytest.param({"throttle_storage": "memcached://canary@host"}, ValueError, id="storage without its port"),
        pytest.param({"throttle_storage": "redis://:canary@host:canary"}, ValueError, id="storage with no such port"),
        pytest.param({"throttle_storage": "redis://:canary/@host:1"}, ValueError, id="password that is not quoted"),
        pytest.param({"throttle_storage": "redis://:canary@[::1"}, ValueError, id="storage that is no URI"),
        pytest.param({"throttle_storage": "redis://:canary\u2100@host"}, ValueError, id="storage that NFKC changes"),
    ],
)
def test_an_impossible_argument_is_named_and_shows_no_password(arguments, error):
    (name,) = arguments
    given = {"throttle": LIMIT, **arguments}
    with pytest.raises(error, match=rf"^{name} must ") as caught:
        UsageMiddleware(not_found, {}, **given)
    assert "\n" not in str(caught.value)
    # Neither in the exceptions that it comes from, which a traceback shows.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("limit", ["1/second", "20 per 20 minutes", "5 PER hour", "1 per 30 days", "1 per month"])
def test_possible_limits(limit):
    make_app(limit)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(ImportError, match=r"^[^\n]*pip install 'usage-middleware\[throttle\]'$"):
        make_app()
    UsageMiddleware(not_found, {})


@pytest.mark.parametrize("scheme", ["redis", "memcached"])
def test_without_its_client_a_storage_is_refused(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, CLIENTS[scheme], None)
    monkeypatch.setitem(sys.modules, f"{CLIENTS[scheme]}.client", None)
    with pytest.raises(ValueError, match=r"client \(redis, pymemcache, \.\.\.\) is installed"):
        make_app(storage=f"{scheme}://127.0.0.1:1")


def test_the_package_is_not_loaded_without_a_limit():
    code = """
    import sys
    from usage_middleware import UsageMiddleware
    UsageMiddleware(print, {})
    assert "limits" not in sys.modules
    """
    process = python("-c", textwrap.dedent(code), stderr=subprocess.PIPE)
    assert process.communicate(timeout=20)[1] == ""


@pytest.mark.parametrize("scheme", ["memory", "redis", "memcached"])
def test_nothing_is_opened_or_asked_before_a_failure(scheme):
    if scheme != "memory":
        pytest.importorskip(CLIENTS[scheme])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        threads = threading.active_count()
        app = make_app(storage=f"{scheme}://127.0.0.1:{listener.getsockname()[1]}")
        assert guess(app, BEARER).status == 200
        assert guess(app, None).status == 401
        assert ask(app, "OPTIONS").status == 204
        assert ask(app, path="/other").status == 404
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert threading.active_count() == threads
